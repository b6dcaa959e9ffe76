"""Batches by number: a pure function of the rows, the seed and the step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jax.sharding import Mesh
import numpy as np

from idesign.training.sharding import process_rows

Rows = Any  # Mapping[str, np.ndarray], or datasets.Dataset.


class Batches:
  """Shuffled batches of `batch_size` rows; batch `n` can be had at once.

  Epoch `e` visits the rows in a random order that depends on `(seed, e)`
  alone; the rows left over when `batch_size` does not divide them are dropped
  from that epoch (other ones in every epoch). There is no state to save: the
  position of a run is its step, and going on at step `n` costs one
  permutation of the rows, whatever `n`.
  """

  def __init__(
    self, rows: Rows, batch_size: int, *, seed: int, mesh: Mesh | None = None
  ):
    """Checks the rows; nothing is copied.

    Args:
      rows: a dict of arrays with equally long axes 0, or a `datasets.Dataset`
        whose columns have fixed shapes.
      batch_size: rows per global batch, over all processes.
      seed: of the order.
      mesh: if given, `batch` returns only the rows of this process's devices.

    Raises:
      ValueError: if there are fewer rows than a batch (or none), the arrays
        differ in length, or the batch does not divide over the mesh.
    """
    self.num_rows = count_rows(rows)
    if not 1 <= batch_size <= self.num_rows:
      raise ValueError(
        f'batch_size={batch_size} must be between 1 and the number of rows, '
        f'{self.num_rows}; use a smaller batch or more data.'
      )
    if seed < 0:
      raise ValueError(f'seed={seed} must not be negative.')
    self._rows = rows
    self.batch_size = batch_size
    self.seed = seed
    self._part = slice(None)
    if mesh is not None:
      self._part = process_rows(mesh, batch_size)
    self._order = (-1, np.empty(0, np.int64))

  @property
  def steps_per_epoch(self) -> int:
    return self.num_rows // self.batch_size

  def indices(self, step: int) -> np.ndarray:
    """The rows of global batch `step >= 0`, `[batch_size]`, all distinct."""
    if step < 0:
      raise ValueError(f'step={step} must not be negative.')
    epoch, index = divmod(step, self.steps_per_epoch)
    if self._order[0] != epoch:
      self._order = (epoch, _permutation(self.num_rows, self.seed, epoch))
    start = index * self.batch_size
    return self._order[1][start : start + self.batch_size]

  def batch(self, step: int) -> dict[str, np.ndarray]:
    """Batch `step`: arrays `[b, ...]`, this process's rows."""
    return take(self._rows, self.indices(step)[self._part])

  def position(self, step: int) -> dict[str, Any]:
    """Where the stream is when batch `step` comes next, as JSON."""
    epoch, index = divmod(step, self.steps_per_epoch)
    return {
      'seed': self.seed,
      'epoch': epoch,
      'index': index,
      'num_rows': self.num_rows,
      'batch_size': self.batch_size,
    }


def in_order(
  rows: Rows, batch_size: int, *, mesh: Mesh | None = None
) -> Iterator[dict[str, np.ndarray]]:
  """Every row once, in order, for evaluation.

  Yields batches `[b, ...]` of equal size with a float32 `weight`, `[b]`. The
  last one is filled up with copies of the first row, of weight 0, so that
  weighted means are over the rows and nothing is compiled twice.

  Raises:
    ValueError: at the first batch, if there are no rows, they have a column
      `weight` already, or the batch does not divide over the mesh.
  """
  count = count_rows(rows)
  part = slice(None) if mesh is None else process_rows(mesh, batch_size)
  for start in range(0, count, batch_size):
    index = np.arange(start, start + batch_size)
    batch = take(rows, np.where(index < count, index, 0)[part])
    if 'weight' in batch:
      raise ValueError('the rows have a column "weight" already; rename it.')
    yield {**batch, 'weight': (index < count)[part].astype(np.float32)}


def count_rows(rows: Rows) -> int:
  """The number of rows; a `ValueError` if none or if columns disagree."""
  if isinstance(rows, Mapping):
    sizes = {name: len(column) for name, column in rows.items()}
  else:
    sizes = {name: rows.num_rows for name in rows.column_names}
  if len(set(sizes.values())) > 1:
    raise ValueError(f'columns have different numbers of rows: {sizes}.')
  if not sizes or not all(sizes.values()):
    raise ValueError(
      f'the data set is empty (rows per column: {sizes}); check the file or '
      'filter it was made with.'
    )
  return next(iter(sizes.values()))


def take(rows: Rows, index: np.ndarray) -> dict[str, np.ndarray]:
  """The rows `index`, stacked: arrays `[len(index), ...]`."""
  if isinstance(rows, Mapping):
    return {name: np.asarray(column[index]) for name, column in rows.items()}
  batch = rows.with_format('numpy')[index]
  for name, column in batch.items():
    if column.dtype == object:
      raise ValueError(
        f'column {name!r} has rows of different shapes or no numbers; make '
        'them alike, or drop it with `remove_columns`.'
      )
  return dict(batch)


def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
  # NumPy promises the raw stream of a bit generator for ever, but lets
  # `Generator.permutation` change; a resumed run must not notice an upgrade.
  bits = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
  return np.argsort(bits.random_raw(count), kind='stable')
