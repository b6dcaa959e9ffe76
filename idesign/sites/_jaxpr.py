"""Re-evaluating a jaxpr with a rule at marked equations.

The only file that touches `jax.extend`. What differs between jax versions is
kept in `bind`, `inner` and `scan_parts`; `tests/sites/test_jaxpr.py` holds a
contract test for each primitive named here.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
from jax.extend import core as jex_core

Jaxpr = jex_core.Jaxpr
Key = Hashable
Found = dict[Key, Any]
# rule(eqn, invals, keys, extra) -> (outvals, found)
Rule = Callable[
  [Any, list, tuple[Key, ...], dict[Key, Any]], tuple[list, Found]
]

# `jit` was `pjit` before jax 0.7. Calls are evaluated in place: XLA inlines
# them anyway, and whatever encloses the whole function is still compiled once.
CALLS = frozenset({'jit', 'pjit', 'closed_call', 'core_call'})
REMATS = frozenset({'remat2', 'remat', 'checkpoint'})


@dataclasses.dataclass
class Plan:
  """Where a rule acts in one jaxpr.

  Attributes:
    marks: equation index -> the keys for which the rule is called there.
    inside: equation index -> the plan of the jaxpr which that equation holds.
    scanned: for a scan's body, the keys whose extra input is sliced along the
      loop. Other extra inputs are the same at every step.
    steps: for a scan's body, key -> the range of steps at which it is live;
      a key that is absent is live at all of them.
  """

  marks: dict[int, tuple[Key, ...]] = dataclasses.field(default_factory=dict)
  inside: dict[int, 'Plan'] = dataclasses.field(default_factory=dict)
  scanned: set[Key] = dataclasses.field(default_factory=set)
  steps: dict[Key, tuple[int, int]] = dataclasses.field(default_factory=dict)

  def keys(self) -> list[Key]:
    """All keys marked here or deeper, in order of appearance."""
    keys = itertools.chain(
      *self.marks.values(), *(p.keys() for p in self.inside.values())
    )
    return list(dict.fromkeys(keys))

  def only(self, live: set[Key]) -> 'Plan':
    """The plan without the marks of other keys."""
    marks = {
      i: tuple(k for k in ks if k in live) for i, ks in self.marks.items()
    }
    inside = {i: p.only(live) for i, p in self.inside.items()}
    return Plan(
      {i: ks for i, ks in marks.items() if ks},
      {i: p for i, p in inside.items() if p.marks or p.inside},
      self.scanned & live,
      {k: s for k, s in self.steps.items() if k in live},
    )


class ScanParts(NamedTuple):
  """What a scan equation does, in terms that no jax version changes."""

  body: Jaxpr
  body_consts: Sequence[Any]
  num_consts: int
  num_carry: int
  length: int
  reverse: bool
  unroll: int | bool


def open_jaxpr(jaxpr: Any) -> tuple[Jaxpr, Sequence[Any]]:
  """A jaxpr and its constants, whether it came closed or not."""
  if isinstance(jaxpr, jex_core.ClosedJaxpr):
    return jaxpr.jaxpr, jaxpr.consts
  return jaxpr, ()


def is_literal(var: Any) -> bool:
  """Whether an operand is a constant written into the jaxpr."""
  return isinstance(var, jex_core.Literal)


def inner(eqn: Any) -> tuple[Jaxpr, Sequence[Any]]:
  """The jaxpr that a call, a remat or a scan equation evaluates."""
  params = eqn.params
  return open_jaxpr(
    params['jaxpr'] if 'jaxpr' in params else params['call_jaxpr']
  )


def inner_jaxprs(eqn: Any) -> list[Jaxpr]:
  """Every jaxpr in an equation's parameters (branches, bodies, conditions)."""
  return [open_jaxpr(j)[0] for j in jex_core.jaxprs_in_params(eqn.params)]


def scan_parts(eqn: Any) -> ScanParts:
  """Reads a scan equation.

  The numbers of constants and carries have had three spellings in as many jax
  versions, so they are read off the ranks: a scanned operand has one axis more
  outside the body than inside, a constant or a carry has the same.
  """
  body, consts = inner(eqn)
  stacked_in = sum(
    len(outer.aval.shape) != len(within.aval.shape)
    for outer, within in zip(eqn.invars, body.invars)
  )
  num_carry = sum(
    len(outer.aval.shape) == len(within.aval.shape)
    for outer, within in zip(eqn.outvars, body.outvars)
  )
  return ScanParts(
    body=body,
    body_consts=consts,
    num_consts=len(eqn.invars) - num_carry - stacked_in,
    num_carry=num_carry,
    length=eqn.params['length'],
    reverse=eqn.params['reverse'],
    unroll=eqn.params['unroll'],
  )


def bind(eqn: Any, invals: list) -> list:
  """Evaluates one equation as it stands."""
  params = eqn.primitive.get_bind_params(eqn.params)
  if isinstance(params, tuple):  # (functions, parameters), before jax 0.10
    functions, params = params
    invals = [*functions, *invals]
  with eqn.ctx.manager:
    outs = eqn.primitive.bind(*invals, **params)
  return list(outs) if eqn.primitive.multiple_results else [outs]


def trace(fn: Callable[..., Any], *args) -> tuple[jex_core.ClosedJaxpr, Any]:
  """The jaxpr of `fn` at `args`, and the tree of its result."""
  closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
  return closed, jax.tree.structure(shapes)


def evaluate(
  jaxpr: Jaxpr,
  consts: Sequence[Any],
  args: Sequence[Any],
  plan: Plan,
  rule: Rule,
  extra: dict[Key, Any],
) -> tuple[list, Found]:
  """Evaluates a jaxpr, calling `rule` in place of the marked equations.

  Args:
    jaxpr: what to evaluate.
    consts: values of its constants.
    args: values of its arguments.
    plan: which equations are marked.
    rule: `rule(eqn, invals, keys, extra) -> (outvals, found)`.
    extra: a pytree per key, handed to the rule. Where the plan says that a
      scan slices it, its leaves have the loop as leading axis.

  Returns:
    The results, and what the rule found, by key. Whatever is found inside a
    scan is stacked along a new leading axis.
  """
  env: dict[Any, Any] = {}

  def read(var):
    return var.val if is_literal(var) else env[var]

  env.update(zip(jaxpr.constvars, consts, strict=True))
  env.update(zip(jaxpr.invars, args, strict=True))
  found: Found = {}
  for i, eqn in enumerate(jaxpr.eqns):
    invals = [read(v) for v in eqn.invars]
    if i in plan.marks:
      outs, new = rule(eqn, invals, plan.marks[i], extra)
    elif i in plan.inside:
      outs, new = _enter(eqn, invals, plan.inside[i], rule, extra)
    else:
      outs, new = bind(eqn, invals), {}
    found.update(new)
    env.update(zip(eqn.outvars, outs, strict=True))
  return [read(v) for v in jaxpr.outvars], found


def _enter(eqn, invals, plan, rule, extra) -> tuple[list, Found]:
  """Evaluates an equation that holds marked equations."""
  name = eqn.primitive.name
  if name == 'scan':
    return _enter_scan(eqn, invals, plan, rule, extra)
  body, consts = inner(eqn)

  def call(invals, extra):
    return evaluate(body, consts, invals, plan, rule, extra)

  if name in REMATS:
    call = jax.checkpoint(
      call,
      prevent_cse=eqn.params['prevent_cse'],
      policy=eqn.params['policy'],
    )
  return call(invals, {k: extra[k] for k in plan.keys() if k in extra})


def _enter_scan(eqn, invals, plan, rule, extra) -> tuple[list, Found]:
  """Evaluates a scan, split where the set of live keys changes."""
  scan = scan_parts(eqn)
  n = scan.num_consts
  consts, carry = invals[:n], invals[n : n + scan.num_carry]
  xs = invals[n + scan.num_carry :]
  keys = plan.keys()
  steps = {k: plan.steps.get(k, (0, scan.length)) for k in keys}
  shared = {k: extra[k] for k in keys if k in extra and k not in plan.scanned}
  sliced = {k: extra[k] for k in plan.scanned if k in extra}

  cuts = sorted({0, scan.length, *itertools.chain(*steps.values())})
  # A scan of no steps is one segment of none.
  segments = list(itertools.pairwise(cuts)) or [(0, 0)]
  ys_parts, found_parts = [], []
  for start, stop in reversed(segments) if scan.reverse else segments:
    live = {k for k in keys if steps[k][0] <= start and stop <= steps[k][1]}
    part = plan.only(live)

    def body(carry, slices, part=part):
      xs, here = slices
      outs, found = evaluate(
        scan.body,
        scan.body_consts,
        [*consts, *carry, *xs],
        part,
        rule,
        shared | here,
      )
      return outs[: scan.num_carry], (outs[scan.num_carry :], found)

    def rows(x, offset=0, start=start, stop=stop):
      whole = start - offset == 0 and stop - offset == x.shape[0]
      return x if whole else x[start - offset : stop - offset]

    here = {
      k: jax.tree.map(lambda x, k=k: rows(x, steps[k][0]), v)
      for k, v in sliced.items()
      if k in live
    }
    carry, (ys, found) = jax.lax.scan(
      body,
      carry,
      ([rows(x) for x in xs], here),
      length=stop - start,
      reverse=scan.reverse,
      unroll=scan.unroll,
    )
    ys_parts.append(ys)
    found_parts.append(found)
  if scan.reverse:
    ys_parts.reverse()
    found_parts.reverse()
  found = {
    k: _concatenate([f[k] for f in found_parts if k in f])
    for k in dict.fromkeys(itertools.chain(*found_parts))
  }
  return [*carry, *_concatenate(ys_parts)], found


def _concatenate(parts: list) -> Any:
  if len(parts) == 1:
    return parts[0]
  return jax.tree.map(lambda *p: jax.numpy.concatenate(p), *parts)
