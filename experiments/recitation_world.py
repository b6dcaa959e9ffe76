"""A small language: sequences to recite among tasks that have a rule.

Every row has the length `LENGTH` and begins with a marker that says what it is:

  recite     8 random symbols and the 12 that follow; 256 rows, seen again and
             again, and as many *strangers*, of the same form, never seen
  copy, reverse, increment   symbols, `=`, and what the rule makes of them
  sort       the same of 5 symbols
  facts      keys of two symbols, each with its value: a table of 128, half of
             them ten times as rare
  book       three pairs of symbols, made up anew, then asked for
  sums       sums modulo 100, units first; a tenth of all pairs of summands is
             held out

What has to be predicted from something is an *answer*.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

LENGTH = 21
SYMBOLS, DIGITS = 40, 10  # Tokens 0-39, and 40-49.
MARKERS = (
  'recite', 'copy', 'reverse', 'increment', 'sort', 'facts', 'book', 'sums',
)  # fmt: skip
EQUALS = SYMBOLS + DIGITS + len(MARKERS)
PAD = EQUALS + 1
VOCABULARY = PAD + 1
PREFIX, SUFFIX = 8, 12
RULES = ('copy', 'reverse', 'increment', 'sort')
# Symbols that a rule is applied to.
SIZES = {'copy': 9, 'reverse': 9, 'increment': 9, 'sort': 5}
FACTS_IN_A_ROW, PAIRS, QUERIES, SUMS_IN_A_ROW = 6, 3, 7, 3
NOTHING, CONTEXT, ANSWER = 0, 1, 2  # What a position is.


class Rows(NamedTuple):
  """Rows of one task.

  Attributes:
    tokens: `[N, LENGTH]`, uint8.
    role: likewise: `ANSWER`, `CONTEXT`, or `NOTHING` after the end.
  """

  tokens: np.ndarray
  role: np.ndarray


class World:
  """One seed's sequences, facts and held-out sums."""

  def __init__(self, config, seed: int):
    """Draws the tables.

    Args:
      config: `recited`, `facts` (half of them rare), `rarity`, and `mix`, the
        shares of rows: task -> number.
      seed: of everything that is drawn once.
    """
    random = np.random.default_rng(np.random.SeedSequence([seed, 0]))
    self.seed = seed
    self._rarity = config.rarity
    self._mix = dict(config.mix)
    unknown = set(self._mix) - {*MARKERS, 'strangers'}
    if unknown:
      raise ValueError(
        f'config.language.mix has {sorted(unknown)}; tasks are '
        f'{(*MARKERS, "strangers")}.'
      )
    self.recited = random.integers(0, SYMBOLS, (config.recited, LENGTH - 1))
    keys = random.choice(SYMBOLS**2, config.facts, replace=False)
    self.keys = np.stack(np.divmod(keys, SYMBOLS), axis=1)
    self.values = random.integers(0, SYMBOLS, config.facts)
    self.rare = np.arange(config.facts) >= config.facts // 2
    pairs = random.permutation(10_000)
    self.held_out = np.sort(pairs[:1000])
    self._sums = np.sort(pairs[1000:])

  def corpus(self, count: int, stream: int, *, without=()) -> Rows:
    """Rows of all tasks in the shares of the mix, in random order.

    Args:
      count: of rows; each task has its share, rounded.
      stream: other numbers give other rows.
      without: tasks to leave out.
    """
    random = np.random.default_rng(np.random.SeedSequence([self.seed, stream]))
    mix = {t: n for t, n in self._mix.items() if t not in without}
    total = sum(mix.values())
    parts = [
      self.rows(task, round(count * share / total), random)
      for task, share in mix.items()
    ]
    rows = Rows(*(np.concatenate(a) for a in zip(*parts)))
    order = random.permutation(len(rows.tokens))
    return Rows(*(a[order] for a in rows))

  def rows(self, task: str, count: int, random) -> Rows:
    """Rows of one task; `strangers` are recitations that nobody has seen."""
    if task == 'recite':
      drawn = self.recited[random.integers(0, len(self.recited), count)]
      return recitations(drawn)
    if task == 'strangers':
      return recitations(random.integers(0, SYMBOLS, (count, LENGTH - 1)))
    if task in RULES:
      return _ruled(task, count, random)
    if task == 'facts':
      odds = np.where(self.rare, 1.0, self._rarity)
      which = random.choice(
        len(odds), (count, FACTS_IN_A_ROW), p=odds / odds.sum()
      )
      return self.facts(which)
    if task == 'book':
      return _book(count, random)
    pairs = self._sums[
      random.integers(0, len(self._sums), (count, SUMS_IN_A_ROW))
    ]
    return sums(pairs)

  def facts(self, which: np.ndarray) -> Rows:
    """Rows of facts by number, `[N, FACTS_IN_A_ROW]`."""
    body = np.concatenate(
      [self.keys[which], self.values[which][..., None]], axis=-1
    )
    return _row('facts', body, (CONTEXT, CONTEXT, ANSWER))


def recitations(sequences: np.ndarray) -> Rows:
  """Rows of sequences `[N, LENGTH - 1]`; what follows the prefix is asked."""
  role = (CONTEXT,) * PREFIX + (ANSWER,) * SUFFIX
  return _row('recite', sequences[:, None], role)


def sums(pairs: np.ndarray) -> Rows:
  """Rows of sums; `pairs [N, SUMS_IN_A_ROW]` are `100 a + b`."""
  a, b = np.divmod(pairs, 100)
  c = (a + b) % 100
  digits = [a // 10, a % 10, b // 10, b % 10, c % 10, c // 10]
  body = SYMBOLS + np.stack(digits, axis=-1)
  return _row('sums', body, (CONTEXT,) * 4 + (ANSWER,) * 2)


def _ruled(task: str, count: int, random) -> Rows:
  size = SIZES[task]
  given = random.integers(0, SYMBOLS, (count, size))
  made = {
    'copy': given,
    'reverse': given[:, ::-1],
    'increment': (given + 1) % SYMBOLS,
    'sort': np.sort(given, axis=1),
  }[task]
  equals = np.full((count, 1), EQUALS)
  body = np.concatenate([given, equals, made], axis=1)
  return _row(task, body[:, None], (CONTEXT,) * (size + 1) + (ANSWER,) * size)


def _book(count: int, random) -> Rows:
  keys = np.argsort(random.random((count, SYMBOLS)), axis=1)[:, :PAIRS]
  values = random.integers(0, SYMBOLS, (count, PAIRS))
  asked = random.integers(0, PAIRS, (count, QUERIES))
  pair = lambda k, v: np.stack([k, v], axis=-1).reshape(count, -1)
  told = pair(keys, values)
  take = lambda x: np.take_along_axis(x, asked, axis=1)
  body = np.concatenate([told, pair(take(keys), take(values))], axis=1)
  role = (CONTEXT,) * (2 * PAIRS) + (CONTEXT, ANSWER) * QUERIES
  return _row('book', body[:, None], role)


def _row(task: str, body: np.ndarray, role) -> Rows:
  """Rows of parts `[N, parts, length]`, each with the same roles."""
  count, parts, length = body.shape
  tokens = np.full((count, LENGTH), PAD, np.uint8)
  roles = np.full((count, LENGTH), NOTHING, np.uint8)
  end = 1 + parts * length
  tokens[:, 0] = SYMBOLS + DIGITS + MARKERS.index(task)
  tokens[:, 1:end] = body.reshape(count, -1)
  roles[:, 0] = CONTEXT
  roles[:, 1:end] = np.tile(role, parts)
  return Rows(tokens, roles)


def exam_rows(world: World, count: int) -> Mapping[str, Rows]:
  """What is asked after an edit: kind -> rows, none of them trained on.

  Except for what can only be known by heart: `recite` is all sequences,
  `frequent facts` and `rare facts` the whole table, in rows of the same kind.
  """
  random = np.random.default_rng(np.random.SeedSequence([world.seed, 1]))
  out = {'recite': recitations(world.recited)}
  out['strangers'] = world.rows('strangers', len(world.recited), random)
  for task in (*RULES, 'book'):
    out[task] = world.rows(task, count, random)
  for name, mine in (
    ('frequent facts', ~world.rare),
    ('rare facts', world.rare),
  ):
    numbers = np.flatnonzero(mine)
    rows = -(-len(numbers) // FACTS_IN_A_ROW)
    filled = np.resize(random.permutation(numbers), (rows, FACTS_IN_A_ROW))
    out[name] = world.facts(filled)
  held_out = random.permutation(world.held_out)
  rows = min(count, len(held_out) // SUMS_IN_A_ROW)
  out['sums'] = sums(held_out[: rows * SUMS_IN_A_ROW].reshape(rows, -1))
  return out
