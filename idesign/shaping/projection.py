r"""Projecting a concept out of gradients: the baseline that loses.

Descent finds another way to the same loss: on every world that was tried here,
behaviour whose gradient is projected out, at activations or at parameters,
before the optimizer or after it, is learned all the same (see
`experiments.pirate`). These transformations exist to show that, and as parts
of what does hold: a bound on the *applied* update, `confine_movement`.

A direction in parameter space is given for some of the parameters, as a sum of
rank-1 matrices `u w^T` (one per matrix and concept): `concepts
.rank_one_directions` makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import optax

from idesign import sites
from idesign.concepts import RankOne

PyTree = Any
Directions = Mapping[str, RankOne]


@jax.custom_vjp
def _block(h, basis):
  del basis
  return h


def _block_forward(h, basis):
  return h, basis


def _block_backward(basis, g):
  return g - (g @ basis) @ basis.T, jnp.zeros_like(basis)


_block.defvjp(_block_forward, _block_backward)


def orthonormal(directions: Float[Array, 'C D']) -> Float[Array, 'D C']:
  """An orthonormal basis of the span of directions, for the functions here.

  Raises:
    ValueError: if there are more directions than dimensions.
  """
  if directions.ndim != 2 or directions.shape[0] > directions.shape[1]:
    raise ValueError(
      f'directions {directions.shape} must be [concepts, width], and not more '
      'than the width, or nothing would be left.'
    )
  return jnp.linalg.qr(directions.T)[0]


def block_activation_gradient(
  fn: Callable[..., Any], bases: Mapping[str, Float[Array, 'D C']]
) -> Callable[..., Any]:
  """Backward only: `dL/dh -> dL/dh - (dL/dh Q) Q^T`; the forward is as it was.

  Args:
    fn: a function whose activations are named.
    bases: activation -> orthonormal `Q`; see `sites.edit` for the names.
  """
  return sites.edit(
    fn, {k: (lambda h, q=q: _block(h, q)) for k, q in bases.items()}
  )


class ConfineState(NamedTuple):
  """What the last step did; arrays only.

  Attributes:
    count: steps so far.
    multiplier: of each concept's direction, how much of it was added.
    residual: how far from optimal the update that was applied is, in units of
      movement (the largest violation of the Karush-Kuhn-Tucker conditions, or
      of a bound after rounding to the dtype of the update); 0 at the optimum.
    ignored: steps so far that were made zero because an update or a bound was
      no number, or no movement could have been in the box.
  """

  count: Int[Array, '']
  multiplier: Float[Array, 'C']
  residual: Float[Array, '']
  ignored: Int[Array, '']


def confine_movement(
  directions: Directions, *, sweeps: int = 30
) -> optax.GradientTransformationExtraArgs:
  r"""Keeps each concept's first-order movement in a box.

  Of all updates it applies the one nearest to the optimizer's:

    min |v - u|^2   subject to   low_c <= <D_c, v> <= high_c   for every c

  by Gauss-Seidel on the dual, a quadratic programme in C variables (as GEM,
  https://arxiv.org/abs/1706.08840, by `v = u + sum_c lambda_c D_c`), with a
  fixed number of sweeps and the residual in the state.

  Goes **last** in a chain, after the learning rate and weight decay: of what is
  applied before them nothing is guaranteed. `update` takes the extra arguments
  `low` and `high`, `[C]`; a bound may be infinite. A direction of norm 0 is not
  constrained. Where an update holds NaN or infinity, or a box is empty (NaN,
  `low > high`, a lower bound of infinity, an upper one of minus infinity), the
  update becomes zero and is counted in `ConfineState.ignored`. An optimizer
  before this one that took a NaN into its moments gives nothing else from then
  on: where gradients can be NaN, put `optax.apply_if_finite` around the chain.

  Args:
    directions: of the parameters named; the others are left alone.
    sweeps: over all concepts. Few are needed unless directions are nearly
      parallel: look at `residual`.

  Raises:
    ValueError: for no direction, or directions with different concepts; when
      traced, if a parameter is missing or has another shape.
  """
  count = _concepts(directions)

  def init(params):
    _leaves(params, directions)
    # Not one array of zeros: a step donates each.
    zero = lambda: jnp.zeros((), jnp.int32)
    return ConfineState(zero(), jnp.zeros(count), jnp.zeros(()), zero())

  def update(updates, state, params=None, *, low, high, **extra):
    del params, extra
    if jnp.shape(low) != (count,) or jnp.shape(high) != (count,):
      raise ValueError(
        f'low {jnp.shape(low)} and high {jnp.shape(high)} must be ({count},).'
      )
    moved, gram = movement(updates, directions), _gram(directions)
    finite = jnp.array(
      [jnp.isfinite(u).all() for u in jax.tree.leaves(updates)]
    )
    # False for NaN.
    boxes = (low <= high) & (low < jnp.inf) & (high > -jnp.inf)
    sound = finite.all() & boxes.all()
    moved = jnp.where(sound, moved, 0)
    low = jnp.where(sound, low, -jnp.inf)
    high = jnp.where(sound, high, jnp.inf)
    diagonal = jnp.diagonal(gram)
    free = diagonal <= 1e-12 * jnp.max(diagonal)

    def best(multiplier, c):
      """The multiplier of `c` when the others stay."""
      own = gram[c, c]
      without = moved[c] + gram[c] @ multiplier - own * multiplier[c]
      wanted = (jnp.clip(without, low[c], high[c]) - without) / own
      return jnp.where(free[c], 0, wanted)

    def visit(i, multiplier):
      c = i % count
      return multiplier.at[c].set(best(multiplier, c))

    multiplier = jax.lax.fori_loop(
      0, sweeps * count, visit, jnp.zeros_like(moved)
    )
    wanted = jax.vmap(best, (None, 0))(multiplier, jnp.arange(count))
    residual = jnp.max(jnp.abs(wanted - multiplier) * diagonal)
    updates = jax.tree.map(lambda u: jnp.where(sound, u, 0), updates)
    updates = _add(updates, directions, multiplier)
    # Behind a barrier, so that it is what was rounded that is measured.
    applied = movement(jax.lax.optimization_barrier(updates), directions)
    outside = jnp.abs(jnp.clip(applied, low, high) - applied)
    residual = jnp.maximum(residual, jnp.max(jnp.where(free, 0, outside)))
    return updates, ConfineState(
      optax.safe_increment(state.count),
      multiplier,
      residual,
      state.ignored + jnp.where(sound, 0, 1).astype(jnp.int32),
    )

  return optax.GradientTransformationExtraArgs(init, update)


def project_out(directions: Directions) -> optax.GradientTransformation:
  """Removes the span of the directions: `u - D^T (D D^T)^+ D u`.

  Before the optimizer in a chain it projects gradients, after it updates.

  Raises:
    ValueError: as `confine_movement`.
  """
  _concepts(directions)

  def init(params):
    _leaves(params, directions)
    return optax.EmptyState()

  def update(updates, state, params=None):
    del params
    moved, gram = movement(updates, directions), _gram(directions)
    return _add(updates, directions, -_multiplier(gram, moved)), state

  return optax.GradientTransformation(init, update)


def movement(updates: PyTree, directions: Directions) -> Float[Array, 'C']:
  """`<D_c, u>` for every concept: its first-order movement under an update."""
  total = 0.0
  for path, leaf in _leaves(updates, directions).items():
    u, w, matrix = _matrices(path, directions[path], leaf)
    part = jnp.einsum('csi,sio->cso', u, matrix)
    total = total + jnp.einsum('cso,cso->c', part, w)
  return total


def _multiplier(
  gram: Float[Array, 'C C'], moved: Float[Array, 'C']
) -> Float[Array, 'C']:
  """`(D D^T)^+ D u`.

  By directions of length 1: beside one in large units the pseudo-inverse would
  take one in small units for rounding.
  """
  length = jnp.sqrt(jnp.diagonal(gram))
  scale = jnp.where(length > 0, 1 / jnp.where(length > 0, length, 1), 0)
  unit = gram * scale[:, None] * scale[None]
  return scale * (jnp.linalg.pinv(unit, hermitian=True) @ (scale * moved))


def _gram(directions: Directions) -> Float[Array, 'C C']:
  total = 0.0
  for d in directions.values():
    flat = lambda x: x.reshape(*x.shape[: 1 + d.num_stack], -1)
    u, w = flat(d.u), flat(d.w)
    u, w = (x.reshape(len(x), -1, x.shape[-1]) for x in (u, w))
    uu = jnp.einsum('csi,dsi->cds', u, u)
    total = total + jnp.sum(uu * jnp.einsum('cso,dso->cds', w, w), -1)
  return total


def _add(updates, directions, multiplier):
  """`u + sum_c multiplier_c D_c`."""
  changed = {}
  for path, leaf in _leaves(updates, directions).items():
    u, w, _ = _matrices(path, directions[path], leaf)
    delta = jnp.einsum('c,csi,cso->sio', multiplier, u, w)
    changed[path] = leaf + delta.reshape(leaf.shape).astype(leaf.dtype)
  leaves, tree = jax.tree.flatten(updates)
  paths = sites.leaf_paths(updates)
  new = [changed.get(path, leaf) for path, leaf in zip(paths, leaves)]
  return jax.tree.unflatten(tree, new)


def _matrices(path, direction, leaf):
  """`u [C, S, I]`, `w [C, S, O]` and the leaf as `[S, I, O]`."""
  lead = direction.num_stack
  stack, ins = direction.u.shape[1 : 1 + lead], direction.u.shape[1 + lead :]
  outs = direction.w.shape[1 + lead :]
  if leaf.shape != (*stack, *ins, *outs):
    raise ValueError(
      f'{path} has shape {leaf.shape}; its directions are for '
      f'{(*stack, *ins, *outs)}.'
    )
  c = len(direction.u)
  s, i, o = math.prod(stack), math.prod(ins), math.prod(outs)
  return (
    direction.u.reshape(c, s, i),
    direction.w.reshape(c, s, o),
    leaf.reshape(s, i, o),
  )


def _leaves(tree, directions) -> dict[str, Array]:
  leaves = dict(zip(sites.leaf_paths(tree), jax.tree.leaves(tree)))
  missing = sorted(set(directions) - set(leaves))
  if missing:
    raise ValueError(
      f'there are directions for {missing}, which are no parameters here: '
      f'{sorted(leaves)}.'
    )
  return {path: leaves[path] for path in directions}


def _concepts(directions: Directions) -> int:
  counts = {len(x) for d in directions.values() for x in (d.u, d.w)}
  if len(counts) != 1:
    raise ValueError(
      f'directions must be for the same concepts, got {sorted(counts)}.'
    )
  return counts.pop()


class HoldState(NamedTuple):
  """Where concepts are held.

  Attributes:
    count: steps so far.
    start: what each read when the transformation was initialised, on each part
      of the probes.
  """

  count: Int[Array, '']
  start: Float[Array, 'P C']


def hold_concepts(
  concepts: Callable[[PyTree, Int[Array, '']], Float[Array, 'C']],
  *,
  parts: int = 1,
) -> optax.GradientTransformation:
  r"""Keeps concepts where they were, whatever the optimizer wants.

  Like `project_out`, with directions that are taken anew at every step and are
  not cut down to rank 1, and with feedback, for what steps of finite length
  leave over adds up:

    v = u - D^+ (D u + s (c(params) - c(params at init))),   D = dc / dparams

  What is held on few probes is not held on others, and many cost much: so each
  step looks at one part of the probes, in turn.

  `s` is 1 unless the way back were longer than `u` itself, which it then is
  not: steps cannot grow where `D` bends, and where nothing is learned nothing
  moves. Of concepts whose directions are linearly dependent, what they cannot
  do together is left (a pseudo-inverse, in float32).

  Goes **last** in a chain, after the learning rate: of what comes later nothing
  is known here. Whatever parameter `concepts` depends on may be moved, and all
  are needed to read them: instead of `optax.masked`, stop the gradient within
  `concepts` for those that are to stay. One NaN in an update reaches all of it;
  where gradients can be NaN, put `optax.apply_if_finite` around the chain.
  Costs a backward pass, and the memory of a gradient, per concept.

  Args:
    concepts: parameters and part -> what each concept reads on that part of
      some probes.
    parts: how many there are.

  Raises:
    ValueError: for fewer parts than one; when traced, if `update` is not given
      the parameters.
  """
  if parts < 1:
    raise ValueError(f'parts={parts} must be at least 1.')

  def init(params):
    each = jnp.arange(parts, dtype=jnp.int32)
    # Computed, hence no parameter itself, which a step would donate.
    start = jax.lax.map(lambda part: concepts(params, part), each)
    return HoldState(jnp.zeros((), jnp.int32), start.astype(jnp.float32))

  def update(updates, state, params=None):
    if params is None:
      raise ValueError('hold_concepts needs update(..., params).')
    part = state.count % parts
    values, pull = jax.vjp(lambda p: concepts(p, part), params)
    (rows,) = jax.vmap(pull)(jnp.eye(len(values), dtype=values.dtype))
    flat = lambda x: x.reshape(len(values), -1).astype(jnp.float32)
    gram, moved = 0.0, 0.0
    for row, u in zip(jax.tree.leaves(rows), jax.tree.leaves(updates)):
      gram += flat(row) @ flat(row).T
      moved += flat(row) @ u.ravel().astype(jnp.float32)
    back = _multiplier(gram, values.astype(jnp.float32) - state.start[part])
    way = jnp.sqrt(jnp.maximum(back @ gram @ back, 0))
    share = jnp.minimum(1, optax.tree.norm(updates) / jnp.maximum(way, 1e-30))
    multiplier = _multiplier(gram, moved) + share * back
    remove = lambda u, d: (u - jnp.tensordot(multiplier, d, 1)).astype(u.dtype)
    updates = jax.tree.map(remove, updates, rows)
    return updates, HoldState(optax.safe_increment(state.count), state.start)

  return optax.GradientTransformation(init, update)
