"""What a curvature edit is compared with: equal damage without curvature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from idesign import sites
from idesign.curvature.edit import (
  Edit,
  Layers,
  basis_at,
  edit_from,
  keep_components,
  score_masks,
)
from idesign.curvature.spectrum import Spectrum

PyTree = Any


class Singular(NamedTuple):
  """Singular value decomposition of one site's weight, in float64.

  Attributes:
    left: `[*stack, d_in, r]` with `r = min(d_in, d_out)`.
    values: `[*stack, r]`, descending.
    right: `[*stack, r, d_out]`.
  """

  left: np.ndarray
  values: np.ndarray
  right: np.ndarray


def singular(
  params: PyTree, at: Mapping[str, sites.Site]
) -> dict[str, Singular]:
  """Singular value decompositions of the weights at sites, by site name."""
  leaves = dict(zip(sites.leaf_paths(params), jax.tree.leaves(params)))

  def one(site):
    matrix = np.asarray(site.matrix(leaves[site.path]), np.float64)
    return Singular(*np.linalg.svd(matrix, full_matrices=False))

  return {name: one(site) for name, site in at.items()}


def keep_singular(
  params: PyTree,
  at: Mapping[str, sites.Site],
  parts: Mapping[str, Singular],
  *,
  share: float,
  layers: Layers | None = None,
) -> Edit:
  """Rank truncation: keeps the leading singular components of each weight.

  Args:
    params: the parameters.
    at: site name -> site, of the weights to edit.
    parts: site name -> decomposition, from `singular` of the same parameters.
    share: share of the rank to keep, in [0, 1], rounded to whole ranks; per
      layer of a stack.
    layers: site name -> layers of its stack to edit; default all.

  Returns:
    The edit; its `kept` is the share of the rank.
  """
  if not 0 <= share <= 1:
    raise ValueError(f'share must be in [0, 1], not {share}.')

  def change(name, index, w):
    left, values, right = (part[index] for part in parts[name])
    rank = round(share * len(values))
    dropped = (left[:, rank:] * values[rank:]) @ right[rank:]
    return w - dropped, rank / len(values)

  return edit_from(params, at, layers, change)


def keep_random(
  params: PyTree,
  at: Mapping[str, sites.Site],
  bases: Mapping[str, Spectrum],
  *,
  share: float,
  seed: int,
  layers: Layers | None = None,
) -> Edit:
  """The placebo: keeps equally many components, chosen at random.

  Components are those of the same eigenbases as in `keep_high_curvature`, so
  that only the choice differs.

  Args:
    params: the parameters.
    at: site name -> site, of the weights to edit.
    bases: site name -> spectrum.
    share: share of components to keep, in [0, 1], rounded to whole components;
      per layer of a stack.
    seed: of the choice; sites draw from independent streams.
    layers: site name -> layers of its stack to edit; default all.
  """
  if not 0 <= share <= 1:
    raise ValueError(f'share must be in [0, 1], not {share}.')
  streams = np.random.SeedSequence(seed).spawn(len(at))
  masks = {}
  for (name, site), stream in zip(sorted(at.items()), streams):
    rng = np.random.default_rng(stream)
    size = site.d_in * site.d_out
    num_layers = int(np.prod(site.stack, dtype=int))
    mask = np.zeros((num_layers, size), bool)
    for layer in mask:
      layer[rng.choice(size, round(share * size), replace=False)] = True
    masks[name] = mask.reshape(*site.stack, site.d_in, site.d_out)
  return keep_components(params, at, bases, masks, layers=layers)


def keep_magnitude(
  params: PyTree,
  at: Mapping[str, sites.Site],
  *,
  share: float,
  layers: Layers | None = None,
) -> Edit:
  """Magnitude pruning: keeps the weights that are largest, in their own basis.

  Args:
    params, at, layers: as for `keep_singular`.
    share: share of the weights to keep, in [0, 1]; per layer of a stack.
  """

  def change(name, index, w):
    del name, index
    mask = score_masks(np.abs(w), share=share)
    return np.where(mask, w, 0.0), float(mask.mean())

  return edit_from(params, at, layers, change)


def keep_salient(
  params: PyTree,
  at: Mapping[str, sites.Site],
  bases: Mapping[str, Spectrum],
  *,
  share: float,
  layers: Layers | None = None,
) -> Edit:
  """Optimal brain damage: drops what raises the loss least (LeCun et al. 1989).

  Saliency `C_ij^2 * curvature_ij / 2`, with the components `C = U^T w V` and
  their K-FAC curvature, in the same bases as `keep_high_curvature`.

  Args:
    params, at, bases, layers: as for `keep_high_curvature`.
    share: share of the components to keep, in [0, 1]; per layer of a stack.
  """

  def change(name, index, w):
    spectrum = basis_at(bases, name)
    u, v = spectrum.input_basis[index], spectrum.output_basis[index]
    rows, columns = spectrum.input_values[index], spectrum.output_values[index]
    components = u.T @ w @ v
    mask = score_masks(components**2 * rows[:, None] * columns, share=share)
    dropped = np.where(mask, 0.0, components)
    return w - u @ dropped @ v.T, float(mask.mean())

  return edit_from(params, at, layers, change)
