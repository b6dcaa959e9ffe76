"""Capturing and editing activations that a model names with `checkpoint_name`.

Neither uses a custom derivative: the result can be differentiated in both
modes, vmapped, jitted, and captured or edited again. Edit first and
differentiate the result: a function that already holds a gradient was
differentiated before the edit, and runs some activations twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from idesign.sites import _jaxpr, selection
from idesign.sites.selection import SelectionError


class _Occurrence(NamedTuple):
  """One equation that names an activation."""

  name: str
  loops: tuple[int, ...]  # Lengths of the enclosing scans, outer first.

  @property
  def num_layers(self) -> int:
    return self.loops[-1] if self.loops else 1


class _Wanted(NamedTuple):
  """What a request means at one occurrence: the key of a plan."""

  occurrence: int
  text: str


def _occurrences(jaxpr, loops=()) -> tuple[list[_Occurrence], set[str]]:
  """The named activations in order, and those out of reach with the reason."""
  found: list[_Occurrence] = []
  hidden: set[str] = set()
  for eqn in jaxpr.eqns:
    primitive = eqn.primitive.name
    if primitive == 'name':
      found.append(_Occurrence(eqn.params['name'], loops))
      continue
    deeper = loops
    if primitive == 'scan':
      deeper = (*loops, _jaxpr.scan_parts(eqn).length)
    for body in _jaxpr.inner_jaxprs(eqn):
      below, hidden_below = _occurrences(body, deeper)
      hidden |= hidden_below
      if _enterable(eqn):
        found += below
      else:
        hidden |= {f'{o.name} (inside {primitive})' for o in below}
  return found, hidden


def _enterable(eqn) -> bool:
  name = eqn.primitive.name
  return name == 'scan' or name in _jaxpr.CALLS or name in _jaxpr.REMATS


def _mark(jaxpr, requests, counter, steps) -> _jaxpr.Plan:
  """The plan for requests, walking in the order of `_occurrences`.

  Args:
    jaxpr: where to mark.
    requests: occurrence -> (key, layers) of each request there.
    counter: the number of the next occurrence.
    steps: the live steps of the innermost enclosing scan, filled in.
  """
  plan = _jaxpr.Plan()
  for i, eqn in enumerate(jaxpr.eqns):
    if eqn.primitive.name == 'name':
      here = requests.get(next(counter), ())
      if here:
        plan.marks[i] = tuple(key for key, _ in here)
        steps.update({key: layers for key, layers in here if layers})
    elif _enterable(eqn):
      below_steps = {} if eqn.primitive.name == 'scan' else steps
      below = _mark(_jaxpr.inner(eqn)[0], requests, counter, below_steps)
      if below_steps is not steps:
        below.steps.update(below_steps)
      if below.keys():
        plan.inside[i] = below
  return plan


def _find(jaxpr, texts: Iterable[str]):
  """Resolves requests against the names in a jaxpr.

  Returns:
    The occurrences, the plan, and each request's keys in order of layers.
  """
  found, hidden = _occurrences(jaxpr)
  requests: dict[int, list] = {}
  keys: dict[str, list[_Wanted]] = {}
  for text in texts:
    pattern = selection.parse(text)
    if any(h.startswith(f'{pattern.name} (') for h in hidden):
      raise SelectionError(
        f'Activation {pattern.name!r} is named where it cannot be reached: '
        f'{", ".join(sorted(hidden))}.'
      )
    here = [k for k, o in enumerate(found) if o.name == pattern.name]
    if not here:
      raise SelectionError(
        f'No activation is named {pattern.name!r}; the names are '
        f'{sorted({o.name for o in found})}. A model names one with '
        'jax.ad_checkpoint.checkpoint_name.'
      )
    if pattern.layers and any(len(found[k].loops) > 1 for k in here):
      raise SelectionError(
        f'{text!r} asks for layers, but {pattern.name!r} is named inside '
        'nested scans, where it is not clear which loop runs through layers. '
        'Capture or edit it whole.'
      )
    keys[text] = []
    for k, layers in _layers(pattern, here, found):
      key = _Wanted(k, text)
      keys[text].append(key)
      requests.setdefault(k, []).append(
        (key, layers if found[k].loops else None)
      )
  return found, _mark(jaxpr, requests, itertools.count(), {}), keys


def _layers(
  pattern, here, found
) -> Iterator[tuple[int, tuple[int, int] | None]]:
  """Distributes a layer range over the occurrences of a name, in order."""
  steps = pattern.steps(sum(found[k].num_layers for k in here))
  first = 0
  for k in here:
    n = found[k].num_layers
    if steps is None:
      yield k, None
    else:
      start, stop = max(steps[0] - first, 0), min(steps[1] - first, n)
      if start < stop:
        yield k, (start, stop)
    first += n


def list_activations(
  fn: Callable[..., Any], *args
) -> dict[str, tuple[int, ...]]:
  """Name -> shape of every activation that can be captured or edited.

  Layers, whether a scan or a Python loop runs through them, are the leading
  axis where there are several.
  """
  closed, _ = _jaxpr.trace(fn, *args)
  names = list(dict.fromkeys(o.name for o in _occurrences(closed.jaxpr)[0]))
  _, values = jax.eval_shape(capture(fn, names), *args) if names else (None, {})
  return {name: value.shape for name, value in values.items()}


def capture(
  fn: Callable[..., Any], names: Iterable[str]
) -> Callable[..., tuple[Any, dict[str, Array]]]:
  """Also returns named activations.

  Args:
    fn: a function of arrays (bind other arguments beforehand) whose
      activations are marked with `jax.ad_checkpoint.checkpoint_name`.
    names: which ones; each may end in a layer range `[start:stop]`.

  Returns:
    `captured(*args, **kwargs) -> (fn's result, {name: activation})`. Layers
    are stacked along a leading axis, whether a scan or a Python loop runs
    through them; a name that occurs once, outside a scan, has no such axis.

  Raises (when called or traced):
    SelectionError: a name is unknown, selects no layer, asks for layers
      inside nested scans, or lies inside a `while`, a `cond` or a custom
      derivative; lists the names found.
    ValueError: occurrences of one name differ in shape.
  """
  texts = [names] if isinstance(names, str) else list(names)

  def captured(*args, **kwargs):
    closed, tree = _jaxpr.trace(lambda a, k: fn(*a, **k), args, kwargs)
    found, plan, keys = _find(closed.jaxpr, texts)

    def rule(eqn, invals, here, extra):
      del extra
      outs = _jaxpr.bind(eqn, invals)
      return outs, {key: outs[0] for key in here}

    leaves = jax.tree.leaves((args, kwargs))
    outs, values = _jaxpr.evaluate(
      closed.jaxpr, closed.consts, leaves, plan, rule, {}
    )
    taken = {t: _stack(t, keys[t], found, values) for t in texts}
    return jax.tree.unflatten(tree, outs), taken

  return captured


def _stack(text: str, keys: list[_Wanted], found, values) -> Array:
  """Layers along axis 0; a name that occurs once outside a scan has none."""
  name = found[keys[0].occurrence].name
  if sum(o.name == name for o in found) == 1:
    return values[keys[0]]
  rows = [
    values[k] if found[k.occurrence].loops else values[k][None] for k in keys
  ]
  if len({r.shape[1:] for r in rows}) != 1:
    raise ValueError(
      f'The occurrences of {text!r} have shapes {[r.shape for r in rows]} and '
      'cannot be stacked; give them different names in the model.'
    )
  return jnp.concatenate(rows)


def edit(
  fn: Callable[..., Any], edits: Mapping[str, Callable[[Array], Array]]
) -> Callable[..., Any]:
  """Replaces named activations.

  Args:
    fn: as in `capture`.
    edits: name -> `f(h)`, which keeps shape and dtype. A name may end in a
      layer range `[start:stop]`: a scan is then split there, and layers that
      are not selected run as they were. Edits of the same activation apply in
      the order given.

  Returns:
    A function like `fn`, in which each selected activation `h` is `f(h)` for
    everything that follows.

  Raises (when called or traced):
    SelectionError: as `capture`.
    ValueError: an edit changed shape or dtype.
  """

  def edited(*args, **kwargs):
    closed, tree = _jaxpr.trace(lambda a, k: fn(*a, **k), args, kwargs)
    _, plan, _ = _find(closed.jaxpr, edits)

    def rule(eqn, invals, here, extra):
      del extra
      (h,) = _jaxpr.bind(eqn, invals)
      for _, text in here:
        new = edits[text](h)
        if new.shape != h.shape or new.dtype != h.dtype:
          raise ValueError(
            f'The edit of {text!r} turned {h.dtype}{h.shape} into '
            f'{new.dtype}{new.shape}; it must keep both.'
          )
        h = new
      return [h], {}

    leaves = jax.tree.leaves((args, kwargs))
    outs, _ = _jaxpr.evaluate(
      closed.jaxpr, closed.consts, leaves, plan, rule, {}
    )
    return jax.tree.unflatten(tree, outs)

  return edited
