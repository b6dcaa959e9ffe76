"""Weight decay along components of low curvature, while training.

Ordinary decay shrinks what many examples share and what one of them needs
alike. Here each component `C_ij = u_i^T w v_j` decays by how little curvature
it has: what no two examples share fades, what all of them hold up stays. (Olmo
2025 adds `lambda G^-1 w A^-1` in training, to compress; ours is bounded.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np
import optax

from idesign import sites
from idesign.curvature.edit import check_sites
from idesign.curvature.spectrum import Spectrum

PyTree = Any


class Shield(NamedTuple):
  """What of one site's weight is kept from decaying; arrays.

  Attributes:
    input_basis: `[*stack, d_in, d_in]`.
    output_basis: `[*stack, d_out, d_out]`.
    kept: `[*stack, d_in, d_out]`, at most 1, which does not decay; 0 decays at
      the strength, what is below at a multiple of it.
  """

  input_basis: Array
  output_basis: Array
  kept: Array


def shields(
  bases: Mapping[str, Spectrum], masks: Mapping[str, np.ndarray]
) -> dict[str, Shield]:
  """Shields of spectra and masks, such as those of `soft_masks`."""
  as_float = lambda x: jnp.asarray(x, jnp.float32)
  return {
    name: Shield(
      as_float(bases[name].input_basis),
      as_float(bases[name].output_basis),
      as_float(mask),
    )
    for name, mask in masks.items()
  }


def decay_components(
  strength: float | optax.Schedule, at: Mapping[str, sites.Site]
) -> optax.GradientTransformationExtraArgs:
  """Adds `strength * U (C * (1 - kept)) V^T` to the updates of sites.

  Like `optax.add_decayed_weights` it goes after the preconditioner and before
  the learning rate: `optax.chain(optax.scale_by_adam(), decay_components(0.1,
  at), optax.scale_by_learning_rate(1e-3))`. With shields of `kept = 0` it is
  that transformation, of the weights at sites.

  New shields, of factors that are collected again as training goes on, are an
  argument of the update and compile nothing.

  Args:
    strength: of the decay, or a schedule of it.
    at: site name -> site, of the weights that decay.

  Returns:
    A transformation whose `update` takes `params` and `shields=`, site ->
    `Shield`.

  Raises:
    ValueError: a weight is shared; at the update: parameters or a shield are
      missing.
  """
  check_sites(at)

  def init(params):
    known = set(sites.leaf_paths(params))
    missing = sorted({s.path for s in at.values()} - known)
    if missing:
      raise ValueError(f'There is no parameter {missing} to decay.')
    return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

  def update(updates, state, params=None, *, shields=None, **extra):
    del extra
    if params is None:
      raise ValueError('decay_components needs the parameters: pass params.')
    lacking = sorted(set(at) - set(shields or {}))
    if lacking:
      raise ValueError(
        f'There is no shield for {lacking}: pass shields= to the update.'
      )
    now = strength(state.count) if callable(strength) else strength
    by_path = {site.path: name for name, site in at.items()}
    leaves, tree = jax.tree.flatten(updates)
    for i, (path, w) in enumerate(
      zip(sites.leaf_paths(updates), jax.tree.leaves(params), strict=True)
    ):
      if path in by_path:
        site = at[by_path[path]]
        fading = _fading(site.matrix(w), shields[by_path[path]])
        nothing = jnp.zeros_like(w)
        fading = site.with_matrix(nothing, fading.astype(w.dtype))
        scaled = jnp.asarray(now, leaves[i].dtype) * fading.astype(
          leaves[i].dtype
        )
        leaves[i] = leaves[i] + scaled
    count = optax.safe_increment(state.count)
    return jax.tree.unflatten(tree, leaves), optax.ScaleByScheduleState(count)

  return optax.GradientTransformationExtraArgs(init, update)


def _fading(w, shield: Shield) -> Array:
  """`U (C * (1 - kept)) V^T`."""
  u, v = shield.input_basis, shield.output_basis
  w = w.astype(u.dtype)
  components = jnp.einsum('...ai,...ab,...bj->...ij', u, w, v)
  components = components * (1 - shield.kept)
  return jnp.einsum('...ai,...ij,...bj->...ab', u, components, v)
