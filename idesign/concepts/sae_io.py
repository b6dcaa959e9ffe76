"""Sparse autoencoders in the formats in which people publish them.

  saelens       `sae_weights.safetensors` and `cfg.json`
  gemma_scope   `params.npz` (https://arxiv.org/abs/2408.05147)
  sparsify      `sae.safetensors` and `cfg.json` (EleutherAI)

Pickles are not read.
"""

from __future__ import annotations

from collections.abc import Mapping
import json
import os
import pathlib
from typing import Any, Literal, NamedTuple
import zipfile
import zlib

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from idesign.concepts import sae_formats as formats
from idesign.concepts.sae import SAE, make_sae
from idesign.concepts.sae_formats import SAEFileError
from idesign.files import new_folder

Format = Literal['saelens', 'gemma_scope', 'sparsify']
_WEIGHTS = {
  'saelens': 'sae_weights.safetensors',
  'gemma_scope': 'params.npz',
  'sparsify': 'sae.safetensors',
}


class LoadedSAE(NamedTuple):
  """What a file held.

  Attributes:
    sae: the autoencoder, float32.
    format: the format it was in.
    metadata: what the file says of the model and layer it was trained on.
    assumed: what the file left open, and what was taken for it; one sentence
      each.
  """

  sae: SAE
  format: Format
  metadata: dict[str, Any]
  assumed: tuple[str, ...]


def load_sae(
  path: str | os.PathLike[str], *, input_scale: float | None = None
) -> LoadedSAE:
  """Reads a published autoencoder; which format it is, its file names say.

  Args:
    path: the folder, or for Gemma Scope also the `.npz` file.
    input_scale: what activations were multiplied by in training, folded into
      the weights (as SAELens does), so that the result reads activations as
      they are; None: nothing is folded.

  Raises:
    SAEFileError: if there is no such file, it is damaged, an array is missing,
      not known, misshapen or not finite, or it describes something that is no
      autoencoder of the kinds in `SAE` (a transcoder, layer-normalised inputs).
  """
  path = pathlib.Path(path)
  kind, file = _find(path)
  assumed: list[str] = []
  if kind == 'gemma_scope':
    tensors = _read_npz(file)
    config, arrays = _guard(
      file, lambda: formats.read_gemma_scope(tensors, assumed)
    )
    metadata: dict[str, Any] = {}
  else:
    raw, tensors = _read_json(file.parent / 'cfg.json'), _read_tensors(file)
    read = formats.read_saelens if kind == 'saelens' else formats.read_sparsify
    config, arrays = _guard(file, lambda: read(raw, tensors, assumed))
    metadata = raw.get('metadata') or raw
    if not isinstance(metadata, dict):
      raise SAEFileError(
        f'{file.parent / "cfg.json"} has metadata={metadata!r}; it must be an '
        'object.'
      )
  arrays = {n: np.asarray(a, np.float32) for n, a in arrays.items()}
  if input_scale is not None:
    arrays['W_enc'] = arrays['W_enc'] * np.float32(input_scale)
    for name in ('W_dec', 'b_dec'):
      arrays[name] = arrays[name] / np.float32(input_scale)
  arrays = {n: jnp.asarray(a) for n, a in arrays.items()}
  sae = _guard(file, lambda: make_sae(config(), arrays))
  return LoadedSAE(sae, kind, dict(metadata), tuple(assumed))


def save_sae(
  path: str | os.PathLike[str],
  sae: SAE,
  *,
  format: Format = 'saelens',
  metadata: Mapping[str, Any] | None = None,
) -> None:
  """Writes a new folder; it appears whole or not at all.

  Args:
    path: the folder, new or empty.
    sae: the autoencoder. A `batchtopk` one is written as the `jumprelu` one
      that it computes.
    format: `gemma_scope` holds JumpReLU only, and reads activations without
      subtracting `b_dec`, which is folded into `b_enc`; `sparsify` holds TopK
      that subtracts it.
    metadata: what to say of the model and layer, JSON; not in Gemma Scope's.

  Raises:
    SAEFileError: if the folder is not empty, or the format cannot hold the
      autoencoder.
  """
  if format not in _WEIGHTS:
    raise SAEFileError(f'format={format!r}; choose from {tuple(_WEIGHTS)}.')
  write = {
    'saelens': formats.write_saelens,
    'gemma_scope': formats.write_gemma_scope,
    'sparsify': formats.write_sparsify,
  }[format]
  arrays = {n: np.asarray(a, np.float32) for n, a in sae.params.items()}
  raw, arrays = write(sae.config, arrays, dict(metadata or {}))
  arrays = {n: np.ascontiguousarray(a) for n, a in arrays.items()}
  try:
    with new_folder(pathlib.Path(path)) as folder:
      if format == 'gemma_scope':
        np.savez(folder / _WEIGHTS[format], **arrays)
        return
      save_file(arrays, folder / _WEIGHTS[format])
      text = json.dumps(raw, indent=2) + '\n'
      (folder / 'cfg.json').write_text(text, encoding='utf-8')
  except FileExistsError as error:
    raise SAEFileError(str(error)) from error


def _find(path: pathlib.Path) -> tuple[Format, pathlib.Path]:
  if path.is_file() and path.suffix == '.npz':
    return 'gemma_scope', path
  found = [kind for kind, name in _WEIGHTS.items() if (path / name).is_file()]
  if len(found) != 1:
    raise SAEFileError(
      f'{path} has {" and ".join(_WEIGHTS[k] for k in found) or "none"} of '
      f'{tuple(_WEIGHTS.values())}; it must have exactly one.'
    )
  return found[0], path / _WEIGHTS[found[0]]


def _guard(file: pathlib.Path, read):
  """Errors of what is read name the file."""
  try:
    return read()
  except SAEFileError as error:
    raise SAEFileError(f'{file}: {error}') from error
  except (ValueError, TypeError) as error:
    raise SAEFileError(f'{file}: {error}') from error


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    raw = json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError) as error:
    raise SAEFileError(f'{path} cannot be read: {error}.') from error
  if not isinstance(raw, dict):
    raise SAEFileError(f'{path} holds a {type(raw).__name__}, not an object.')
  return raw


def _read_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  try:
    return load_file(path)
  except (SafetensorError, OSError) as error:
    raise SAEFileError(
      f'{path} is truncated or not a safetensors file ({error}); download it '
      'again.'
    ) from error


def _read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
  try:
    with np.load(path, allow_pickle=False) as file:
      return {name: file[name] for name in file.files}
  except (
    OSError,
    ValueError,
    EOFError,  # Of an empty file.
    TypeError,  # Of a single array, an npy.
    zipfile.BadZipFile,
    zlib.error,
  ) as error:
    raise SAEFileError(
      f'{path} is truncated or not an npz of plain arrays ({error}); '
      'download it again.'
    ) from error
