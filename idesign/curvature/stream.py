"""Factors of many batches: one pass over the data, resumable, sharded.

The sums of each shard of the data stay on its devices, with no communication
from batch to batch: they are added up once, at the end. What an example adds
depends on its number alone, so that a run that was interrupted, or one on
another number of devices, adds the same things.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import itertools
import os
import re
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array
import tqdm

from idesign import sites, training
from idesign.curvature.fisher import Fisher, Logits, sum_positions
from idesign.curvature.kfac import Factors, kfac_factors

PyTree = Any


class NumberedBatches(Protocol):
  """What `idesign.training.Batches` is."""

  def batch(self, step: int) -> Mapping[str, Any]:
    """`inputs [B, ...]`, and `labels`, `mask` if there are."""

  def position(self, step: int) -> dict[str, Any]:
    """Where the data is when batch `step` comes next, as JSON."""


class StreamState(NamedTuple):
  """Sums so far; a checkpoint holds it whole.

  Attributes:
    sums: factors with the shards of the data as leading axis.
    key: of sampled labels, never changed.
    step: batches that are in the sums.
  """

  sums: Factors
  key: Array
  step: Array


class FactorStream:
  """Adds up the K-FAC factors of batches.

  ```
  stream = FactorStream(model.apply, 'blocks/mlp/.*/kernel', fisher, mesh)
  factors = stream.collect(params, batches, 1000, key=key, workdir='factors')
  ```

  Rows of the factors are split over the mesh axis `model` where it divides
  them, like the parameters; the examples over `data`.
  """

  def __init__(
    self,
    logits_fn: Logits,
    select: str | Iterable[str],
    fisher: Fisher = Fisher(),
    mesh: Mesh | None = None,
    *,
    num_shards: int | None = None,
  ):
    """Says what is to be read.

    Args:
      logits_fn, select, fisher: as for `kfac_factors`.
      mesh: with axes `data` and `model`; default one device.
      num_shards: sums that are kept apart until the end, a multiple of the
        mesh's `data` axis, which it is by default. Runs with equally many give
        the same bits on any number of devices, as long as XLA compiles the
        shards' products alike.
    """
    self._mesh = mesh or training.make_mesh(1, devices=jax.devices()[:1])
    data = self._mesh.shape['data']
    self._num_shards = num_shards or data
    if self._num_shards % data:
      raise ValueError(
        f'num_shards={num_shards} is not a multiple of the mesh axis '
        f'data={data}.'
      )
    self._select, self._fisher, self._logits = select, fisher, logits_fn
    self._factors = kfac_factors(logits_fn, select, fisher)
    self._sites: tuple[sites.Site, ...] = ()
    self._add = self._total = None

  def init(
    self, params: PyTree, batch: Mapping[str, Any], key: Array
  ) -> StreamState:
    """Zero sums, born sharded.

    Raises:
      ValueError: the batch does not divide over the shards.
      SelectionError, UnreadUseError: as `idesign.sites.collect`.
    """
    rows = jax.tree.leaves(batch)[0].shape[0]
    if rows % self._num_shards:
      raise ValueError(
        f'A batch of {rows} examples does not divide over {self._num_shards} '
        'shards.'
      )
    losses = lambda p, b: sum_positions(self._logits(p, b['inputs']), None)
    abstract = jax.eval_shape(lambda *a: a, params, dict(batch))
    self._sites = sites.find_sites(losses, *abstract, self._select).sites
    shapes = jax.eval_shape(self._of_shards, *abstract, key, 0)
    shardings = jax.tree.map(self._sharding, shapes)
    everywhere = NamedSharding(self._mesh, PartitionSpec())
    born = lambda key: StreamState(
      jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes),
      key,
      jnp.int32(0),
    )
    placed = StreamState(shardings, everywhere, everywhere)
    state = jax.jit(born, out_shardings=placed)(key)
    self._add = jax.jit(self._next, donate_argnums=0, out_shardings=placed)
    totals = jax.tree.map(self._total_sharding, shapes)
    self._total = jax.jit(_total, out_shardings=(totals, everywhere))
    return state

  def add(
    self, state: StreamState, params: PyTree, batch: Mapping[str, Any]
  ) -> StreamState:
    """The state with a batch more; the old one is consumed."""
    return self._add(state, params, dict(batch))

  def lower(self, state, params, batch) -> jax.stages.Lowered:
    """The program of `add`, to look at."""
    return self._add.lower(state, params, dict(batch))

  def flush(self, state: StreamState) -> Factors:
    """Adds up the shards, the one reduction there is, and looks at the sums.

    Raises:
      FloatingPointError: naming the first layer, in the order in which the
        model runs through them, where something is not finite.
    """
    total, finite = self._total(state.sums)
    check_finite(jax.device_get(finite), self._sites)
    return total

  def collect(
    self,
    params: PyTree,
    batches: NumberedBatches,
    num_batches: int,
    *,
    key: Array,
    workdir: str | os.PathLike[str] | None = None,
    save_every: int = 100,
  ) -> Factors:
    """The factors of batches `0 ... num_batches - 1`.

    Args:
      params: of the model.
      batches: this process's rows of every batch.
      num_batches: at least 1.
      key: of sampled labels; batch `n` and example `b` of it have their own.
      workdir: where to leave checkpoints, from which the same call goes on to
        the same bits; none are left without.
      save_every: batches between two of them, and between two looks at whether
        the sums are finite.

    Raises:
      ValueError: the workdir belongs to another model, selection, Fisher
        information, key or data.
      FloatingPointError: as `flush`.
    """
    if num_batches < 1:
      raise ValueError(f'num_batches must be at least 1, not {num_batches}.')
    load = lambda n: training.shard_batch(batches.batch(n), self._mesh)
    first = load(0)
    state = self.init(params, first, key)
    if workdir is None:
      return self.flush(
        self._run(state, params, load, num_batches, save_every, None)
      )
    identity = {
      'model': training.fingerprint(params),
      'select': [self._select]
      if isinstance(self._select, str)
      else list(self._select),
      'fisher': vars(self._fisher),
      'key': training.fingerprint({'key': key}),
      'shards': self._num_shards,
      'data': batches.position(0),
    }

    def save(state, checkpointer):
      step = int(state.step)
      if checkpointer.latest_step != step:
        checkpointer.save(step, state, batches.position(step))

    with training.Checkpointer(workdir, identity, keep=1) as checkpointer:
      if checkpointer.latest_step is not None:
        state, _ = checkpointer.restore(state)
        if int(state.step) > num_batches:
          raise ValueError(
            f'{workdir} has {int(state.step)} batches in its sums, more than '
            f'num_batches={num_batches}: choose another workdir.'
          )
      state = self._run(
        state, params, load, num_batches, save_every,
        lambda state: save(state, checkpointer),
      )  # fmt: skip
    return self.flush(state)

  def _run(self, state, params, load, num_batches, save_every, save):
    begin = int(state.step)
    steps = tqdm.trange(
      begin, num_batches, initial=begin, total=num_batches, desc='factors',
      disable=jax.process_index() != 0 or num_batches - begin < 10,
    )  # fmt: skip
    for n in steps:
      state = self.add(state, params, load(n))
      if (n + 1) % save_every == 0 or n + 1 == num_batches:
        self.flush(state)  # Sums that are not finite are not worth saving.
        if save is not None:
          save(state)
    return state

  def _next(self, state: StreamState, params, batch) -> StreamState:
    new = self._of_shards(params, batch, state.key, state.step)
    return StreamState(
      jax.tree.map(jnp.add, state.sums, new), state.key, state.step + 1
    )

  def _of_shards(self, params, batch, key, step) -> Factors:
    """The factors of each shard of a batch, `[shards, ...]`."""
    rows = jax.tree.leaves(batch)[0].shape[0]
    keys = jax.random.split(jax.random.fold_in(key, step), rows)
    split = lambda x: x.reshape(self._num_shards, -1, *x.shape[1:])
    batch, keys = jax.tree.map(split, (batch, keys))

    def one(batch, keys):
      drawn = {'key': keys} if self._fisher.labels == 'model' else {}
      return self._factors(
        params, batch['inputs'], mask=batch.get('mask'),
        labels=batch.get('labels'), **drawn,
      )  # fmt: skip

    return jax.vmap(one)(batch, keys)

  def _sharding(self, x) -> NamedSharding:
    """Of sums `[shards, *stack, rows, columns]`."""
    spec = ['data'] + [None] * (x.ndim - 1)
    if x.ndim > 2 and x.shape[-2] % self._mesh.shape['model'] == 0:
      spec[-2] = 'model'
    return NamedSharding(self._mesh, PartitionSpec(*spec))

  def _total_sharding(self, x) -> NamedSharding:
    return NamedSharding(self._mesh, PartitionSpec(*self._sharding(x).spec[1:]))


def _total(sums: Factors):
  total = jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)
  finite = jax.tree.map(
    lambda m: jnp.isfinite(m).all(axis=(-2, -1)), (total.inputs, total.outputs)
  )
  return total, finite


def check_finite(finite, found: Sequence[sites.Site]) -> None:
  """Raises a FloatingPointError that names the first layer with a NaN or Inf.

  Layer inputs are looked at first, in the order in which the model runs
  through them: a loss that is not finite spoils every gradient, one activation
  only what comes after it.

  Args:
    finite: of inputs and of outputs, site -> `[*stack]`.
    found: the sites, in order of appearance.
  """
  inputs, outputs = finite
  order = list(_natural_order(found))
  for what, flags, along in (
    ('input', inputs, order), ('output gradient', outputs, order[::-1])
  ):  # fmt: skip
    for site, index in along:
      if not flags[site.name][index]:
        layer = f', layer {",".join(map(str, index))}' if index else ''
        raise FloatingPointError(
          f'The {what} of {site.name!r}{layer} is not finite; it is the first. '
          'Look at the batches since the last checkpoint, and at the precision '
          'of that layer.'
        )


def _natural_order(found: Sequence[sites.Site]):
  """Sites by layer: a scan runs through all of its sites before the next."""
  for stack, group in itertools.groupby(found, key=lambda s: s.stack):
    group = list(group)
    for index in itertools.product(*map(range, stack)):
      for site in group:
        yield site, index


def plan_groups(
  found: Sequence[sites.Site], budget: float, *, model_axis: int = 1
) -> list[list[str]]:
  """Splits layers into groups whose factors fit into memory, one pass each.

  A pass holds the sums, those of a batch, and their total at the end: three
  copies of `d_in^2 + d_out^2` floats for each layer, in one shard.

  Args:
    found: the sites, of `idesign.sites.find_sites`.
    budget: bytes of a device that factors may take.
    model_axis: devices over which rows are split.

  Returns:
    For each pass, patterns such as `'blocks/mlp/up/kernel[0:4]'`; together
    every site once, in the order in which the model runs through them.

  Raises:
    ValueError: one layer alone does not fit, naming it.
  """
  copies, groups, used = 3, [], 0.0
  for site, index in _natural_order(found):
    rows = 4 * (site.d_in**2 + site.d_out**2) * copies
    size = rows / model_axis
    if size > budget:
      raise ValueError(
        f'The factors of {site.name!r} take {size / 2**30:.2f} GiB of each '
        f'device (x {site.d_in}, dy {site.d_out}), more than the '
        f'{budget / 2**30:.2f} GiB there are: split rows over more devices '
        '(mesh axis `model`), or deselect it.'
      )
    if not groups or used + size > budget:
      groups.append([])
      used = 0.0
    used += size
    groups[-1].append((site, index))
  return [_patterns(group) for group in groups]


def _patterns(group) -> list[str]:
  """Selection patterns of layers, runs of one stack joined."""
  layers: dict[str, tuple[sites.Site, list[int]]] = {}
  for site, index in group:
    layers.setdefault(site.path, (site, []))[1].append(index[0] if index else 0)
  out = []
  for path, (site, indices) in layers.items():
    text = re.escape(path)
    if not site.stack:
      out.append(text)
      continue
    offset = site.layers[0] if site.layers else 0
    start, stop = min(indices) + offset, max(indices) + 1 + offset
    out.append(f'{text}[{start}:{stop}]')
  return out
