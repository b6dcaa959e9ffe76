"""Sampling from a decoder: one compiled program, prefill then decode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from idesign.models.attention import KVCache
from idesign.models.functional import Params


class Generation(NamedTuple):
  """What was sampled.

  Attributes:
    tokens_BN: the new tokens; the pad token after a stop token.
    lengths_B: number of new tokens per row, the stop token included.
    logprobs_BN: log-probability of each token under the model's own softmax
      (temperature 1, nothing filtered), float32; 0 after a stop token.
    sampling_logprobs_BN: the same under the distribution that was sampled
      from; 0 for greedy decoding and after a stop token.
  """

  tokens_BN: Int[Array, 'B N']
  lengths_B: Int[Array, 'B']
  logprobs_BN: Float[Array, 'B N']
  sampling_logprobs_BN: Float[Array, 'B N']


def generate(
  apply: Callable[..., Any],
  params: Params,
  prompts_BT: Int[Array, 'B T'],
  mask_BT: Bool[Array, 'B T'],
  *,
  key: jax.Array,
  max_new_tokens: int,
  cache: KVCache,
  repeats: int = 1,
  temperature: jax.typing.ArrayLike = 1.0,
  top_k: int | None = None,
  top_p: jax.typing.ArrayLike | None = None,
  stop_tokens: Sequence[int] = (),
  pad_token: int = 0,
) -> Generation:
  """Continues every prompt by up to `max_new_tokens` tokens.

  The logits are divided by `temperature`; of them the `top_k` largest are
  kept; of those the smallest set whose probability reaches `top_p`; from the
  rest a token is drawn. Ties go to the lower token id. A row ends with a stop
  token; the loop ends when all rows have.

  Prompts may be padded on either side: the prompt is where the mask is true,
  and positions count its real tokens from 0. Padding takes cache slots but is
  never seen.

  Row `b` at step `i` draws with `fold_in(fold_in(key, b), i)`, so that what a
  row gets depends on its prompt, its number and the key, not on the batch.

  Args:
    apply: `apply(params, tokens, mask_BT=, cache=) -> (logits, cache)`:
      `Model.apply`, or a function around it (to edit activations, say). Pass
      the same object again to use the compiled program again.
    params: first argument of `apply`.
    prompts_BT: prompt tokens.
    mask_BT: true for real tokens, at least one in every row.
    key: random key.
    max_new_tokens: length of the output.
    cache: an empty `init_cache(config, B, S)` with
      `S >= T + max_new_tokens - 1`; it is not changed.
    repeats: continuations of each prompt, which is read once for all of them;
      rows `b repeats` to `(b + 1) repeats - 1` of the output are prompt `b`'s.
    temperature: 0 is greedy decoding. Traced: changing it does not recompile.
    top_k: how many tokens to keep; None: all.
    top_p: probability to keep, in (0, 1]; None: all. Traced.
    stop_tokens: ids that end a row.
    pad_token: what follows a stop token.

  Returns:
    A `Generation`. Where the model's logits are NaN (a token outside the
    vocabulary) the log-probabilities of that row are, from there on.

  Raises:
    ValueError: if shapes or settings do not fit. Values of traced arguments
      are checked only where they are known, outside `jit`.
  """
  _check(prompts_BT, mask_BT, max_new_tokens, cache, temperature, top_k, top_p)
  if repeats < 1:
    raise ValueError(f'repeats={repeats} must be at least 1.')
  return _generate(
    apply,
    params,
    jnp.asarray(prompts_BT, jnp.int32),
    jnp.asarray(mask_BT, bool),
    key,
    cache,
    jnp.asarray(temperature, jnp.float32),
    None if top_p is None else jnp.asarray(top_p, jnp.float32),
    jnp.asarray(tuple(stop_tokens), jnp.int32),
    jnp.asarray(pad_token, jnp.int32),
    max_new_tokens=max_new_tokens,
    repeats=repeats,
    top_k=top_k,
  )


@functools.partial(
  jax.jit, static_argnames=('apply', 'max_new_tokens', 'repeats', 'top_k')
)
def _generate(
  apply,
  params,
  prompts_BT,
  mask_BT,
  key,
  cache,
  temperature,
  top_p,
  stop_tokens_K,
  pad_token,
  *,
  max_new_tokens,
  repeats,
  top_k,
) -> Generation:
  batch = prompts_BT.shape[0] * repeats
  row_keys_B = jax.vmap(lambda b: jax.random.fold_in(key, b))(jnp.arange(batch))

  def draw(logits_BV, step, state):
    """Draws the tokens of one step and writes them down."""
    logits_BV = logits_BV.astype(jnp.float32)
    kept_BV = filter_logits(logits_BV, temperature, top_k=top_k, top_p=top_p)
    keys_B = jax.vmap(lambda k: jax.random.fold_in(k, step))(row_keys_B)
    logprobs_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    kept_logprobs_BV = jax.nn.log_softmax(kept_BV, axis=-1)
    uniform_B = jax.vmap(jax.random.uniform)(keys_B)
    tokens_B = inverse_cdf(uniform_B, kept_logprobs_BV)
    own_B, sampled_B = (
      jnp.take_along_axis(x_BV, tokens_B[:, None], axis=1)[:, 0]
      for x_BV in (logprobs_BV, kept_logprobs_BV)
    )

    done_B = state['done']
    tokens_B = jnp.where(done_B, pad_token, tokens_B)
    own_B = jnp.where(done_B, 0, own_B)
    sampled_B = jnp.where(done_B, 0, sampled_B)
    stopped_B = jnp.any(tokens_B[:, None] == stop_tokens_K[None], axis=1)
    out = state['out']
    return {
      'out': Generation(
        tokens_BN=out.tokens_BN.at[:, step].set(tokens_B),
        lengths_B=out.lengths_B + (~done_B).astype(jnp.int32),
        logprobs_BN=out.logprobs_BN.at[:, step].set(own_B),
        sampling_logprobs_BN=(
          out.sampling_logprobs_BN.at[:, step].set(sampled_B)
        ),
      ),
      'last': tokens_B,
      'done': done_B | stopped_B,
    }

  shape = (batch, max_new_tokens)
  state = {
    'out': Generation(
      tokens_BN=jnp.full(shape, pad_token),
      lengths_B=jnp.zeros((batch,), jnp.int32),
      logprobs_BN=jnp.zeros(shape, jnp.float32),
      sampling_logprobs_BN=jnp.zeros(shape, jnp.float32),
    ),
    'last': jnp.zeros((batch,), jnp.int32),
    'done': jnp.zeros((batch,), bool),
  }
  logits_BTV, cache = apply(params, prompts_BT, mask_BT=mask_BT, cache=cache)
  slots_T = jnp.arange(prompts_BT.shape[1])[None]
  last_B = jnp.max(jnp.where(mask_BT, slots_T, 0), axis=1)
  logits_BV = jnp.take_along_axis(logits_BTV, last_B[:, None, None], 1)[:, 0]
  if repeats > 1:
    logits_BV = jnp.repeat(logits_BV, repeats, axis=0)
    cache = cache.repeated(repeats)
  state = draw(logits_BV, 0, state)

  def unfinished(carry):
    step, state, _ = carry
    return (step < max_new_tokens) & ~jnp.all(state['done'])

  def decode(carry):
    step, state, cache = carry
    logits_B1V, cache = apply(
      params,
      state['last'][:, None],
      mask_BT=~state['done'][:, None],
      cache=cache,
    )
    return step + 1, draw(logits_B1V[:, 0], step, state), cache

  carry = (jnp.ones((), jnp.int32), state, cache)
  return jax.lax.while_loop(unfinished, decode, carry)[1]['out']


def inverse_cdf(
  uniform_B: Float[Array, 'B'], logprobs_BV: Float[Array, 'B V']
) -> Int[Array, 'B']:
  """The first token whose cumulative probability is above `uniform`.

  One random number a row: one for each token of the vocabulary (the Gumbel
  trick) can cost as much as a small model, and is as fine, 24 bits.
  """
  probs_BV = jnp.exp(logprobs_BV)
  cdf_BV = jnp.cumsum(probs_BV, axis=-1)
  # Sums in another order are not quite monotone: what has no probability must
  # not be chosen for that.
  above_BV = (cdf_BV > uniform_B[:, None] * cdf_BV[:, -1:]) & (probs_BV > 0)
  first_B = jnp.argmax(above_BV, axis=-1)
  # A uniform of almost 1 may have nothing above.
  likeliest_B = jnp.argmax(probs_BV, axis=-1)
  tokens_B = jnp.where(jnp.any(above_BV, axis=-1), first_B, likeliest_B)
  return tokens_B.astype(jnp.int32)


def filter_logits(
  logits_BV: Float[Array, 'B V'],
  temperature: jax.typing.ArrayLike = 1.0,
  *,
  top_k: int | None = None,
  top_p: jax.typing.ArrayLike | None = None,
) -> Float[Array, 'B V']:
  """Logits of the distribution that `generate` samples from.

  `softmax` of the result is that distribution: temperature, then top-k, then
  top-p, then renormalised. Tokens outside have `-inf`. At temperature 0 only
  the largest logit stays. Ties go to the lower token id.
  """
  vocab = logits_BV.shape[-1]
  greedy = jnp.asarray(temperature, jnp.float32) == 0
  scaled_BV = logits_BV / jnp.where(greedy, 1, temperature)
  best_B = jnp.argmax(logits_BV, axis=-1)
  keep_BV = ~greedy | (jnp.arange(vocab)[None] == best_B[:, None])
  if top_k is not None or top_p is not None:
    order_BV = jnp.argsort(scaled_BV, axis=-1, descending=True, stable=True)
    rank_BV = jnp.argsort(order_BV, axis=-1)
    sorted_BV = jnp.take_along_axis(scaled_BV, order_BV, axis=-1)
    chosen_BV = jnp.arange(vocab)[None] < (vocab if top_k is None else top_k)
    if top_p is not None:
      probs_BV = jax.nn.softmax(
        jnp.where(chosen_BV, sorted_BV, -jnp.inf), axis=-1
      )
      before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
      # The most probable token always stays.
      first_BV = jnp.arange(vocab)[None] == 0
      chosen_BV = chosen_BV & ((before_BV < top_p) | first_BV)
    chosen_BV = jnp.broadcast_to(chosen_BV, logits_BV.shape)
    keep_BV = keep_BV & jnp.take_along_axis(chosen_BV, rank_BV, axis=-1)
  return jnp.where(keep_BV, scaled_BV, -jnp.inf)


def _check(
  prompts_BT, mask_BT, max_new_tokens, cache, temperature, top_k, top_p
) -> None:
  if prompts_BT.ndim != 2 or prompts_BT.shape != mask_BT.shape:
    raise ValueError(
      f'prompts are {prompts_BT.shape} and their mask {mask_BT.shape}; both '
      'must be [batch, time].'
    )
  if max_new_tokens < 1:
    raise ValueError(f'max_new_tokens={max_new_tokens} must be at least 1.')
  batch, time = prompts_BT.shape
  slots = cache.valid_BS.shape
  if slots[0] != batch or slots[1] < time + max_new_tokens - 1:
    raise ValueError(
      f'the cache has {slots[1]} slots for {slots[0]} rows; {batch} prompts '
      f'of {time} and {max_new_tokens} new tokens need at least '
      f'{time + max_new_tokens - 1} for {batch}.'
    )
  if top_k is not None and top_k < 1:
    raise ValueError(f'top_k={top_k} must be at least 1, or None.')
  known = lambda x: x is not None and not isinstance(x, jax.core.Tracer)
  if known(temperature) and not temperature >= 0:
    raise ValueError(f'temperature={temperature} must be at least 0.')
  if known(top_p) and not 0 < top_p <= 1:
    raise ValueError(f'top_p={top_p} must be in (0, 1], or None.')
  if known(cache.length) and int(cache.length):
    raise ValueError(
      f'the cache holds {int(cache.length)} tokens; pass an empty one.'
    )
  if known(mask_BT) and not np.asarray(mask_BT).any(axis=1).all():
    raise ValueError('a prompt has no real token: its mask is all false.')
