"""Weight edits that keep some components and drop the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np

from idesign import sites
from idesign.curvature import spectrum as spectrum_lib
from idesign.curvature.spectrum import Spectrum

PyTree = Any
Layers = Mapping[str, Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Edit:
  """New values for some parameters, with the old ones to go back to.

  `revert(apply(params))` is `params` bit for bit. Both check that they are
  given what they expect, so that an edit is never applied to another model,
  twice, or reverted from something that was trained on.

  Attributes:
    original: path -> parameter before, on the host, so that donating the
      parameters to a train step does not delete it.
    edited: path -> parameter after, same shape and dtype, likewise.
    kept: path -> share of the components of the edited layers that were kept,
      in [0, 1].
  """

  original: dict[str, np.ndarray]
  edited: dict[str, np.ndarray]
  kept: dict[str, float]

  def apply(self, params: PyTree) -> PyTree:
    """The parameters with the edited values.

    Raises:
      ValueError: a parameter is missing or is not the one the edit was made
        from.
    """
    return _exchange(params, self.original, self.edited, 'apply')

  def revert(self, params: PyTree) -> PyTree:
    """The parameters with the original values; the inverse of `apply`."""
    return _exchange(params, self.edited, self.original, 'revert')


def _exchange(params, old, new, verb) -> PyTree:
  leaves, tree = jax.tree.flatten(params)
  paths = sites.leaf_paths(params)
  missing = set(old) - set(paths)
  if missing:
    raise ValueError(
      f'Cannot {verb} the edit: there is no parameter {sorted(missing)}.'
    )
  for i, path in enumerate(paths):
    if path not in old:
      continue
    if not _same_bits(leaves[i], old[path]):
      raise ValueError(
        f'Cannot {verb} the edit: parameter {path!r} is not the one that the '
        'edit expects. Apply it once, to the parameters it was made from, and '
        'revert it before training on.'
      )
    leaves[i] = jax.device_put(new[path], getattr(leaves[i], 'sharding', None))
  return jax.tree.unflatten(tree, leaves)


def _same_bits(a: Array, b: np.ndarray) -> bool:
  if a.shape != b.shape or a.dtype != b.dtype:
    return False
  bits = f'u{b.dtype.itemsize}'  # Tells -0 from 0, and equal NaNs are equal.
  return np.array_equal(np.asarray(a).view(bits), b.view(bits))


def edit_from(
  params: PyTree,
  at: Mapping[str, sites.Site],
  layers: Layers | None,
  change: Callable[[str, np.ndarray], tuple[np.ndarray, np.ndarray]],
) -> Edit:
  """An edit of several sites.

  Args:
    params: the parameters.
    at: site name -> site, of the weights to edit.
    layers: site name -> layers of its stack to edit; sites that are not named
      are edited whole.
    change: `change(name, w) -> (new w, share kept)`, with `w [*stack, d_in,
      d_out]` in float64 and the share by layer, `[*stack]`.

  Raises:
    ValueError: a weight is shared, or there is no such site or layer.
  """
  unknown = set(layers or ()) - set(at)
  if unknown:
    raise ValueError(
      f'layers names {sorted(unknown)}; the sites are {sorted(at)}.'
    )
  leaves = dict(zip(sites.leaf_paths(params), jax.tree.leaves(params)))
  original, edited, kept = {}, {}, {}
  for name, site in at.items():
    if site.shared or site.used_elsewhere:
      raise ValueError(
        f'Parameter {site.path!r} is used more than once; editing it at '
        f'{name!r} would edit it everywhere. Deselect it.'
      )
    if site.layers is not None and name in (layers or {}):
      raise ValueError(
        f'Site {name!r} was found with layers {site.layers} already; find it '
        'whole and choose layers here, or leave layers out.'
      )
    leaf = leaves[site.path]
    original[site.path] = np.array(leaf)
    matrix = np.asarray(site.matrix(leaf), np.float64)
    chosen = _chosen(site, (layers or {}).get(name))
    new, share = change(name, matrix)
    new = np.where(chosen[..., None, None], new, matrix)
    edited[site.path] = np.array(
      site.with_matrix(leaf, jnp.asarray(new, leaf.dtype))
    )
    kept[site.path] = float(np.broadcast_to(share, chosen.shape)[chosen].mean())
  return Edit(original, edited, kept)


def _chosen(site: sites.Site, layers: Sequence[int] | None) -> np.ndarray:
  """`[*stack]`, true for the layers to edit."""
  if layers is None:
    return np.ones(site.stack, bool)
  if not layers:
    raise ValueError(f'layers[{site.name!r}] is empty; deselect the site.')
  if len(site.stack) != 1 or not all(0 <= i < site.stack[0] for i in layers):
    raise ValueError(
      f'Site {site.name!r} has a stack of {site.stack}; layers {list(layers)} '
      'cannot be chosen from it.'
    )
  chosen = np.zeros(site.stack, bool)
  chosen[list(layers)] = True
  return chosen


def _masked(matrix, basis: Spectrum, masks: np.ndarray) -> np.ndarray:
  """`U (C * mask) V^T` with `C = U^T w V`, formed as `w - U (C * ~mask) V^T`.

  Dropping is subtracted so that what is kept does not pass through the bases:
  with nothing dropped the matrix is returned bit for bit.
  """
  u, v = basis.input_basis, basis.output_basis
  components = u.swapaxes(-1, -2) @ matrix @ v
  dropped = np.where(masks, 0.0, components)
  return matrix - u @ dropped @ v.swapaxes(-1, -2)


def _by_layer(function, *arrays: np.ndarray) -> np.ndarray:
  """Maps over stack axes; the last axis of each array is its own."""
  stack = arrays[0].shape[:-1]
  flat = [a.reshape(-1, a.shape[-1]) for a in arrays]
  results = np.stack([function(*row) for row in zip(*flat)])
  return results.reshape(*stack, *results.shape[1:])


def curvature_masks(
  basis: Spectrum, *, mass: float | None = None, share: float | None = None
) -> np.ndarray:
  """True for the components of highest curvature.

  Args:
    basis: the spectrum of a site.
    mass: keep the fewest components that hold this share of the curvature
      mass, in (0, 1]; per layer of a stack.
    share: or keep this share of the components, in [0, 1], rounded to whole
      components; per layer of a stack.

  Returns:
    `[*stack, d_in, d_out]`.

  Raises:
    ValueError: not exactly one of `mass` and `share` is given, or out of range.
  """
  if (mass is None) == (share is None):
    raise ValueError(f'Give either mass or share; got {mass} and {share}.')
  if share is not None and not 0 <= share <= 1:
    raise ValueError(f'share must be in [0, 1], not {share}.')

  def one(rows, columns):
    if mass is not None:
      counts = spectrum_lib.keep_mass(rows, columns, mass)
    else:
      count = round(share * len(rows) * len(columns))
      counts = spectrum_lib.keep_count(rows, columns, count)
    return spectrum_lib.staircase(counts, len(columns))

  return _by_layer(one, basis.input_values, basis.output_values)


def keep_high_curvature(
  params: PyTree,
  at: Mapping[str, sites.Site],
  bases: Mapping[str, Spectrum],
  *,
  mass: float | None = None,
  share: float | None = None,
  layers: Layers | None = None,
) -> Edit:
  """Drops the components of low curvature (Merullo et al. 2025).

  What single examples need is sharp for them but points in directions of its
  own, so that it averages out of the population Fisher; what many examples
  share is left in its components of high curvature. `W_edit = U (C * 1_S) V^T`
  with `S` from `curvature_masks`. The choice does not look at `C`: this is a
  projection, not a saliency.

  Args:
    params: the parameters.
    at: site name -> site, of the weights to edit, from `sites.find_sites`.
    bases: site name -> spectrum, from `spectra`.
    mass: share of curvature mass to keep, or
    share: share of components to keep; exactly one of the two.
    layers: site name -> layers of its stack to edit; default all.

  Returns:
    The edit. With `mass=1` or `share=1` it changes nothing.

  Raises:
    ValueError: a site has no spectrum or its weight is shared.
  """
  masks = {
    name: curvature_masks(_basis(bases, name), mass=mass, share=share)
    for name in at
  }
  return keep_components(params, at, bases, masks, layers=layers)


def keep_components(
  params: PyTree,
  at: Mapping[str, sites.Site],
  bases: Mapping[str, Spectrum],
  masks: Mapping[str, np.ndarray],
  *,
  layers: Layers | None = None,
) -> Edit:
  """Keeps the components where a mask `[*stack, d_in, d_out]` is true."""

  def change(name, matrix):
    edited = _masked(matrix, _basis(bases, name), masks[name])
    return edited, masks[name].mean((-2, -1))

  return edit_from(params, at, layers, change)


def _basis(bases, name) -> Spectrum:
  if name not in bases:
    raise ValueError(
      f'There is no spectrum for site {name!r}; there are {sorted(bases)}. '
      'Collect the factors with the same selection.'
    )
  return bases[name]
