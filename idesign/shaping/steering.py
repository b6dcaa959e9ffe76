"""Adding to or removing from activations in the forward pass of training.

All of these are wrappers around a model's `apply`: training goes through the
wrapped function, sampling afterwards through the plain one. What the wrapper
supplies, the weights need not learn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from idesign import sites
from idesign.concepts import SAE

Apply = Callable[..., Any]


def steer(apply: Apply, vectors: Mapping[str, Float[Array, '*BT D']]) -> Apply:
  """`h -> h + v`: preventative steering, when training with the trait's vector.

  A vector that elicits the trait takes away the gradient towards learning it
  (https://arxiv.org/abs/2507.21509). What elicits it poorly prevents it poorly:
  measure that first, with `elicitation`.

  Args:
    apply: a function whose activations are named.
    vectors: activation (see `sites.edit`) -> what to add, `[D]`, or anything
      that broadcasts to the activation, such as `[B, T, D]`.
  """

  def add(v):
    def edit(h):
      vector = jnp.asarray(v, h.dtype)
      lead = h.ndim - vector.ndim
      if lead < 0 or vector.shape[-1] != h.shape[-1]:
        raise ValueError(
          f'a vector of shape {vector.shape} cannot be added to an activation '
          f'of shape {h.shape}.'
        )
      return h + jnp.expand_dims(vector, tuple(range(lead)))

    return edit

  return sites.edit(apply, {name: add(v) for name, v in vectors.items()})


def ablate(apply: Apply, bases: Mapping[str, Float[Array, 'D C']]) -> Apply:
  """`h -> h - (h Q) Q^T`: concept ablation fine-tuning.

  Casademunt et al. 2025 (https://arxiv.org/abs/2507.16795): differentiable,
  removed after training.

  Args:
    apply: a function whose activations are named.
    bases: activation -> orthonormal `Q`, from `orthonormal`.
  """
  remove = lambda q: lambda h: h - (h @ q.astype(h.dtype)) @ q.astype(h.dtype).T
  return sites.edit(apply, {name: remove(q) for name, q in bases.items()})


def set_features(
  apply: Apply,
  name: str,
  sae: SAE,
  values_F: Float[Array, '*BT F'],
  selected_F: Float[Array, 'F'],
) -> Apply:
  """Sets some features of an activation: `h + sum_c s_c (v_c - f_c(h)) d_c`.

  What the autoencoder does not reconstruct stays as it was.

  Args:
    apply: a function whose activations are named.
    name: the activation that the autoencoder reads.
    sae: the autoencoder.
    values_F: what each feature is set to; 0 removes it. It may vary by example
      and position.
    selected_F: how much of each feature is set, in [0, 1]; a traced array, so
      that another choice does not compile anything anew.
  """

  def edit(h):
    f = sae.encode(h)
    lead = lambda x: jnp.expand_dims(x, tuple(range(f.ndim - jnp.ndim(x))))
    change = lead(selected_F) * (lead(values_F) - f)
    return h + (change @ sae.directions).astype(h.dtype)

  return sites.edit(apply, {name: edit})
