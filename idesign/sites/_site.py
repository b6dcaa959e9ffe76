"""What a weight site is: a parameter's view, a product, and the two as one."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np

from idesign.sites import _jaxpr
from idesign.sites.selection import Pattern


class Use(NamedTuple):
  """A use of a selected parameter that is not a site."""

  path: str
  primitive: str
  shape: tuple[int, ...]


class Move(NamedTuple):
  primitive: Any
  params: dict[str, Any]


LAYER = 'one layer of the stack'


@dataclasses.dataclass(frozen=True)
class View:
  """What is left of a parameter after the layout changes seen so far."""

  path: str
  pattern: Pattern | None  # None: tracked, but not selected.
  moves: tuple[Any, ...] = ()
  stack: tuple[int, ...] = ()  # Lengths of the scans that slice it.
  slicers: tuple[int, ...] = ()  # Their plans, by id.
  loops: int = 1  # Steps of the scans across which it is constant.

  def moved(self, eqn) -> 'View':
    return dataclasses.replace(
      self, moves=(*self.moves, Move(eqn.primitive, eqn.params))
    )

  def pieces(self, eqn) -> list['View']:
    """Each result of a `split` or an `unstack`, as the slice that it is."""
    shape, axis = eqn.invars[0].aval.shape, eqn.params['axis']
    whole = eqn.primitive.name == 'split'
    sizes = eqn.params['sizes'] if whole else (1,) * shape[axis]
    squeeze = () if whole else (Move(lax.squeeze_p, {'dimensions': (axis,)}),)
    stops = np.cumsum(sizes)
    views = []
    for start, stop in zip(stops - sizes, stops):
      starts, limits = [0] * len(shape), list(shape)
      starts[axis], limits[axis] = int(start), int(stop)
      cut = Move(
        lax.slice_p,
        {
          'start_indices': tuple(starts),
          'limit_indices': tuple(limits),
          'strides': None,
        },
      )
      moves = (*self.moves, cut, *squeeze)
      views.append(dataclasses.replace(self, moves=moves))
    return views

  def constant_across(self, length: int) -> 'View':
    return dataclasses.replace(self, loops=self.loops * length)

  def sliced_by(self, length: int, plan: _jaxpr.Plan) -> 'View':
    return dataclasses.replace(
      self,
      moves=(*self.moves, LAYER),
      stack=(*self.stack, length),
      slicers=(*self.slicers, id(plan)),
    )

  def restacked_from(self, plan: _jaxpr.Plan) -> 'View | None':
    """The stack again, where a scan hands its slices out untouched."""
    if self.slicers[-1:] != (id(plan),) or self.moves[-1] != LAYER:
      return None
    return dataclasses.replace(
      self,
      moves=self.moves[:-1],
      stack=self.stack[:-1],
      slicers=self.slicers[:-1],
    )


class Product(NamedTuple):
  """The roles of the axes of one `dot_general` between `x` and a weight.

  Axes of `x` are counted as they were before a reshape made the first ones one.
  """

  weight_first: bool
  x_batch: int
  x_free: tuple[int, ...]
  x_contract: tuple[int, ...]
  w_free: tuple[int, ...]
  w_contract: tuple[int, ...]
  w_shape: tuple[int, ...]
  merged: tuple[int, ...] = ()  # Axes of `x` that the product has as one.

  def x(self, x: Array) -> Array:
    """The layer's input as `[B, T, d_in]`."""
    if self.merged:
      x = x.reshape(*self.merged, *x.shape[1:])
    others = tuple(a for a in self.x_free if a != self.x_batch)
    x = jnp.transpose(x, (self.x_batch, *others, *self.x_contract))
    return _three(x, len(others))

  def dy(self, dy: Array) -> Array:
    """The output's cotangent as `[B, T, d_out]`."""
    first = len(self.w_free) if self.weight_first else 0
    if self.merged:
      shape = dy.shape
      dy = dy.reshape(*shape[:first], *self.merged, *shape[first + 1 :])
    place = {a: first + i for i, a in enumerate(self.x_free)}
    others = [place[a] for a in self.x_free if a != self.x_batch]
    outs = [a for a in range(dy.ndim) if a not in place.values()]
    return _three(
      jnp.transpose(dy, (place[self.x_batch], *others, *outs)), len(others)
    )

  def weight(self, w: Array) -> Array:
    """The weight as `[d_in, d_out]`."""
    d_in = math.prod(self.w_shape[a] for a in self.w_contract)
    w = jnp.transpose(w, (*self.w_contract, *self.w_free))
    return w.reshape(d_in, -1)


def _three(x: Array, middle: int) -> Array:
  shape = x.shape
  t, d = math.prod(shape[1 : 1 + middle]), math.prod(shape[1 + middle :])
  return x.reshape(shape[0], t, d)


@dataclasses.dataclass(frozen=True)
class Site:
  """A product of a selected parameter with data.

  A site computes `y[b, t] = x[b, t] @ w` with `w [d_in, d_out]`, where `b` is
  the example and `t` runs over whatever other axes `x` has (one if none).

  Attributes:
    name: `path`, or `path#k` where the parameter has several sites.
    path: the parameter's path in the tree, keys joined by `/`.
    num_positions: `T`.
    d_in: features of `x`.
    d_out: features of `y`.
    stack: lengths of the scans that slice the parameter; every statistic of
      this site has them as leading axes.
    layers: the selected layers of the stack, `(start, stop)`; None for all.
    loops: number of times the site runs with the same weight because it is
      constant across a scan.
    shared: whether the parameter meets data more than once, here (`loops`) or
      at another site. Only additive statistics may then be read site by site.
    used_elsewhere: whether the parameter also has uses that are not sites,
      such as the gather of a tied embedding.
  """

  name: str
  path: str
  num_positions: int
  d_in: int
  d_out: int
  stack: tuple[int, ...]
  layers: tuple[int, int] | None
  loops: int
  shared: bool
  used_elsewhere: bool
  view: View = dataclasses.field(repr=False)
  product: Product = dataclasses.field(repr=False)
  x_aval: jax.ShapeDtypeStruct = dataclasses.field(repr=False)
  dy_aval: jax.ShapeDtypeStruct = dataclasses.field(repr=False)

  def matrix(self, leaf: Array) -> Array:
    """The parameter as this site multiplies with it: `[*stack, d_in, d_out]`.

    The dtype is the parameter's own: casts on the way to the product are
    left out.
    """
    return self._lay_out(leaf)

  def with_matrix(self, leaf: Array, matrix: Array) -> Array:
    """The parameter with this site's matrix replaced; inverse of `matrix`.

    Values are moved, never computed with: `with_matrix(w, matrix(w))` is `w`
    bit for bit, and entries that this site does not use stay as they are.
    """
    back = jax.linear_transpose(self._lay_out, leaf)
    (new,) = back(matrix.astype(leaf.dtype))
    if self.layers is None and not self._cuts():
      return new
    (used,) = back(jnp.ones_like(matrix, leaf.dtype))
    return jnp.where(used != 0, new, leaf)

  def from_gradient(self, leaf: Array, gradient: Array) -> Array:
    """Per-example matrices `[*stack, B, d_in, d_out]` as `[B, *leaf.shape]`."""
    back = jax.linear_transpose(
      self._lay_out, jax.ShapeDtypeStruct(leaf.shape, gradient.dtype)
    )
    by_example = jnp.moveaxis(gradient, len(self.stack), 0)
    return jax.vmap(lambda g: back(g)[0])(by_example)

  def _cuts(self) -> bool:
    return any(
      isinstance(m, Move) and m.primitive.name == 'slice'
      for m in self.view.moves
    )

  def _lay_out(self, leaf: Array) -> Array:
    depth = 0
    for move in (*self.view.moves, self.product.weight):
      if move == LAYER:
        depth += 1
        continue
      if isinstance(move, Move):
        move = functools.partial(move.primitive.bind, **move.params)
      for _ in range(depth):
        move = jax.vmap(move)
      leaf = move(leaf)
    return leaf if self.layers is None else leaf[slice(*self.layers)]


class Sites(NamedTuple):
  """What a loss does with the selected parameters.

  Attributes:
    sites: the products with data, in order of appearance.
    unread: every other use, in order of appearance.
  """

  sites: tuple[Site, ...]
  unread: tuple[Use, ...]

  @property
  def by_name(self) -> dict[str, Site]:
    """The sites by name, as edits take them."""
    return {site.name: site for site in self.sites}

  def __str__(self) -> str:
    rows = [('site', 'stack', 'positions', 'd_in', 'd_out', 'shared')]
    rows += [
        (s.name, 'x'.join(map(str, s.stack)), str(s.num_positions),
         str(s.d_in), str(s.d_out), 'yes' if s.shared else '')
        for s in self.sites
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
      '  '.join(c.ljust(w) for c, w in zip(row, widths)).rstrip()
      for row in rows
    ]
    lines += [
      f'no site: {u.path} in {u.primitive} {u.shape}' for u in self.unread
    ]
    return '\n'.join(lines)
