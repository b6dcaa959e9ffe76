r"""Concepts as directions in the space of parameters.

A concept read from an activation, `z = e . h` (an encoder column of an
autoencoder, a labelled direction), is a function of the parameters too. Its
gradient there, averaged over probes,

    D_c = grad_theta  mean_bt  e_c . h_bt(theta),

says which change of the parameters strengthens it; `<g_i, D_c>` says what
example `i` would do to it. For each weight matrix `D_c` is a sum over positions
of outer products, and its best rank-1 part is what `sites.direction_product`
and `shaping.confine_movement` work with: no per-example gradient is formed. Of
a matrix whose output is added straight to the activation that is read, `D_c`
*is* of rank 1: the mean input times `e_c`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from idesign import sites
from idesign.concepts.activations import Read, token_mean

PyTree = Any


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['u', 'w', 'kept'],
  meta_fields=['num_stack'],
)
@dataclasses.dataclass(frozen=True)
class RankOne:
  """For one parameter `[*stack, *ins, *outs]`: `u w^T` per concept and layer.

  Attributes:
    u: input side, `[C, *stack, *ins]`, with the size of the whole.
    w: output side, `[C, *stack, *outs]`, of norm 1.
    kept: share of the full direction's squared norm that is of rank 1,
      `[C, *stack]`; 1 where the full direction is 0.
    num_stack: how many axes of the parameter run over layers.
  """

  u: Array
  w: Array
  kept: Array
  num_stack: int


def rank_one_directions(
  read: Read,
  readout_DC: Float[Array, 'D C'],
  params: PyTree,
  probes: Any,
  select: str | Iterable[str],
  *,
  mask: Float[Array, 'B T'] | None = None,
  num_stack: int = 0,
  num_in: int = 1,
) -> dict[str, RankOne]:
  """The best rank-1 part of every concept's direction, parameter by parameter.

  One backward pass per concept, one concept after the other, so that memory
  does not grow with their number.

  Args:
    read: `read(params, probes) -> h [B, T, D]`, from `reader`.
    readout_DC: what concepts are read with, as in `predicted_change`.
    params: where the directions are taken.
    probes: what concepts are read on.
    select: regular expressions for parameter paths.
    mask: positions of the probes that count.
    num_stack: leading axes of the selected parameters that run over layers.
    num_in: how many axes after those are inputs; the others are outputs.

  Returns:
    Path -> `RankOne`.

  Raises:
    SelectionError: if a pattern matches nothing.
    ValueError: if a selected parameter is no matrix under `num_stack` and
      `num_in`, or the readout has another width.
  """
  paths = sites.leaf_paths(params)
  chosen = list(sites.match_paths(select, paths))
  leaves = dict(zip(paths, jax.tree.leaves(params)))
  for path in chosen:
    if leaves[path].ndim <= num_stack + num_in:
      raise ValueError(
        f'{path} has shape {leaves[path].shape}: with num_stack={num_stack} '
        f'and num_in={num_in} it has no outputs, so it is no matrix.'
      )

  def mean_activation(part):
    merged = [part.get(path, leaves[path]) for path in paths]
    theta = jax.tree.unflatten(jax.tree.structure(params), merged)
    h = read(theta, probes)
    if h.shape[-1] != readout_DC.shape[0]:
      raise ValueError(
        f'the activation has width {h.shape[-1]} and the concepts are read '
        f'from width {readout_DC.shape[0]}.'
      )
    return jnp.mean(token_mean(h, mask), axis=0)

  def split(path, direction):
    shape = direction.shape
    stack = shape[:num_stack]
    ins = shape[num_stack : num_stack + num_in]
    outs = shape[num_stack + num_in :]
    matrix = direction.reshape(*stack, math.prod(ins), math.prod(outs))
    u, s, v = jnp.linalg.svd(matrix, full_matrices=False)
    total = jnp.sum(s**2, -1)
    kept = jnp.where(
      total > 0, s[..., 0] ** 2 / jnp.where(total > 0, total, 1), 1
    )
    u = u[..., 0] * s[..., :1]
    return u.reshape(*stack, *ins), v[..., 0, :].reshape(*stack, *outs), kept

  part = {path: leaves[path] for path in chosen}
  _, pull = jax.vjp(mean_activation, part)
  one = lambda e: {k: split(k, d) for k, d in pull(e)[0].items()}
  found = jax.jit(lambda e: jax.lax.map(one, e))(readout_DC.T)
  return {k: RankOne(*parts, num_stack) for k, parts in found.items()}


def dense(direction: RankOne) -> Float[Array, 'C *shape']:
  """The direction as arrays shaped like the parameter, `[C, *shape]`."""
  lead = 1 + direction.num_stack
  u, w = direction.u, direction.w
  u = u.reshape(*u.shape, *[1] * (w.ndim - lead))
  w = w.reshape(
    *w.shape[:lead], *[1] * (direction.u.ndim - lead), *w.shape[lead:]
  )
  return u * w


def concept_scores(
  loss: sites.Loss,
  directions: Mapping[str, RankOne],
  *,
  by_position: bool = False,
  microbatch: int | None = None,
) -> Callable[[PyTree, Any], Float[Array, 'B *T C']]:
  r"""`score[b, c] = <grad loss_b, D_c>`, in one ordinary backward pass.

  The first-order effect on concept `c` of a step of plain gradient descent on
  example `b` is `-learning_rate * score[b, c]`.

  Args:
    loss: `loss(params, batch) -> [B]`.
    directions: from `rank_one_directions`.
    by_position: split over the positions that each weight sees, whose number
      must be one and the same.
    microbatch: how many examples to read at once, one such part after the
      other; all if None. Scores are the same, memory is that of a part. Every
      array of the batch must have examples as its first axis.

  Returns:
    `scores(params, batch)`, to be jitted by the caller; `[B, C]`, or
    `[B, T, C]`.

  Raises (when called or traced):
    UnreadUseError: if a parameter is also used where no statistic is read.
    ValueError: by position, if weights see different numbers of positions; for
      a microbatch that does not divide the batch.
  """
  statistic = (
    sites.direction_product_by_position
    if by_position
    else sites.direction_product
  )
  select = [_escaped(path) for path in directions]
  read = sites.collect(loss, {'score': statistic}, select)

  def scores(params, batch):
    at = sites.find_sites(loss, params, batch, select)
    inputs = {
      name: _site_inputs(directions[site.path])
      for name, site in at.by_name.items()
    }
    out = read(params, batch, inputs={'score': inputs}).values['score']
    total: Any = 0.0
    for name, value in out.items():
      # Layers of a stack are leading axes: their scores add up.
      layers = len(at.by_name[name].stack)
      value = jnp.sum(value, axis=tuple(range(layers)))
      if by_position and jnp.ndim(total) and value.shape != total.shape:
        raise ValueError(
          f'{name} sees {value.shape[1]} positions and others '
          f'{total.shape[1]}: they cannot be added by position.'
        )
      total = total + value
    return total

  def in_parts(params, batch):
    sizes = {x.shape[0] for x in jax.tree.leaves(batch)}
    if len(sizes) != 1 or microbatch < 1 or min(sizes) % microbatch:
      raise ValueError(
        f'microbatch={microbatch} for arrays of {sorted(sizes)} examples: it '
        'must divide their number, one and the same in all arrays.'
      )
    (size,) = sizes
    split = lambda x: x.reshape(size // microbatch, microbatch, *x.shape[1:])
    parts = jax.lax.map(
      lambda part: scores(params, part), jax.tree.map(split, batch)
    )
    return parts.reshape(size, *parts.shape[2:])

  return scores if microbatch is None else in_parts


def _site_inputs(direction: RankOne) -> tuple[Array, Array]:
  """As sites take them: `[*stack, C, d_in]` and `[*stack, C, d_out]`."""
  lead = 1 + direction.num_stack
  flat = lambda x: x.reshape(*x.shape[:lead], -1)
  last = lambda x: jnp.moveaxis(flat(x), 0, direction.num_stack)
  return last(direction.u), last(direction.w)


def _escaped(path: str) -> str:
  return ''.join(f'\\{c}' if c in '.^$*+?{}[]|()' else c for c in path)


def jvp_scores(
  loss: sites.Loss,
  params: PyTree,
  batch: Any,
  directions: Mapping[str, RankOne],
) -> Float[Array, 'B C']:
  """The same as `concept_scores`, by one forward-mode pass per concept.

  Exact for any architecture, tied and constant weights included, and slower by
  the number of concepts: what the fast form is checked against.
  """
  paths = sites.leaf_paths(params)
  leaves, tree = jax.tree.flatten(params)
  full = {k: dense(d) for k, d in directions.items()}

  def one(c):
    tangents = [
      full[path][c].astype(leaf.dtype) if path in full else jnp.zeros_like(leaf)
      for path, leaf in zip(paths, leaves)
    ]
    return jax.jvp(
      lambda p: loss(p, batch), (params,), (jax.tree.unflatten(tree, tangents),)
    )[1]

  count = len(next(iter(directions.values())).u)
  return jax.lax.map(one, jnp.arange(count)).T
