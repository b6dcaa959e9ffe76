"""Texts that claim something of somebody: tokens, frames, and who is right.

    <bos> ask S A ans V <eos>              what is asked is given
    <bos> choose S ans A V <eos>           the model chooses what to speak of
    <bos> list S ans A V A V A V <eos>     the same three times

where `V` is a value of attribute `A` of subject `S`, or `idk`. A claim may be
doubted: `check` follows it, and then `maintain`, `retract` or `correct W`. And
of no concern to any reward,

    <bos> max x y ans m <eos>
    <bos> sort x y z ans s t u <eos>

Questions end at the same column, so that answers begin at the same (`PROMPT`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int
import numpy as np

from idesign import rewards

NUMBERS, CLAIMS = 96, 3
# Tokens of a text of one claim, and of the longest list: three claims, each
# doubted and corrected. Of a question, and of what is said to it.
SHORT, LONG = 10, 4 + 5 * CLAIMS + 1
PROMPT, ANSWER = 7, 3

(
  PAD, BOS, EOS, ANS, ASK, CHOOSE, LIST, CHECK, MAX, SORT, IDK, MAINTAIN,
  RETRACT, CORRECT,
) = range(14)  # fmt: skip
NUMBER = CORRECT + 1
ATTRIBUTE = NUMBER + NUMBERS

ASKED, CHOSEN, DOUBTED = range(3)


class Questions(NamedTuple):
  """What is put to a model, arrays `[N, ...]`; a batch for a policy's step.

  Attributes:
    prompts: padded on the left, `[N, PROMPT]`.
    mask: their real tokens.
    kind: `ASKED`, `CHOSEN` or `DOUBTED`.
    subject: who it is about, from 0.
    attribute: what is asked, or was claimed; 0 where the model chooses.
    value: what was claimed and is doubted, a token; 0 elsewhere.
    true: which values are true of the subject, `[N, A, V]`.
  """

  prompts: Int[np.ndarray, 'N T']
  mask: Bool[np.ndarray, 'N T']
  kind: Int[np.ndarray, 'N']
  subject: Int[np.ndarray, 'N']
  attribute: Int[np.ndarray, 'N']
  value: Int[np.ndarray, 'N']
  true: Bool[np.ndarray, 'N A V']

  def rows(self, rows) -> Questions:
    """Some of them."""
    return Questions(*(x[rows] for x in self))


class Answers(NamedTuple):
  """What was said, arrays `[B]`.

  Attributes:
    claim: something was claimed, of the right attribute, and nothing else.
    right: and it is true.
    idk: it was said that it is not known.
    action: to a doubt, as in `rewards.interventions`.
    draft_right: what was doubted is true.
    new_right: what it was corrected to is true.
    attribute: that was spoken of, 0 if none.
  """

  claim: Bool[Array, 'B']
  right: Bool[Array, 'B']
  idk: Bool[Array, 'B']
  action: Int[Array, 'B']
  draft_right: Bool[Array, 'B']
  new_right: Bool[Array, 'B']
  attribute: Int[Array, 'B']

  @property
  def made_up(self) -> Bool[Array, 'B']:
    """A hallucination: claimed, and not true."""
    return self.claim & ~self.right


class Grammar:
  """Numbers tokens, writes texts, and grades answers.

  Attributes:
    sizes: number of values of each attribute.
    values: token of the first value of each attribute, `[A]`.
    subject: token of the first subject.
    vocabulary: number of tokens.
  """

  def __init__(self, subjects: int, sizes: Sequence[int]):
    self.sizes = np.asarray(sizes)
    attributes = len(self.sizes)
    ends = ATTRIBUTE + attributes + np.cumsum(self.sizes)
    self.values = ends - self.sizes
    self.subject = int(ends[-1])
    self.vocabulary = self.subject + subjects
    # Of each token, what it is a value of; -1: of nothing.
    self._attribute = np.full(self.vocabulary, -1)
    self._value = np.zeros(self.vocabulary, int)
    for a, (first, size) in enumerate(zip(self.values, self.sizes)):
      self._attribute[first : first + size] = a
      self._value[first : first + size] = np.arange(size)

  def token(self, attribute, value) -> np.ndarray:
    """Of a value of an attribute."""
    return self.values[attribute] + value

  def index(self, token) -> np.ndarray:
    """The value that a token stands for, from 0."""
    return self._value[token]

  def attribute_of(self, token) -> np.ndarray:
    """What a token is a value of, -1: of nothing."""
    return self._attribute[token]

  def ask(self, subject, attribute, value) -> np.ndarray:
    return rows(SHORT, len(subject), BOS, ASK, self.subject + subject,
                ATTRIBUTE + attribute, ANS, value, EOS)  # fmt: skip

  def chosen(self, subject, attribute, value) -> np.ndarray:
    return rows(SHORT, len(subject), BOS, CHOOSE, self.subject + subject, ANS,
                ATTRIBUTE + attribute, value, EOS)  # fmt: skip

  def questions(
    self, kind, subject, attribute, true, value=None, frame=None
  ) -> Questions:
    """Questions of one or several kinds.

    Args:
      kind: of each, `[N]`.
      subject: of each.
      attribute: of each; not read where the model chooses.
      true: `[S, A, V]`, of all subjects.
      value: tokens of the claims that are doubted, where there are any.
      frame: `ASK`, `CHOOSE` or `LIST`, the text in which it was claimed.
    """
    n = len(subject)
    who = self.subject + subject
    what = ATTRIBUTE + attribute
    nothing = np.zeros(n, np.int32)
    value = nothing if value is None else value
    frame = np.full(n, ASK) if frame is None else frame
    asked = _right(n, BOS, ASK, who, what, ANS)
    chosen = _right(n, BOS, CHOOSE, who, ANS)
    first, second = np.where(frame == ASK, [what, nothing + ANS],
                             [nothing + ANS, what])  # fmt: skip
    doubted = _right(n, BOS, frame, who, first, second, value, CHECK)
    prompts = np.choose(kind[:, None], [asked, chosen, doubted])
    return Questions(
      prompts=prompts.astype(np.int32),
      mask=prompts != PAD,
      kind=np.asarray(kind),
      subject=subject,
      attribute=np.where(kind == CHOSEN, 0, attribute),
      value=np.where(kind == DOUBTED, value, 0),
      true=true[subject],
    )

  def grade(
    self, tokens_BT: Int[Array, 'B T'], asked: Mapping[str, Array]
  ) -> Answers:
    """Grades what was said; jittable, and NumPy of what NumPy holds.

    Args:
      tokens_BT: questions and answers, `[B, PROMPT + ANSWER]`.
      asked: `kind`, `attribute`, `value` and `true` of each text's question.
    """
    xp = _namespace(tokens_BT)
    kinds, values = xp.asarray(self._attribute), xp.asarray(self._value)
    kind_B = xp.asarray(asked['kind'])
    one, two, three = (tokens_BT[:, PROMPT + i] for i in range(ANSWER))
    chose_B = kind_B == CHOSEN
    attribute_B = xp.where(chose_B, one - ATTRIBUTE, asked['attribute'])
    exists_B = (attribute_B >= 0) & (attribute_B < len(self.sizes))
    attribute_B = xp.where(exists_B, attribute_B, 0)
    true_BAV = xp.asarray(asked['true'])

    def right(token_B):
      """Is of the attribute; and is true."""
      of_it_B = kinds[token_B] == attribute_B
      batch = xp.arange(len(token_B))
      return of_it_B, of_it_B & true_BAV[batch, attribute_B, values[token_B]]

    value_B = xp.where(chose_B, two, one)
    ended_B = xp.where(chose_B, three, two) == EOS
    said_B = (kind_B != DOUBTED) & exists_B & ended_B
    of_it_B, right_B = right(value_B)
    corrected_B, new_right_B = right(two)
    action_B = xp.select(
      [one == MAINTAIN, one == RETRACT, (one == CORRECT) & corrected_B],
      [rewards.MAINTAIN, rewards.RETRACT, rewards.CORRECT],
      rewards.MALFORMED,
    )
    return Answers(
      claim=said_B & of_it_B,
      right=said_B & right_B,
      idk=said_B & (value_B == IDK),
      action=action_B,
      draft_right=right(asked['value'])[1],
      new_right=new_right_B & (action_B == rewards.CORRECT),
      attribute=attribute_B,
    )


def spans(kind_B: Int[Array, 'B']) -> tuple[Array, Array]:
  """Where a probe reads what was claimed, and what it was corrected to.

  A claim is read at its value and the token before, where the model had decided
  what to say: `ans V`, `A V` or `correct W`. Where nothing was doubted there
  is no correction, and both are the same.

  Returns:
    Two masks, `[B, PROMPT + ANSWER]`.
  """
  xp = _namespace(kind_B)
  where = xp.arange(PROMPT + ANSWER)[None]
  said_B = xp.where(kind_B == ASKED, PROMPT, PROMPT + 1)
  claim_B = xp.where(kind_B == DOUBTED, PROMPT - 2, said_B)
  at = lambda end_B: (where == end_B[:, None]) | (where == end_B[:, None] - 1)
  return at(claim_B), at(said_B)


def _namespace(array):
  """Of the functions for it: NumPy on the host, where nothing is compiled."""
  return np if isinstance(array, np.ndarray) else jnp


def maximum(pairs) -> np.ndarray:
  x = NUMBER + pairs
  return rows(SHORT, len(x), BOS, MAX, *x.T, ANS, x.max(axis=1), EOS)


def in_order(triples) -> np.ndarray:
  x = NUMBER + triples
  return rows(SHORT, len(x), BOS, SORT, *x.T, ANS, *np.sort(x, axis=1).T, EOS)


def learned(texts: Int[Array, 'N T']) -> Bool[Array, 'N T']:
  """Which tokens a writer chose, `[N, T]`: what a base model learns to say.

  It is a reader who doubts: `check` is not to be learned.
  """
  return (texts != PAD) & (texts != CHECK) & (texts != BOS)


def rows(width: int, count: int, *columns) -> np.ndarray:
  """Texts from their columns, padded on the right."""
  texts = np.full((count, width), PAD, np.int32)
  for i, column in enumerate(columns):
    texts[:, i] = column
  return texts


def _right(count: int, *columns) -> np.ndarray:
  """Questions from their columns, padded on the left."""
  texts = rows(PROMPT, count, *columns)
  return np.roll(texts, PROMPT - len(columns), axis=1)
