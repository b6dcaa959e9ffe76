"""What does a concept stand for? Labels without a language model.

A concept is described by where it is active (the spans of text around its most
active positions) and by what it makes the model say (the tokens whose logits
its direction raises most: nostalgebraist's logit lens, 2020). Both are facts
about the model that need no other model; the label is the tokens themselves.

Dimensions: `B` texts of a batch, `T` positions, `D` width of the activation,
`F` concepts, `V` tokens, `K` spans or tokens kept, `W` tokens of a window.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from idesign.concepts.activations import Read
from idesign.concepts.sae import SAE

# What concepts are read with: an autoencoder, or directions as columns.
Concepts = SAE | Float[Array, 'D F']
Decode = Callable[[int], str]

_LONGEST = 20  # Characters of a token in a label.


def promoted_tokens(
  directions_FD: Float[Array, 'F D'],
  unembedding_DV: Float[Array, 'D V'],
  *,
  k: int,
  gain_D: Float[Array, 'D'] | None = None,
  block: int = 128,
) -> Int[np.ndarray, 'F K']:
  """The `k` tokens with the largest `(d_c * gain) W_U`, for every concept.

  The most promoted come first, of equally promoted ones the first in the
  vocabulary. A final norm's division by the size of the activation changes no
  order and is left out; for one that also subtracts the mean, subtract it from
  the directions first.

  Args:
    directions_FD: what a concept adds to the activation, `sae.directions`.
    unembedding_DV: `lm_head/kernel`, or a tied embedding, transposed.
    k: how many tokens.
    gain_D: what the final norm multiplies by: its `scale`, or `1 + scale` if
      the model has `norm_unit_offset`. None leaves it out.
    block: concepts at a time; memory is that of `block * V` logits.

  Raises:
    ValueError: if shapes do not fit, the vocabulary has fewer than `k` tokens,
      or one of their logits is not finite.
  """
  width = directions_FD.shape[1:]
  gain = width if gain_D is None else gain_D.shape
  if not width == gain == unembedding_DV.shape[:-1]:
    raise ValueError(
      f'directions {directions_FD.shape}, gain {gain} and unembedding '
      f'{unembedding_DV.shape} must be [F, D], [D] and [D, V] of one width D.'
    )
  vocabulary = unembedding_DV.shape[1]
  if not 1 <= k <= vocabulary:
    raise ValueError(f'k={k}: the vocabulary has {vocabulary} tokens.')

  # The unembedding is an argument: a constant would be copied and compiled in.
  @jax.jit
  def top(directions_FD, unembedding_DV, gain_D):
    def one(direction_D):
      gained_D = direction_D if gain_D is None else direction_D * gain_D
      return jax.lax.top_k(gained_D @ unembedding_DV, k)

    return jax.lax.map(one, directions_FD, batch_size=block)

  found = top(directions_FD, unembedding_DV, gain_D)
  logit_FK, token_FK = map(np.asarray, found)
  bad = np.flatnonzero(~np.isfinite(logit_FK).all(axis=1))
  if bad.size:
    raise ValueError(
      f'the logits of concept {bad[0]} are not finite: its direction, the '
      'gain or the unembedding holds NaN or infinity.'
    )
  return token_FK


class Span(NamedTuple):
  """Where a concept is active.

  Attributes:
    text, position: the text, counted over all batches, and where in it.
    activation: there.
    tokens: the position's and those around it.
    marked: which of `tokens` is the position's.
  """

  text: int
  position: int
  activation: float
  tokens: tuple[int, ...]
  marked: int


class Spans(NamedTuple):
  """The most active positions of every concept, the most active first.

  Attributes:
    activation_FK: minus infinity where there are fewer than K.
    text_FK, position_FK: as in `Span`, -1 where there are fewer.
    token_FKW: the tokens around it, its own in the middle, -1 outside the text.
  """

  activation_FK: Float[np.ndarray, 'F K']
  text_FK: Int[np.ndarray, 'F K']
  position_FK: Int[np.ndarray, 'F K']
  token_FKW: Int[np.ndarray, 'F K W']

  def of(self, concept: int) -> list[Span]:
    """Those of one concept; none if it was never active.

    Raises:
      ValueError: if there is no such concept.
    """
    if not 0 <= concept < len(self.text_FK):  # -1 would be the last.
      raise ValueError(
        f'there is no concept {concept}: they are 0 to {len(self.text_FK) - 1}.'
      )
    spans, middle = [], self.token_FKW.shape[-1] // 2
    for value, text, position, window in zip(*(x[concept] for x in self)):
      if text >= 0:
        tokens = tuple(window[window >= 0].tolist())
        marked = int((window[:middle] >= 0).sum())
        place = int(text), int(position), float(value)
        spans.append(Span(*place, tokens, marked))
    return spans


def top_spans(
  read: Read,
  params: Any,
  concepts: Concepts,
  batches: Iterable[tuple[Any, np.ndarray, np.ndarray | None]],
  *,
  k: int,
  width: int,
  per_text: int = 1,
  pad: int | None = None,
) -> Spans:
  """The `k` most active positions of every concept, in one pass over texts.

  Only `[F, k]` positions and their windows are held between batches. Equally
  active positions come in the order in which they are read.

  Args:
    read: `read(params, batch) -> [B, T, D]`, from `reader`; jitted here.
    params: of the model.
    concepts: an autoencoder, whose features count where they are above 0, or
      directions as columns, whose inner products count everywhere.
    batches: triples of what `read` takes, the tokens `[B, T]`, at least 0, and
      a mask `[B, T]`, false for positions that do not count (padding, a first
      token), or None.
    k: spans per concept.
    width: tokens shown on either side, whether they count or not.
    per_text: at most so many of the spans are from one text.
    pad: a token that is not shown beside another.

  Raises:
    ValueError: for numbers out of range, tokens or a mask of another shape, a
      negative token, an activation that is not finite, or no position at all.
  """
  if k < 1 or width < 0 or per_text < 1:
    raise ValueError(
      f'k={k} and per_text={per_text} must be at least 1, width={width} at '
      'least 0.'
    )
  read = jax.jit(read)
  is_sae = isinstance(concepts, SAE)
  size = concepts.config.d_sae if is_sae else concepts.shape[1]
  none_FK = jnp.full((size, k), -1, jnp.int32)
  none_FKW = jnp.full((size, k, 2 * width + 1), -1, jnp.int32)
  held = Spans(jnp.full((size, k), -jnp.inf), none_FK, none_FK, none_FKW)
  texts = positions = 0
  for number, (batch, tokens, mask) in enumerate(batches):
    h_BTD = read(params, batch)
    token_BT = np.asarray(tokens)
    mask_BT = np.ones(token_BT.shape) if mask is None else np.asarray(mask)
    mask_BT = mask_BT.astype(bool)
    if not h_BTD.shape[:2] == token_BT.shape == mask_BT.shape:
      raise ValueError(
        f'batch {number} has tokens {token_BT.shape} and mask {mask_BT.shape}; '
        f'the activation has positions {h_BTD.shape[:2]}.'
      )
    if (token_BT < 0).any():
      raise ValueError(f'batch {number} has a token {token_BT.min()}, below 0.')
    held, finite = _merge(
      held, concepts, h_BTD, token_BT, mask_BT, texts, per_text, pad
    )
    if not finite:
      raise ValueError(f'the activation of batch {number} is not finite.')
    texts, positions = texts + len(token_BT), positions + mask_BT.sum()
  if not positions:
    raise ValueError(f'of {texts} texts no position counts: nothing to read.')
  return Spans(*map(np.asarray, held))


@functools.partial(jax.jit, static_argnames=['per_text', 'pad'])
def _merge(held, concepts, h_BTD, token_BT, mask_BT, first_text, per_text, pad):
  """The best of what was held and of a batch; whether that is finite."""
  size, k, window = held.token_FKW.shape
  batch, time = token_BT.shape
  n = min(per_text, time)
  h_BTD = jnp.where(mask_BT[..., None], h_BTD, 0)

  def best(text):
    h_TD, mask_T = text
    f_TF = _activations(concepts, h_TD)
    counts_TF = jnp.broadcast_to(mask_T[:, None], f_TF.shape)
    if isinstance(concepts, SAE):
      counts_TF &= f_TF > 0
    f_TF = jnp.where(counts_TF, f_TF, -jnp.inf).astype(jnp.float32)
    return jax.lax.top_k(f_TF.T, n)

  # One text after the other: features at all positions are many numbers.
  found = jax.lax.map(best, (h_BTD, mask_BT))
  value_FC, position_FC = (
    jnp.moveaxis(x_BFN, 0, 1).reshape(size, batch * n) for x_BFN in found
  )
  text_C = first_text + jnp.repeat(jnp.arange(batch, dtype=jnp.int32), n)
  text_FC = jnp.broadcast_to(text_C[None], position_FC.shape)
  # Of equal ones `top_k` takes the first; what was held was read before.
  join = lambda old, new: jnp.concatenate([old, new], axis=1)
  value_FK, at_FK = jax.lax.top_k(join(held.activation_FK, value_FC), k)
  pick = lambda old, new: jnp.take_along_axis(join(old, new), at_FK, axis=1)
  text_FK = pick(held.text_FK, text_FC)
  position_FK = pick(held.position_FK, position_FC)

  shift_11W = (jnp.arange(window, dtype=jnp.int32) - window // 2)[None, None]
  near_FKW = position_FK[..., None] + shift_11W
  row_FK1 = jnp.maximum(text_FK - first_text, 0)[..., None]
  token_FKW = token_BT[row_FK1, jnp.clip(near_FKW, 0, time - 1)]
  shown_FKW = (near_FKW >= 0) & (near_FKW < time)
  if pad is not None:
    shown_FKW &= (token_FKW != pad) | (shift_11W == 0)
  token_FKW = jnp.where(shown_FKW, token_FKW, -1).astype(jnp.int32)
  concept_F1 = jnp.arange(size)[:, None]
  old_FKW = held.token_FKW[concept_F1, jnp.minimum(at_FK, k - 1)]
  token_FKW = jnp.where(at_FK[..., None] < k, old_FKW, token_FKW)
  merged = Spans(value_FK, text_FK, position_FK, token_FKW)
  return merged, jnp.isfinite(h_BTD).all()


def render(span: Span, decode: Decode) -> str:
  """The span as text, its active token as `<<token>>`.

  Args:
    span: one of `Spans.of`.
    decode: the text of one token. It is quoted as it is.
  """
  parts = [decode(token) for token in span.tokens]
  parts[span.marked] = f'<<{parts[span.marked]}>>'
  return ''.join(parts)


def label(
  marked: Sequence[str], promoted: Sequence[str], *, words: int = 3
) -> str:
  """A short label: `marked tokens → promoted tokens`, either of which may lack.

  Args:
    marked: the active tokens of the concept's spans, the most active first.
      Those found most often are taken, of equally frequent ones the first.
      Tokens that differ in spaces around them are one.
    promoted: the tokens it promotes, the most promoted first.
    words: how many of either are taken.
  """
  count = collections.Counter(map(visible, marked))
  said = dict.fromkeys(map(visible, promoted))
  before = ', '.join(word for word, _ in count.most_common(words))
  after = ', '.join(list(said)[:words])
  return f'{before} → {after}'.strip() if after else before


def _activations(concepts: Concepts, h: Float[Array, '*B D']) -> Array:
  if isinstance(concepts, SAE):
    return concepts.encode(h)
  if h.shape[-1] != concepts.shape[0]:
    raise ValueError(
      f'the activation has width {h.shape[-1]} and the concepts are read from '
      f'width {concepts.shape[0]}: they belong to another layer or model.'
    )
  return h @ concepts


def visible(token: str) -> str:
  """A token in a label: one short word, also where it is a space."""
  kept = ''.join(c if c.isprintable() else ' ' for c in token).strip()
  kept = kept or repr(token)
  return kept if len(kept) <= _LONGEST else kept[:_LONGEST] + '…'
