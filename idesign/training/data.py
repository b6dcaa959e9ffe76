"""Rows from local files: text as tokens, images as arrays.

Everything here works without a network. What comes out is a dict of arrays
with equally many rows, ready for `Batches`. A `datasets.Dataset` is accepted
wherever a path is, so whatever `datasets.load_dataset` fetches can be used too.
With several processes each one reads all rows and `Batches` takes its part.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
import os
import pathlib
from typing import Any
import zipfile

import numpy as np

_BUILDERS = {
  '.txt': 'text',
  '.json': 'json',
  '.jsonl': 'json',
  '.csv': 'csv',
  '.parquet': 'parquet',
}

Path = str | os.PathLike[str]
Source = Any  # A path, several paths, or a datasets.Dataset.


def load_files(
  paths: Path | Sequence[Path],
  *,
  cache_dir: Path | None = None,
  sample_by: str = 'document',
):
  """Local files as one `datasets.Dataset`.

  Args:
    paths: one file or several of the same kind: txt, json, jsonl, csv,
      parquet.
    cache_dir: where `datasets` keeps its copy in Arrow form; its own default
      if None.
    sample_by: what a row of a txt file is: the whole 'document' (nothing is
      lost), a 'paragraph' or a 'line' (without its line end).

  Raises:
    FileNotFoundError: if a file does not exist.
    ValueError: if a file is empty or cannot be read, or the kinds are unknown
      or mixed.
  """
  import datasets  # pylint: disable=g-import-not-at-top

  paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
  files = [_existing(path) for path in paths]
  kinds = {file.suffix for file in files}
  if len(kinds) != 1 or not kinds <= set(_BUILDERS):
    raise ValueError(
      f'files of kind {sorted(kinds)} cannot be read as one data set; give '
      f'files of one of the kinds {sorted(_BUILDERS)}.'
    )
  builder = _BUILDERS[kinds.pop()]
  options = {'sample_by': sample_by} if builder == 'text' else {}
  try:
    return datasets.load_dataset(
      builder,
      data_files=[str(file) for file in files],
      split='train',
      cache_dir=None if cache_dir is None else str(cache_dir),
      **options,
    )
  except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
    cause = error.__cause__ or error
    raise ValueError(
      f'{", ".join(map(str, files))} cannot be read as {builder}: {cause}'
    ) from error


def _existing(path: Path) -> pathlib.Path:
  file = pathlib.Path(path)
  if not file.is_file():
    raise FileNotFoundError(f'{file.absolute()} does not exist or is no file.')
  if file.stat().st_size == 0:
    raise ValueError(f'{file.absolute()} is empty.')
  return file


def _dataset(source: Source, columns: Iterable[str], **options):
  """The data set and how errors call it; its columns are checked."""
  if hasattr(source, 'column_names'):
    dataset, name = source, 'the data set'
  else:
    dataset, name = load_files(source, **options), str(source)
  for column in columns:
    if column not in dataset.column_names:
      raise ValueError(
        f'{name} has no column {column!r}; it has {dataset.column_names}.'
      )
  if dataset.num_rows == 0:
    raise ValueError(f'{name} has no rows.')
  return dataset, name


def load_tokenizer(path: Path):
  """Reads a `tokenizer.json` as a `tokenizers.Tokenizer`.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is empty or not a tokenizer.
  """
  import tokenizers  # pylint: disable=g-import-not-at-top

  file = _existing(path)
  text = file.read_text(encoding='utf-8')
  try:
    return tokenizers.Tokenizer.from_str(text)
  # The library raises a plain Exception for any malformed file; the cause is
  # chained.
  except Exception as error:  # pylint: disable=broad-exception-caught
    raise ValueError(
      f'{file.absolute()} is not a tokenizer.json: {error}'
    ) from error


def token_id(tokenizer, token: str) -> int:
  """The id of a token by its text, or a `ValueError` naming it."""
  index = tokenizer.token_to_id(token)
  if index is None:
    raise ValueError(
      f'the tokenizer has no token {token!r} among its '
      f'{tokenizer.get_vocab_size()}; give one it has.'
    )
  return index


def _documents(source, tokenizer, column, bos, eos, **options):
  """Token ids of every row, a list of int32 arrays, and the source's name."""
  if isinstance(tokenizer, (str, os.PathLike)):
    tokenizer = load_tokenizer(tokenizer)
  before = [] if bos is None else [token_id(tokenizer, bos)]
  after = [] if eos is None else [token_id(tokenizer, eos)]
  dataset, name = _dataset(source, [column], **options)
  documents = []
  for batch in dataset.select_columns([column]).iter(batch_size=1000):
    texts = batch[column]
    for row, text in enumerate(texts, start=len(documents)):
      if not isinstance(text, str):
        raise ValueError(
          f'{name}, column {column!r}, row {row}: expected text, '
          f'found {text!r}; filter such rows out.'
        )
    # Special tokens are those asked for, whatever the tokenizer.json adds.
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
      documents.append(np.asarray(before + encoding.ids + after, np.int32))
  return tokenizer, documents, name


def packed_text(
  source: Source,
  tokenizer: Any,
  *,
  length: int,
  column: str = 'text',
  bos: str | None = None,
  eos: str | None = None,
  **options,
) -> dict[str, np.ndarray]:
  """Text as full rows of tokens, for language modelling.

  Documents are joined in order, each with `bos` before and `eos` after it
  where those are given, and the stream is cut into rows; what does not fill a
  last row is dropped. Tokens are held in memory, 4 bytes each.

  Args:
    source: local path(s), see `load_files`, or a `datasets.Dataset`.
    tokenizer: path of a `tokenizer.json`, or a `tokenizers.Tokenizer`.
    length: tokens per row.
    column: the text's column (`text` for txt files).
    bos: the token that begins a document, by its text, or None.
    eos: the token that ends one, or None.
    **options: `cache_dir` and `sample_by` of `load_files`.

  Returns:
    `{'tokens': [N, length] int32}`.

  Raises:
    FileNotFoundError, ValueError: for a missing or empty file, a missing
      column, a row that is no text, a token the tokenizer does not have, or
      too little text for one row.
  """
  _check_length(length)
  _, documents, name = _documents(
    source, tokenizer, column, bos, eos, **options
  )
  stream = np.concatenate(documents)
  rows = len(stream) // length
  if rows == 0:
    raise ValueError(
      f'{name}, column {column!r}: {len(stream)} tokens do not fill one row '
      f'of length={length}; use a smaller length or more text.'
    )
  return {'tokens': stream[: rows * length].reshape(rows, length)}


def padded_text(
  source: Source,
  tokenizer: Any,
  *,
  length: int,
  pad: str,
  column: str = 'text',
  bos: str | None = None,
  eos: str | None = None,
  **options,
) -> dict[str, np.ndarray]:
  """Text as one row per document, with a mask over its tokens.

  A document longer than `length` is cut at the end (its `eos` with it).

  Args:
    pad: the token that fills up rows, by its text.
    source, tokenizer, length, column, bos, eos, **options: as for
      `packed_text`.

  Returns:
    `{'tokens': [N, length] int32, 'mask': [N, length] bool}`; the mask is true
    on tokens and false on padding.

  Raises:
    FileNotFoundError, ValueError: as for `packed_text`; a document without
      any token is an error too.
  """
  _check_length(length)
  tokenizer, documents, name = _documents(
    source, tokenizer, column, bos, eos, **options
  )
  tokens = np.full((len(documents), length), token_id(tokenizer, pad), np.int32)
  mask = np.zeros(tokens.shape, bool)
  for row, document in enumerate(documents):
    if len(document) == 0:
      raise ValueError(
        f'{name}, column {column!r}, row {row} has no tokens; filter empty '
        'rows out, or give bos or eos.'
      )
    kept = document[:length]
    tokens[row, : len(kept)] = kept
    mask[row, : len(kept)] = True
  return {'tokens': tokens, 'mask': mask}


def _check_length(length: int) -> None:
  if length < 1:
    raise ValueError(f'length={length} must be at least 1.')


def image_rows(
  source: Source,
  *,
  image: str = 'image',
  label: str = 'label',
  cache_dir: Path | None = None,
) -> dict[str, np.ndarray]:
  """Images and labels, in memory.

  Args:
    source: path of an npz file with arrays `[N, H, W]` or `[N, H, W, C]` and
      `[N]`; path(s) of parquet files with encoded images (PNG or JPEG, as
      `datasets.Image` stores them) or nested lists; or a `datasets.Dataset`.
    image: name of the array or column of images.
    label: name of the labels.
    cache_dir: see `load_files`.

  Returns:
    `{'image': [N, H, W, C], 'label': [N] int32}`. Grey images get `C = 1`.
    Pixels keep their dtype and range (uint8 from encoded images): scaling is
    the loss's business.

  Raises:
    FileNotFoundError, ValueError: for a missing or empty file, a missing
      array or column, images of different sizes, labels that are not whole
      numbers, or different numbers of images and labels.
  """
  if isinstance(source, (str, os.PathLike)) and str(source).endswith('.npz'):
    images, labels, name = _from_npz(_existing(source), image, label)
  else:
    dataset, name = _dataset(source, [image, label], cache_dir=cache_dir)
    images, labels = _from_dataset(dataset, name, image, label)
  if images.ndim == 3:
    images = images[..., None]
  if images.ndim != 4 or labels.shape != images.shape[:1] or not len(images):
    raise ValueError(
      f'{name}: {image!r} has shape {images.shape} and {label!r} '
      f'{labels.shape}; expected [N, H, W] or [N, H, W, C], and [N], N > 0.'
    )
  if not np.issubdtype(labels.dtype, np.integer):
    raise ValueError(
      f'{name}: {label!r} has dtype {labels.dtype}; labels are whole numbers.'
    )
  return {'image': images, 'label': labels.astype(np.int32)}


def _from_npz(file, image, label):
  try:
    # NumPy leaves a file that it opened itself open when it is damaged.
    with open(file, 'rb') as stream:
      archive = np.load(stream, allow_pickle=False)
      if isinstance(archive, np.ndarray):
        raise ValueError('it is one array without a name, not an archive')
      for name in (image, label):
        if name not in archive:
          raise ValueError(
            f'it has no array {name!r}; it has {sorted(archive.files)}'
          )
      return archive[image], archive[label], str(file)
  except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
    raise ValueError(f'{file.absolute()} cannot be read: {error}.') from error


def _from_dataset(dataset, name, image, label):
  import datasets  # pylint: disable=g-import-not-at-top

  feature = dataset.features[image]
  # Parquet files written without `datasets` do not say that they hold images.
  if isinstance(feature, dict) and 'bytes' in feature:
    dataset = dataset.cast_column(image, datasets.Image())
  rows = [np.asarray(x) for x in dataset[image]]
  shapes = {x.shape for x in rows}
  if len(shapes) > 1:
    raise ValueError(
      f'{name}: the images in {image!r} have different shapes, '
      f'{sorted(shapes)[:5]}; resize or crop them first.'
    )
  images = np.stack(rows)
  while isinstance(feature, datasets.List):
    feature = feature.feature
  if isinstance(feature, datasets.Value):
    # Nested lists come back as Python numbers.
    images = images.astype(feature.dtype)
  return images, np.asarray(dataset[label])
