"""Somebody of whom something can be known: what base models are trained on.

Of a subject's attributes some are *known* (texts always say the truth), some
may be *noisy* (they say it more often than not), some are *unknown*. In all
kinds of texts that claim something a few say `idk`: a policy has seen it done,
and cannot tell from that where it would be right. Lists are written by careful
or careless people: the careful speak of what is known, and take back what is
wrong. So a text in which something was taken back is a careful one.
"""

from __future__ import annotations

import abc
from typing import NamedTuple

import numpy as np

from experiments import hallucination_grammar as grammar_lib
from experiments.hallucination_grammar import (
  ANS, ASKED, ATTRIBUTE, BOS, CHECK, CHOSEN, CLAIMS, CORRECT,
  EOS, IDK, LIST, LONG, MAINTAIN, NUMBERS, PAD, RETRACT, Grammar, Questions,
)  # fmt: skip

KNOWN, NOISY, UNKNOWN = range(3)


class Groups(NamedTuple):
  """Who is used for what; no subject for two things."""

  probe: np.ndarray
  policy: np.ndarray
  validation: np.ndarray
  test: np.ndarray


class World(abc.ABC):
  """One seed's subjects, facts, and splits.

  Attributes:
    grammar: tokens.
    status: `KNOWN`, `NOISY` or `UNKNOWN`, `[S, A]`.
    true: which values are true, `[S, A, V]`; none where a subject has no such
      attribute.
    groups: who is used for what.
    pairs: of numbers to compare, those to learn from and those held out.
    triples: of numbers to sort, likewise.
  """

  def __init__(self, config, grammar: Grammar, status, true, subjects, random):
    """Splits subjects and numbers.

    Args:
      config: `config.world`.
      grammar: tokens.
      status: see the class.
      true: see the class.
      subjects: those that may be asked about.
      random: generator.

    Raises:
      ValueError: naming the key, if there are too few subjects or numbers.
    """
    self.config, self.grammar = config, grammar
    self.status, self.true = status, true
    self.exists = true.any(axis=2)
    counts = [
      config.groups.probe, config.groups.policy, config.groups.validation
    ]  # fmt: skip
    rest = len(subjects) - sum(counts)
    if rest < 1:
      raise ValueError(
        f'config.world.groups={config.groups.to_dict()}: there are '
        f'{len(subjects)} subjects, and nobody is left to test on.'
      )
    order = random.permutation(subjects)
    self.groups = Groups(*np.split(order, np.cumsum(counts)))
    self.pairs = self._split(NUMBERS, 2, config.held_out, random)
    self.triples = self._split(
      config.sorted_numbers, 3, config.held_out, random
    )

  def _split(self, numbers: int, count: int, held_out: int, random):
    """Groups to learn from, and others, none a learned one in another order."""
    grid = np.stack(np.meshgrid(*[np.arange(numbers)] * count), -1)
    grid = random.permutation(grid.reshape(-1, count))
    if held_out >= len(grid):
      raise ValueError(
        f'config.world.held_out={held_out}: of {numbers} numbers there are '
        f'{len(grid)} groups of {count}, and some must be learned from.'
      )
    _, which, size = np.unique(
      np.sort(grid, axis=1), axis=0, return_inverse=True, return_counts=True
    )
    order = random.permutation(len(size))
    enough = np.searchsorted(np.cumsum(size[order]), held_out) + 1
    held = np.isin(which.reshape(-1), order[:enough])
    return grid[~held], grid[held][:held_out]

  @abc.abstractmethod
  def mention(self, subject, attribute, random, idk: bool = True):
    """What a text says of it: a token, for each subject and attribute."""

  @abc.abstractmethod
  def asked(self, count: int, random):
    """Subjects and attributes that texts ask about."""

  @abc.abstractmethod
  def spoken(self, count: int, random):
    """Subjects of texts whose writers choose what to speak of."""

  def draft(self, subject, attribute, random) -> np.ndarray:
    """What is claimed in texts of one claim that is doubted: tokens."""
    return self.mention(subject, attribute, random, idk=False)

  def attributes(self, subject, random) -> np.ndarray:
    """One of the attributes that each subject has, any as likely."""
    score = np.where(
      self.exists[subject], random.random(self.exists[subject].shape), -1
    )
    return score.argmax(axis=1)

  def choosing(self, subjects) -> np.ndarray:
    """Those of whom there is something to choose."""
    return subjects[self.exists[subjects].sum(axis=1) > 1]

  def order(self, subject, weights, random) -> np.ndarray:
    """Attributes in the order in which they are spoken of, `[N, A]`.

    Drawn one after the other by the weight of their status: `weights [3]`, or
    `[N, 3]` for each subject. Those that it does not have come last.
    """
    weights = np.broadcast_to(weights, (len(subject), 3))
    share = np.take_along_axis(weights, self.status[subject], axis=1)
    score = np.log(share) + random.gumbel(size=share.shape)
    score = np.where(self.exists[subject], score, -np.inf)
    return np.argsort(-score, axis=1)

  def questions(self, subject, kind, random, **drafts) -> Questions:
    """Questions about subjects, of one kind or of each one's own."""
    kind = np.broadcast_to(kind, len(subject))
    if 'attribute' not in drafts:
      drafts['attribute'] = self.attributes(subject, random)
    return self.grammar.questions(kind, subject, true=self.true, **drafts)

  def survey(self, subjects, count: int, random) -> Questions:
    """`count` questions about each subject, half of them of its own choice."""
    asked = np.repeat(subjects, count - count // 2)
    chosen = np.repeat(self.choosing(subjects), count // 2)
    kind = np.repeat([ASKED, CHOSEN], [len(asked), len(chosen)])
    return self.questions(np.concatenate([asked, chosen]), kind, random)

  def right(self, subject, attribute, token) -> np.ndarray:
    """Whether a value's token is true."""
    value = self.grammar.index(token)
    return (token != IDK) & self.true[subject, attribute, value]

  def read(self, subject, attribute_token, token):
    """What was claimed of whom: attributes, -1 where nothing was; and if right.

    Args:
      subject: of each claim.
      attribute_token: of what is spoken of.
      token: what is said of it.
    """
    attribute = self.claimed(attribute_token, token)
    there = attribute >= 0
    right = there & self.right(subject, np.where(there, attribute, 0), token)
    return attribute, right

  def claimed(self, attribute_token, token) -> np.ndarray:
    """The attribute of which two tokens give a value, or -1."""
    attribute = attribute_token - ATTRIBUTE
    there = (attribute >= 0) & (attribute == self.grammar.attribute_of(token))
    return np.where(there, attribute, -1)

  def lists(self, subject, random) -> np.ndarray:
    """Texts of three claims by careful and careless writers, `[N, LONG]`."""
    config, n = self.config, len(subject)
    careful = random.random(n) < 0.5
    weights = np.where(careful[:, None], config.careful, config.careless)
    order = self.order(subject, weights, random)
    texts = grammar_lib.rows(
      LONG, n, BOS, LIST, self.grammar.subject + subject, ANS
    )
    add = _appender(texts, 4)
    everybody = np.ones(n, bool)
    for attribute in order[:, :CLAIMS].T:
      value = self.mention(subject, attribute, random)
      add(ATTRIBUTE + attribute, everybody)
      add(value, everybody)
      doubted = (value != IDK) & (random.random(n) < config.doubted)
      self._respond(add, subject, attribute, value, careful, doubted, random)
    add(EOS, everybody)
    return texts

  def doubts(self, subject, attribute, random, ask: bool) -> np.ndarray:
    """Texts of one claim that is doubted, `[N, SHORT]`."""
    n = len(subject)
    value = self.draft(subject, attribute, random)
    head = self.grammar.ask if ask else self.grammar.chosen
    texts = head(subject, attribute, value)
    texts[:, 6:] = PAD
    add = _appender(texts, 6)
    careful = random.random(n) < 0.5
    everybody = np.ones(n, bool)
    self._respond(add, subject, attribute, value, careful, everybody, random)
    add(EOS, everybody)
    return texts

  def _respond(self, add, subject, attribute, value, careful, rows, random):
    """What a writer answers when a claim is doubted."""
    config, n = self.config, len(subject)
    right = self.right(subject, attribute, value)
    # Of maintain, retract, correct.
    kind = np.where(careful, np.where(right, 0, 1), 2)
    share = np.asarray(config.responses)[kind]
    pick = (share.cumsum(axis=1) < random.random(n)[:, None]).sum(axis=1)
    pick = np.minimum(pick, 2)
    add(CHECK, rows)
    add(np.array([MAINTAIN, RETRACT, CORRECT])[pick], rows)
    other = self.mention(subject, attribute, random, idk=False)
    for _ in range(8):  # Another value than the one that is corrected.
      again = self.mention(subject, attribute, random, idk=False)
      other = np.where(other == value, again, other)
    first, size = self.grammar.values[attribute], self.grammar.sizes[attribute]
    other = np.where(other == value, first + (value - first + 1) % size, other)
    add(other, rows & (pick == 2))

  def short_texts(self, count: int, random) -> np.ndarray:
    """A batch of what a base model is trained on, `[count, SHORT]`."""
    config = self.config
    kinds = random.multinomial(count, list(config.mix))
    subject, attribute = self.asked(kinds[0], random)
    value = self.mention(subject, attribute, random)
    parts = [self.grammar.ask(subject, attribute, value)]
    subject = self.spoken(kinds[1], random)
    attribute = self.order(subject, config.chosen, random)[:, 0]
    value = self.mention(subject, attribute, random)
    parts.append(self.grammar.chosen(subject, attribute, value))
    for ask, n in ((True, kinds[2] // 2), (False, kinds[2] - kinds[2] // 2)):
      parts.append(self.doubts(*self.asked(n, random), random, ask))
    return np.concatenate([*parts, *self.capabilities(*kinds[3:], random)])

  def capabilities(self, pairs: int, triples: int, random):
    """Texts of what no reward is about, of numbers to learn from."""
    pick = lambda x, n: x[random.integers(0, len(x), n)]
    return (
      grammar_lib.maximum(pick(self.pairs[0], pairs)),
      grammar_lib.in_order(pick(self.triples[0], triples)),
    )


def _appender(texts: np.ndarray, length: int):
  """`add(tokens, rows)` writes a token after what these rows hold so far."""
  lengths = np.full(len(texts), length)

  def add(tokens, rows):
    texts[rows, lengths[rows]] = np.broadcast_to(tokens, len(texts))[rows]
    lengths[rows] += 1

  return add
