r"""Kronecker factors of a model's Fisher information, read at weight sites.

For a weight `w [d_in, d_out]` with input `x` and output gradient `g` the
Fisher block is approximated by `A (x) G`, with the uncentred second moments
`A = sum x x^T` and `G = sum g g^T` over examples and positions (Martens &
Grosse 2015; weights shared over positions by the *expand* rule of Eschenhagen
et al. 2023). Both are exact where a block is such a product: for one example at
one position, and where inputs and output gradients are independent.

EK-FAC keeps the eigenbases of the factors and measures the curvature along each
pair of eigenvectors anew, `sum_n (u_i^T dW_n v_j)^2` over examples `n` (George
et al. 2018): the diagonal of the Fisher block in that basis, exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from idesign import sites
from idesign.curvature import fisher as fisher_lib
from idesign.curvature.fisher import Fisher, Logits

PyTree = Any
Bases = Mapping[
  str, tuple[Float[Array, '*stack I I'], Float[Array, '*stack O O']]
]


class Factors(NamedTuple):
  """Sums over examples, positions and label samples; a pytree to add up.

  The absolute curvature of a component is `input value * output value / (count
  * positions)`, of the Fisher information averaged over examples.

  Attributes:
    inputs: site -> `sum x x^T`, `[*stack, d_in, d_in]`, float32 (float64 where
      the model is).
    outputs: site -> `sum g g^T`, `[*stack, d_out, d_out]`, likewise.
    count: number of examples times label samples in the sums, float32.
    positions: site -> number of positions times label samples in the sums,
      masked ones left out, float32.
  """

  inputs: dict[str, Array]
  outputs: dict[str, Array]
  count: Array
  positions: dict[str, Array]

  def __add__(self, other: 'Factors') -> 'Factors':
    return jax.tree.map(jnp.add, self, other)


def mixture(a: Factors, b: Factors, weight: float) -> Factors:
  """Factors of two domains: an edit of them keeps what either needs.

  Moments per position are added, the second ones `weight` times: `A = A_a +
  weight A_b`, `G` likewise. (A keep-set of general text alone loses arithmetic;
  general text with arithmetic keeps it.)

  Args:
    a: of the first domain; the result counts what it counts.
    b: of the second, of the same sites.
    weight: of the second, at least 0.

  Raises:
    ValueError: the weight is negative, or the sites differ.
  """
  if weight < 0:
    raise ValueError(f'A domain has a weight of at least 0, not {weight}.')
  if set(a.positions) != set(b.positions):
    raise ValueError(
      'Factors of different sites do not mix: '
      f'{sorted(set(a.positions) ^ set(b.positions))}.'
    )

  def add(x, y):
    return {
      n: x[n] + weight * y[n] * (a.positions[n] / b.positions[n]) for n in x
    }

  return a._replace(
    inputs=add(a.inputs, b.inputs), outputs=add(a.outputs, b.outputs)
  )


class Eigenvalues(NamedTuple):
  """EK-FAC eigenvalues, summed over examples; a pytree to add up.

  Attributes:
    values: site -> `[*stack, d_in, d_out]`, `sum_n (u_i^T dW_n v_j)^2`.
    count: number of examples times label samples in the sums, float32.
  """

  values: dict[str, Array]
  count: Array

  def __add__(self, other: 'Eigenvalues') -> 'Eigenvalues':
    return jax.tree.map(jnp.add, self, other)

  def mean(self) -> dict[str, Array]:
    """The curvature of each component, averaged over examples."""
    return {n: v / self.count.astype(v.dtype) for n, v in self.values.items()}


def normalized(statistic: sites.Statistic) -> sites.Statistic:
  """The statistic with each example's output gradient scaled to norm one."""

  def fn(x, dy, *inputs):
    dy = fisher_lib.at_least_float32(dy)
    # At interpolation gradients are so small that their squares underflow.
    largest = jnp.max(jnp.abs(dy), axis=(1, 2), keepdims=True)
    dy = dy / jnp.where(largest > 0, largest, 1)
    square = jnp.sum(dy**2, axis=(1, 2), keepdims=True)
    return statistic.fn(x, dy / jnp.sqrt(jnp.maximum(square, 1)), *inputs)

  return sites.Statistic(fn, additive=False)


def kfac_factors(
  logits_fn: Logits,
  select: str | Iterable[str],
  fisher: Fisher = Fisher(),
) -> Callable[..., Factors]:
  """K-FAC factors of one batch; add the results of several batches.

  Args:
    logits_fn: `logits_fn(params, inputs) -> logits [B, *T, C]`.
    select: which parameters, as in `idesign.sites.find_sites`.
    fisher: which Fisher information.

  Returns:
    `factors(params, inputs, *, key=None, labels=None, mask=None) -> Factors`,
    to be jitted by the caller. To sample labels a `key` is needed, or one for
    each example, `[B]`; `labels [B, *T]` for gold ones. `mask [B, T]` leaves
    positions out of the loss and of both factors.

  Raises (when called or traced):
    ValueError: key or labels are missing.
    Whatever `idesign.sites.collect` raises.
  """
  outputs = sites.output_moment
  if fisher.normalize == 'example':
    outputs = normalized(outputs)
  moments = {'inputs': sites.input_moment, 'outputs': outputs}
  passes = _passes(logits_fn, moments, select, fisher)

  def factors(params, inputs, *, key=None, labels=None, mask=None) -> Factors:
    read, losses, draws = passes(params, inputs, key, labels, mask)
    batch = inputs, jax.tree.map(lambda d: d[0], draws), mask
    found = sites.find_sites(losses, params, batch, select).sites

    def once(draw) -> Factors:
      out = read(draw)
      count = out.losses.shape[0]
      seen = {s.name: _positions(s, count, mask) for s in found}
      values = out.values
      return Factors(
        values['inputs'], values['outputs'], jnp.float32(count), seen
      )

    total = _sum_over(once, draws)
    if fisher.labels != 'exact':
      return total
    # The columns of one square root are one sample, of which inputs are part
    # once. Their sums are that many times too large.
    columns = draws.shape[0]
    whole = jax.tree.map(lambda a: a / columns, total)
    return whole._replace(outputs=total.outputs)

  return factors


def ekfac_eigenvalues(
  logits_fn: Logits,
  select: str | Iterable[str],
  fisher: Fisher = Fisher(),
) -> Callable[..., Eigenvalues]:
  """EK-FAC eigenvalues of one batch; add the results of several batches.

  Gradients are summed over an example's positions before they are squared, so
  that this is the Fisher information of examples, whose positions belong
  together; that of K-FAC-expand takes positions apart.

  Args:
    logits_fn, select, fisher: as for `kfac_factors`.

  Returns:
    `eigenvalues(params, inputs, bases, *, key=None, labels=None, mask=None) ->
    Eigenvalues`, with `bases` from `as_bases`, or any orthonormal ones.
  """
  square = sites.rotated_square
  if fisher.normalize == 'example':
    square = normalized(square)
  passes = _passes(logits_fn, {'squares': square}, select, fisher)

  def eigenvalues(
    params, inputs, bases: Bases, *, key=None, labels=None, mask=None
  ) -> Eigenvalues:
    read, _, draws = passes(params, inputs, key, labels, mask)

    def once(draw) -> Eigenvalues:
      out = read(draw, {'squares': bases})
      return Eigenvalues(
        out.values['squares'], jnp.float32(out.losses.shape[0])
      )

    total = _sum_over(once, draws)
    if fisher.labels != 'exact':
      return total
    return total._replace(count=total.count / draws.shape[0])

  return eigenvalues


def _passes(logits_fn, statistics, select, fisher):
  """`passes(params, inputs, key, labels, mask) -> read, losses, draws`."""

  def losses(params, batch):
    inputs, draw, mask = batch
    logits = logits_fn(params, inputs)
    return fisher_lib.draw_losses(fisher, logits, draw, mask)

  collect = sites.collect(losses, statistics, select)

  def passes(params, inputs, key, labels, mask):
    logits = jax.eval_shape(logits_fn, params, inputs)
    draws = fisher_lib.draws(fisher, logits, key, labels)

    def read(draw, given=None):
      return collect(params, (inputs, draw, mask), mask=mask, inputs=given)

    return read, losses, draws

  return passes


def _sum_over(once, draws):
  """The sum, one draw at a time: memory does not grow with their number."""
  if draws.shape[0] == 1:
    return once(jax.tree.map(lambda d: d[0], draws))
  zeros = jax.tree.map(
    lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(once, draws[0])
  )
  return jax.lax.scan(lambda f, d: (f + once(d), None), zeros, draws)[0]


def _positions(site: sites.Site, count: int, mask) -> Array:
  if mask is not None and site.num_positions == math.prod(mask.shape[1:]):
    return jnp.sum(mask, dtype=jnp.float32)
  return jnp.float32(count * site.num_positions * site.loops)
