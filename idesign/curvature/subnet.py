"""BalancedSubnet: weights that hold told sequences, found by gradient descent.

The strongest published way to unlearn what was memorized (Sakarvadia et al.
2024), and a baseline that curvature edits are held against: it has to be told
what is to be forgotten, and finds, by learning a score for every weight, the
few whose removal raises the loss there and leaves it elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from idesign import sites
from idesign.curvature.edit import Edit, Layers, check_sites, chosen_layers
from idesign.curvature.edit import edit_from
from idesign.sites import Loss

PyTree = Any


@dataclasses.dataclass(frozen=True)
class SubnetConfig:
  """How the weights are found.

  Attributes:
    forget: weight of the loss that is raised; `1 - forget` has the one that is
      kept low. Published: 0.7.
    learning_rate: of the scores, by momentum descent. Published: 0.3.
    momentum: likewise.
  """

  forget: float = 0.7
  learning_rate: float = 0.3
  momentum: float = 0.9

  def __post_init__(self):
    if not 0 < self.forget < 1:
      raise ValueError(f'forget must be in (0, 1), not {self.forget}.')


class SubnetState(NamedTuple):
  """Scores so far, by site, `[*stack, d_in, d_out]`.

  Attributes:
    scores: the largest are removed; those of layers that are not edited are
      minus infinity.
    velocity: of momentum descent.
    count: how many weights are removed, uint32.
  """

  scores: dict[str, Array]
  velocity: dict[str, Array]
  count: Array


class BalancedSubnet:
  """Learns which weights to remove.

  ```
  subnet = BalancedSubnet(loss, params, at, SubnetConfig())
  state = subnet.init(share=0.0015)
  for told, other in batches:
    state, losses = subnet.step(state, params, told, other)
  edit = subnet.edit(state, params)
  ```

  Another share, or other parameters of the same shapes, compile nothing anew.
  """

  def __init__(
    self,
    loss: Loss,
    params: PyTree,
    at: Mapping[str, sites.Site],
    config: SubnetConfig,
    *,
    layers: Layers | None = None,
  ):
    """Says what is to be learned.

    Args:
      loss: `loss(params, batch) -> [B]`.
      params: of the trained model; its own weights stay as they are.
      at: site name -> site, of the weights that may be removed.
      config: how.
      layers: site name -> layers of its stack; default all.

    Raises:
      ValueError: a weight is shared, or there is no such layer.
    """
    check_sites(at, layers)
    self._loss, self._at, self._config = loss, at, config
    self._layers = layers
    self._shapes = {name: (*s.stack, s.d_in, s.d_out) for name, s in at.items()}
    self._open = {name: self._chosen(name) for name in at}
    self._free = sum(
      int(m.sum()) * s.d_in * s.d_out
      for m, s in zip(self._open.values(), at.values())
    )
    self._paths = sites.leaf_paths(params)
    self.step: Callable[..., tuple[SubnetState, dict[str, Array]]] = jax.jit(
      self._step, donate_argnums=0
    )

  def init(self, share: float) -> SubnetState:
    """All scores zero: which are removed first is decided by their order.

    Args:
      share: of the weights at sites to remove, all of them together, in (0, 1).
        Published: 0.0015.

    Raises:
      ValueError: it is not, or it is not one weight.
    """
    count = round(share * self._free)
    if not 0 < share < 1 or not count:
      raise ValueError(
        f'share={share} must be in (0, 1), and at least one of the '
        f'{self._free} weights that may be removed.'
      )
    scores = {
      name: jnp.where(
        jnp.asarray(self._open[name])[..., None, None],
        jnp.zeros(shape),
        -jnp.inf,
      )
      for name, shape in self._shapes.items()
    }
    return SubnetState(
      scores, jax.tree.map(jnp.zeros_like, scores), jnp.uint32(count)
    )

  def edit(self, state: SubnetState, params: PyTree) -> Edit:
    """Removes the weights of largest score."""
    masks = jax.device_get(_lowest(state.scores, state.count))

    def change(name, index, w):
      mask = masks[name][index]
      return np.where(mask, w, 0.0), float(mask.mean())

    return edit_from(params, self._at, self._layers, change)

  def _chosen(self, name: str) -> np.ndarray:
    site = self._at[name]
    chosen = np.zeros(site.stack, bool)
    for index in chosen_layers(site, (self._layers or {}).get(name)):
      chosen[index] = True
    return chosen

  def _step(self, state: SubnetState, params, told, other):
    """One step; `losses` are the means before it, of told and of other."""
    config = self._config

    def objective(masks):
      masked = self._masked(params, masks)
      raised = jnp.mean(self._loss(masked, told))
      kept = jnp.mean(self._loss(masked, other))
      total = (1 - config.forget) * kept - config.forget * raised
      return total, {'told': raised, 'other': kept}

    masks = jax.tree.map(
      lambda m: m.astype(jnp.float32), _lowest(state.scores, state.count)
    )
    # Straight through: a larger score is less of the mask.
    slopes, losses = jax.grad(objective, has_aux=True)(masks)
    velocity = jax.tree.map(
      lambda v, g: config.momentum * v - g, state.velocity, slopes
    )
    scores = jax.tree.map(
      lambda s, v: s - config.learning_rate * v, state.scores, velocity
    )
    return SubnetState(scores, velocity, state.count), losses

  def _masked(self, params, masks) -> PyTree:
    leaves, tree = jax.tree.flatten(params)
    for name, site in self._at.items():
      i = self._paths.index(site.path)
      w = site.matrix(leaves[i])
      leaves[i] = site.with_matrix(leaves[i], w * masks[name].astype(w.dtype))
    return jax.tree.unflatten(tree, leaves)


def _lowest(scores: dict[str, Float[Array, '...']], count: Array):
  """True but for the `count` largest scores of all arrays together.

  By bisection over the bit patterns of floats, in 32 counts: sorting all
  weights of a model at every step would take longer than the step. Of equal
  scores the first are removed, in the order of arrays and entries.
  """
  ordered = jax.tree.map(_order, scores)
  leaves = jax.tree.leaves(ordered)
  at_least = lambda t: sum(jnp.sum(x >= t, dtype=jnp.uint32) for x in leaves)

  def bit(k, threshold):
    trial = threshold | (jnp.uint32(2**31) >> k.astype(jnp.uint32))
    return jnp.where(at_least(trial) >= count, trial, threshold)

  threshold = jax.lax.fori_loop(0, 32, bit, jnp.uint32(0))
  above = sum(jnp.sum(x > threshold, dtype=jnp.uint32) for x in leaves)
  left = count - above
  masks = []
  for x in leaves:
    tied = x == threshold
    rank = jnp.cumsum(tied.reshape(-1), dtype=jnp.uint32).reshape(x.shape)
    masks.append(~((x > threshold) | (tied & (rank <= left))))
    taken = jnp.minimum(jnp.sum(tied, dtype=jnp.uint32), left)
    left = left - taken
  return jax.tree.unflatten(jax.tree.structure(ordered), masks)


def _order(x: Float[Array, '...']):
  """Integers that are ordered as floats are."""
  bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
  sign = jnp.uint32(2**31)
  # -0 counts as 0.
  bits = jnp.where(x == 0, jnp.uint32(0), bits)
  return jnp.where(bits >= sign, ~bits, bits | sign)
