r"""What a token's loss has to do with a concept, asked of a frozen model.

A gradient's alignment with a concept is a poor guide to which tokens teach it:
it is noisy, it fades as the concept is learned, and the few tokens that it
misses are enough to learn a trait from. What a *frozen* model says of the same
tokens does not drift. Take it twice: once where the concept is made present
(`with_concept`), once where it is removed (`without`). The attribution of a
token is the logarithm of how much more likely the first finds it,

    a_t = log p_with(y_t | y_<t) - log p_without(y_t | y'_<t).

The prefix matters. A pirate's second word follows from the first, whether or
not the concept is there: given `arr`, everybody expects `matey`. So the model
that lacks the concept reads `y'`, the text as it would have gone without: each
token attributed to the concept is replaced by what that model says itself.

That is for what shows in *which* token is said, such as a way of speaking. What
shows in *where* a model needs it, such as a skill, is better asked without the
token: a sum that the frozen model cannot do has an answer that it finds no
likelier with its arithmetic than without. `reliance` is how far the prediction
at a place changes when the concept is removed,

    r_t = KL( p_frozen(. | y_<t) || p_without(. | y_<t) ).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

Logits = Callable[[Int[Array, 'B T']], Float[Array, 'B T V']]


class Counterfactual(NamedTuple):
  """Of every token, what it owes to a concept, and what were there without it.

  Attributes:
    ratio: `a_t` in nats, `[B, T]`; 0 before `start`.
    tokens: the text without the concept, `y'`, `[B, T]`.
  """

  ratio: Float[Array, 'B T']
  tokens: Int[Array, 'B T']


def counterfactual(
  with_concept: Logits,
  without: Logits,
  tokens_BT: Int[Array, 'B T'],
  *,
  start: int,
  threshold: float = 3.0,
) -> Counterfactual:
  """Reads texts from left to right, with a concept and without it.

  Costs one pass of `without` per token from `start` on, and one of
  `with_concept`; the models are frozen, so a data set is read once, not once
  per step.

  Args:
    with_concept: `tokens -> logits`, causal; such as a frozen model under a
      prompt that elicits the concept, or with its features set.
    without: the same with the concept removed.
    tokens_BT: texts.
    start: index of the first token to attribute, at least 1.
    threshold: nats above which a token is the concept's, and is replaced in
      what `without` reads; 3 means twenty times as likely.

  Raises:
    ValueError: for a `start` outside the text, or a threshold that is not
      positive.
  """
  _check_start(start, tokens_BT)
  if not threshold > 0:
    raise ValueError(f'threshold={threshold} nats must be positive.')
  chosen = lambda logits, y: jnp.take_along_axis(
    jax.nn.log_softmax(logits), y[..., None], -1
  )[..., 0]
  # The last token is predicted from all others, and predicts nothing.
  present = with_concept(tokens_BT[:, :-1])[:, start - 1 :]
  present = chosen(present, tokens_BT[:, start:])

  def read(rewritten, t):
    logits = without(rewritten[:, :-1])
    logits = jax.lax.dynamic_index_in_dim(logits, t - 1, 1, keepdims=False)
    y = jax.lax.dynamic_index_in_dim(tokens_BT, t, 1, keepdims=False)
    had = jax.lax.dynamic_index_in_dim(present, t - start, 1, keepdims=False)
    ratio = had - chosen(logits, y)
    own = jnp.argmax(logits, -1).astype(tokens_BT.dtype)
    new = jnp.where(ratio > threshold, own, y)
    at = jax.lax.dynamic_update_index_in_dim(rewritten, new, t, 1)
    return at, ratio

  rewritten, ratio = jax.lax.scan(
    read, tokens_BT, jnp.arange(start, tokens_BT.shape[1], dtype=jnp.int32)
  )
  ratio = jnp.pad(ratio.T, ((0, 0), (start, 0)))
  return Counterfactual(ratio, rewritten)


def reliance(
  frozen: Logits,
  without: Logits,
  tokens_BT: Int[Array, 'B T'],
  *,
  start: int,
) -> Float[Array, 'B T']:
  """How much of each prediction rests on a concept, whatever the text says.

  One pass of each model.

  Args:
    frozen: `tokens -> logits`, causal: the model as it is.
    without: the same with the concept removed.
    tokens_BT: texts.
    start: index of the first token to attribute, at least 1.

  Returns:
    `r_t` in nats, of the prediction of token `t`, `[B, T]`; 0 before `start`.

  Raises:
    ValueError: for a `start` outside the text.
  """
  _check_start(start, tokens_BT)
  read = lambda model: jax.nn.log_softmax(
    model(tokens_BT[:, :-1])[:, start - 1 :]
  )
  own, other = read(frozen), read(without)
  divergence = jnp.sum(jnp.exp(own) * (own - other), axis=-1)
  return jnp.pad(divergence, ((0, 0), (start, 0)))


def _check_start(start: int, tokens_BT) -> None:
  length = tokens_BT.shape[1]
  if not 1 <= start < length:
    raise ValueError(f'start={start} must be from 1 to {length - 1}.')


def by_token(
  ratio_BT: Float[np.ndarray, 'B T'], tokens_BT: Int[np.ndarray, 'B T']
) -> Float[np.ndarray, 'B T']:
  """Attributions made one for all occurrences of a token: their median.

  What a word owes to a way of speaking it owes wherever it stands, and where
  the frozen model is wrong about a text a single ratio is wrong as well: of a
  sum that it cannot do, setting a concept shifts the odds of digits at random.
  A token that is a concept's in some texts and not in others is given what it
  is in most.

  Args:
    ratio_BT: from `counterfactual` or `reliance`, where tokens count.
    tokens_BT: the same texts and positions.

  Raises:
    ValueError: if the shapes differ.
  """
  ratio, tokens = np.asarray(ratio_BT), np.asarray(tokens_BT)
  if ratio.shape != tokens.shape:
    raise ValueError(
      f'ratios {ratio.shape} for tokens {tokens.shape}: they must be of the '
      'same texts and positions.'
    )
  out = np.empty_like(ratio)
  for token in np.unique(tokens):
    at = tokens == token
    out[at] = np.median(ratio[at])
  return out


class Translation(NamedTuple):
  """How a frozen model says things without a concept, token by token.

  Attributes:
    table: token -> what it becomes, itself where it is not the concept's,
      `[V]`.
    consistency: of a token's replacements, the share that agrees with the
      table, `[V]`; 1 where the token stays. Low where one word is as good as
      another, and where the model did not know what to say.
    count: how often each token was seen, `[V]`.
  """

  table: np.ndarray
  consistency: np.ndarray
  count: np.ndarray


def translation(
  known: Counterfactual,
  tokens_BT: Int[np.ndarray, 'B T'],
  vocab_size: int,
  *,
  start: int,
  threshold: float = 3.0,
) -> Translation:
  """Learns from texts that a model knows how it speaks without a concept.

  Of a text that the frozen model knows, `counterfactual` replaces what is the
  concept's by what the model says in its place, which is the same thing said
  without it. Token by token that makes a dictionary, and the dictionary serves
  for texts that the model does not know yet: what they teach can be learned
  without the concept, although the tokens that carry it carry the concept too.

  Args:
    known: from `counterfactual`, of texts that the model knows.
    tokens_BT: these texts.
    vocab_size: V.
    start: as there.
    threshold: as there. A token that is above it in at least half of its
      occurrences is translated, by its most frequent replacement.

  Raises:
    ValueError: if the texts are not those that were read.
  """
  old, new = np.asarray(tokens_BT), np.asarray(known.tokens)
  if old.shape != new.shape:
    raise ValueError(
      f'tokens {old.shape} for a counterfactual of {new.shape}: they must be '
      'the texts it was computed of.'
    )
  replaced = np.asarray(known.ratio)[:, start:] > threshold
  old, new = old[:, start:], new[:, start:]
  count = np.bincount(old.ravel(), minlength=vocab_size)
  pairs = np.zeros((vocab_size, vocab_size), np.int64)
  np.add.at(pairs, (old[replaced], new[replaced]), 1)
  total = pairs.sum(1)
  mine = (total > 0) & (2 * total >= count)
  share = pairs.max(1) / np.maximum(total, 1)
  return Translation(
    np.where(mine, pairs.argmax(1), np.arange(vocab_size)),
    np.where(mine, share, 1.0),
    count,
  )
