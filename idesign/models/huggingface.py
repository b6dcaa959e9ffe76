"""Models from Hugging Face folders, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np

from idesign.files import new_folder
from idesign.models.config import TransformerConfig
from idesign.models.functional import DTypePolicy, Model, Params
from idesign.models.hf_config import read_config, write_config
from idesign.models.hf_fields import CheckpointError
from idesign.models.hf_files import (
  TensorInfo,
  TensorReader,
  check_finite,
  check_float,
  list_tensors,
  plan_shards,
  shard_names,
  write_index,
  write_shard,
)
from idesign.models.hf_names import TABLES, Row, Table
from idesign.models.transformer import transformer

Shardings = Callable[[str], jax.sharding.Sharding | None] | Mapping[str, Any]


def load_pretrained(
  folder: str | os.PathLike[str],
  *,
  dtypes: DTypePolicy = DTypePolicy(),
  shardings: Shardings | None = None,
) -> tuple[Model, Params]:
  """Reads `config.json` and safetensors files into a decoder.

  Families: Llama, OLMo-2, Qwen2, Qwen3, GPT-2, GPT-NeoX, Gemma-2 and Gemma-3
  (its text model), with their language-model heads; a tied model may leave its
  head out. Everything that headers and config can tell is checked before the
  first tensor is read.

  Args:
    folder: holds `config.json` and `model.safetensors`, or the shards that
      `model.safetensors.index.json` names.
    dtypes: dtypes of the model; tensors are cast to `dtypes.param` as read.
    shardings: where each parameter goes: a function of its path
      (`blocks/attn/q/kernel`, whose leading axis is the layer), a tree like
      the parameters, or None for the default device. A None sharding also
      means the default device.

  Returns:
    The model and its parameters. At most one stacked parameter (three, where
    the checkpoint fuses q, k and v) is held on the host at a time.

  Raises:
    CheckpointError: naming the file and the tensor or key, for a missing or
      malformed file, an unsupported architecture or setting, a missing, extra
      or mis-shaped tensor, a tensor with NaN or infinity, or one that does not
      fit the parameter dtype.
    ValueError: if a sharding is missing from the tree or does not divide its
      parameter.
  """
  folder = pathlib.Path(folder)
  family, config = read_config(folder, dtypes)
  model = transformer(config)
  shapes = _flatten(jax.eval_shape(model.init, jax.random.key(0)))
  table = TABLES[family]
  rows = table.used_rows(set(shapes))
  infos = _match(folder, table, rows, shapes, config)
  placed = _resolve_shardings(shardings, shapes)
  params: dict[str, jax.Array] = {}
  with TensorReader() as reader:
    for row in rows:
      for path, array in _read_row(reader, row, infos, shapes, config):
        params[path] = _place(array, placed[path])
    if table.head in infos and config.tie_embeddings:
      _check_tied(reader, rows, infos, table)
  return model, _unflatten(params)


def save_pretrained(
  folder: str | os.PathLike[str],
  model: Model,
  params: Params,
  *,
  max_shard_bytes: int = 5_000_000_000,
) -> None:
  """Writes a folder that `load_pretrained` and transformers read.

  The family is the first that can express the model. Tensors keep the dtype
  of the parameters. Nothing is left behind if writing fails; at most one
  shard is held on the host at a time. Token ids and the tokenizer are not part
  of a model and are not written.

  Args:
    folder: must not exist, or be empty.
    model: from `transformer` or `load_pretrained`.
    params: its parameters; every process must be able to address them.
    max_shard_bytes: size above which the weights are cut into several files.

  Raises:
    CheckpointError: if the folder is taken, no family computes this model, a
      parameter has NaN or infinity, or the disk is full.
    ValueError: if the parameters are not those of the model.
  """
  folder = pathlib.Path(folder)
  if not isinstance(model.config, TransformerConfig):
    raise CheckpointError(
      f'only decoders can be exported, not {type(model.config).__name__}.'
    )
  if max_shard_bytes <= 0:
    raise ValueError(f'max_shard_bytes={max_shard_bytes} must be positive.')
  config = model.config
  family, raw = write_config(config)
  shapes = _flatten(jax.eval_shape(model.init, jax.random.key(0)))
  flat = _flatten(params)
  _check_params(flat, shapes)
  table = TABLES[family]
  sources = _sources(table.used_rows(set(shapes)), table, config)

  def tensor(name: str) -> np.ndarray:
    row, layer = sources[name]
    parts = [flat[p] if layer is None else flat[p][layer] for p in row.paths]
    array = row.layout.join([np.asarray(p) for p in parts], config)
    check_finite(array, name, folder)  # It could not be loaded again.
    return array

  sizes = {}
  for name, (row, layer) in sources.items():
    parts = [flat[path] for path in row.paths]
    size = sum(part.size * part.dtype.itemsize for part in parts)
    sizes[name] = size // (1 if layer is None else config.n_layers)
  groups = plan_shards(sizes, max_shard_bytes)
  raw['torch_dtype'] = str(flat['embed/embedding'].dtype)
  try:
    with new_folder(folder) as temporary:
      for file, group in zip(shard_names(groups), groups):
        write_shard(temporary / file, {name: tensor(name) for name in group})
      write_index(temporary, groups, sizes)
      text = json.dumps(raw, indent=2, sort_keys=True) + '\n'
      (temporary / 'config.json').write_text(text, encoding='utf-8')
  except FileExistsError as error:
    raise CheckpointError(str(error)) from error


def _sources(
  rows: list[Row], table: Table, config: TransformerConfig
) -> dict[str, tuple[Row, int | None]]:
  """Checkpoint name of every tensor, to its row and layer; by layer."""
  sources = {
    table.written(row.name): (row, None) for row in rows if not row.stacked
  }
  for layer in range(config.n_layers):
    for row in rows:
      if row.stacked:
        sources[table.written(row.name.format(layer))] = (row, layer)
  return sources


def _match(
  folder: pathlib.Path,
  table: Table,
  rows: list[Row],
  shapes: Mapping[str, jax.ShapeDtypeStruct],
  config: TransformerConfig,
) -> dict[str, TensorInfo]:
  """Holds the headers against the table; every tensor by canonical name."""
  infos: dict[str, TensorInfo] = {}
  for info in list_tensors(folder):
    name = table.canonical(info.name)
    if table.is_buffer(name):
      continue
    if name in infos:
      raise CheckpointError(
        f'{info.path} holds {name} twice, as {infos[name].name} and '
        f'{info.name}.'
      )
    infos[name] = info
  expected = {}
  for row in rows:
    shape = _checkpoint_shape(row, shapes, config)
    layers = range(config.n_layers) if row.stacked else (0,)
    expected.update({row.name.format(layer): shape for layer in layers})
  missing = sorted(set(expected) - set(infos))
  if missing:
    raise CheckpointError(
      f'{folder} lacks {len(missing)} of {len(expected)} tensors that '
      f'config.json asks for: {_some(missing)}.'
    )
  # A tied head may be there too; it is compared with the embedding when read.
  if config.tie_embeddings and table.head in infos:
    expected[table.head] = shapes['embed/embedding'].shape
  extra = sorted(set(infos) - set(expected))
  if extra:
    raise CheckpointError(
      f'{infos[extra[0]].path} has tensors that config.json does not account '
      f'for: {_some([infos[name].name for name in extra])}.'
    )
  for name, shape in expected.items():
    info = infos[name]
    check_float(info)
    if info.shape != shape:
      raise CheckpointError(
        f'{info.name} in {info.path} has shape {info.shape}; config.json '
        f'asks for {shape}.'
      )
  return infos


def _some(names: list[str]) -> str:
  shown = ', '.join(names[:5])
  return shown + (f' and {len(names) - 5} more' if len(names) > 5 else '')


def _checkpoint_shape(
  row: Row,
  shapes: Mapping[str, jax.ShapeDtypeStruct],
  config: TransformerConfig,
) -> tuple[int, ...]:
  parts = [shapes[path].shape[1 if row.stacked else 0 :] for path in row.paths]
  # One byte per value, and only where tensors are fused is it touched.
  return row.layout.join([np.empty(p, np.int8) for p in parts], config).shape


def _read_row(
  reader: TensorReader,
  row: Row,
  infos: Mapping[str, TensorInfo],
  shapes: Mapping[str, jax.ShapeDtypeStruct],
  config: TransformerConfig,
) -> list[tuple[str, np.ndarray]]:
  """The parameters of a row, all layers of each stacked."""
  buffers = [np.empty(shapes[p].shape, shapes[p].dtype) for p in row.paths]
  for layer in range(config.n_layers) if row.stacked else (None,):
    info = infos[row.name if layer is None else row.name.format(layer)]
    parts = row.layout.split(reader.read(info), config)
    for buffer, part in zip(buffers, parts):
      target = buffer if layer is None else buffer[layer]
      # Overflow is not a warning here: it is an error with a name, below.
      with np.errstate(over='ignore'):
        target[...] = part.astype(buffer.dtype)
      check_finite(target, info.name, info.path)
  return list(zip(row.paths, buffers))


def _check_tied(
  reader: TensorReader,
  rows: list[Row],
  infos: Mapping[str, TensorInfo],
  table: Table,
) -> None:
  name = next(row.name for row in rows if 'embed/embedding' in row.paths)
  head, embedding = infos[table.head], infos[name]
  if not np.array_equal(reader.read(head), reader.read(embedding)):
    raise CheckpointError(
      f'{head.name} in {head.path} differs from {embedding.name}, but '
      'config.json says tie_word_embeddings; set it to false to use both.'
    )


def _place(
  array: np.ndarray, sharding: jax.sharding.Sharding | None
) -> jax.Array:
  if sharding is None:
    return jax.device_put(array)
  return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)


def _resolve_shardings(
  shardings: Shardings | None, shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.sharding.Sharding | None]:
  """One sharding per path, each checked against the shape."""
  if shardings is None:
    return dict.fromkeys(shapes)
  if callable(shardings):
    placed = {path: shardings(path) for path in shapes}
  else:
    flat = _flatten(shardings)
    lacking = sorted(set(shapes) - set(flat))
    if lacking:
      raise ValueError(f'shardings have no entry for {_some(lacking)}.')
    placed = {path: flat[path] for path in shapes}
  for path, sharding in placed.items():
    if sharding is None:
      continue
    try:
      sharding.shard_shape(shapes[path].shape)
    except ValueError as error:
      raise ValueError(f'sharding of {path}: {error}') from error
  return placed


def _check_params(
  flat: Mapping[str, Any], shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> None:
  odd = sorted(set(flat) ^ set(shapes))
  if odd:
    raise ValueError(f'parameters and model disagree on {_some(odd)}.')
  for path, leaf in flat.items():
    if leaf.shape != shapes[path].shape:
      raise ValueError(
        f'{path} has shape {leaf.shape}; the model has {shapes[path].shape}.'
      )


def _flatten(tree: Mapping[str, Any], above: str = '') -> dict[str, Any]:
  """Leaves of nested dicts by path, `a/b/c`."""
  flat: dict[str, Any] = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      flat |= _flatten(value, f'{above}{key}/')
    else:
      flat[above + key] = value
  return flat


def _unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  tree: dict[str, Any] = {}
  for path, value in flat.items():
    *above, last = path.split('/')
    node = tree
    for key in above:
      node = node.setdefault(key, {})
    node[last] = value
  return tree
