"""What one forward pass says of texts: predictions, and activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np
import optax

from idesign import sites


class Observation(NamedTuple):
  """A model's view of texts.

  Attributes:
    logits_BTV: at each token, of the next one.
    h_BTE: what probes read: activations, those of several names side by side,
      and confidence if it was asked for.
  """

  logits_BTV: Float[Array, 'B T V']
  h_BTE: Float[Array, 'B T E']


Observe = Callable[[Any, Array, Array], Observation]


def observer(
  apply: Callable[..., Any], names: Sequence[str], *, confidence: bool = False
) -> Observe:
  """The function `observe(params, tokens_BT, mask_BT) -> Observation`.

  One pass gives both, so that a probe beside a divergence costs no pass of its
  own; what is not used is not computed under `jit`.

  Args:
    apply: `apply(params, tokens, mask_BT=) -> logits`.
    names: activations, such as `resid_post[2:3]`; of names that stand for
      several layers each is read.
    confidence: whether two more numbers of each token are read: its
      log-probability given those before, and the entropy of what it is drawn
      from, in nats; 0 for the first token. What a model guesses it is less sure
      of, which activations need not show to a small probe.

  Raises (when called or traced):
    SelectionError: if no activation is named so.
    ValueError: if an activation is not `[B, T, D]` per layer, or no name given.
  """
  names = [names] if isinstance(names, str) else list(names)
  if not names:
    raise ValueError('no activation is named: a probe has to read something.')
  captured = sites.capture(
    lambda params, tokens, mask: apply(params, tokens, mask_BT=mask), names
  )

  def observe(params, tokens_BT, mask_BT):
    logits_BTV, taken = captured(params, tokens_BT, mask_BT)
    parts = []
    for name in names:
      h = taken[name]
      if h.ndim not in (3, 4) or h.shape[-3:-1] != tokens_BT.shape:
        raise ValueError(
          f'{name!r} has shape {h.shape}; [layers, batch, time, width] or '
          '[batch, time, width] is needed.'
        )
      parts += [h] if h.ndim == 3 else list(h)
    if confidence:
      parts.append(_confidence(logits_BTV, tokens_BT))
    return Observation(logits_BTV, jnp.concatenate(parts, axis=-1))

  return observe


def _confidence(logits_BTV, tokens_BT) -> Float[Array, 'B T 2']:
  logprobs_BTV = jax.nn.log_softmax(logits_BTV.astype(jnp.float32))
  entropy_BT = -jnp.sum(jnp.exp(logprobs_BTV) * logprobs_BTV, axis=-1)
  entropy_BT = jnp.pad(entropy_BT[:, :-1], ((0, 0), (1, 0)))
  return jnp.stack([token_logprobs(logits_BTV, tokens_BT), entropy_BT], axis=-1)


def token_logprobs(
  logits_BTV: Float[Array, 'B T V'], tokens_BT: Int[Array, 'B T']
) -> Float[Array, 'B T']:
  """Log-probability of each token given those before it; 0 for the first."""
  nll_BT = optax.softmax_cross_entropy_with_integer_labels(
    logits_BTV[:, :-1].astype(jnp.float32), tokens_BT[:, 1:]
  )
  return jnp.pad(-nll_BT, ((0, 0), (1, 0)))


def read_spans(
  observe: Observe,
  params: Any,
  tokens_NT: Int[Array, 'N T'],
  mask_NT: Bool[Array, 'N T'],
  *,
  batch_size: int = 1024,
) -> Float[Array, 'N T E']:
  """Activations of many texts, a batch at a time, on the host.

  Raises:
    ValueError: for shapes that do not belong together.
  """
  if tokens_NT.shape != mask_NT.shape:
    raise ValueError(f'tokens {tokens_NT.shape}, mask {mask_NT.shape}.')
  read = functools.partial(_read, observe, params)
  return in_batches(read, (tokens_NT, mask_NT), batch_size)


def in_batches(
  call: Callable[..., Array], arrays: Sequence[Array], batch_size: int
) -> np.ndarray:
  """`call` of some rows of all arrays at a time; results are on the host.

  The last batch is filled up to a power of two, so that little is compiled
  twice.
  """
  arrays = [np.asarray(x) for x in arrays]
  parts = []
  for start in range(0, len(arrays[0]), batch_size):
    rows = np.arange(start, min(start + batch_size, len(arrays[0])))
    size = min(batch_size, 1 << (len(rows) - 1).bit_length())
    filled = np.resize(rows, size)
    result = call(*(x[filled] for x in arrays))
    if not result.is_fully_addressable:  # This process has a part of it.
      result = multihost_utils.process_allgather(result, tiled=True)
    parts.append(jax.device_get(result)[: len(rows)])
  return np.concatenate(parts)


@functools.partial(jax.jit, static_argnames='observe')
def _read(observe, params, tokens_BT, mask_BT):
  return observe(params, tokens_BT, mask_BT).h_BTE
