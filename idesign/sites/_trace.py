"""Tracing a loss, and making sure that its example axis is what it seems."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jaxtyping import Array, Float

from idesign.sites import _find, _jaxpr, selection

PyTree = Any
Loss = Callable[[PyTree, PyTree], Float[Array, 'B']]


def traced(loss: Loss, params: PyTree, batch: PyTree, select, example_axis):
  """Traces a loss and finds its sites: its jaxpr, `Sites` and their plan."""
  paths = selection.leaf_paths(params)
  chosen = selection.match_paths(select, paths)
  _refuse_explicit_meshes((params, batch))
  closed, _ = _jaxpr.trace(loss, params, batch)
  shapes = [a.shape for a in closed.out_avals]
  if len(shapes) != 1 or len(shapes[0]) != 1:
    raise ValueError(
      'A loss returns one value per example, shape [B]; this one returns '
      f'{shapes}. Do not average over the batch.'
    )
  arguments = [*paths, *[None] * len(jax.tree.leaves(batch))]
  (size,) = shapes[0]
  larger = _one_more_example(loss, params, batch, size, example_axis)
  sites, plan = _find.find(
    closed, arguments, chosen, size, example_axis, checked=larger is not None
  )
  if larger is not None:
    try:
      _find.find(larger, arguments, chosen, size + 1, example_axis)
    except _find.UnsupportedUseError as error:
      raise _find.UnsupportedUseError(
        error.path,
        error.primitive,
        f'axis {example_axis} of the layer input has the size of the batch, '
        f'{size}, but does not grow with it, so it is not the examples. Name '
        'the example axis with example_axis.',
      ) from error
  return closed, sites, plan


def _one_more_example(loss, params, batch, size: int, axis: int):
  """The loss traced with one example more, to tell axes of equal size apart.

  None if that cannot be traced, because the loss closes over arrays of this
  batch's size or insists on it; then no other axis may have that size.
  """

  def grown(leaf):
    shape = list(jnp.shape(leaf))
    at = axis if len(shape) > axis and shape[axis] == size else 0
    if shape and shape[at] == size:
      shape[at] += 1
    return jax.ShapeDtypeStruct(shape, jnp.result_type(leaf))

  try:
    closed, _ = _jaxpr.trace(loss, params, jax.tree.map(grown, batch))
  except Exception:  # pylint: disable=broad-except
    return None  # The loss is the user's, and so are its assertions.
  same_contract = [a.shape for a in closed.out_avals] == [(size + 1,)]
  return closed if same_contract else None


def _refuse_explicit_meshes(arguments: PyTree) -> None:
  for leaf in jax.tree.leaves(arguments):
    if not isinstance(leaf, jax.Array):
      continue
    mesh = jax.typeof(leaf).sharding.mesh
    if AxisType.Explicit in mesh.axis_types:
      raise ValueError(
        f'An argument of shape {leaf.shape} lives on a mesh with explicit '
        f'axes, {mesh.axis_names}. Statistics are sharded by the compiler: '
        'make the mesh with axis_types=(AxisType.Auto,) * '
        f'{len(mesh.axis_names)}, as idesign.training.make_mesh does.'
      )
