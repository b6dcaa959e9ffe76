"""Reading statistics at weight sites, in one ordinary backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from idesign.sites import _jaxpr, selection
from idesign.sites._site import Site, Sites, Use
from idesign.sites._trace import Loss, PyTree, traced
from idesign.sites.statistics import Statistic, per_example_gradient


class UnreadUseError(ValueError):
  """A selected parameter is also used where no statistic can be read."""


class SharedWeightError(ValueError):
  """A statistic that does not add up over the uses of a shared weight."""


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['losses', 'values', 'grads'],
  meta_fields=['unread'],
)
@dataclasses.dataclass(frozen=True)
class Readout:
  """What one backward pass brought back.

  Attributes:
    losses: the loss of each example, `[B]`.
    values: statistic name -> site name -> array. Arrays have the site's stack
      as leading axes. A shared weight's non-additive statistic is under the
      parameter's path.
    grads: gradient of the summed loss in every parameter; None unless asked.
    unread: uses of selected parameters that are not in `values`.
  """

  losses: Array
  values: dict[str, dict[str, Array]]
  grads: PyTree | None
  unread: tuple[Use, ...]


def find_sites(
  loss: Loss,
  params: PyTree,
  batch: PyTree,
  select: str | Iterable[str] = '.*',
  *,
  example_axis: int = 0,
) -> Sites:
  """Lists the weight sites of a loss; `print` it for a table.

  Args:
    loss: `loss(params, batch) -> [B]`, of any JAX model. It is traced, not run.
    params: its parameters, or their `ShapeDtypeStruct`s.
    batch: a batch, or its `ShapeDtypeStruct`s.
    select: regular expressions that must match a whole parameter path, such as
      `blocks/mlp/up/kernel`. A trailing `[start:stop]` selects layers of a
      stack that a scan runs through.
    example_axis: which axis of every layer input is the example.

  Returns:
    The sites, and every use of a selected parameter that is not one (a gather
    of an embedding, a bias, a norm scale, a convolution).

  Raises:
    SelectionError: a pattern matches no path or no layer.
    UnsupportedUseError: a selected parameter reaches `cond`, `while`,
      `shard_map`, a custom derivative, a batched product or a scan's carry.
  """
  return traced(loss, params, batch, select, example_axis)[1]


def collect(
  loss: Loss,
  statistics: Mapping[str, Statistic],
  select: str | Iterable[str] = '.*',
  *,
  unread: Literal['raise', 'report'] = 'raise',
  with_grads: bool = False,
  example_axis: int = 0,
) -> Callable[..., Readout]:
  r"""Reads statistics of a loss at its weight sites.

  Each site `y = x w` is given an extra argument of zeros and an identity on
  `y` whose backward rule returns the statistic as that argument's gradient.
  Statistics of `x` alone are results of the forward pass. Nothing else is
  stored, weight gradients are not formed unless asked for, and a statistic
  stacks under `scan`, respects `checkpoint` and shards like any gradient. The
  sum of the losses is differentiated, so a statistic does not depend on how the
  user would average.

  Example `b` of the loss must depend on row `b` of every layer input only (no
  batch statistics, no shuffling of examples inside the model). That the example
  axis is the one stated is checked by tracing the loss with one example more.
  A loss that closes over arrays of the batch's size cannot be traced so; then
  a layer input that has that size twice is refused. Pass such arrays in the
  batch.

  Args:
    loss: `loss(params, batch) -> [B]`.
    statistics: what to read, by name; all in the same backward pass.
    select: which parameters, as in `find_sites`.
    unread: what to do if a selected parameter has a use that is not a site:
      raise, or say so in `Readout.unread`.
    with_grads: also return the gradient of the summed loss.
    example_axis: which axis of every layer input is the example.

  Returns:
    `read(params, batch, *, mask=None, inputs=None) -> Readout`, to be jitted
    by the caller. `mask [B, T]` keeps positions: where it is false `x` and
    `dy` count as zero at every site with `T` positions. `inputs` maps a
    statistic's name to site name -> pytree for statistics that take inputs.

  Raises (when called or traced):
    UnreadUseError: see `unread`.
    SharedWeightError: a statistic that is not additive and has no
      `of_gradient` meets a weight that is tied or constant across a scan.
    SelectionError, UnsupportedUseError: as `find_sites`.
  """
  if unread not in ('raise', 'report'):
    raise ValueError(f"unread is 'raise' or 'report', not {unread!r}.")

  def read(params, batch, *, mask=None, inputs=None) -> Readout:
    closed, (sites, other), plan = traced(
      loss, params, batch, select, example_axis
    )
    if other and unread == 'raise':
      uses = ', '.join(f'{u.path} in {u.primitive}' for u in other)
      raise UnreadUseError(
        f'Selected parameters have uses that are not sites: {uses}. Narrow '
        "`select`, or pass unread='report' and read Readout.unread."
      )
    for site in sites if mask is not None else ():
      if site.loops > 1:
        raise ValueError(
          f'mask cannot be applied at {site.name!r}: its positions are the '
          f'{site.loops} steps of a scan. Make the loss of those positions '
          'zero and leave the mask out.'
        )
    readings = [_readings(s, statistics, inputs or {}) for s in sites]
    forward, backward = (
      zip(*map(_split, sites, readings)) if sites else ((), ())
    )
    flat = jax.tree.leaves((params, batch))
    num_params = len(jax.tree.leaves(params))

    def rule(eqn, invals, keys, extra):
      (y,) = _jaxpr.bind(eqn, invals)
      (k,) = keys
      x = invals[1 if sites[k].product.weight_first else 0]
      zeros, given = extra[k]
      found = _evaluate(sites[k], forward[k], x, None, given, mask)
      y = _probe(sites[k], backward[k], y, x, zeros, given, mask)
      return [y], {k: found}

    def probed(leaves, probes):
      extra = {
        k: (probes[k], {n: r.inputs for n, r in readings[k].items()})
        for k in range(len(sites))
      }
      outs, found = _jaxpr.evaluate(
        closed.jaxpr,
        closed.consts,
        [*leaves, *flat[num_params:]],
        plan,
        rule,
        extra,
      )
      return outs[0], found

    probes = [{n: r.zeros() for n, r in rs.items()} for rs in backward]
    leaves = flat[:num_params]
    if with_grads:
      losses, pull, found = jax.vjp(probed, leaves, probes, has_aux=True)
      grads, read_back = pull(jnp.ones_like(losses))
      grads = jax.tree.unflatten(jax.tree.structure(params), grads)
    else:
      losses, pull, found = jax.vjp(
        lambda z: probed(leaves, z), probes, has_aux=True
      )
      (read_back,), grads = pull(jnp.ones_like(losses)), None
    read_back = [found[k] | read_back[k] for k in range(len(sites))]
    by_path = dict(zip(selection.leaf_paths(params), leaves))
    values = {
      name: _assemble(stat, [r[name] for r in read_back], sites, by_path)
      for name, stat in statistics.items()
    }
    return Readout(losses, values, grads, other)

  return read


@dataclasses.dataclass(frozen=True)
class _Reading:
  """One statistic at one site: the function, its inputs and its result."""

  fn: Callable[..., Array]
  inputs: PyTree
  result: jax.ShapeDtypeStruct
  stack: tuple[int, ...]
  of_input: bool

  def zeros(self) -> Array:
    return jnp.zeros((*self.stack, *self.result.shape), self.result.dtype)


def _readings(site: Site, statistics, inputs) -> dict[str, _Reading]:
  readings = {}
  for name, stat in statistics.items():
    if site.shared and not stat.additive:
      if stat.of_gradient is None or site.layers is not None:
        raise SharedWeightError(
          f'{name!r} is not additive and parameter {site.path!r} meets data '
          f'more than once (site {site.name!r}, {site.loops} loop steps). '
          'Read per_example_gradient there and reduce the sum, or deselect '
          'the parameter.'
        )
      stat = per_example_gradient
    here = inputs.get(name)
    if here is not None and site.name not in here:
      raise ValueError(
        f'inputs[{name!r}] has nothing for site {site.name!r}; it has '
        f'{sorted(here)}.'
      )
    here = () if here is None else (here[site.name],)
    depth = len(site.stack)
    one = jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(a.shape[depth:], a.dtype), here
    )
    for a in jax.tree.leaves(here):
      if a.shape[:depth] != site.stack:
        raise ValueError(
          f'inputs[{name!r}][{site.name!r}] has shape {a.shape}; its leading '
          f'axes must be the stack {site.stack}.'
        )
    result = jax.eval_shape(stat.fn, site.x_aval, site.dy_aval, *one)
    readings[name] = _Reading(stat.fn, here, result, site.stack, stat.of_input)
  return readings


def _split(site: Site, readings):
  """What is read in the forward pass, and what in the backward one.

  A weight that is constant across a scan is read in the backward pass, which
  adds up the steps.
  """
  early = lambda r: r.of_input and site.loops == 1
  return (
    {n: r for n, r in readings.items() if early(r)},
    {n: r for n, r in readings.items() if not early(r)},
  )


def _probe(site: Site, readings, y, x, zeros, inputs, mask):
  """Returns `y`; its backward pass gives `zeros` the statistics as gradient."""

  @jax.custom_vjp
  def probe(y, x, zeros, inputs, mask):
    del x, zeros, inputs, mask
    return y

  def forward(y, x, zeros, inputs, mask):
    del zeros
    return y, (x, inputs, mask)

  def backward(residuals, dy):
    x, inputs, mask = residuals
    return dy, None, _evaluate(site, readings, x, dy, inputs, mask), None, None

  probe.defvjp(forward, backward)
  return probe(y, x, zeros, inputs, mask)


def _evaluate(site: Site, readings, x, dy, inputs, mask) -> dict[str, Array]:
  """The statistics of one layer, of a layer input and an output gradient."""
  x = site.product.x(x)
  dy = None if dy is None else site.product.dy(dy)
  if mask is not None:
    x = _masked(x, mask)
    dy = None if dy is None else _masked(dy, mask)
  return {
    n: r.fn(x, dy, *inputs[n]).astype(r.result.dtype)
    for n, r in readings.items()
  }


def _masked(x: Array, mask: Bool[Array, 'B T']) -> Array:
  # A site after pooling has one position and nothing to mask.
  if x.shape[1] == 1 and mask.shape[1] != 1:
    return x
  if x.shape[:2] != mask.shape:
    raise ValueError(
      f'mask has shape {mask.shape}, but a site has positions {x.shape[:2]}.'
    )
  return jnp.where(mask[:, :, None], x, jnp.zeros((), x.dtype))


def _assemble(stat, values, sites, by_path) -> dict[str, Array]:
  """Names the values; joins the uses of shared weights where they must be."""
  out, gradients = {}, {}
  for site, value in zip(sites, values):
    if stat.additive or not site.shared:
      out[site.name] = value
    else:
      g = site.from_gradient(by_path[site.path], value)
      gradients[site.path] = gradients.get(site.path, 0) + g
  return out | {path: stat.of_gradient(g) for path, g in gradients.items()}


def per_example_gradients(
  loss: Loss, select: str | Iterable[str] = '.*', *, example_axis: int = 0
) -> Callable[..., dict[str, Array]]:
  """Per-example gradients in the parameters' own shapes, uses summed.

  Returns:
    `f(params, batch, *, mask=None)` -> path -> `[B, *parameter.shape]`. Layers
    that were not selected are zero. Every use must be a site.
  """
  read = collect(
    loss, {'g': per_example_gradient}, select, example_axis=example_axis
  )

  def gradients(params, batch, *, mask=None):
    values = read(params, batch, mask=mask).values['g']
    sites = find_sites(loss, params, batch, select, example_axis=example_axis)
    leaves = dict(zip(selection.leaf_paths(params), jax.tree.leaves(params)))
    out: dict[str, Array] = {}
    for site in sites.sites:
      g = site.from_gradient(leaves[site.path], values[site.name])
      out[site.path] = out[site.path] + g if site.path in out else g
    return out

  return gradients


def vmap_grad(loss: Loss, params: PyTree, batch: PyTree) -> PyTree:
  """The plain reference: `vmap(grad)` over examples of one.

  Works for every parameter and primitive; holds a whole gradient per example.

  Returns:
    A tree like `params` with leaves `[B, *shape]`.
  """

  def one(example):
    single = jax.tree.map(lambda a: a[None], example)
    return jax.grad(lambda p: loss(p, single)[0])(params)

  return jax.vmap(one)(batch)
