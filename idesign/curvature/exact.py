r"""Second derivatives of a loss, exactly: matrices of small models, products.

Losses are `loss(params, batch) -> [B]`, as in `idesign.sites`; everything here
is of their sum. Products take and return trees like the parameters, run under
`jit`, and shard as the parameters do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
from jaxtyping import Array, Float

from idesign.curvature import fisher as fisher_lib
from idesign.curvature.fisher import Fisher, Logits
from idesign.sites import Loss

PyTree = Any


def hessian(loss: Loss, params: PyTree, batch: PyTree) -> Float[Array, 'P P']:
  """The Hessian of the summed loss, by `jax.hessian`.

  Rows and columns are in the order of `jax.flatten_util.ravel_pytree`. It holds
  `P^2` numbers: for models of a few thousand parameters.
  """
  flat, unravel = ravel_pytree(params)
  return jax.hessian(lambda p: jnp.sum(loss(unravel(p), batch)))(flat)


def hessian_product(loss: Loss) -> Callable[..., PyTree]:
  """`H v` of the summed loss, as the forward derivative of its gradient.

  About 2.5 gradients (Pearlmutter 1994): the pass and its derivative.

  Returns:
    `product(params, batch, vector) -> tree like params`.
  """

  def product(params, batch, vector):
    gradient = jax.grad(lambda p: jnp.sum(loss(p, batch)))
    return jax.jvp(gradient, (params,), (vector,))[1]

  return product


def gauss_newton_product(
  logits_fn: Logits, likelihood: str = 'categorical'
) -> Callable[..., PyTree]:
  """`J^T M J v`, with the Hessian `M` of the loss in the logits.

  For a softmax `M = diag(p) - p p^T`, in closed form; for half the squared
  error the identity. In these two cases the Gauss-Newton matrix is the Fisher
  information (Martens 2020), summed over examples.

  Args:
    logits_fn: `logits_fn(params, inputs) -> logits [B, *T, C]`.
    likelihood: `'categorical'` or `'normal'`.

  Returns:
    `product(params, inputs, vector, *, mask=None) -> tree like params`, with
    `mask [B, *T]` of positions that have a loss.
  """
  fisher = Fisher(labels='exact', likelihood=likelihood)
  return fisher_product(logits_fn, fisher)


def fisher_product(
  logits_fn: Logits, fisher: Fisher = Fisher()
) -> Callable[..., PyTree]:
  """`F v` with the Fisher information of a batch, summed over examples.

  With exact labels `J^T M J v`. With sampled or gold ones `sum_n g_n <g_n, v>`
  over the gradients `g_n` of examples, averaged over samples: one forward and
  one reverse pass, in which no `g_n` is formed.

  Args:
    logits_fn: `logits_fn(params, inputs) -> logits [B, *T, C]`.
    fisher: which Fisher information; `normalize` must be `'none'`, as the whole
      gradient of an example has no site to be normalized at.

  Returns:
    `product(params, inputs, vector, *, key=None, labels=None, mask=None)`.
  """
  if fisher.normalize != 'none':
    raise ValueError("normalize must be 'none': a product is not of one site.")

  def exact(params, inputs, vector, mask):
    logits = lambda p: (
      fisher_lib.at_least_float32(logits_fn(p, inputs)) / fisher.temperature
    )
    z, change = jax.jvp(logits, (params,), (vector,))
    if fisher.likelihood == 'categorical':
      change = fisher_lib.softmax_middle(z, change)
    if mask is not None:
      change = jnp.where(mask[..., None], change, 0)
    return jax.vjp(logits, params)[1](change)[0]

  def product(params, inputs, vector, *, key=None, labels=None, mask=None):
    if fisher.labels == 'exact':
      return exact(params, inputs, vector, mask)
    shape = jax.eval_shape(logits_fn, params, inputs)
    draws = fisher_lib.draws(fisher, shape, key, labels)

    def once(draw):
      losses = lambda p: fisher_lib.draw_losses(
        fisher, logits_fn(p, inputs), draw, mask
      )
      _, slopes = jax.jvp(losses, (params,), (vector,))
      return jax.vjp(losses, params)[1](slopes)[0]

    def add(total, draw):
      return jax.tree.map(jnp.add, total, once(draw)), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    total, _ = jax.lax.scan(add, zeros, draws)
    return jax.tree.map(lambda x: x / draws.shape[0], total)

  return product


def directional_curvature(loss: Loss) -> Callable[..., Float[Array, 'B']]:
  """`v^T H_n v` of every example `n` along one direction.

  Two forward derivatives, so that no gradient of an example is formed.

  Returns:
    `curvature(params, batch, vector) -> [B]`.
  """

  def curvature(params, batch, vector):
    losses = lambda p: loss(p, batch)
    slope = lambda p: jax.jvp(losses, (p,), (vector,))[1]
    return jax.jvp(slope, (params,), (vector,))[1]

  return curvature
