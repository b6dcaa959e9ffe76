r"""Which Fisher information is read, and the losses whose gradients it takes.

For one example with logits `z` (over all positions) and Jacobian `J` of `z` in
the parameters, the Fisher information is `J^T M J` with the covariance `M` of
the log-likelihood's gradient in `z`. It is a sum of outer products of
gradients: in expectation over labels that the model samples itself, or exactly
over the columns of a square root of `M` (Martens 2020). The labels of the data
give the *empirical* Fisher, which is another matrix (Kunstner et al. 2019).
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

PyTree = Any
Logits = Callable[[PyTree, PyTree], Float[Array, 'B *T C']]


@dataclasses.dataclass(frozen=True)
class Fisher:
  """Which Fisher information the factors approximate.

  Attributes:
    labels: `'model'` samples labels from the model's own distribution, which
      gives the true Fisher in expectation; `'exact'` goes through a square root
      of the covariance, one backward pass for each position and class, which
      gives it exactly, for small models; `'gold'` takes the data's labels, the
      empirical Fisher.
    temperature: both the labels and the loss use `logits / temperature`. At
      interpolation the gradient `p - e_y` vanishes except on a few examples
      with small margin, and `G` collapses onto them; a higher temperature gives
      every example a say.
    normalize: `'example'` divides the output gradients of each example by
      their norm over positions and features, at each site by itself. An
      example whose gradient is exactly zero counts as zero.
    num_samples: label samples per position; at least 1, and 1 unless sampled.
    likelihood: `'categorical'`: logits of a softmax; `'normal'`: means of
      normal distributions of variance one, whose loss is half the squared
      error. Gold labels are then `[B, *T, C]`.
  """

  labels: Literal['model', 'gold', 'exact'] = 'model'
  temperature: float = 1.0
  normalize: Literal['none', 'example'] = 'none'
  num_samples: int = 1
  likelihood: Literal['categorical', 'normal'] = 'categorical'

  def __post_init__(self):
    if self.labels not in ('model', 'gold', 'exact'):
      raise ValueError(
        f"labels is 'model', 'gold' or 'exact', not {self.labels!r}."
      )
    if self.normalize not in ('none', 'example'):
      raise ValueError(
        f"normalize is 'none' or 'example', not {self.normalize!r}."
      )
    if self.likelihood not in ('categorical', 'normal'):
      raise ValueError(
        f"likelihood is 'categorical' or 'normal', not {self.likelihood!r}."
      )
    if self.labels == 'exact' and self.normalize != 'none':
      raise ValueError(
        "labels='exact' have a gradient for every class, none of which is the "
        "example's: leave normalize='none', or sample labels."
      )
    if not self.temperature > 0:
      raise ValueError(f'temperature must be positive, not {self.temperature}.')
    if self.num_samples < 1 or (
      self.labels != 'model' and self.num_samples > 1
    ):
      raise ValueError(
        f'num_samples is {self.num_samples}; it must be at least 1, and '
        'exactly 1 for labels that are not sampled.'
      )


def negative_log_likelihood(
  logits: Float[Array, 'B *T C'],
  labels: Int[Array, 'B *T'],
  mask: Bool[Array, 'B *T'] | None = None,
) -> Float[Array, 'B']:
  """`-log p(label)` per example, summed over positions that are not masked.

  A label that is no class makes its example's loss and gradients NaN, unless
  its position is masked.
  """
  log_p = jax.nn.log_softmax(at_least_float32(logits))
  is_class = (labels >= 0) & (labels < logits.shape[-1])
  safe = jnp.where(is_class, labels, 0)
  nll = -jnp.take_along_axis(log_p, safe[..., None], axis=-1)[..., 0]
  read = is_class if mask is None else is_class | ~mask
  # Multiplied, so that the gradient is NaN as well.
  nll = nll * jnp.where(read, 1.0, jnp.nan).astype(nll.dtype)
  return sum_positions(nll, mask)


def softmax_middle(
  logits: Float[Array, '*B C'], vector: Float[Array, '*B C']
) -> Float[Array, '*B C']:
  """`(diag(p) - p p^T) v = p * v - p <p, v>` without forming the matrix.

  In float32 at least: `<p, v>` is subtracted from `v`.
  """
  p = jax.nn.softmax(at_least_float32(logits))
  vector = vector.astype(p.dtype)
  return p * (vector - jnp.sum(p * vector, axis=-1, keepdims=True))


def draws(fisher: Fisher, logits: jax.ShapeDtypeStruct, key, labels):
  """What the passes of one batch need, stacked along a first axis.

  Args:
    fisher: which Fisher information.
    logits: of the batch, for shapes.
    key: one, or one for each example, `[B]`: what an example's labels are then
      depends neither on the batch nor on how that is split over devices.
    labels: gold ones.

  Returns:
    Keys of samples `[num_samples, B]`, the numbers of the columns of a square
    root, `[T * C]`, or gold labels `[1, B, *T]`; for `draw_losses`, one each.
  """
  if fisher.labels == 'model':
    if key is None:
      raise ValueError("labels='model' are sampled: pass key.")
    keys = key if key.ndim else jax.random.split(key, logits.shape[0])
    split = lambda key: jax.random.split(key, fisher.num_samples)
    return jnp.swapaxes(jax.vmap(split)(keys), 0, 1)
  if fisher.labels == 'gold':
    if labels is None:
      raise ValueError("labels='gold' come from the data: pass labels.")
    return jnp.asarray(labels)[None]
  return jnp.arange(logits.size // logits.shape[0])


def draw_losses(
  fisher: Fisher,
  logits: Float[Array, 'B *T C'],
  draw: Array,
  mask: Bool[Array, 'B *T'] | None,
) -> Float[Array, 'B']:
  """Losses whose gradients, squared and summed over draws, are the Fisher.

  Only the gradients mean something, except for gold labels.
  """
  z = at_least_float32(logits) / fisher.temperature
  fixed = jax.lax.stop_gradient(z)
  categorical = fisher.likelihood == 'categorical'
  if fisher.labels == 'gold' and not categorical:
    return sum_positions(0.5 * jnp.sum((z - draw) ** 2, axis=-1), mask)
  if categorical and fisher.labels != 'exact':
    if fisher.labels == 'model':
      draw = jax.vmap(jax.random.categorical)(draw, fixed)
    return negative_log_likelihood(z, draw, mask)
  if fisher.labels == 'model':  # Of a normal distribution: p - y is the noise.
    noise = lambda key: jax.random.normal(key, z.shape[1:], z.dtype)
    slope = jax.vmap(noise)(draw)
  else:
    slope = _root_column(fixed, draw, categorical)
  return sum_positions(jnp.sum(slope * z, axis=-1), mask)


def _root_column(z, column, categorical: bool):
  """Column `(t, c)` of a square root of `M`: `sqrt(p_c) (e_c - p)` at `t`."""
  num_classes = z.shape[-1]
  one_hot = jax.nn.one_hot(column % num_classes, num_classes, dtype=z.dtype)
  slope = jnp.broadcast_to(one_hot, z.shape)
  if categorical:
    p = jax.nn.softmax(z)
    # An exponential of half a logarithm: a small p has a finite root.
    root = jnp.exp(jax.nn.log_softmax(z) / 2)
    slope = jnp.sum(root * slope, axis=-1, keepdims=True) * (slope - p)
  here = jnp.arange(math.prod(z.shape[1:-1])) == column // num_classes
  return jnp.where(here.reshape(z.shape[1:-1])[None, ..., None], slope, 0)


def sum_positions(values, mask) -> Float[Array, 'B']:
  """Per example, over positions that are not masked."""
  if mask is not None:
    values = jnp.where(mask, values, jnp.zeros((), values.dtype))
  return jnp.sum(values, axis=tuple(range(1, values.ndim)))


def at_least_float32(x: Array) -> Array:
  """Half precision widened; float64 stays."""
  return x if x.dtype == jnp.float64 else x.astype(jnp.float32)
