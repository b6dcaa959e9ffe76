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
from idesign.curvature import selection
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


def check_sites(
  at: Mapping[str, sites.Site], layers: Layers | None = None
) -> None:
  """Raises a ValueError unless each weight can be edited by itself."""
  unknown = set(layers or ()) - set(at)
  if unknown:
    raise ValueError(
      f'layers names {sorted(unknown)}; the sites are {sorted(at)}.'
    )
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
    chosen_layers(site, (layers or {}).get(name))


def edit_from(
  params: PyTree,
  at: Mapping[str, sites.Site],
  layers: Layers | None,
  change: Callable[..., tuple[np.ndarray, float]],
) -> Edit:
  """An edit of several sites, one layer at a time.

  Args:
    params: the parameters.
    at: site name -> site, of the weights to edit.
    layers: site name -> layers of its stack to edit; sites that are not named
      are edited whole.
    change: `change(name, index, w) -> (new w, share kept)`, with `w [d_in,
      d_out]` in float64, of the layer `index` of the stack, a tuple.

  Raises:
    ValueError: a weight is shared, or there is no such site or layer.
  """
  check_sites(at, layers)
  leaves = dict(zip(sites.leaf_paths(params), jax.tree.leaves(params)))
  original, edited, kept = {}, {}, {}
  for name, site in at.items():
    leaf = leaves[site.path]
    original[site.path] = np.array(leaf)
    stack = np.array(site.matrix(leaf))
    shares = []
    for index in chosen_layers(site, (layers or {}).get(name)):
      new, share = change(name, index, np.asarray(stack[index], np.float64))
      stack[index] = new.astype(stack.dtype)
      shares.append(share)
    edited[site.path] = np.array(site.with_matrix(leaf, jnp.asarray(stack)))
    kept[site.path] = float(np.mean(shares))
  return Edit(original, edited, kept)


def chosen_layers(
  site: sites.Site, layers: Sequence[int] | None
) -> list[tuple[int, ...]]:
  """Indices into the stack of a site, of the layers to edit."""
  if layers is None:
    return list(np.ndindex(site.stack))
  if not layers:
    raise ValueError(f'layers[{site.name!r}] is empty; deselect the site.')
  if len(site.stack) != 1 or not all(0 <= i < site.stack[0] for i in layers):
    raise ValueError(
      f'Site {site.name!r} has a stack of {site.stack}; layers {list(layers)} '
      'cannot be chosen from it.'
    )
  return [(i,) for i in sorted(set(layers))]


def _by_layer(function, *arrays: np.ndarray, axes: int = 1) -> np.ndarray:
  """Maps over stack axes; the last `axes` axes of each array are its own."""
  stack = arrays[0].shape[:-axes]
  flat = [a.reshape(-1, *a.shape[len(stack) :]) for a in arrays]
  results = np.stack([function(*row) for row in zip(*flat)])
  return results.reshape(*stack, *results.shape[1:])


def _one_of(mass, share) -> None:
  if (mass is None) == (share is None):
    raise ValueError(f'Give either mass or share; got {mass} and {share}.')
  if mass is not None:
    selection.check_mass(mass)
  if share is not None and not 0 <= share <= 1:
    raise ValueError(f'share must be in [0, 1], not {share}.')


def curvature_masks(
  basis: Spectrum, *, mass: float | None = None, share: float | None = None
) -> np.ndarray:
  """True for the components of highest curvature, as products of eigenvalues.

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
  _one_of(mass, share)

  def one(rows, columns):
    if mass is not None:
      counts = selection.keep_mass(rows, columns, mass)
    else:
      count = round(share * len(rows) * len(columns))
      counts = selection.keep_count(rows, columns, count)
    return selection.staircase(counts, len(columns))

  return _by_layer(one, basis.input_values, basis.output_values)


def score_masks(
  scores: np.ndarray, *, mass: float | None = None, share: float | None = None
) -> np.ndarray:
  """The same of scores that are stored, `[*stack, d_in, d_out]`.

  Such as EK-FAC eigenvalues (`Eigenvalues.mean`), the participation of a
  component (`Moments`), or its curvature on other data (`domain_mass`).

  Args:
    scores: finite, not negative; the larger the more to be kept.
    mass: share of the scores' sum to keep, in (0, 1], or
    share: share of the components to keep; per layer of a stack.
  """
  _one_of(mass, share)

  def one(layer):
    if mass is not None:
      return selection.largest_mass(layer, mass)
    return selection.largest_count(layer, round(share * layer.size))

  return _by_layer(one, np.asarray(scores), axes=2)


def soft_masks(scores: np.ndarray, *, share: float) -> np.ndarray:
  """Masks without an edge, `score / (score + t)`, in [0, 1].

  Args:
    scores: `[*stack, d_in, d_out]`, finite, not negative.
    share: mean of the mask, in (0, 1]; it decides `t`, per layer of a stack.
      At 1 the mask is one everywhere.

  Raises:
    ValueError: the share is out of range, or larger than that of the scores
      that are not zero.
  """
  if not 0 < share <= 1:
    raise ValueError(f'share must be in (0, 1], not {share}.')

  def one(layer):
    if share == 1:
      return np.ones(layer.shape)
    if (layer > 0).mean() <= share:
      raise ValueError(
        f'Only {(layer > 0).mean():.3g} of the scores are positive, so that '
        f'their soft mask cannot have the mean {share}.'
      )
    unit = layer / layer.max()  # In [0, 1]; t from a bisection of log t.
    low, high = -700.0, 700.0
    for _ in range(80):
      middle = (low + high) / 2
      if (unit / (unit + np.exp(middle))).mean() > share:
        low = middle
      else:
        high = middle
    return unit / (unit + np.exp(high))

  return _by_layer(one, np.asarray(scores, np.float64), axes=2)


def union(*masks: np.ndarray) -> np.ndarray:
  """Keeps what any of several masks in one basis keeps; soft ones, the most.

  Domains of which each needs its own components (general text, arithmetic) are
  kept together: take the basis of all factors added up, `domain_mass` of each
  domain in it, and the union of their masks.
  """
  return np.maximum.reduce(masks)


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
    name: curvature_masks(basis_at(bases, name), mass=mass, share=share)
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
  """Multiplies components by a mask, `U (C * mask) V^T` with `C = U^T w V`.

  Formed as `w - U (C * (1 - mask)) V^T`, so that what is kept does not pass
  through the bases: where nothing is dropped the weight stays bit for bit.

  Args:
    params, at, bases, layers: as for `keep_high_curvature`.
    masks: site name -> `[*stack, d_in, d_out]`, true or one where a component
      is kept, or anything between one and zero.
  """

  def change(name, index, w):
    spectrum, mask = basis_at(bases, name), np.asarray(masks[name][index])
    u, v = spectrum.input_basis[index], spectrum.output_basis[index]
    drop = 1.0 - mask
    if not drop.any():
      return w, 1.0
    return w - u @ ((u.T @ w @ v) * drop) @ v.T, float(mask.mean())

  return edit_from(params, at, layers, change)


def basis_at(bases: Mapping[str, Spectrum], name: str) -> Spectrum:
  """The spectrum of a site, or an error that says which there are."""
  if name not in bases:
    raise ValueError(
      f'There is no spectrum for site {name!r}; there are {sorted(bases)}. '
      'Collect the factors with the same selection.'
    )
  return bases[name]
