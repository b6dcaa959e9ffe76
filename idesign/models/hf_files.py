"""Tensors of a folder of safetensors files, checked from their headers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import contextlib
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from idesign.models.hf_fields import CheckpointError

_FLOATS = ('F64', 'F32', 'F16', 'BF16')
_SINGLE = 'model.safetensors'
_INDEX = 'model.safetensors.index.json'


class TensorInfo(NamedTuple):
  """One tensor as its file's header describes it."""

  name: str
  path: pathlib.Path
  shape: tuple[int, ...]
  dtype: str


def list_tensors(folder: pathlib.Path) -> list[TensorInfo]:
  """Every tensor of `model.safetensors` or of the shards of its index.

  Only headers are read.

  Raises:
    CheckpointError: if there is neither file, the index is malformed, a shard
      or an indexed tensor is missing, a tensor is in two shards, or a file is
      truncated or not safetensors.
  """
  if (folder / _SINGLE).is_file():
    return _header(folder / _SINGLE)
  index = folder / _INDEX
  if not index.is_file():
    raise CheckpointError(
      f'{folder} has neither {_SINGLE} nor {_INDEX}; only safetensors '
      'checkpoints are read (a pickled pytorch_model.bin is not).'
    )
  try:
    weight_map = json.loads(index.read_text(encoding='utf-8'))['weight_map']
    shards = sorted(set(weight_map.values()))
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise CheckpointError(
      f'{index} is not an index with a weight_map: {error!r}.'
    ) from error
  found: dict[str, TensorInfo] = {}
  for shard in shards:
    if not (folder / shard).is_file():
      raise CheckpointError(
        f'{folder / shard} does not exist, though {index} names it; download '
        'it.'
      )
    for info in _header(folder / shard):
      if info.name in found:
        raise CheckpointError(
          f'{info.name} is both in {found[info.name].path} and {info.path}.'
        )
      found[info.name] = info
  for name, shard in weight_map.items():
    if name not in found or found[name].path.name != shard:
      raise CheckpointError(
        f'{folder / shard} has no {name}, though {index} says so.'
      )
  return list(found.values())


def _header(path: pathlib.Path) -> list[TensorInfo]:
  try:
    with safe_open(path, framework='numpy') as file:
      slices = {name: file.get_slice(name) for name in file.keys()}
      return [
        TensorInfo(name, path, tuple(s.get_shape()), s.get_dtype())
        for name, s in slices.items()
      ]
  except SafetensorError as error:
    raise CheckpointError(
      f'{path} is truncated or not a safetensors file ({error}); download '
      'it again.'
    ) from error


def check_float(info: TensorInfo) -> None:
  """Raises CheckpointError for a tensor that is not of floating point."""
  if info.dtype not in _FLOATS:
    raise CheckpointError(
      f'{info.name} in {info.path} is {info.dtype}; only {_FLOATS} are read '
      '(quantised checkpoints are not supported).'
    )


class TensorReader(contextlib.ExitStack):
  """Reads tensors one by one; each file stays open (memory-mapped)."""

  def __init__(self):
    super().__init__()
    self._files: dict[pathlib.Path, Any] = {}

  def read(self, info: TensorInfo) -> np.ndarray:
    """The tensor, on the host.

    Raises:
      CheckpointError: if it holds NaN or infinity.
    """
    if info.path not in self._files:
      file = safe_open(info.path, framework='numpy')
      self._files[info.path] = self.enter_context(file)
    tensor = self._files[info.path].get_tensor(info.name)
    check_finite(tensor, info.name, info.path)
    return tensor


def check_finite(tensor: np.ndarray, name: str, path: pathlib.Path) -> None:
  """Raises CheckpointError for NaN or infinity."""
  bad = tensor.size - int(np.count_nonzero(np.isfinite(tensor)))
  if bad:
    raise CheckpointError(
      f'{name} in {path} has {bad} of {tensor.size} values that are NaN or '
      f'infinite as {tensor.dtype}.'
    )


def plan_shards(
  sizes: Mapping[str, int], max_shard_bytes: int
) -> list[list[str]]:
  """Cuts tensors, in order, into groups of at most so many bytes.

  A tensor larger than the limit has a group of its own.
  """
  groups: list[list[str]] = []
  total = 0
  for name, size in sizes.items():
    if not groups or total + size > max_shard_bytes:
      groups.append([])
      total = 0
    groups[-1].append(name)
    total += size
  return groups


def shard_names(groups: Sequence[Sequence[str]]) -> list[str]:
  """File names of the shards, as transformers numbers them."""
  if len(groups) == 1:
    return [_SINGLE]
  count = len(groups)
  return [f'model-{i + 1:05d}-of-{count:05d}.safetensors' for i in range(count)]


def write_shard(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
  """Writes one safetensors file that transformers reads."""
  # save_file writes the memory of a strided view, not its values.
  dense = {name: np.ascontiguousarray(t) for name, t in tensors.items()}
  try:
    save_file(dense, path, metadata={'format': 'pt'})
  except (OSError, SafetensorError) as error:
    raise CheckpointError(
      f'{path} could not be written: {error}. Nothing is left behind: make '
      'room, or fix the permissions, and save again.'
    ) from error


def write_index(
  folder: pathlib.Path,
  groups: Sequence[Sequence[str]],
  sizes: Mapping[str, int],
) -> None:
  """Writes the index of several shards; nothing for a single one."""
  if len(groups) == 1:
    return
  weight_map = {
    name: file
    for group, file in zip(groups, shard_names(groups))
    for name in group
  }
  index = {
    'metadata': {'total_size': sum(sizes.values())},
    'weight_map': weight_map,
  }
  (folder / _INDEX).write_text(json.dumps(index, indent=2), encoding='utf-8')
