"""What a model may reply: one JSON object, checked before anything reads it."""

from __future__ import annotations

import json
import re
from typing import Any

from idesign.judges.verdict import DECISIONS

ACTIONS = ('verdict', 'spans', 'neighbours', 'activation')

SCHEMA: dict[str, Any] = {
  'type': 'object',
  'additionalProperties': False,
  'required': [
    'action', 'text', 'decision', 'strength', 'confidence', 'clause',
    'rationale',
  ],
  'properties': {
    'action': {'type': 'string', 'enum': list(ACTIONS)},
    'text': {'type': ['string', 'null']},
    'decision': {'type': ['string', 'null'], 'enum': [*DECISIONS, None]},
    'strength': {'type': ['number', 'null']},
    'confidence': {'type': ['number', 'null']},
    'clause': {'type': ['string', 'null']},
    'rationale': {'type': ['string', 'null']},
  },
}  # fmt: skip

_TYPES = {'string': str, 'number': (int, float), 'null': type(None)}
_FENCED = re.compile(r'```(?:json)?[ \t]*\r?\n(.*)\n[ \t]*```', re.DOTALL)


class InvalidReply(ValueError):
  """A reply that is no request and no verdict; says why."""


def parse_reply(text: str) -> dict[str, Any]:
  """The JSON object that a reply is, with the keys and types of `SCHEMA`.

  Apart from white space the reply must be the object, or one fenced block that
  holds it and nothing else. An object within prose is none: a model that
  quotes what a text asked it to say has not said it.

  Raises:
    InvalidReply: if it is anything else.
  """
  text = text.strip()
  fenced = _FENCED.fullmatch(text)
  try:
    reply = json.loads(
      fenced[1] if fenced else text,
      object_pairs_hook=_no_key_twice,
      parse_constant=_no_constant,
    )
  except InvalidReply:
    raise
  except (ValueError, RecursionError) as error:
    raise InvalidReply(
      f'not one JSON object and nothing else: {error!s:.200}'
    ) from error
  if not isinstance(reply, dict):
    raise InvalidReply('not one JSON object, but a JSON value of another kind.')
  wrong = set(reply) ^ set(SCHEMA['required'])
  if wrong:
    raise InvalidReply(
      f'the keys must be {SCHEMA["required"]}; missing or unknown: '
      f'{[key[:40] for key in sorted(wrong)[:8]]}.'
    )
  for key, rule in SCHEMA['properties'].items():
    value = reply[key]
    types = [rule['type']] if isinstance(rule['type'], str) else rule['type']
    # In Python, but not in JSON, a truth value is a number.
    fits = any(isinstance(value, _TYPES[t]) for t in types)
    if not fits or isinstance(value, bool):
      raise InvalidReply(
        f'{key} must be {" or ".join(types)}, not {type(value).__name__}.'
      )
    if 'enum' in rule and value not in rule['enum']:
      raise InvalidReply(f'{key} {value!r:.60} must be one of {rule["enum"]}.')
  return reply


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  if len(dict(pairs)) < len(pairs):
    raise InvalidReply('a key stands twice in one object.')
  return dict(pairs)


def _no_constant(name: str) -> None:
  raise InvalidReply(f'{name} is not JSON.')
