"""Batch order is a function of (seed, step); processes share the batch."""

import datasets
import jax
import numpy as np
import pytest

from idesign.training import Batches, in_order, make_mesh
from idesign.training.batches import _permutation


def rows(count=23):
  return {
    'x': np.arange(count),
    'y': np.arange(2 * count, dtype=np.float32).reshape(count, 2),
  }


def as_dataset(count=23):
  return datasets.Dataset.from_dict(
    {name: column.tolist() for name, column in rows(count).items()}
  )


@pytest.mark.parametrize('make', [rows, as_dataset])
def test_an_epoch_visits_rows_once_and_drops_the_remainder(make):
  batches = Batches(make(), 5, seed=0)
  assert batches.steps_per_epoch == 4
  orders = []
  for epoch in range(3):
    seen = []
    for index in range(4):
      batch = batches.batch(4 * epoch + index)
      assert batch['x'].shape == (5,) and batch['y'].shape == (5, 2)
      np.testing.assert_array_equal(batch['y'][:, 0], 2 * batch['x'])
      seen.extend(batch['x'].tolist())
    assert len(set(seen)) == 20
    orders.append(seen)
  assert orders[0] != orders[1] != orders[2]
  # Every row has its turn: the rows left out differ between epochs.
  assert len(set(range(23)) - set(orders[0] + orders[1] + orders[2])) == 0


def test_batches_depend_on_seed_and_step_alone():
  forward = [Batches(rows(), 5, seed=3).indices(n) for n in range(12)]
  fresh = Batches(rows(), 5, seed=3)
  for n in (11, 0, 7, 3, 8, 11):
    np.testing.assert_array_equal(fresh.indices(n), forward[n])
  other = Batches(rows(), 5, seed=4)
  assert not all(
    np.array_equal(other.indices(n), forward[n]) for n in range(12)
  )


def test_the_order_never_changes():
  """A resumed run depends on it; these numbers may not be updated."""
  assert _permutation(10, 2, 5).tolist() == [5, 2, 9, 8, 1, 3, 0, 6, 7, 4]


def test_far_steps_cost_no_walk():
  batches = Batches(rows(), 5, seed=0)
  assert len(set(batches.indices(10**12))) == 5
  assert batches.position(10**12 + 1) == {
    'seed': 0,
    'epoch': 250_000_000_000,
    'index': 1,
    'num_rows': 23,
    'batch_size': 5,
  }


def test_the_first_row_is_anywhere_with_equal_chance():
  """2000 epochs of 5 rows: counts within 5 standard deviations of 400."""
  places = [int(np.argmin(_permutation(5, 0, epoch))) for epoch in range(2000)]
  counts = np.bincount(places, minlength=5)
  assert np.abs(counts - 400).max() < 5 * np.sqrt(2000 * 0.2 * 0.8)


@pytest.mark.parametrize('size', [(8, 1), (2, 4), (1, 8)])
def test_a_single_process_has_the_whole_batch(size):
  whole = Batches(rows(), 8, seed=0).batch(3)
  part = Batches(rows(), 8, seed=0, mesh=make_mesh(*size)).batch(3)
  jax.tree.map(np.testing.assert_array_equal, part, whole)


@pytest.mark.parametrize(
  'make, size, match',
  [
    (lambda: {}, 1, 'data set is empty'),
    (lambda: rows(0), 1, r'data set is empty .*x.: 0'),
    (lambda: as_dataset(5).select([]), 1, 'data set is empty'),
    (lambda: {**rows(), 'z': np.ones(4)}, 2, 'different numbers of rows'),
    (rows, 24, 'batch_size=24 must be between 1 and .* 23'),
    (rows, 0, 'batch_size=0'),
  ],
)
def test_bad_rows(make, size, match):
  with pytest.raises(ValueError, match=match):
    Batches(make(), size, seed=0)


def test_bad_arguments():
  with pytest.raises(ValueError, match='seed=-1'):
    Batches(rows(), 2, seed=-1)
  with pytest.raises(ValueError, match='step=-1'):
    Batches(rows(), 2, seed=0).batch(-1)
  with pytest.raises(ValueError, match='batch_size=6 .* data=4'):
    Batches(rows(), 6, seed=0, mesh=make_mesh(4, 2))


def test_ragged_columns_are_named():
  ragged = datasets.Dataset.from_dict({'t': [[1, 2], [3], [4], [5, 6]]})
  with pytest.raises(ValueError, match="column 't' has rows of different"):
    Batches(ragged, 4, seed=0).batch(0)


@pytest.mark.parametrize('make', [rows, as_dataset])
@pytest.mark.parametrize('size', [4, 23, 30])
def test_in_order_means_are_over_the_rows(make, size):
  total, weight, shapes = 0.0, 0.0, set()
  for batch in in_order(make(), size):
    total += float(batch['x'] @ batch['weight'])
    weight += float(batch['weight'].sum())
    shapes.add(batch['x'].shape)
    assert batch['weight'].dtype == np.float32
  assert (total, weight) == (sum(range(23)), 23)
  assert shapes == {(size,)}


def test_in_order_refuses_a_second_weight():
  with pytest.raises(ValueError, match='column "weight" already'):
    next(in_order({'weight': np.ones(3)}, 2))
