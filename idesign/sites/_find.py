"""Finding the weight sites of a loss: where a selected parameter meets data."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from idesign.sites import _jaxpr
from idesign.sites._site import Product, Site, Sites, Use, View
from idesign.sites.selection import Pattern, SelectionError

# Primitives that only lay a parameter out anew; values are moved, not mixed.
_MOVES = frozenset({'transpose', 'reshape', 'squeeze', 'slice', 'rev'})
_SAME = frozenset({
    'convert_element_type', 'reduce_precision', 'copy', 'copy_p', 'name',
    'sharding_constraint', 'mesh_cast', 'reshard', 'optimization_barrier',
})  # fmt: skip


Axes = tuple[int, ...] | None  # Sizes of the first axes before they were one.


class UnsupportedUseError(ValueError):
  """A selected parameter reaches a primitive that sites cannot look into."""

  def __init__(self, path: str, primitive: str, why: str):
    self.path, self.primitive = path, primitive
    super().__init__(
      f'Parameter {path!r} reaches {primitive!r}: {why} Select other '
      'parameters, or use idesign.sites.vmap_grad, the plain per-example '
      'gradient, which handles any primitive.'
    )


class _Walk:
  """One pass over a jaxpr; collects sites and other uses."""

  def __init__(self, num_examples: int, example_axis: int, checked: bool):
    self.num_examples = num_examples
    self.example_axis = example_axis
    self.checked = checked
    self.found: list[tuple[View, Product, Any, Any]] = []
    self.unread: list[Use] = []

  def jaxpr(
    self, jaxpr, views: list[View | None], plan, merged: list[Axes] = ()
  ) -> list[View | None]:
    env = {v: view for v, view in zip(jaxpr.invars, views) if view is not None}
    axes = dict(zip(jaxpr.invars, merged))
    for i, eqn in enumerate(jaxpr.eqns):
      operands, first = (
        [None if _jaxpr.is_literal(v) else of.get(v) for v in eqn.invars]
        for of in (env, axes)
      )
      if eqn.primitive.name == 'reshape':
        axes[eqn.outvars[0]] = _merged(eqn, first[0])
      if any(v is not None for v in operands):
        outs = self.equation(i, eqn, operands, plan, first)
        env.update({v: o for v, o in zip(eqn.outvars, outs) if o is not None})
    return [None if _jaxpr.is_literal(v) else env.get(v) for v in jaxpr.outvars]

  def equation(self, i, eqn, operands, plan, merged) -> list[View | None]:
    name = eqn.primitive.name
    if name == 'dot_general':
      self.dot(i, eqn, operands, plan, merged)
    elif name == 'scan':
      return self.scan(i, eqn, operands, plan)
    elif name in _jaxpr.CALLS or name in _jaxpr.REMATS:
      body, _ = _jaxpr.inner(eqn)
      below = _jaxpr.Plan()
      outs = self.jaxpr(body, operands, below, merged)
      if below.keys():
        plan.inside[i] = below
      return outs
    elif name in _SAME and _keeps_values(eqn):
      return operands
    elif name in _MOVES or (name == 'broadcast_in_dim' and _keeps_size(eqn)):
      return [operands[0] and operands[0].moved(eqn)]
    elif name in ('split', 'unstack'):
      return operands[0].pieces(eqn)
    else:
      for view in self.selected(operands):
        if _jaxpr.inner_jaxprs(eqn):
          raise UnsupportedUseError(
            view.path, name, 'its own rules would be lost by looking inside.'
          )
        self.use(view, name, eqn.outvars[0].aval.shape)
    return [None] * len(eqn.outvars)

  def selected(self, operands) -> list[View]:
    return [v for v in operands if v is not None and v.pattern is not None]

  def use(self, view: View, primitive: str, shape) -> None:
    new = Use(view.path, primitive, tuple(shape))
    if new not in self.unread:
      self.unread.append(new)

  def scan(self, i, eqn, operands, plan) -> list[View | None]:
    parts = _jaxpr.scan_parts(eqn)
    n, m = parts.num_consts, parts.num_consts + parts.num_carry
    for view in self.selected(operands[n:m]):
      raise UnsupportedUseError(
        view.path, 'scan', 'as a carry it may change from step to step.'
      )
    for view in self.selected(operands[m:]):
      if view.pattern.layers is not None and view.moves:
        raise SelectionError(
          f'{view.pattern.text!r} asks for layers, but {view.path!r} is cut or '
          'laid out anew before the scan, so its layers cannot be counted. '
          'Select the whole stack.'
        )
    below = _jaxpr.Plan()
    consts = [v and v.constant_across(parts.length) for v in operands[:n]]
    xs = [v and v.sliced_by(parts.length, below) for v in operands[m:]]
    first = len(self.found)
    outs = self.jaxpr(
      parts.body, [*consts, *[None] * parts.num_carry, *xs], below
    )
    for view in self.selected(outs[: parts.num_carry]):
      raise UnsupportedUseError(
        view.path, 'scan', 'it leaves a step as a carry, which is data.'
      )
    # Module systems pass their parameters through a loop and out again.
    out_views = [v and v.restacked_from(below) for v in outs]
    for view, kept, var in zip(outs, out_views, eqn.outvars):
      if view is not None and view.pattern is not None and kept is None:
        self.use(view, 'scan output', var.aval.shape)
    if below.keys():
      plan.inside[i] = below
    for key in range(first, len(self.found)):
      view = self.found[key][0]
      if id(below) not in view.slicers:
        continue
      below.scanned.add(key)
      steps = view.pattern.steps(parts.length)
      if steps is not None:
        below.steps[key] = steps
    return out_views

  def dot(self, i, eqn, operands, plan, merged) -> None:
    out = eqn.outvars[0].aval
    chosen = self.selected(operands)
    if chosen and all(v is not None for v in operands):
      for view in chosen:
        self.use(view, 'dot_general of two parameters', out.shape)
      return
    for view in chosen:
      weight_first = operands[0] is not None
      contract, batch = eqn.params['dimension_numbers']
      (w_contract, x_contract), (w_batch, _) = (
        (contract, batch) if weight_first else (contract[::-1], batch[::-1])
      )
      w, x = eqn.invars if weight_first else eqn.invars[::-1]
      if w_batch:
        raise UnsupportedUseError(
          view.path, 'dot_general', 'the weight has a batch axis of its own.'
        )
      if view.pattern.layers is not None and len(view.stack) != 1:
        raise SelectionError(
          f'{view.pattern.text!r} asks for layers, but {view.path!r} is '
          f'sliced by {len(view.stack)} scans; layers need exactly one.'
        )
      # Where a reshape made the first axes of `x` one, they are told apart.
      first = merged[1 if weight_first else 0] or ()
      first = () if 0 in x_contract else first
      x, w = x.aval, w.aval
      shape = (*first, *x.shape[1:]) if first else x.shape
      later = len(shape) - x.ndim
      x_contract = tuple(a + later for a in x_contract)
      x_free = tuple(a for a in range(len(shape)) if a not in x_contract)
      axis = self.example_axis
      if axis not in x_free or shape[axis] != self.num_examples:
        raise UnsupportedUseError(
          view.path,
          'dot_general',
          f'axis {axis} of the layer input {_short(x, shape)} is not the '
          f'{self.num_examples} examples of the loss. Name the example axis '
          'with example_axis.',
        )
      alike = sum(shape[a] == self.num_examples for a in x_free)
      if alike > 1 and not self.checked:
        raise UnsupportedUseError(
          view.path,
          'dot_general',
          f'{alike} axes of the layer input {_short(x, shape)} have the size '
          'of the batch, and the loss cannot be traced with one example more '
          'to tell which is the examples: it closes over arrays of that size, '
          'or insists on it. Pass such arrays in the batch.',
        )
      product = Product(
          weight_first, axis, x_free, x_contract,
          tuple(a for a in range(w.ndim) if a not in w_contract),
          tuple(w_contract), tuple(w.shape), first,
      )  # fmt: skip
      plan.marks[i] = (len(self.found),)
      self.found.append((view, product, x, out))


def _merged(eqn, known: Axes) -> Axes:
  """The axes that are the first one of a reshape's result.

  Args:
    eqn: the reshape.
    known: the axes that are the first one of its operand, if several.
  """
  before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
  for many in range(1, len(before) + 1):
    if after and math.prod(before[:many]) == after[0]:
      axes = (*(known or before[:1]), *before[1:many])
      return axes if len(axes) > 1 else None
  return None


def _short(x, shape) -> str:
  return f'{x.dtype}[{",".join(map(str, shape))}]'


def _keeps_values(eqn) -> bool:
  # A cast to integers stops the gradient.
  return all(jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in eqn.outvars)


def _keeps_size(eqn) -> bool:
  return eqn.invars[0].aval.size == eqn.outvars[0].aval.size


def find(
    closed, paths: list[str | None], chosen: dict[str, Pattern],
    num_examples: int, example_axis: int, checked: bool = True,
) -> tuple[Sites, _jaxpr.Plan]:  # fmt: skip
  """Finds the sites of a traced loss.

  Args:
    closed: the loss's jaxpr.
    paths: for each argument of the jaxpr the path of the parameter it is, or
      None where it is data.
    chosen: the selected paths.
    num_examples: `B`.
    example_axis: which axis of every layer input is the example.
    checked: whether the caller tells axes of the batch's size apart.

  Returns:
    The sites, and the plan whose keys are their indices.
  """
  walk = _Walk(num_examples, example_axis, checked)
  plan = _jaxpr.Plan()
  views = [None if p is None else View(p, chosen.get(p)) for p in paths]
  outs = walk.jaxpr(closed.jaxpr, views, plan)
  for view in walk.selected(outs):
    walk.use(view, 'the loss itself', ())

  elsewhere = {use.path for use in walk.unread}
  counts: dict[str, int] = {}
  for view, *_ in walk.found:
    counts[view.path] = counts.get(view.path, 0) + 1
  seen: dict[str, int] = {}
  sites = []
  for view, product, x, out in walk.found:
    k = seen[view.path] = seen.get(view.path, -1) + 1
    several = counts[view.path] > 1
    x_aval = jax.eval_shape(product.x, x)
    dy_aval = jax.eval_shape(product.dy, out)
    layers = view.pattern.steps(view.stack[0]) if len(view.stack) == 1 else None
    sites.append(Site(
        name=f'{view.path}#{k}' if several else view.path,
        path=view.path,
        num_positions=x_aval.shape[1],
        d_in=x_aval.shape[2],
        d_out=dy_aval.shape[2],
        stack=view.stack if layers is None else (layers[1] - layers[0],),
        layers=layers,
        loops=view.loops,
        shared=several or view.loops > 1,
      used_elsewhere=view.path in elsewhere,
        view=view, product=product, x_aval=x_aval, dy_aval=dy_aval,
    ))  # fmt: skip
  return Sites(tuple(sites), tuple(walk.unread)), plan
