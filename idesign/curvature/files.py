"""Factors and edits as folders of safetensors with a manifest.

A folder is written whole or not at all, and says what it is of:

```
manifest.json          kind, identity (model, data, tokens, labels), sites
site-000.safetensors   the arrays of one site
```

Factors of another model or corpus are refused when they are read, and an edit
by any parameters but those that it was made from, or that it made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import hashlib
import json
import os
import pathlib
import shutil
from typing import Any, NamedTuple, TypeVar

import jax
from jax.experimental import multihost_utils
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from idesign import models, sites
from idesign.curvature.edit import Edit
from idesign.curvature.kfac import Eigenvalues, Factors
from idesign.files import new_folder

PyTree = Any
Path = str | os.PathLike[str]
Sums = TypeVar('Sums', Factors, Eigenvalues)
_FORMAT = 1
_TOKENIZER = (
  'tokenizer*',
  'special_tokens_map.json',
  'vocab*',
  'merges.txt',
  'added_tokens.json',
  'generation_config.json',
  'chat_template*',
)


class Identity(NamedTuple):
  """What factors are of.

  Attributes:
    model: `training.fingerprint` of the parameters.
    data: a hash of the corpus, or its name and version.
    tokens: positions that were read.
    fisher: the settings, `vars(fisher)`.
    bases: of eigenvalues, a hash of the bases that they are in; else empty.
  """

  model: str
  data: str
  tokens: int
  fisher: dict[str, Any]
  bases: str = ''


class FileError(ValueError):
  """A folder that is not what was asked for; the message says where."""


def save_sums(folder: Path, sums: Factors | Eigenvalues, of: Identity) -> None:
  """Writes K-FAC factors or EK-FAC eigenvalues.

  With several processes all of them call it, and process 0 writes.

  Raises:
    FileExistsError: the folder is taken.
    FloatingPointError: an array is not finite, naming it.
  """
  names = list(sums.inputs if isinstance(sums, Factors) else sums.values)
  per_site = [f for f in sums._fields if f != 'count']
  if jax.process_index() != 0:
    for name in names:  # What process 0 gathers needs everyone.
      for field in per_site:
        _whole(getattr(sums, field)[name])
    return
  with new_folder(pathlib.Path(folder)) as temporary:
    files = {}
    for i, name in enumerate(names):
      arrays = {f: _whole(getattr(sums, f)[name]) for f in per_site}
      for field, array in arrays.items():
        if not np.isfinite(array).all():
          raise FloatingPointError(
            f'The {field} of {name!r} are not finite; nothing was written to '
            f'{folder}.'
          )
      files[name] = f'site-{i:03d}.safetensors'
      save_file(arrays, temporary / files[name])
    _write_manifest(
      temporary,
      {
        'kind': type(sums).__name__,
        'identity': of._asdict(),
        'count': float(sums.count),
        'sites': files,
      },
    )


def load_sums(
  folder: Path,
  kind: type[Sums],
  *,
  expect: Mapping[str, Any],
  select: Iterable[str] | None = None,
) -> Sums:
  """Reads what `save_sums` wrote, on the host.

  Args:
    folder: the folder.
    kind: `Factors` or `Eigenvalues`.
    expect: fields of `Identity` that must be as given, `model` at least: no
      factors are of use without knowing whose they are.
    select: names of sites, default all.

  Raises:
    FileError: of another kind, model or corpus; a file is missing or damaged;
      there is no such site.
  """
  folder = pathlib.Path(folder)
  if 'model' not in expect:
    raise ValueError('expect must say which model the factors are of.')
  manifest = _read_manifest(folder, kind.__name__)
  found = manifest['identity']
  wrong = {k: (found.get(k), v) for k, v in expect.items() if found.get(k) != v}
  if wrong:
    what = '; '.join(f'{k}: {a!r} -> {b!r}' for k, (a, b) in wrong.items())
    raise FileError(
      f'{folder} holds {kind.__name__} of something else. Different (found -> '
      f'asked for): {what}. Collect them again.'
    )
  names = list(manifest['sites'] if select is None else select)
  unknown = sorted(set(names) - set(manifest['sites']))
  if unknown:
    raise FileError(
      f'{folder} has nothing of {unknown}; it has {sorted(manifest["sites"])}.'
    )
  fields: dict[str, Any] = {
    f: {} for f in kind._fields if f != 'count'
  }  # fmt: skip
  for name in names:
    arrays = _read(folder / manifest['sites'][name])
    if set(arrays) != set(fields):
      raise FileError(f'{folder / manifest["sites"][name]} lacks arrays.')
    for field, array in arrays.items():
      fields[field][name] = array
  return kind(**fields, count=np.float32(manifest['count']))


def hash_arrays(arrays: Iterable[np.ndarray]) -> str:
  """SHA-256 over shapes, dtypes and bytes; of bases, or of rows of data."""
  digest = hashlib.sha256()
  for a in arrays:
    a = np.ascontiguousarray(a)
    digest.update(f'{a.dtype.str}{a.shape}'.encode())
    digest.update(a.tobytes())
  return digest.hexdigest()


def save_edit(folder: Path, edit: Edit) -> None:
  """Writes an edit as the bits that it changes, `old XOR new`.

  Exact in any dtype and in both directions; where nothing changes it is zero.
  """
  with new_folder(pathlib.Path(folder)) as temporary:
    deltas, manifest = {}, {}
    for path, old in edit.original.items():
      new = edit.edited[path]
      deltas[path] = _bits(old) ^ _bits(new)
      manifest[path] = {
        'before': hash_arrays([_bits(old)]),
        'after': hash_arrays([_bits(new)]),
        'dtype': str(old.dtype),
        'kept': edit.kept[path],
      }
    save_file(deltas, temporary / 'edit.safetensors')
    _write_manifest(temporary, {'kind': 'Edit', 'parameters': manifest})


def load_edit(folder: Path, params: PyTree) -> Edit:
  """The edit, given the parameters before it, or those after it.

  Raises:
    FileError: a parameter is missing or is neither; or a file is damaged.
  """
  folder = pathlib.Path(folder)
  manifest = _read_manifest(folder, 'Edit')['parameters']
  deltas = _read(folder / 'edit.safetensors')
  leaves = dict(zip(sites.leaf_paths(params), jax.tree.leaves(params)))
  original, edited, kept = {}, {}, {}
  for path, about in manifest.items():
    if path not in leaves or path not in deltas:
      raise FileError(
        f'{folder} edits {path!r}, which is missing among the parameters or in '
        'the file.'
      )
    here = np.array(leaves[path])
    if str(here.dtype) != about['dtype']:
      raise FileError(
        f'{folder} edits {path!r} in {about["dtype"]}, not {here.dtype}: load '
        'the parameters in the dtype in which the edit was made.'
      )
    other = here
    if deltas[path].shape == here.shape:
      other = (_bits(here) ^ deltas[path]).view(here.dtype)
    marks = hash_arrays([_bits(here)]), hash_arrays([_bits(other)])
    if marks == (about['before'], about['after']):
      original[path], edited[path] = here, other
    elif marks == (about['after'], about['before']):
      original[path], edited[path] = other, here
    else:
      raise FileError(
        f'{path!r} is neither what the edit in {folder} was made from nor what '
        'it makes: it is of another model, or the file is damaged.'
      )
    kept[path] = about['kept']
  return Edit(original, edited, kept)


def edit_folder(
  source: Path,
  edit: Path,
  target: Path,
  *,
  dtypes: models.DTypePolicy = models.DTypePolicy(),
) -> None:
  """Applies a saved edit to a Hugging Face folder, giving a new one.

  Args:
    source: of the model, with its tokenizer, which is copied.
    edit: from `save_edit`, of parameters loaded with the same `dtypes`.
    target: must not exist, or be empty.
    dtypes: `DTypePolicy(param='bfloat16')` for a model that is kept so.

  Raises:
    FileError, CheckpointError: as `load_edit`, and as loading and saving.
  """
  source = pathlib.Path(source)
  model, params = models.load_pretrained(source, dtypes=dtypes)
  change = load_edit(edit, params)
  if not all(
    np.array_equal(_bits(np.array(leaf)), _bits(change.original[path]))
    for path, leaf in zip(sites.leaf_paths(params), jax.tree.leaves(params))
    if path in change.original
  ):
    raise FileError(f'{source} has the edit in {edit} already.')
  with new_folder(pathlib.Path(target)) as temporary:
    models.save_pretrained(temporary, model, change.apply(params))
    for pattern in _TOKENIZER:
      for file in source.glob(pattern):
        shutil.copy2(file, temporary / file.name)


def _whole(x) -> np.ndarray:
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    x = multihost_utils.process_allgather(x, tiled=True)
  return np.asarray(x, order='C')  # Which leaves scalars scalars.


def _bits(x: np.ndarray) -> np.ndarray:
  return np.ascontiguousarray(x).view(f'u{x.dtype.itemsize}')


def _write_manifest(folder: pathlib.Path, manifest) -> None:
  text = json.dumps({'format': _FORMAT, **manifest}, indent=2) + '\n'
  (folder / 'manifest.json').write_text(text, encoding='utf-8')


def _read_manifest(folder: pathlib.Path, kind: str) -> dict[str, Any]:
  path = folder / 'manifest.json'
  try:
    manifest = json.loads(path.read_text(encoding='utf-8'))
  except (OSError, json.JSONDecodeError) as error:
    raise FileError(f'{path} could not be read: {error}.') from error
  if manifest.get('format') != _FORMAT or manifest.get('kind') != kind:
    raise FileError(
      f'{folder} holds {manifest.get("kind")!r} of format '
      f'{manifest.get("format")!r}, not {kind!r} of format {_FORMAT}.'
    )
  return manifest


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
  try:
    return load_file(path)
  except (OSError, SafetensorError) as error:
    raise FileError(f'{path} is missing or damaged: {error}.') from error
