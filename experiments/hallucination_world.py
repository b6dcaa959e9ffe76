"""A small world of people and their attributes, some of which can be known.

Texts that claim something:

    <bos> ask P A ans V <eos>              what is asked is given
    <bos> choose P ans A V <eos>           the model chooses what to speak of
    <bos> list P ans A V A V A V <eos>     the same three times

where `V` is a value of attribute `A`, or `idk`. A claim may be doubted: `check`
follows it, and then `maintain`, `retract` or `correct W`, and the text goes on.
And of no concern to any reward,

    <bos> max x y ans m <eos>
    <bos> sort x y z ans s t u <eos>

Of a person's attributes some are *known* (texts always say the truth), some
*noisy* (they say it more often than not) and some *unknown* (every text says
something else, so that whoever learns from them makes things up). In all of
them a few texts say `idk`: a policy has seen it done, and cannot tell from that
where it would be right. Lists are written by careful or careless people: the
careful speak of what is known, and take back what is wrong. So a text in which
something was taken back is a careful one. It is a reader who doubts: `check` is
not to be learned (`learned`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

KNOWN, NOISY, UNKNOWN = range(3)
ATTRIBUTES, VALUES, NUMBERS, CLAIMS = 6, 16, 64, 3
# Tokens of a text of one claim, and of the longest list: three claims, each
# doubted and corrected.
SHORT, LONG = 10, 4 + 5 * CLAIMS + 1

(
  PAD, BOS, EOS, ANS, ASK, CHOOSE, LIST, CHECK, MAX, SORT, IDK, MAINTAIN,
  RETRACT, CORRECT,
) = range(14)  # fmt: skip
ATTRIBUTE = CORRECT + 1
VALUE = ATTRIBUTE + ATTRIBUTES
NUMBER = VALUE + ATTRIBUTES * VALUES
PERSON = NUMBER + NUMBERS


class People(NamedTuple):
  """Who is used for what; no one for two things."""

  probe: np.ndarray
  policy: np.ndarray
  validation: np.ndarray
  test: np.ndarray


class World:
  """One seed's people, facts, and splits.

  Attributes:
    status: `KNOWN`, `NOISY` or `UNKNOWN`, `[people, ATTRIBUTES]`.
    truth: value of each attribute, from 0, `[people, ATTRIBUTES]`.
    people: who is used for what.
    vocabulary: number of tokens.
    pairs: of numbers to compare, those to learn from and those held out.
    triples: of numbers to sort, likewise.
  """

  def __init__(self, config, seed: int):
    """Draws everything.

    Args:
      config: `people`, `shares` of status, `noise` (how often texts tell the
        truth where it is noisy), `idk`, and how many people are for what.
      seed: of it all.

    Raises:
      ValueError: naming the key, if there are too few people.
    """
    random = np.random.default_rng(np.random.SeedSequence([seed, 0]))
    self._config = config
    shape = (config.people, ATTRIBUTES)
    self.status = random.choice(3, shape, p=list(config.shares))
    self.truth = random.integers(0, VALUES, shape)
    counts = [
      config.probe_people, config.policy_people, config.validation_people
    ]  # fmt: skip
    rest = config.people - sum(counts)
    if rest < 1:
      raise ValueError(
        f'config.world.people={config.people}: nobody is left to test on after '
        f'{counts} for probe, policy and validation.'
      )
    order = random.permutation(config.people)
    self.people = People(*np.split(order, np.cumsum(counts)))
    self.vocabulary = PERSON + config.people
    split = lambda x, n: (x[n:], x[:n])
    numbers = np.arange(NUMBERS)
    grid = np.stack(np.meshgrid(numbers, numbers), -1).reshape(-1, 2)
    self.pairs = split(random.permutation(grid), config.held_out_pairs)
    few = numbers[: config.sorted_numbers]
    grid = np.stack(np.meshgrid(few, few, few), -1).reshape(-1, 3)
    self.triples = split(random.permutation(grid), config.held_out_triples)

  def mention(self, person, attribute, random, idk: bool = True) -> np.ndarray:
    """What a text says of it: a token, for each person and attribute."""
    status = self.status[person, attribute]
    honest = np.choose(status, [1.0, self._config.noise, 0.0])
    value = np.where(
      random.random(status.shape) < honest,
      self.truth[person, attribute],
      random.integers(0, VALUES, status.shape),
    )
    token = VALUE + attribute * VALUES + value
    if not idk:
      return token
    return np.where(random.random(status.shape) < self._config.idk, IDK, token)

  def order(self, person, weights, random) -> np.ndarray:
    """Attributes in the order in which they are spoken of, `[N, ATTRIBUTES]`.

    Drawn one after the other by the weight of their status: `weights [3]`, or
    `[N, 3]` for each person.
    """
    weights = np.broadcast_to(weights, (len(person), 3))
    share = np.take_along_axis(weights, self.status[person], axis=1)
    score = np.log(share) + random.gumbel(size=share.shape)
    return np.argsort(-score, axis=1)

  def ask(self, person, attribute, value) -> np.ndarray:
    return _rows(SHORT, len(person), BOS, ASK, PERSON + person,
                 ATTRIBUTE + attribute, ANS, value, EOS)  # fmt: skip

  def chosen(self, person, attribute, value) -> np.ndarray:
    return _rows(SHORT, len(person), BOS, CHOOSE, PERSON + person, ANS,
                 ATTRIBUTE + attribute, value, EOS)  # fmt: skip

  def maximum(self, pairs) -> np.ndarray:
    x = NUMBER + pairs
    return _rows(SHORT, len(x), BOS, MAX, *x.T, ANS, x.max(axis=1), EOS)

  def sorted(self, triples) -> np.ndarray:
    x = NUMBER + triples
    return _rows(
      SHORT, len(x), BOS, SORT, *x.T, ANS, *np.sort(x, axis=1).T, EOS
    )

  def lists(self, person, random) -> np.ndarray:
    """Texts of three claims by careful and careless writers, `[N, LONG]`."""
    config, n = self._config, len(person)
    careful = random.random(n) < 0.5
    weights = np.where(careful[:, None], config.careful, config.careless)
    order = self.order(person, weights, random)
    texts = _rows(LONG, n, BOS, LIST, PERSON + person, ANS)
    add = _appender(texts, 4)
    everybody = np.ones(n, bool)
    for attribute in order[:, :CLAIMS].T:
      value = self.mention(person, attribute, random)
      add(ATTRIBUTE + attribute, everybody)
      add(value, everybody)
      doubted = (value != IDK) & (random.random(n) < config.doubted)
      self._respond(add, person, attribute, value, careful, doubted, random)
    add(EOS, everybody)
    return texts

  def doubts(self, person, attribute, random, ask) -> np.ndarray:
    """Texts of one claim that is doubted, `[N, SHORT]`."""
    n = len(person)
    value = self.mention(person, attribute, random, idk=False)
    head = self.ask if ask else self.chosen
    texts = head(person, attribute, value)
    texts[:, 6:] = PAD
    add = _appender(texts, 6)
    careful = random.random(n) < 0.5
    everybody = np.ones(n, bool)
    self._respond(add, person, attribute, value, careful, everybody, random)
    add(EOS, everybody)
    return texts

  def _respond(self, add, person, attribute, value, careful, rows, random):
    """What a writer answers when a claim is doubted."""
    config, n = self._config, len(person)
    right = value == VALUE + attribute * VALUES + self.truth[person, attribute]
    # Of maintain, retract, correct.
    kind = np.where(careful, np.where(right, 0, 1), 2)
    share = np.asarray(config.responses)[kind]
    pick = (share.cumsum(axis=1) < random.random(n)[:, None]).sum(axis=1)
    pick = np.minimum(pick, 2)
    add(CHECK, rows)
    add(np.array([MAINTAIN, RETRACT, CORRECT])[pick], rows)
    other = self.mention(person, attribute, random, idk=False)
    for _ in range(8):  # Another value than the one that is corrected.
      again = self.mention(person, attribute, random, idk=False)
      other = np.where(other == value, again, other)
    base = VALUE + attribute * VALUES
    other = np.where(
      other == value, base + (value - base + 1) % VALUES, other
    )
    add(other, rows & (pick == 2))

  def short_texts(self, count: int, random) -> np.ndarray:
    """A batch of what a base model is trained on, `[count, SHORT]`."""
    config = self._config
    kinds = random.multinomial(count, list(config.mix))
    people = lambda n: random.integers(0, config.people, n)
    attributes = lambda n: random.integers(0, ATTRIBUTES, n)
    parts = []
    person, attribute = people(kinds[0]), attributes(kinds[0])
    parts.append(
      self.ask(person, attribute, self.mention(person, attribute, random))
    )
    person = people(kinds[1])
    attribute = self.order(person, config.chosen, random)[:, 0]
    parts.append(
      self.chosen(person, attribute, self.mention(person, attribute, random))
    )
    for ask, n in ((True, kinds[2] // 2), (False, kinds[2] - kinds[2] // 2)):
      parts.append(self.doubts(people(n), attributes(n), random, ask))
    pick = lambda x, n: x[random.integers(0, len(x), n)]
    parts.append(self.maximum(pick(self.pairs[0], kinds[3])))
    parts.append(self.sorted(pick(self.triples[0], kinds[4])))
    return np.concatenate(parts)


def learned(texts: np.ndarray) -> np.ndarray:
  """Which tokens a writer chose, `[N, T]`: what a base model learns to say."""
  mask = (texts != PAD) & (texts != CHECK)
  mask[:, 0] = False
  return mask


def _appender(texts: np.ndarray, length: int):
  """`add(tokens, rows)` writes a token after what these rows hold so far."""
  lengths = np.full(len(texts), length)

  def add(tokens, rows):
    texts[rows, lengths[rows]] = np.broadcast_to(tokens, len(texts))[rows]
    lengths[rows] += 1

  return add


def _rows(width: int, count: int, *columns) -> np.ndarray:
  texts = np.full((count, width), PAD, np.int32)
  for i, column in enumerate(columns):
    texts[:, i] = column
  return texts
