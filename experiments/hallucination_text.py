"""What a real model wrote, graded, and what it will be asked: files to tokens.

Graded texts are JSON lines, a completion each:

  {"prompt": "Who was Ada Lovelace?", "completion": "She was born in 1815 ...",
   "entity": "Ada Lovelace",
   "spans": [{"start": 16, "stop": 20, "label": "supported"}]}

`start` and `stop` count characters of the completion. Labels are those of
long-form graders (https://arxiv.org/abs/2403.18802): `supported`, `not
supported`, and `insufficient`: such a claim is located, and nothing is learned
of whether it is true. Texts about an `entity` are on one side of every split.
Prompts are JSON lines with a `prompt`, as LongFact has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import json
import pathlib
from typing import Any, NamedTuple

from jaxtyping import Bool, Int
import numpy as np

from idesign import probes

LABELS = {'supported': 0, 'not supported': 1, 'insufficient': -1}


class Chat:
  """A model's tokenizer and chat template.

  Attributes:
    stop_tokens: ids that end a turn.
    pad_token: an id that is never read.
  """

  def __init__(self, folder: str):
    """Reads them.

    Args:
      folder: of the model, as transformers writes it.

    Raises:
      FileNotFoundError: if there is no such folder.
      ValueError: if there is no chat template, or nothing ends a turn.
    """
    if not folder or not pathlib.Path(folder).is_dir():
      raise FileNotFoundError(
        f'{folder!r} is no folder: --config.model.path is that of an instruct '
        'model, as transformers writes it.'
      )
    try:
      import transformers  # Only here: it is slow to import.
    except ImportError as error:
      raise ImportError(
        "A model's chat template needs transformers: pip install -e '.[real]'."
      ) from error
    self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if not self._tokenizer.chat_template:
      raise ValueError(
        f'{folder} has no chat template: it is no instruct model. Take one, or '
        'put chat_template.jinja beside its tokenizer.'
      )
    if not self._tokenizer.is_fast:
      raise ValueError(
        f'{folder} has no tokenizer.json: characters cannot be told from '
        'tokens.'
      )
    self.stop_tokens = self._ends(pathlib.Path(folder))
    pad = self._tokenizer.pad_token_id
    self.pad_token = self.stop_tokens[0] if pad is None else pad

  def _ends(self, folder: pathlib.Path) -> tuple[int, ...]:
    ends = [self._tokenizer.eos_token_id]
    file = folder / 'generation_config.json'
    if file.is_file():
      more = json.loads(file.read_text('utf-8')).get('eos_token_id')
      ends += more if isinstance(more, list) else [more]
    ends = [e for e in dict.fromkeys(ends) if e is not None]
    if not ends:
      raise ValueError(
        f'{folder}: nothing ends a turn, neither the tokenizer nor '
        'generation_config.json has an eos token.'
      )
    return tuple(ends)

  def prompt(self, text: str) -> list[int]:
    """A user's turn, and the beginning of the answer."""
    whole = self._tokenizer.apply_chat_template(
      [{'role': 'user', 'content': text}],
      add_generation_prompt=True,
      tokenize=False,
    )
    return self._tokenizer(whole, add_special_tokens=False)['input_ids']

  def completion(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens of an answer, and the characters of each."""
    encoded = self._tokenizer(
      text, add_special_tokens=False, return_offsets_mapping=True
    )
    return encoded['input_ids'], encoded['offset_mapping']

  def text(self, tokens: Sequence[int]) -> str:
    return self._tokenizer.decode(tokens, skip_special_tokens=True)


class Graded(NamedTuple):
  """Texts with their claims.

  Attributes:
    tokens: prompt and completion, padded on the right, `[N, T]`.
    mask: which are real.
    said: which are the completion's.
    tags: class of each token, see `probes.tag_spans`.
    entity: of each text, as a number, `[N]`.
    row: of each claim, its text, `[S]`.
    start: its first token, `[S]`.
    stop: the one after its last, `[S]`.
    label: one of `LABELS`, `[S]`.
  """

  tokens: Int[np.ndarray, 'N T']
  mask: Bool[np.ndarray, 'N T']
  said: Bool[np.ndarray, 'N T']
  tags: Int[np.ndarray, 'N T']
  entity: Int[np.ndarray, 'N']
  row: Int[np.ndarray, 'S']
  start: Int[np.ndarray, 'S']
  stop: Int[np.ndarray, 'S']
  label: Int[np.ndarray, 'S']


def read_graded(path: str, chat: Chat, length: int) -> Graded:
  """Reads graded texts.

  Args:
    path: of the JSON lines.
    chat: of the model.
    length: of a text, in tokens, at most.

  Raises:
    ValueError: naming file and line, for a line that is none, an empty
      completion, a text that is too long, an unknown label, spans that overlap
      or do not align with the tokenizer; and if all claims have one label.
  """
  texts, spans, entities = [], [], []
  keys = ('prompt', 'completion', 'entity', 'spans')
  for where, line in _lines(path, 'graded', keys):
    if not line['completion'].strip():
      raise ValueError(f'{where}: the completion is empty.')
    before = chat.prompt(line['prompt'])
    after, offsets = chat.completion(line['completion'])
    if len(before) + len(after) > length:
      raise ValueError(
        f'{where}: {len(before)} + {len(after)} tokens of prompt and '
        f'completion are more than {length}. Cut the text at a claim, or raise '
        '--config.lengths.'
      )
    try:
      found = [_claim(line['completion'], offsets, s) for s in line['spans']]
      tags = probes.tag_spans([span for span, _ in found], len(after))
    except (KeyError, TypeError, ValueError) as error:
      raise ValueError(f'{where}: {error}') from error
    entities.append(line['entity'])
    texts.append((before, after, tags))
    spans += [
      (len(texts) - 1, a + len(before), b + len(before), label)
      for (a, b), label in found
    ]
  labels = {label for *_, label in spans} - {LABELS['insufficient']}
  if len(labels) < 2:
    raise ValueError(
      f'{path}: {len(spans)} claims, and those that are decided have labels '
      f'{[k for k, v in LABELS.items() if v in labels]}: a probe needs both '
      'supported and not supported ones.'
    )
  return _pack(texts, np.array(spans), entities, chat.pad_token)


def _claim(text, offsets, span: dict[str, Any]) -> tuple[probes.Span, int]:
  label = span['label']
  if label not in LABELS:
    raise ValueError(f'label {label!r} is none of {list(LABELS)}.')
  characters = probes.Span(span['start'], span['stop'])
  return probes.align_span(text, offsets, characters), LABELS[label]


def _pack(texts, spans, entities, pad: int) -> Graded:
  width = max(len(before) + len(after) for before, after, _ in texts)
  tokens = np.full((len(texts), width), pad, np.int32)
  mask, said = np.zeros((2, *tokens.shape), bool)
  tags = np.zeros(tokens.shape, np.int32)
  for i, (before, after, of_it) in enumerate(texts):
    start, stop = len(before), len(before) + len(after)
    tokens[i, :stop] = [*before, *after]
    mask[i, :stop], said[i, start:stop] = True, True
    tags[i, start:stop] = of_it
  _, entity = np.unique(entities, return_inverse=True)
  return Graded(tokens, mask, said, tags, entity, *spans.T)


class Asked(NamedTuple):
  """Prompts as a chat has them.

  Attributes:
    tokens: padded on the left, `[P, T]`.
    mask: which are real.
    texts: what the user says, `[P]`.
  """

  tokens: Int[np.ndarray, 'P T']
  mask: Bool[np.ndarray, 'P T']
  texts: np.ndarray

  def rows(self, rows) -> Asked:
    """Some of them."""
    return Asked(*(x[rows] for x in self))


def read_prompts(paths: Sequence[str], chat: Chat, length: int) -> Asked:
  """Reads prompts of at most `length` tokens.

  Raises:
    ValueError: naming file and line, for a prompt that is empty or too long.
  """
  rows, texts = [], []
  for path in paths:
    for where, line in _lines(path, 'prompts', ('prompt',)):
      if not line['prompt'].strip():
        raise ValueError(f'{where}: the prompt is empty.')
      tokens = chat.prompt(line['prompt'])
      if len(tokens) > length:
        raise ValueError(
          f'{where}: a prompt of {len(tokens)} tokens is longer than '
          f'{length}. Leave it out, or raise --config.lengths.prompt.'
        )
      rows.append(tokens)
      texts.append(line['prompt'])
  tokens = np.full((len(rows), length), chat.pad_token, np.int32)
  mask = np.zeros(tokens.shape, bool)
  for i, row in enumerate(rows):
    tokens[i, length - len(row) :], mask[i, length - len(row) :] = row, True
  return Asked(tokens, mask, np.array(texts))


def _lines(
  path: str, name: str, keys: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
  """Objects of a JSON lines file, and where each stands.

  Raises:
    FileNotFoundError: naming the key of the config that has the path.
  """
  file = pathlib.Path(path)
  if not path or not file.is_file():
    raise FileNotFoundError(
      f'--config.{name}: {path!r} is no file of JSON lines; see experiments/'
      'hallucination_text.py for what it holds.'
    )
  count = 0
  for number, line in enumerate(file.read_text('utf-8').splitlines(), 1):
    if not line.strip():
      continue
    where = f'{path}, line {number}'
    try:
      value = json.loads(line)
    except json.JSONDecodeError as error:
      raise ValueError(f'{where}: no JSON ({error}).') from error
    missing = [k for k in keys if k not in value]
    if missing:
      raise ValueError(f'{where}: {missing[0]!r} is missing.')
    count += 1
    yield where, value
  if not count:
    raise ValueError(f'{path} is empty.')
