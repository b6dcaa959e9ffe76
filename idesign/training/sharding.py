"""Where arrays live: meshes, rules from parameter paths to shardings, hosts.

Every mesh has the axes `("data", "model")`. The pattern for large models is

```
abstract = jax.eval_shape(init, key)             # shapes, no memory
shardings = tree_shardings(abstract, mesh, rules)
params = jax.jit(init, out_shardings=shardings)(key)   # born sharded
```

and `idesign.training.init_state` does it for parameters and optimizer state
together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import importlib.util
import os
import pathlib
import re
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

AXES = ('data', 'model')

PyTree = Any
Rules = Sequence[tuple[str, PartitionSpec]]

_ENV = {
  'coordinator_address': 'JAX_COORDINATOR_ADDRESS',
  'num_processes': 'JAX_NUM_PROCESSES',
  'process_id': 'JAX_PROCESS_ID',
}


def initialize_distributed(
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> None:
  """Joins the processes of one run; call it before anything else uses JAX.

  What decides, in this order: the arguments; the environment variables
  `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES`, `JAX_PROCESS_ID`; on a Cloud
  TPU VM, JAX's own detection of the slice. With none of them, with one
  process, or when the processes are joined already, nothing happens.

  Args:
    coordinator_address: `host:port` of process 0, reachable from every host.
    num_processes: how many processes take part.
    process_id: which one this is, from 0.

  Raises:
    ValueError: if some of the three are given and others are not, or if
      `process_id` is not below `num_processes`.
    RuntimeError: from JAX, if a device was used before this call.
  """
  if jax.distributed.is_initialized():
    return
  given = {
    'coordinator_address': coordinator_address,
    'num_processes': num_processes,
    'process_id': process_id,
  }
  for name, variable in _ENV.items():
    if given[name] is None and os.environ.get(variable):
      given[name] = os.environ[variable]
  missing = [name for name, value in given.items() if value is None]
  if len(missing) == len(given):
    if _on_tpu_vm():
      jax.distributed.initialize()
    return
  if missing:
    raise ValueError(
      f'{" and ".join(missing)} must be given too: several processes need '
      'the address of process 0, their number and their own id, as '
      f'arguments or as {", ".join(_ENV[name] for name in missing)} in the '
      'environment.'
    )
  count, index = int(given['num_processes']), int(given['process_id'])
  if not 0 <= index < count:
    raise ValueError(
      f'process_id={index} is not one of the {count} processes; ids run '
      f'from 0 to num_processes - 1 = {count - 1}.'
    )
  if count > 1:
    jax.distributed.initialize(given['coordinator_address'], count, index)


def _on_tpu_vm() -> bool:
  platforms = jax.config.jax_platforms
  if platforms and 'tpu' not in platforms:
    return False
  if importlib.util.find_spec('libtpu') is None:
    return False
  # JAX cannot be asked: touching devices before `initialize` is an error.
  return any(
    pathlib.Path(name).exists() for name in ('/dev/accel0', '/dev/vfio/0')
  )


def make_mesh(
  data: int = -1,
  model: int = 1,
  *,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """A `data x model` mesh whose axes are both of type `Auto`.

  Args:
    data: size of the axis that splits the examples of a batch; -1 for
      whatever the devices leave.
    model: size of the axis that splits parameters; -1 likewise, but not both.
    devices: the devices to use; all of them (of all processes) by default.

  Raises:
    ValueError: if a size is neither positive nor -1, if both are -1, or if
      `data * model` is not the number of devices.
  """
  count = len(jax.devices() if devices is None else devices)
  sizes = {'data': data, 'model': model}
  for name, size in sizes.items():
    if size != -1 and size < 1:
      raise ValueError(f'mesh axis {name}={size} must be positive, or -1.')
  if data == -1 and model == -1:
    raise ValueError('data and model cannot both be -1; give one of them.')
  for name, other in (('data', model), ('model', data)):
    if sizes[name] == -1:
      if count % other:
        raise ValueError(
          f'{count} devices cannot be divided into a mesh with '
          f'{"model" if name == "data" else "data"}={other}; use a divisor '
          f'of {count}.'
        )
      sizes[name] = count // other
  if sizes['data'] * sizes['model'] != count:
    raise ValueError(
      f'a mesh of data={data} x model={model} needs {data * model} devices '
      f'but there are {count}; set one axis to -1, or pass `devices`.'
    )
  return jax.make_mesh(
    tuple(sizes.values()),
    AXES,
    axis_types=(AxisType.Auto,) * len(AXES),
    devices=devices,
  )


def path_name(path: tuple[Any, ...]) -> str:
  """A pytree path as rules and errors spell it: `blocks/mlp/up/kernel`."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def _checked_sharding(
  name: str, shape: tuple[int, ...], mesh: Mesh, spec: PartitionSpec
) -> NamedSharding:
  if len(spec) > len(shape):
    raise ValueError(
      f'the rule for {name} gives {spec}, which has more entries than the '
      f'shape {shape} has dimensions; shorten the PartitionSpec.'
    )
  for dimension, entry in enumerate(spec):
    axes = () if entry is None else entry
    for axis in (axes,) if isinstance(axes, str) else axes:
      if axis not in mesh.shape:
        raise ValueError(
          f'the rule for {name} names the mesh axis {axis!r}, but the mesh '
          f'has {tuple(mesh.shape)}.'
        )
    axes = (axes,) if isinstance(axes, str) else axes
    parts = int(np.prod([mesh.shape[axis] for axis in axes], dtype=int))
    if shape[dimension] % parts:
      raise ValueError(
        f'dimension {dimension} of {name}, shape {shape}, cannot be split '
        f'into {parts} parts over mesh axis {"x".join(axes)}; change the '
        'rule for this parameter, the size, or the mesh.'
      )
  return NamedSharding(mesh, spec)


def tree_shardings(tree: PyTree, mesh: Mesh, rules: Rules) -> PyTree:
  """Shardings of parameters, from rules over their paths.

  Args:
    tree: pytree of arrays or `jax.ShapeDtypeStruct`s.
    mesh: a mesh made by `make_mesh`.
    rules: `(pattern, spec)` pairs. A pattern is a regular expression that has
      to match the *whole* path (`blocks/mlp/up/kernel`); the first that does
      decides. `('.*', P())` as the last rule replicates everything else.

  Returns:
    A pytree like `tree` of `NamedSharding`.

  Raises:
    ValueError: if no rule matches a path, or a spec does not fit the shape
      (too many entries, unknown mesh axis, dimension not divisible); the
      message names the parameter.
  """
  compiled = [(re.compile(pattern), spec) for pattern, spec in rules]

  def sharding(path, leaf):
    name = path_name(path)
    for pattern, spec in compiled:
      if pattern.fullmatch(name):
        return _checked_sharding(name, leaf.shape, mesh, spec)
    raise ValueError(
      f'no sharding rule covers the parameter {name!r}, shape {leaf.shape}; '
      'add one (patterns match the whole path), or end the rules with '
      "('.*', PartitionSpec())."
    )

  return jax.tree_util.tree_map_with_path(sharding, tree)


def follow_shardings(
  tree: PyTree, params: PyTree, shardings: PyTree, mesh: Mesh
) -> PyTree:
  """Shardings of an optimizer state that follow those of the parameters.

  A leaf follows the parameter whose path ends its own path (`0/mu/up/kernel`
  follows `up/kernel`; the longest wins) if it also has that parameter's
  shape. Every other leaf (counts, factored moments) is replicated. This needs
  nothing from the optimizer, and can only decide where values live, never
  what they are.

  Args:
    tree: the optimizer state, arrays or `jax.ShapeDtypeStruct`s.
    params: the parameters, likewise.
    shardings: of the parameters, by `tree_shardings`.
    mesh: the mesh of the replicated leaves.
  """
  flat = jax.tree_util.tree_flatten_with_path(params)[0]
  by_path = {
    tuple(map(str, path)): (leaf.shape, sharding)
    for (path, leaf), sharding in zip(flat, jax.tree.leaves(shardings))
  }
  replicated = NamedSharding(mesh, PartitionSpec())

  def follow(path, leaf):
    names = tuple(map(str, path))
    for start in range(len(names) + 1):
      shape, sharding = by_path.get(names[start:], (None, None))
      if shape == leaf.shape:
        return sharding
    return replicated

  return jax.tree_util.tree_map_with_path(follow, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Examples, axis 0 of every array of a batch, split over `data`."""
  return NamedSharding(mesh, PartitionSpec('data'))


def process_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
  """Which rows of a global batch this process has to load, sorted, `[b]`.

  They are the rows that `batch_sharding` puts on its devices: disjoint parts
  where processes differ in `data`, the same rows where they differ in `model`
  only.

  Raises:
    ValueError: if `batch_size` is not a multiple of the `data` axis.
  """
  if batch_size < 1 or batch_size % mesh.shape['data']:
    raise ValueError(
      f'batch_size={batch_size} is not a positive multiple of the mesh axis '
      f'data={mesh.shape["data"]}; every shard gets equally many examples.'
    )
  indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
  every = np.arange(batch_size)
  return np.unique(np.concatenate([every[index] for index in indices.values()]))


def shard_batch(
  batch: Mapping[str, np.ndarray], mesh: Mesh
) -> dict[str, jax.Array]:
  """Puts this process's rows of a batch on its devices, as global arrays.

  Args:
    batch: arrays `[b, ...]`, the rows `process_rows(mesh, B)` of the batch.
    mesh: the mesh to split axis 0 over.

  Returns:
    Arrays `[B, ...]` with `batch_sharding(mesh)`.

  Raises:
    ValueError: if an array has no axis 0 or it does not divide over the
      shards of this process.
  """
  sharding = batch_sharding(mesh)
  shards = len(process_rows(mesh, mesh.shape['data']))

  def place(name, local):
    local = np.asarray(local)
    if local.ndim == 0 or local.shape[0] % shards:
      raise ValueError(
        f'batch[{name!r}] has shape {local.shape}; its axis 0, the examples, '
        f'must be a multiple of the {shards} data shards of this process.'
      )
    rows = local.shape[0] // shards * mesh.shape['data']
    return jax.make_array_from_process_local_data(
      sharding, local, (rows, *local.shape[1:])
    )

  return {name: place(name, local) for name, local in batch.items()}
