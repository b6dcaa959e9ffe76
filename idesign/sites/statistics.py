r"""Statistics of a layer's input and its output's cotangent.

A statistic is a function of `x [B, T, d_in]` and `dy [B, T, d_out]` at one
weight site, `T` being every axis of `x` that is neither the example nor a
feature. For the loss's sum over examples, `dy` is the per-example gradient of
the output, so `sum_t x_t dy_t^T` is the per-example gradient of the weight.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Statistic:
  """What to read at a site.

  Attributes:
    fn: `fn(x, dy) -> array`, or `fn(x, dy, inputs) -> array` where the caller
      gives inputs for the site.
    additive: whether the statistic of a weight that meets data several times
      (tied, or constant across a scan) is the sum over those meetings.
    of_gradient: for a statistic that is not additive, its value as a function
      of the per-example gradient of the parameter, `[B, *shape]`. With it the
      statistic of a shared weight is formed from summed per-example
      gradients; without it, reading a shared weight is an error.
    of_input: whether `fn` ignores `dy`. It is then evaluated in the forward
      pass, with `dy=None`, so that no layer input is kept for it, and once for
      all projections of the same input.
  """

  fn: Callable[..., Array]
  additive: bool
  of_gradient: Callable[[Array], Array] | None = None
  of_input: bool = False


def _einsum(spec: str, *operands: Array) -> Array:
  """Sums in float32, or in float64 where an operand is."""
  dtypes = {x.dtype for x in operands}
  wide = jnp.float64 if jnp.dtype(jnp.float64) in dtypes else jnp.float32
  if len(dtypes) > 1:  # Such as a bfloat16 input of a float32 output.
    operands = [x.astype(wide) for x in operands]
  return jnp.einsum(spec, *operands, preferred_element_type=wide)


def _moment(x: Float[Array, 'B T D']) -> Float[Array, 'D D']:
  # Over one axis: of a sum over two, XLA makes a transposed copy on CPUs, which
  # takes as long as the product.
  x = x.reshape(-1, x.shape[2])
  return _einsum('ni,nj->ij', x, x)


def _input_moment(x: Float[Array, 'B T I'], dy) -> Float[Array, 'I I']:
  del dy
  return _moment(x)


def _output_moment(x, dy: Float[Array, 'B T O']) -> Float[Array, 'O O']:
  del x
  return _moment(dy)


def _gradient(x, dy) -> Float[Array, 'B I O']:
  return _einsum('bti,bto->bio', x, dy)


def _squared_norm(x, dy) -> Float[Array, 'B']:
  """Per-example squared gradient norm, by whichever form needs fewer FLOPs."""
  (t, i), o = x.shape[1:], dy.shape[2]
  if t * (i + o) <= i * o:
    xx, gg = _einsum('bti,bsi->bts', x, x), _einsum('bto,bso->bts', dy, dy)
    return jnp.sum(xx * gg, axis=(1, 2))
  return jnp.sum(_gradient(x, dy) ** 2, axis=(1, 2))


def _direction_products(x, dy, inputs) -> Float[Array, 'B T C']:
  u, w = inputs
  return _einsum('bti,ci->btc', x, u) * _einsum('bto,co->btc', dy, w)


def _direction_product(x, dy, inputs) -> Float[Array, 'B C']:
  return jnp.sum(_direction_products(x, dy, inputs), axis=1)


def _rotated_square(x, dy, inputs) -> Float[Array, 'I O']:
  basis_in, basis_out = inputs
  rotated = _gradient(
    _einsum('bti,ij->btj', x, basis_in), _einsum('bto,op->btp', dy, basis_out)
  )
  return jnp.sum(rotated**2, axis=0)


# sum_bt x x^T. A weight used several times sees its uses as further positions
# (K-FAC-expand, Eschenhagen et al. 2023), hence additive; so is the next one.
input_moment = Statistic(_input_moment, additive=True, of_input=True)
# sum_bt dy dy^T.
output_moment = Statistic(_output_moment, additive=True)
# Per-example gradients of the weight matrix.
per_example_gradient = Statistic(_gradient, additive=True)
# Per-example squared gradient norms. Short sequences use the ghost identity
# |sum_t x_t dy_t^T|^2 = sum_ts (x_t . x_s)(dy_t . dy_s) (Goodfellow 2015; Li et
# al. 2021), so that no gradient is formed.
per_example_squared_norm = Statistic(
  _squared_norm,
  additive=False,
  of_gradient=lambda g: jnp.sum(g**2, axis=tuple(range(1, g.ndim))),
)
# Inner products <u_c w_c^T, gradient_b> with rank-1 directions. Inputs per
# site: `(u [*stack, C, d_in], w [*stack, C, d_out])`.
direction_product = Statistic(_direction_product, additive=True)
# The same before summing over positions, `[B, T, C]`.
direction_product_by_position = Statistic(_direction_products, additive=True)
# sum_b (U_in^T gradient_b U_out)^2, the eigenvalues of EK-FAC (George et al.
# 2018). Inputs per site: `(U_in [*stack, d_in, d_in], U_out [*stack, d_out,
# d_out])`.
rotated_square = Statistic(_rotated_square, additive=False)
