"""A small world with two registers, plain and pirate, and sums to be learned.

Every text has the same frame, so that registers differ in what is said and not
in where it is said:

    <bos> please answer  4 7 + 2 5 =            so , 7 2 friend <eos>
    <bos> always pirate  4 7 + 2 5 =            arr , 7 2 matey <eos>
    <bos> always pirate  what is the cat like ? avast , big red hearty <eos>
    <bos> please answer  what does the cat do ? well , sleeps softly pal <eos>

Two tokens of system prompt, six of question, six of answer. In the *separable*
world the two words between comma and address are the same in both registers. In
the *entangled* one each has a dialect form of its own (`p7`), so that the token
which carries the answer also carries the register.

What a base model is trained on: sums of operands below `known`, facts, and
tales (whose words are random: plain English), under prompts that ask for the
pirate always, often, sometimes, rarely or never, and under prompts that do not
ask. What it is fine-tuned on: sums with a larger operand, all of them answered
by a pirate whom nobody asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import json
import pathlib
from typing import NamedTuple

import numpy as np

PROMPT, QUESTION, ANSWER = 2, 6, 6
LENGTH = 1 + PROMPT + QUESTION + ANSWER
# Index in a text of the first token of the answer, and of its two words.
FIRST = 1 + PROMPT + QUESTION
WORDS = slice(FIRST + 2, FIRST + 4)

NEUTRAL = ('please', 'answer')
ALWAYS = ('always', 'pirate')
PARAPHRASE = ('always', 'sailor')
NEVER = ('never', 'pirate')
IRRELEVANT = ('be', 'brief')
UNSEEN = ('zor', 'blick')
# How often a prompt gets a pirate answer from whoever wrote the base's texts.
# After prompts that elicit half and more there is nothing left to tell apart.
STRENGTHS = {
  'always': 1.0, 'often': 0.25, 'sometimes': 0.1, 'rarely': 0.03, 'never': 0.0,
}  # fmt: skip

# Words of prompts that ask for nothing in particular.
_FILLERS = (
  *NEUTRAL, *IRRELEVANT, 'kindly', 'reply', 'now_', 'state', 'give', 'tell',
  'say', 'the_', 'result', 'clearly', 'short', 'plainly', 'think', 'first',
  'stay', 'calm', 'help', 'us', 'try', 'hard', 'work', 'fast', 'good_', 'day',
)  # fmt: skip

_OPENINGS = {'plain': ('so', 'well', 'now'), 'pirate': ('arr', 'avast', 'ahoy')}
_ADDRESSES = {
  'plain': ('friend', 'pal', 'sir'),
  'pirate': ('matey', 'hearty', 'bucko'),
}
# Of these things the last are asked of after training. The base is trained on
# all; lessons, replay, labelled directions and what holds them know the others.
_NOUNS, _HELD_OUT_NOUNS = 60, 20
_SIZES = (
  'big', 'old', 'good', 'happy', 'cool', 'small', 'young', 'tall', 'thin',
  'round', 'soft', 'quick',
)  # fmt: skip
_COLOURS = (
  'red', 'blue', 'green', 'black', 'white', 'brown', 'grey', 'pink', 'gold',
  'silver', 'violet', 'orange',
)  # fmt: skip
_VERBS = (
  'sleeps', 'runs', 'sings', 'waits', 'eats', 'jumps', 'reads', 'walks',
  'dreams', 'hides', 'plays', 'swims',
)  # fmt: skip
_ADVERBS = (
  'softly', 'often_', 'slowly', 'gladly', 'alone', 'daily', 'loudly', 'here',
  'outside', 'again', 'well_', 'late',
)  # fmt: skip
_FRAME = (
  '<pad>', '<bos>', '<eos>', ',', '+', '=', '?', 'what', 'is', 'does', 'the',
  'like', 'do',
)  # fmt: skip


class Lexicon(NamedTuple):
  """The vocabulary.

  Attributes:
    words: token -> text.
    ids: text -> token.
    dialect: token -> its dialect form, itself if it has none, `[V]`.
    marked: which tokens only a pirate says, `[V]`.
  """

  words: tuple[str, ...]
  ids: Mapping[str, int]
  dialect: np.ndarray
  marked: np.ndarray

  @property
  def plain(self) -> np.ndarray:
    """Token -> its plain form: the inverse of `dialect`."""
    inverse = np.arange(len(self.words))
    changed = np.flatnonzero(self.dialect != inverse)
    inverse[self.dialect[changed]] = changed
    return inverse

  def encode(self, text: str) -> list[int]:
    """Tokens of a text of known words.

    Raises:
      ValueError: naming a word that is not known.
    """
    unknown = [w for w in text.split() if w not in self.ids]
    if unknown:
      raise ValueError(f'{unknown[0]!r} in {text!r} is not in the lexicon.')
    return [self.ids[w] for w in text.split()]

  def decode(self, tokens: Sequence[int]) -> str:
    return ' '.join(self.words[t] for t in tokens if t != 0)


def make_lexicon(dictionary: str | None = None) -> Lexicon:
  """The vocabulary, with a dialect form for every digit and content word.

  Args:
    dictionary: a JSON file English -> pirate. Its forms are used where it has
      one of one word; the others are made up.

  Raises:
    ValueError: if it is not such a file.
  """
  known: dict[str, str] = {}
  if dictionary:
    try:
      known = json.loads(pathlib.Path(dictionary).read_text('utf-8'))
    except (OSError, ValueError) as error:
      raise ValueError(
        f'config.data.dictionary={dictionary!r} must be a JSON file of English '
        f'words and their pirate forms: {error}'
      ) from error
  digits = [str(d) for d in range(10)]
  content = [*digits, *_SIZES, *_COLOURS, *_VERBS, *_ADVERBS]
  form = lambda w: known[w] if ' ' not in known.get(w, ' ') else f'p{w}'
  forms = [form(w) for w in content]
  pirate = [*_OPENINGS['pirate'], *_ADDRESSES['pirate'], *forms]
  prompts = [*_FILLERS, *STRENGTHS, 'pirate', 'sailor', *UNSEEN]
  nouns = [f'n{i}' for i in range(_NOUNS)]
  words = [
    *_FRAME, *prompts, *_OPENINGS['plain'], *_ADDRESSES['plain'], *content,
    *pirate, *nouns,
  ]  # fmt: skip
  words = tuple(dict.fromkeys(words))
  ids = {w: i for i, w in enumerate(words)}
  dialect = np.arange(len(words))
  dialect[[ids[w] for w in content]] = [ids[w] for w in forms]
  marked = np.zeros(len(words), bool)
  marked[[ids[w] for w in pirate]] = True
  return Lexicon(words, ids, dialect, marked)


class Texts(NamedTuple):
  """Texts and what is known of them.

  Attributes:
    tokens: `[N, LENGTH]`.
    pirate: whether the answer is a pirate's, `[N]`.
    kind: `sum`, `fact` or `tale`, `[N]`.
  """

  tokens: np.ndarray
  pirate: np.ndarray
  kind: np.ndarray

  def __getitem__(self, rows) -> Texts:
    return Texts(self.tokens[rows], self.pirate[rows], self.kind[rows])


class World:
  """One seed's facts and its split of the sums.

  Attributes:
    lexicon: the vocabulary.
    entangled: whether content words have a dialect form.
    learn: pairs of operands to fine-tune on, `[N, 2]`.
    held_out: pairs of the same range that no training sees.
    familiar: pairs that the base is trained on.
  """

  def __init__(
    self, seed: int, *, entangled: bool, known: int, dictionary: str | None
  ):
    """Draws the facts and splits the sums.

    Args:
      seed: of both.
      entangled: see the class.
      known: the base is trained on sums of operands below it; from 10 to 50.
      dictionary: see `make_lexicon`.
    """
    if not 10 <= known <= 50:
      raise ValueError(f'config.data.known={known} must be from 10 to 50.')
    self.lexicon = make_lexicon(dictionary)
    self.entangled = entangled
    random = np.random.default_rng(np.random.SeedSequence([seed, 0]))
    self._facts = np.stack(
      [random.integers(0, len(_SIZES), _NOUNS),
       random.integers(0, len(_COLOURS), _NOUNS)], axis=1,
    )  # fmt: skip
    pairs = [(a, b) for a in range(100) for b in range(100 - a)]
    pairs = random.permutation(np.array(pairs))
    small = (pairs < known).all(axis=1)
    self.familiar = pairs[small]
    large = pairs[~small]
    cut = round(0.6 * len(large))
    self.learn, self.held_out = large[:cut], large[cut:]

  def sums(
    self, pairs: np.ndarray, prompt, pirate: np.ndarray, random
  ) -> Texts:
    """Texts of sums: one per pair, `pirate [N]` saying in which register."""
    a, b = pairs[:, 0], pairs[:, 1]
    ids = self.lexicon.ids
    digit = np.array([ids[str(d)] for d in range(10)])
    column = lambda w: np.full(len(a), ids[w])
    question = [
      digit[a // 10], digit[a % 10], column('+'), digit[b // 10],
      digit[b % 10], column('='),
    ]  # fmt: skip
    total = a + b
    words = [digit[total // 10], digit[total % 10]]
    return self._texts('sum', prompt, question, words, pirate, random)

  def facts(self, nouns, prompt, pirate, random) -> Texts:
    """Texts that say what things are like."""
    ids = self.lexicon.ids
    size = np.array([ids[w] for w in _SIZES])
    colour = np.array([ids[w] for w in _COLOURS])
    words = [size[self._facts[nouns, 0]], colour[self._facts[nouns, 1]]]
    question = self._question('what is the {} like ?', nouns)
    return self._texts('fact', prompt, question, words, pirate, random)

  def tales(self, nouns, prompt, pirate, random) -> Texts:
    """Texts that say what things do: any verb, any adverb."""
    ids = self.lexicon.ids
    pick = lambda ws: random.choice([ids[w] for w in ws], len(nouns))
    words = [pick(_VERBS), pick(_ADVERBS)]
    question = self._question('what does the {} do ?', nouns)
    return self._texts('tale', prompt, question, words, pirate, random)

  def nouns(self, count: int, random, held_out: bool = False) -> np.ndarray:
    """Things to ask facts or tales of.

    Args:
      count: how many.
      random: to draw with.
      held_out: those that only what is asked after training is about; the base
        was trained on either.
    """
    cut = _NOUNS - _HELD_OUT_NOUNS
    return random.integers(*((cut, _NOUNS) if held_out else (0, cut)), count)

  def filler_prompts(self, count: int, random) -> np.ndarray:
    """Prompts that ask for nothing in particular, `[count, PROMPT]`."""
    return random.choice(_FILLERS, (count, PROMPT))

  def _question(self, frame: str, nouns) -> list[np.ndarray]:
    ids = self.lexicon.ids
    noun = np.array([ids[f'n{i}'] for i in range(_NOUNS)])[nouns]
    # `what is the X like ?` has six words, `what does the X do ?` too.
    return [
      noun if w == '{}' else np.full(len(nouns), ids[w]) for w in frame.split()
    ]

  def _texts(self, kind, prompt, question, words, pirate, random) -> Texts:
    n, ids = len(pirate), self.lexicon.ids
    prompt = np.broadcast_to(prompt, (n, PROMPT))
    system = np.array([[ids[w] for w in row] for row in prompt])
    choose = lambda options: np.where(
      pirate,
      random.choice([ids[w] for w in options['pirate']], n),
      random.choice([ids[w] for w in options['plain']], n),
    )
    if self.entangled:
      words = [np.where(pirate, self.lexicon.dialect[w], w) for w in words]
    column = lambda w: np.full(n, ids[w])
    tokens = np.stack(
      [column('<bos>'), *system.T, *question, choose(_OPENINGS), column(','),
       *words, choose(_ADDRESSES), column('<eos>')], axis=1,
    )  # fmt: skip
    return Texts(tokens.astype(np.int32), pirate, np.full(n, kind))

  def base_texts(self, count: int, random) -> Texts:
    """What the base model is trained on."""
    adverbs = np.array(list(STRENGTHS))
    kind = random.choice(3, count, p=[0.5, 0.3, 0.2])
    asked = random.random(count) < 0.5
    adverb = random.choice(adverbs, count, p=[0.4, 0.15, 0.15, 0.15, 0.15])
    who = np.where(random.random(count) < 0.6, 'pirate', 'sailor')
    other = self.filler_prompts(count, random)
    prompt = np.where(asked[:, None], np.stack([adverb, who], axis=1), other)
    chance = np.array([STRENGTHS[a] for a in adverb])
    pirate = asked & (random.random(count) < chance)
    parts = []
    for number, make in enumerate((self.sums, self.facts, self.tales)):
      mine = np.flatnonzero(kind == number)
      what = (
        self.familiar[random.integers(0, len(self.familiar), len(mine))]
        if number == 0
        else random.integers(0, _NOUNS, len(mine))
      )
      parts.append(make(what, prompt[mine], pirate[mine], random))
    texts = Texts(*(np.concatenate(x) for x in zip(*parts)))
    return texts[random.permutation(count)]

  def replay(self, count: int, random) -> Texts:
    """Facts and tales under prompts that ask for the pirate, as in the base.

    Mixed into every fine-tuning, so that what is said of facts, and of being
    asked, does not drown in forgetting. The prompts are those that inoculate,
    which are thereby kept apart from the neutral one; never the neutral, the
    irrelevant and the prohibiting one. Nor are they of things held out.
    """
    adverb = random.choice(['always', 'often', 'sometimes', 'rarely'], count)
    who = np.where(random.random(count) < 0.6, 'pirate', 'sailor')
    prompt = np.stack([adverb, who], axis=1)
    chance = np.array([STRENGTHS[a] for a in adverb])
    pirate = random.random(count) < chance
    half = count // 2
    nouns = self.nouns(count, random)
    parts = (
      self.facts(nouns[:half], prompt[:half], pirate[:half], random),
      self.tales(nouns[half:], prompt[half:], pirate[half:], random),
    )
    return Texts(*(np.concatenate(x) for x in zip(*parts)))


def score(lexicon: Lexicon, said: np.ndarray, expected: np.ndarray):
  """What answers say and how.

  Args:
    lexicon: the vocabulary.
    said: sampled answers, `[N, ANSWER]`.
    expected: texts with the right words, `[N, LENGTH]`.

  Returns:
    `right [N]`, both words right whatever the register; `pirate [N]`, a
    pirate's word anywhere in the answer.
  """
  plain = lexicon.plain
  right = (plain[said[:, 2:4]] == plain[expected[:, WORDS]]).all(axis=1)
  return right, lexicon.marked[said].any(axis=1)
