r"""K-FAC factors of a model's Fisher information, read at weight sites.

For a weight `w [d_in, d_out]` with input `x` and output gradient `g` the
Fisher block is approximated by `A (x) G`, with the uncentred second moments
`A = sum x x^T` and `G = sum g g^T` over examples and positions (Martens &
Grosse 2015; weights shared over positions by the *expand* rule of Eschenhagen
et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from idesign import sites

PyTree = Any
Logits = Callable[[PyTree, PyTree], Float[Array, 'B *T C']]


@dataclasses.dataclass(frozen=True)
class Fisher:
  """Which Fisher information the factors approximate.

  Attributes:
    labels: `'model'` samples labels from the model's own distribution, which
      gives the true Fisher; `'gold'` takes the data's, the empirical Fisher.
    temperature: both the sampled labels and the loss use `logits /
      temperature`. At interpolation the gradient `p - e_y` vanishes except on
      a few examples with small margin, and `G` collapses onto them; a higher
      temperature gives every example a say.
    normalize: `'example'` divides the output gradients of each example by
      their norm over positions and features, at each site by itself. An
      example whose gradient is exactly zero counts as zero.
    num_samples: label samples per position; at least 1, and 1 for gold labels.
  """

  labels: Literal['model', 'gold'] = 'model'
  temperature: float = 1.0
  normalize: Literal['none', 'example'] = 'none'
  num_samples: int = 1

  def __post_init__(self):
    if self.labels not in ('model', 'gold'):
      raise ValueError(f"labels is 'model' or 'gold', not {self.labels!r}.")
    if self.normalize not in ('none', 'example'):
      raise ValueError(
        f"normalize is 'none' or 'example', not {self.normalize!r}."
      )
    if not self.temperature > 0:
      raise ValueError(f'temperature must be positive, not {self.temperature}.')
    if self.num_samples < 1 or (self.labels == 'gold' and self.num_samples > 1):
      raise ValueError(
        f'num_samples is {self.num_samples}; it must be at least 1, and '
        'exactly 1 for gold labels, which are not sampled.'
      )


class Factors(NamedTuple):
  """Sums over examples, positions and label samples; a pytree to add up.

  Attributes:
    inputs: site -> `sum x x^T`, `[*stack, d_in, d_in]`, float32.
    outputs: site -> `sum g g^T`, `[*stack, d_out, d_out]`, float32.
    count: number of examples times label samples in the sums, float32.
  """

  inputs: dict[str, Array]
  outputs: dict[str, Array]
  count: Array

  def __add__(self, other: 'Factors') -> 'Factors':
    return jax.tree.map(jnp.add, self, other)


def _normalized_output_moment(x, dy):
  dy = dy.astype(jnp.float32)
  # At interpolation gradients are so small that their squares underflow.
  largest = jnp.max(jnp.abs(dy), axis=(1, 2), keepdims=True)
  dy = dy / jnp.where(largest > 0, largest, 1)
  square = jnp.sum(dy**2, axis=(1, 2), keepdims=True)
  return sites.output_moment.fn(x, dy / jnp.sqrt(jnp.maximum(square, 1)))


def negative_log_likelihood(
  logits: Float[Array, 'B *T C'],
  labels: Int[Array, 'B *T'],
  mask: Bool[Array, 'B *T'] | None = None,
) -> Float[Array, 'B']:
  """`-log p(label)` per example, summed over positions that are not masked.

  A label that is no class makes its example's loss and gradients NaN, unless
  its position is masked.
  """
  log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
  is_class = (labels >= 0) & (labels < logits.shape[-1])
  safe = jnp.where(is_class, labels, 0)
  nll = -jnp.take_along_axis(log_p, safe[..., None], axis=-1)[..., 0]
  read = is_class if mask is None else is_class | ~mask
  # Multiplied, so that the gradient is NaN as well.
  nll = nll * jnp.where(read, 1.0, jnp.nan)
  if mask is not None:
    nll = jnp.where(mask, nll, 0.0)
  return jnp.sum(nll, axis=tuple(range(1, nll.ndim)))


def kfac_factors(
  logits_fn: Logits,
  select: str | Iterable[str],
  fisher: Fisher = Fisher(),
) -> Callable[..., Factors]:
  """K-FAC factors of one batch; add the results of several batches.

  Args:
    logits_fn: `logits_fn(params, inputs) -> logits [B, *T, C]` of a
      classifier over the last axis.
    select: which parameters, as in `idesign.sites.find_sites`.
    fisher: which Fisher information.

  Returns:
    `factors(params, inputs, *, key=None, labels=None, mask=None) -> Factors`,
    to be jitted by the caller. `key` is needed to sample labels, `labels [B,
    *T]` for gold ones. `mask [B, T]` leaves positions out of the loss and of
    both factors.

  Raises (when called or traced):
    ValueError: key or labels are missing.
    Whatever `idesign.sites.collect` raises.
  """
  outputs = (
    sites.output_moment
    if fisher.normalize == 'none'
    else sites.Statistic(_normalized_output_moment, additive=False)
  )
  moments = {'inputs': sites.input_moment, 'outputs': outputs}

  def factors(params, inputs, *, key=None, labels=None, mask=None) -> Factors:
    if fisher.labels == 'model' and key is None:
      raise ValueError("labels='model' are sampled: pass key.")
    if fisher.labels == 'gold' and labels is None:
      raise ValueError("labels='gold' come from the data: pass labels.")

    def loss(params, batch):
      inputs, drawn, mask = batch
      logits = logits_fn(params, inputs) / fisher.temperature
      if fisher.labels == 'model':
        fixed = jax.lax.stop_gradient(logits).astype(jnp.float32)
        drawn = jax.random.categorical(drawn, fixed)
      return negative_log_likelihood(logits, drawn, mask)

    read = sites.collect(loss, moments, select)

    def once(drawn) -> Factors:
      out = read(params, (inputs, drawn, mask), mask=mask)
      return Factors(
        out.values['inputs'],
        out.values['outputs'],
        jnp.float32(out.losses.shape[0]),
      )

    if fisher.labels == 'gold':
      return once(labels)

    # One sample at a time: memory does not grow with their number.
    keys = jax.random.split(key, fisher.num_samples)
    zeros = jax.tree.map(
      lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(once, keys[0])
    )
    total, _ = jax.lax.scan(lambda f, k: (f + once(k), None), zeros, keys)
    return total

  return factors
