"""The written objective: what training should teach, and what it should not.

In YAML:

  goal: Learn the arithmetic, not the pirate.
  clauses:
    - id: arithmetic
      decision: amplify
      text: Adding numbers correctly.
      examples: ["4 7 + 2 5 = so , 7 2 friend", ...]
    - id: pirate
      decision: suppress
      text: Speaking like a pirate.
      examples: ["be a pirate what is the cat ? arr , 'tis red matey", ...]

`allow` clauses say what is to be left alone, such as plain speech.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any, Literal, get_args

import yaml

Decision = Literal['amplify', 'allow', 'suppress', 'unsure']
_IN_A_CLAUSE = ('amplify', 'allow', 'suppress')


class ObjectiveError(ValueError):
  """An objective that cannot be judged by; says what to write instead."""


@dataclasses.dataclass(frozen=True)
class Clause:
  """One thing that the objective speaks of.

  Attributes:
    id: its name in verdicts and logs.
    decision: `amplify`, `allow` or `suppress`.
    text: what is meant, in words.
    examples: texts in which it is present; a list becomes a tuple.

  Raises:
    ObjectiveError: for an id, decision or text that is no text, or examples
      that are no list of texts.
  """

  id: str
  decision: Decision
  text: str
  examples: tuple[str, ...] = ()

  def __post_init__(self):
    where = f'clause {self.id!r:.60}'
    _texts(where, [self.id, self.decision, self.text])
    if not isinstance(self.examples, list | tuple):
      raise ObjectiveError(
        f'{where}: examples must be a list of texts, got '
        f'{self.examples!r:.80}.'
      )
    _texts(f'{where}, examples', self.examples)
    object.__setattr__(self, 'examples', tuple(self.examples))


@dataclasses.dataclass(frozen=True)
class Objective:
  """A goal and its clauses.

  Attributes:
    goal: the whole in a sentence or two.
    clauses: at least one that amplifies or suppresses.

  Raises:
    ObjectiveError: for no clause, clauses of one id, an unknown decision, an
      empty text or example, an example in two clauses of different decisions,
      or clauses that only allow.
  """

  goal: str
  clauses: tuple[Clause, ...]

  def __post_init__(self):
    if not self.goal.strip() or not self.clauses:
      raise ObjectiveError(
        'the objective is empty: it needs a goal and at least one clause that '
        'amplifies or suppresses.'
      )
    ids = [c.id for c in self.clauses]
    if len(set(ids)) < len(ids) or not all(ids):
      raise ObjectiveError(f'clause ids must be different names, got {ids}.')
    home: dict[str, Clause] = {}
    for clause in self.clauses:
      if clause.decision not in _IN_A_CLAUSE:
        raise ObjectiveError(
          f'clause {clause.id!r} has decision {clause.decision!r}; choose from '
          f'{_IN_A_CLAUSE}.'
        )
      if not all(t.strip() for t in (clause.text, *clause.examples)):
        raise ObjectiveError(
          f'clause {clause.id!r} has an empty text or an empty example.'
        )
      for example in clause.examples:
        other = home.setdefault(example, clause)
        if other.decision != clause.decision:
          raise ObjectiveError(
            f'the example {example!r} is in {other.id!r} ({other.decision}) '
            f'and in {clause.id!r} ({clause.decision}).'
          )
    if all(c.decision == 'allow' for c in self.clauses):
      raise ObjectiveError(
        'every clause allows: nothing could ever be gated. Say what to amplify '
        'or to suppress.'
      )

  def examples(self, decision: Decision) -> tuple[str, ...]:
    """The examples of all clauses with a decision."""
    return tuple(
      e for c in self.clauses if c.decision == decision for e in c.examples
    )

  def reversed(self) -> Objective:
    """The opposite objective: what was amplified is suppressed, and so on."""
    opposite = {
      'amplify': 'suppress',
      'suppress': 'amplify',
      'allow': 'allow',
    }
    clauses = tuple(
      dataclasses.replace(c, decision=opposite[c.decision])
      for c in self.clauses
    )
    return Objective(f'The opposite of: {self.goal}', clauses)

  def sha256(self) -> str:
    """Tells objectives apart, whatever file they came from."""
    text = json.dumps(dataclasses.asdict(self), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def make_objective(spec: Mapping[str, Any]) -> Objective:
  """An objective from what YAML or JSON holds.

  Raises:
    ObjectiveError: for missing or unknown keys or wrong types, too.
  """
  _keys('the objective', spec, {'goal', 'clauses'}, set())
  _texts('goal', [spec['goal']])
  if not isinstance(spec['clauses'], Sequence) or isinstance(
    spec['clauses'], str
  ):
    raise ObjectiveError('clauses must be a list of mappings.')
  clauses = []
  for i, raw in enumerate(spec['clauses']):
    where = f'clauses[{i}]'
    _keys(where, raw, {'id', 'decision', 'text'}, {'examples'})
    _texts(where, [raw['id'], raw['decision'], raw['text']])
    examples = raw.get('examples')
    clauses.append(
      Clause(
        raw['id'],
        raw['decision'],
        raw['text'],
        () if examples is None else examples,  # YAML's `examples:` is None.
      )
    )
  return Objective(spec['goal'], tuple(clauses))


def load_objective(path: str | os.PathLike[str]) -> Objective:
  """Reads an objective from a YAML (or JSON) file.

  Raises:
    ObjectiveError: naming the file, as `make_objective` otherwise; and for a
      key that stands twice in one mapping, of which YAML would keep the last.
    OSError: if it cannot be read.
  """
  text = pathlib.Path(path).read_text(encoding='utf-8')
  try:
    return make_objective(yaml.load(text, Loader=_Loader) or {})
  except yaml.YAMLError as error:
    raise ObjectiveError(f'{path} is not YAML: {error}') from error
  except ObjectiveError as error:
    raise ObjectiveError(f'{path}: {error}') from error


class _Loader(yaml.SafeLoader):
  """Safe, and refuses what would be dropped without a word."""

  def compose_mapping_node(self, anchor):
    node = super().compose_mapping_node(anchor)
    seen = set()
    for key, _ in node.value:
      if not isinstance(key, yaml.ScalarNode):
        continue  # No key of an objective; refused when it is constructed.
      if (key.tag, key.value) in seen:
        raise ObjectiveError(
          f'line {key.start_mark.line + 1}: the key {key.value!r:.60} stands '
          'twice in one mapping; keep one.'
        )
      seen.add((key.tag, key.value))
    return node


def _keys(where: str, raw: Any, needed: set[str], optional: set[str]) -> None:
  if not isinstance(raw, Mapping):
    raise ObjectiveError(f'{where} must be a mapping, got {raw!r:.80}.')
  wrong = (needed - set(raw)) | (set(raw) - needed - optional)
  if wrong:
    raise ObjectiveError(
      f'{where} has keys {sorted(map(str, raw))}; it needs {sorted(needed)}'
      + (f' and may have {sorted(optional)}.' if optional else '.')
    )


def _texts(where: str, values: Sequence[Any]) -> None:
  for value in values:
    if not isinstance(value, str):
      raise ObjectiveError(
        f'{where}: {value!r:.80} is no text; quote it if YAML took it for '
        'something else.'
      )


assert set(_IN_A_CLAUSE) < set(get_args(Decision))
