"""Exact selection: bisection against a full sort, ties included."""

import fractions
import math

import numpy as np
import pytest

from idesign import curvature
from idesign.curvature import selection


def full_sort(rows, columns, share):
  """The definition: sort all products, equal ones in row-major order."""
  mass = [fractions.Fraction(r) * fractions.Fraction(c)
          for r in rows for c in columns]  # fmt: skip
  total, taken = sum(mass), 0
  keep = np.zeros(len(mass), bool)
  for i in sorted(range(len(mass)), key=lambda i: -mass[i]):
    if taken >= fractions.Fraction(share) * total:
      break
    keep[i], taken = True, taken + mass[i]
  return keep.reshape(len(rows), len(columns))


def descending(values):
  return np.sort(np.asarray(values, float))[::-1]


def spectra(kind, seed):
  """Spectra whose products are exact in float64, so that ties are real."""
  rng = np.random.default_rng(seed)
  if kind == 'integers':
    return descending(rng.integers(1, 9, 7)), descending(rng.integers(1, 9, 5))
  if kind == 'equal':
    return np.full(6, 2.0), np.full(4, 3.0)
  if kind == 'with zeros':
    return descending([4, 2, 0, 0]), descending([3, 1, 0])
  return descending(2.0 ** rng.integers(-9, 9, 8)), descending(
    2.0 ** rng.integers(-9, 9, 6)
  )


KINDS = ('integers', 'equal', 'with zeros', 'powers')


@pytest.mark.parametrize('share', [0.125, 0.5, 0.75, 0.9375, 1.0])
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('seed', range(3))
def test_keep_mass_is_the_full_sort(kind, share, seed):
  rows, columns = spectra(kind, seed)
  counts = curvature.keep_mass(rows, columns, share)
  mask = curvature.staircase(counts, len(columns))
  expected = (
    np.ones_like(mask) if share == 1 else full_sort(rows, columns, share)
  )
  np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize('scale', [1.0, 1e-290])
def test_rounded_products_are_what_is_compared(scale):
  """At thresholds that are products, quotients are off by a rounding."""
  rng = np.random.default_rng(0)
  rows, columns = descending(rng.random(40)), descending(rng.random(30)) * scale
  products = np.outer(rows, columns)
  guessed = 0
  for threshold in products.reshape(-1):
    counts = selection._at_least(rows, columns, threshold)
    np.testing.assert_array_equal(counts, (products >= threshold).sum(axis=1))
    quotients = threshold / rows
    guessed += (counts != (columns[None] >= quotients[:, None]).sum(1)).sum()
  assert guessed > 20  # The quotient alone would be wrong.


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('seed', range(3))
def test_keep_count_is_the_full_sort(kind, seed):
  rows, columns = spectra(kind, seed)
  mass = np.outer(rows, columns).reshape(-1)
  order = np.argsort(-mass, kind='stable')
  for count in range(mass.size + 1):
    expected = np.zeros(mass.size, bool)
    expected[order[:count]] = True
    counts = curvature.keep_count(rows, columns, count)
    mask = curvature.staircase(counts, len(columns))
    np.testing.assert_array_equal(mask.reshape(-1), expected)


@pytest.mark.parametrize('share', [0.3, 0.6, 0.9, 0.99, 0.99999])
def test_the_set_is_minimal_on_real_spectra(share):
  rng = np.random.default_rng(0)
  rows = descending(rng.lognormal(0, 4, 60))
  columns = descending(rng.lognormal(0, 4, 50))
  counts = curvature.keep_mass(rows, columns, share)
  assert (np.diff(counts) <= 0).all()
  mask = curvature.staircase(counts, 50)
  mass = np.outer(rows, columns)
  target = share * math.fsum(mass.reshape(-1))
  kept = math.fsum(mass[mask])
  slack = 1e-12 * target
  assert kept >= target - slack
  assert kept - mass[mask].min() < target + slack
  assert mass[mask].min() >= mass[~mask].max()


def test_no_array_of_all_products_is_formed():
  """2e5 x 2e5 products would need 320 GB."""
  rows = columns = 1 / np.arange(1, 200_001) ** 2
  counts = curvature.keep_mass(rows, columns, 0.9)
  assert 0 < counts.sum() < 1000


@pytest.mark.parametrize('share', [0.0, -0.1, 1.5, float('nan')])
def test_shares_out_of_range_raise(share):
  with pytest.raises(ValueError, match='mass share must be in'):
    curvature.keep_mass(np.ones(2), np.ones(2), share)


@pytest.mark.parametrize('exponents', [(-500, -560), (600, 500), (-1000, 0)])
def test_masses_whose_products_have_no_float(exponents):
  """Scaling by powers of two changes nothing."""
  rows, columns = spectra('powers', 0)
  down = np.ldexp(rows, exponents[0]), np.ldexp(columns, exponents[1])
  for share in (0.3, 0.9):
    np.testing.assert_array_equal(
      curvature.keep_mass(*down, share),
      curvature.keep_mass(rows, columns, share),
    )


def test_bad_spectra_raise():
  for bad in (np.nan, np.inf):
    with pytest.raises(ValueError, match='finite'):
      curvature.keep_mass(np.array([1.0, bad]), np.ones(2), 0.5)
  with pytest.raises(ValueError, match='descending'):
    curvature.keep_mass(np.ones(2), np.array([1.0, 2.0]), 0.5)
  with pytest.raises(ValueError, match='negative'):
    curvature.keep_mass(np.array([1.0, -1.0]), np.ones(2), 0.5)
  with pytest.raises(ValueError, match='count must be in'):
    curvature.keep_count(np.ones(2), np.ones(2), 5)


def scores(kind, seed):
  rng = np.random.default_rng(seed)
  if kind == 'integers':
    return rng.integers(0, 5, (6, 7)).astype(float)
  if kind == 'equal':
    return np.full((4, 5), 3.0)
  if kind == 'with zeros':
    return np.maximum(rng.integers(-8, 8, (5, 6)), 0.0)
  return 2.0 ** rng.integers(-30, 30, (6, 5))


@pytest.mark.parametrize('share', [0.125, 0.5, 0.75, 0.9375, 1.0])
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('seed', range(3))
def test_largest_mass_is_the_full_sort(kind, share, seed):
  values = scores(kind, seed)
  expected = full_sort(values.reshape(-1), [1.0], share).reshape(values.shape)
  if share == 1:
    expected = np.ones_like(expected)
  np.testing.assert_array_equal(curvature.largest_mass(values, share), expected)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('seed', range(3))
def test_largest_count_is_the_full_sort(kind, seed):
  values = scores(kind, seed)
  order = np.argsort(-values.reshape(-1), kind='stable')
  for count in range(values.size + 1):
    expected = np.zeros(values.size, bool)
    expected[order[:count]] = True
    mask = curvature.largest_count(values, count)
    np.testing.assert_array_equal(mask.reshape(-1), expected)


@pytest.mark.parametrize('share', [0.3, 0.9, 0.99999])
def test_stored_products_are_selected_as_products_are(share):
  rng = np.random.default_rng(0)
  rows = descending(2.0 ** rng.integers(-9, 9, 80))
  columns = descending(2.0 ** rng.integers(-9, 9, 60))
  counts = curvature.keep_mass(rows, columns, share)
  np.testing.assert_array_equal(
    curvature.largest_mass(np.outer(rows, columns), share),
    curvature.staircase(counts, 60),
  )


def test_shares_that_end_on_a_score_or_on_rounding():
  """Where sums round, the set still holds the share, and not one more."""
  values = np.full((10, 10), 0.1)
  for share in (0.1, 0.29, 0.3, 0.7, 0.99):
    mask = curvature.largest_mass(values, share)
    assert abs(mask.sum() - share * 100) < 1 + 1e-9
  tiny = np.array([[1.0, 1e-320, 0.0]])
  assert curvature.largest_mass(tiny, 0.999999).sum() == 1


@pytest.mark.parametrize('bad', [-1.0, np.nan, np.inf])
def test_scores_that_cannot_be_selected_raise(bad):
  with pytest.raises(ValueError, match='finite and not negative'):
    curvature.largest_mass(np.array([[1.0, bad]]), 0.5)
  with pytest.raises(ValueError, match='finite and not negative'):
    curvature.largest_count(np.array([[1.0, bad]]), 1)


def test_counts_and_shares_out_of_range_raise():
  ones = np.ones((2, 3))
  for share in (0.0, -1.0, 1.5, np.nan):
    with pytest.raises(ValueError, match='must be in'):
      curvature.largest_mass(ones, share)
  for count in (-1, 7):
    with pytest.raises(ValueError, match=r'count must be in \[0, 6\]'):
      curvature.largest_count(ones, count)
