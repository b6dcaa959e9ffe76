r"""How examples use the components of a weight: many a little, or few a lot.

With the gradient `dW_n` of example `n` and bases `u`, `v`, example `n` pulls on
component `(i, j)` by `s_n = u_i^T dW_n v_j`. Over examples,

  curvature            mean s^2                      on single examples
  batch curvature      (mean s)^2                    on a large batch
  coherence            (mean s)^2 / mean s^2         1: all pull alike
  participation        (sum s^2)^2 / (N sum s^4)     1: all use it equally,
                                                     1/N: one example alone

Coherence and batch curvature need gold labels: with labels that the model
samples itself the mean of `s` is zero by construction.

What inputs and output gradients give by themselves, without belonging
together, is the *null*: inputs of one example meet the gradients of another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np

from idesign import sites
from idesign.curvature import fisher as fisher_lib
from idesign.curvature.fisher import Fisher, Logits
from idesign.curvature.kfac import Bases, normalized


class Moments(NamedTuple):
  """Sums of powers of `s` over examples; a pytree to add up with `+`.

  The fourth is of `s / largest`: at interpolation gradients are so small that
  their fourth powers leave the range of floats.

  Attributes:
    first: site -> `sum s`, `[*stack, d_in, d_out]`.
    second: site -> `sum s^2`.
    fourth: site -> `sum (s / largest)^4`.
    largest: site -> `max |s|`.
    count: number of examples, float32.
  """

  first: dict[str, Array]
  second: dict[str, Array]
  fourth: dict[str, Array]
  largest: dict[str, Array]
  count: Array

  def __add__(self, other: 'Moments') -> 'Moments':
    add = functools.partial(jax.tree.map, jnp.add)
    largest = jax.tree.map(jnp.maximum, self.largest, other.largest)

    def rescale(fourth, before, after):
      # The ratio first: a quotient of fourth powers would underflow.
      ratio = before / jnp.where(after > 0, after, 1)
      return fourth * ratio**4

    fourth = add(
      jax.tree.map(rescale, self.fourth, self.largest, largest),
      jax.tree.map(rescale, other.fourth, other.largest, largest),
    )
    return Moments(
      add(self.first, other.first), add(self.second, other.second), fourth,
      largest, self.count + other.count,
    )  # fmt: skip

  def curvature(self) -> dict[str, np.ndarray]:
    """`mean s^2`: the curvature of the empirical Fisher information."""
    return self._each(lambda m: m.second / m.count)

  def batch_curvature(self) -> dict[str, np.ndarray]:
    """`(mean s)^2`: what is left of it where examples pull against another."""
    return self._each(lambda m: (m.first / m.count) ** 2)

  def coherence(self) -> dict[str, np.ndarray]:
    """Of the two, the ratio, in [0, 1]; NaN where no example pulls."""
    return self._each(lambda m: _ratio(m.first**2, m.count * m.second))

  def participation(self) -> dict[str, np.ndarray]:
    """The share of examples that use a component; NaN where none does."""

    def one(m):
      square = _ratio(m.second, m.largest**2)
      return _ratio(square**2, m.count * m.fourth)

    return self._each(one)

  def _each(self, function) -> dict[str, np.ndarray]:
    count = np.float64(self.count)
    wide = lambda x: np.asarray(x, np.float64)
    return {
      name: function(
        Moments(
          wide(self.first[name]), wide(self.second[name]),
          wide(self.fourth[name]), wide(self.largest[name]), count,
        )
      )
      for name in self.first
    }  # fmt: skip


def component_moments(
  logits_fn: Logits,
  select: str | Iterable[str],
  fisher: Fisher = Fisher(labels='gold'),
) -> Callable[..., Moments]:
  """Moments of one batch; add the results of several batches.

  Args:
    logits_fn, select: as for `kfac_factors`.
    fisher: which gradients; one for each example, hence not exact labels, nor
      several samples.

  Returns:
    `moments(params, inputs, bases, *, key=None, labels=None, mask=None,
    shuffle=None) -> Moments`, with `bases` from `as_bases`. With a key
    `shuffle` they are those of the null: at every site each example's inputs
    meet the output gradients of an example drawn without replacement, position
    by position, of those that are not zero (masked).
  """
  if fisher.labels == 'exact' or fisher.num_samples > 1:
    raise ValueError(
      'Moments are of one gradient for each example: take gold labels, or one '
      f'sample, not labels={fisher.labels!r} with num_samples='
      f'{fisher.num_samples}.'
    )

  def losses(params, batch):
    inputs, draw, mask = batch
    return fisher_lib.draw_losses(fisher, logits_fn(params, inputs), draw, mask)

  def reader(shuffled: bool):
    statistic = sites.Statistic(
      _shuffled_powers if shuffled else _powers, additive=False
    )
    if fisher.normalize == 'example':
      statistic = normalized(statistic)
    return sites.collect(losses, {'powers': statistic}, select)

  def moments(
    params, inputs, bases: Bases, *,
    key=None, labels=None, mask=None, shuffle=None,
  ) -> Moments:  # fmt: skip
    logits = jax.eval_shape(logits_fn, params, inputs)
    draw = fisher_lib.draws(fisher, logits, key, labels)
    given = dict(bases)
    if shuffle is not None:
      order = jax.random.permutation(shuffle, logits.shape[0])
      given = {n: (*b, _repeated(order, b[0])) for n, b in bases.items()}
    batch = inputs, jax.tree.map(lambda d: d[0], draw), mask
    out = reader(shuffle is not None)(
      params, batch, mask=mask, inputs={'powers': given}
    )
    parts = out.values['powers']
    # The axis of powers is behind those of the stack.
    pick = lambda k: {n: jnp.take(p, k, axis=-3) for n, p in parts.items()}
    count = jnp.float32(out.losses.shape[0])
    return Moments(pick(0), pick(1), pick(2), pick(3), count)

  return moments


def band_shares(
  scores: np.ndarray, values: np.ndarray, edges: Iterable[float]
) -> np.ndarray:
  """The share of `values` in bands of components, ordered by their scores.

  Args:
    scores: such as curvature, any shape; the largest come first, equal ones
      in row-major order.
    values: of the same shape, not negative: such as the squared gradients of
      memorized examples.
    edges: shares of components where bands end, ascending, in (0, 1); `(0.1,
      0.5)` are the bands of the first tenth, the next four, and the rest.

  Returns:
    `[len(edges) + 1]`, summing to one.
  """
  edges = list(edges)
  if edges != sorted(edges) or not all(0 < e < 1 for e in edges):
    raise ValueError(f'edges must ascend within (0, 1), not {edges}.')
  order = np.argsort(-np.asarray(scores).reshape(-1), kind='stable')
  ordered = np.asarray(values, np.float64).reshape(-1)[order]
  stops = [round(e * ordered.size) for e in edges]
  sums = np.array([part.sum() for part in np.split(ordered, stops)])
  return sums / sums.sum()


def _powers(x, dy, inputs) -> Array:
  basis_in, basis_out = inputs
  s = sites.per_example_gradient.fn(
    _product(x, basis_in), _product(dy, basis_out)
  )
  largest = jnp.max(jnp.abs(s), axis=0)
  scaled = s / jnp.where(largest > 0, largest, 1)[None]
  sums = jnp.sum(s, 0), jnp.sum(s**2, 0), jnp.sum(scaled**4, 0)
  return jnp.stack([*sums, largest])


def _shuffled_powers(x, dy, inputs) -> Array:
  *bases, order = inputs
  return _powers(_compact(x)[order], _compact(dy), bases)


def _compact(x) -> Array:
  """Positions that are not zero first, each example's in their order."""
  empty = jnp.all(x == 0, axis=-1)
  order = jnp.argsort(empty, axis=1, stable=True)
  return jnp.take_along_axis(x, order[..., None], axis=1)


def _product(x, basis) -> Array:
  wide = fisher_lib.at_least_float32(x)
  # Components of low curvature are small differences of large sums.
  return jnp.einsum(
    'bti,ij->btj', wide, basis.astype(wide.dtype),
    precision=jax.lax.Precision.HIGHEST,
  )  # fmt: skip


def _repeated(order, basis) -> Array:
  """The same order for every layer of a stack."""
  return jnp.broadcast_to(order, (*basis.shape[:-2], order.shape[0]))


def _ratio(a, b):
  with np.errstate(divide='ignore', invalid='ignore'):
    return np.where(b > 0, a / b, np.nan)
