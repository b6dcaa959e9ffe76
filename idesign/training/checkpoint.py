"""Checkpoints: state, data position and config, saved and restored together.

A workdir looks like

```
config.json                 the config it belongs to
checkpoints/120/state/      parameters, optimizer state, step, key (Orbax)
checkpoints/120/meta/       data position, config, and a fingerprint per array
```

A step is written under a temporary name (`120.orbax-checkpoint-tmp`) and
renamed when complete; a process killed at any moment leaves the earlier steps
whole, and the next start removes what is left of the unfinished one.

Orbax reads a changed byte in an array's data without noticing, so each array
is saved with a fingerprint of its bits that is compared after restoring. It
does not depend on the mesh.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import hashlib
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from idesign.training.sharding import path_name
from idesign.training.workdir import as_json, claim_workdir, differences

PyTree = Any


class CheckpointError(RuntimeError):
  """A checkpoint could not be written or read; the message says which."""


class Checkpointer:
  """Saves and restores the checkpoints of one workdir.

  ```
  with Checkpointer(workdir, config, keep=2) as checkpointer:
    if checkpointer.latest_step is not None:
      state, position = checkpointer.restore(state)
    ...
    checkpointer.save(step, state, position)
  ```

  Saving copies the state to the host and returns; the files are written in
  the background, and leaving the `with` block waits for them. (An asynchronous
  save that is still running when Python exits is lost, which is why there is
  no other way to open one.) With several processes every one of them makes the
  same calls, and the workdir is on a file system that all of them see.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    config: Mapping[str, Any],
    *,
    keep: int = 2,
    ignore: Sequence[str] = (),
  ):
    """Claims the workdir; see `claim_workdir` for `ignore` and its errors.

    Args:
      workdir: the folder; created if there is none.
      config: what the run is a function of, JSON values only.
      keep: how many of the latest steps to keep, at least 1.
      ignore: dotted config keys that may differ.
    """
    if keep < 1:
      raise ValueError(f'keep={keep} must be at least 1.')
    self.workdir = claim_workdir(workdir, config, ignore=ignore)
    self.directory = self.workdir / 'checkpoints'
    self._config = as_json(config, f'the config for {self.workdir}')
    self._ignore = tuple(ignore)
    self._keep = keep
    self._manager = None

  def __enter__(self) -> Checkpointer:
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.LatestN(self._keep),
        cleanup_tmp_directories=True,
        # Made in the background, a folder that a full disk refuses is
        # waited for during five minutes before it is an error.
        async_options=ocp.options.AsyncOptions(
          create_directories_asynchronously=False
        ),
      ),
    )
    return self

  def __exit__(self, exc_type, exc, traceback) -> None:
    try:
      self.wait()
    finally:
      manager, self._manager = self._manager, None
      manager.close()

  @property
  def _open(self) -> ocp.CheckpointManager:
    if self._manager is None:
      raise ValueError(
        f'the checkpointer of {self.workdir} is not open; use it inside '
        '`with Checkpointer(...) as checkpointer:`.'
      )
    return self._manager

  @property
  def steps(self) -> list[int]:
    """The complete steps, ascending."""
    return sorted(self._open.all_steps())

  @property
  def latest_step(self) -> int | None:
    """The last complete step, or None if there is no checkpoint."""
    return self._open.latest_step()

  def save(self, step: int, state: PyTree, position: Mapping[str, Any]) -> None:
    """Starts saving `state` as `step`.

    Args:
      step: greater than every saved step.
      state: pytree of `jax.Array`s. It may be donated as soon as this
        returns.
      position: where the data pipeline is, JSON values only.

    Raises:
      CheckpointError: if this save, or the one before it in the background,
        cannot be written.
      ValueError: if the step is not new, the position is not JSON, or a leaf
        is no `jax.Array` or has no elements (Orbax cannot store those).
    """
    latest = self.latest_step
    if latest is not None and step <= latest:
      raise ValueError(
        f'step {step} is not after the latest checkpoint, {latest}, in '
        f'{self.directory}.'
      )
    meta = {
      'position': as_json(position, 'the data position'),
      'config': self._config,
      'arrays': _describe(state),
    }
    items = ocp.args.Composite(
      state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
    )
    try:
      self._open.save(step, args=items)
    except (OSError, ValueError, RuntimeError) as error:
      raise self._failed_save(error) from error

  def wait(self) -> None:
    """Returns when no save is running.

    Raises:
      CheckpointError: if the save that was running failed, for example on a
        full disk.
    """
    try:
      self._open.wait_until_finished()
    except (OSError, ValueError, RuntimeError) as error:
      raise self._failed_save(error) from error

  def _failed_save(self, error: Exception) -> CheckpointError:
    return CheckpointError(
      f'a checkpoint could not be written under {self.directory}: {error}\n'
      f'The complete steps, {self.steps}, are intact. Make room (or fix the '
      'permissions) and run the same command again: it resumes from the last '
      'of them, or from the beginning if there is none.'
    )

  def restore(
    self, template: PyTree, step: int | None = None
  ) -> tuple[PyTree, dict[str, Any]]:
    """Reads a step onto the devices and shardings of `template`.

    Args:
      template: pytree of `jax.Array`s or `jax.ShapeDtypeStruct`s (with
        `sharding`, unless it is the default device). Only structure, shapes,
        dtypes and shardings are used, so the mesh may be another one than
        that of the save.
      step: which; the latest by default. Another one is never taken instead.

    Returns:
      The state, bit for bit as saved, and the data position.

    Raises:
      CheckpointError: if there is no such step, or it is damaged, naming the
        folder.
      ValueError: if the step belongs to another config, or its arrays do not
        have the shapes and dtypes of the template, naming them.
    """
    step = self.latest_step if step is None else step
    if step not in self.steps:
      raise CheckpointError(
        f'{self.directory} has no step {step}; it has {self.steps}.'
      )
    folder = self.directory / str(step)
    meta = self._read(step, folder, meta=ocp.args.JsonRestore())['meta']
    if {'position', 'config', 'arrays'} - set(meta):
      raise self._damaged(folder, 'meta is incomplete')
    different = differences(meta['config'], self._config, ignore=self._ignore)
    if different:
      raise ValueError(
        f'{folder} was saved by another config. Different (found -> asked '
        f'for): {"; ".join(different)}.'
      )
    target = jax.tree.map(_abstract, template)
    self._check_shapes(folder, meta['arrays'], target)
    state = self._read(step, folder, state=ocp.args.StandardRestore(target))
    state = state['state']
    for name, found in _describe(state).items():
      if found != meta['arrays'][name]:
        raise self._damaged(folder, f'the bits of {name} have changed')
    return state, meta['position']

  def _read(self, step: int, folder: pathlib.Path, **items):
    try:
      return self._open.restore(step, args=ocp.args.Composite(**items))
    # Orbax raises a plain Exception for an array it cannot read. Nothing is
    # hidden: the cause is chained.
    except Exception as error:  # pylint: disable=broad-exception-caught
      raise self._damaged(folder, f'{type(error).__name__}: {error}') from error

  def _damaged(self, folder: pathlib.Path, why: str) -> CheckpointError:
    earlier = [step for step in self.steps if step < int(folder.name)]
    remedy = f'go on from step {earlier[-1]}' if earlier else 'start again'
    return CheckpointError(
      f'the checkpoint in {folder} is damaged: {why[:2000]}\nRestore that '
      f'folder from a copy, or remove it to {remedy}.'
    )

  def _check_shapes(self, folder, saved, target) -> None:
    leaves = jax.tree_util.tree_flatten_with_path(target)[0]
    wanted = {path_name(p): [list(x.shape), str(x.dtype)] for p, x in leaves}
    different = [
      f'{name}: {saved.get(name, ["absent"])[:2]} -> '
      f'{wanted.get(name, ["absent"])}'
      for name in sorted(saved.keys() | wanted.keys())
      if saved.get(name, [None])[:2] != wanted.get(name)
    ]
    if different:
      shown = '; '.join(different[:20])
      raise ValueError(
        f'the state in {folder} is not of the kind asked for. Different '
        f'(found -> asked for), {len(different)} in all: {shown}. Was the '
        'model or the optimizer changed?'
      )


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
  sharding = x.sharding
  if sharding is None:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def fingerprint(tree: PyTree) -> str:
  """Of the paths, shapes, dtypes and bits of every array of a tree.

  Sixteen hexadecimal digits. It does not depend on the mesh and needs no copy
  on the host: to tell models apart, not to resist those who forge them.
  """
  text = json.dumps(_describe(tree), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _describe(state: PyTree) -> dict[str, list[Any]]:
  """`{path: [shape, dtype, fingerprint]}` of every array."""
  leaves = jax.tree_util.tree_flatten_with_path(state)[0]
  for path, leaf in leaves:
    if not isinstance(leaf, jax.Array) or leaf.size == 0:
      raise ValueError(
        f'{path_name(path)!r} is {type(leaf).__name__} of shape '
        f'{np.shape(leaf)}; a checkpoint holds jax.Arrays with elements.'
      )
  prints = np.asarray(_fingerprints([leaf for _, leaf in leaves]))
  return {
    path_name(path): [list(leaf.shape), str(leaf.dtype), int(mark)]
    for (path, leaf), mark in zip(leaves, prints)
  }


@jax.jit
def _fingerprints(leaves: list[jax.Array]) -> jax.Array:
  """`sum_i mix(bits_i xor golden i) mod 2^32` of each array, `[n]` uint32.

  `mix` is the finalizer of MurmurHash3, a bijection: a change of any one word
  changes the sum, and changes of several do not cancel but by chance. It is
  exact integer arithmetic: no order of summation, hence no mesh, matters.
  """

  def one(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x = jax.random.key_data(x)
    if jnp.iscomplexobj(x):
      x = jnp.stack([x.real, x.imag], -1)
    if x.dtype == jnp.bool_:
      x = x.astype(jnp.uint8)
    width = min(x.dtype.itemsize, 4)
    bits = jax.lax.bitcast_convert_type(x, f'uint{8 * width}')
    bits = bits.astype(jnp.uint32)
    index, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
      iota = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
      index += iota * np.uint32(stride % 2**32)
      stride *= bits.shape[axis]
    h = bits ^ (index * np.uint32(0x9E3779B9))
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return jnp.sum(h ^ (h >> np.uint32(16)), dtype=jnp.uint32)

  return jnp.stack([one(x) for x in leaves])
