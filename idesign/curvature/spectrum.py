"""Eigenbases of Kronecker factors, and exact selection of components.

A weight `w [d_in, d_out]` has components `C_ij = u_i^T w v_j` in the eigenbases
`u` of the input factor and `v` of the output factor. Under K-FAC the curvature
of a component is the product of its two eigenvalues, its *mass*.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from idesign.curvature.kfac import Factors


class Spectrum(NamedTuple):
  """Eigendecomposition of one site's factors; float64, on the host.

  Attributes:
    input_values: `[*stack, d_in]`, descending, not negative.
    input_basis: `[*stack, d_in, d_in]`, eigenvectors in columns.
    output_values: `[*stack, d_out]`, descending, not negative.
    output_basis: `[*stack, d_out, d_out]`.
  """

  input_values: np.ndarray
  input_basis: np.ndarray
  output_values: np.ndarray
  output_basis: np.ndarray

  def mass(self) -> np.ndarray:
    """Curvature of every component, `[*stack, d_in, d_out]`."""
    return self.input_values[..., :, None] * self.output_values[..., None, :]


def _eigh(name: str, moment: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  moment = np.asarray(moment, np.float64)
  if not np.isfinite(moment).all():
    raise ValueError(
      f'The {name} factor has entries that are not finite; the loss or an '
      'activation overflowed. Collect the factors in float32.'
    )
  values, basis = np.linalg.eigh((moment + moment.swapaxes(-1, -2)) / 2)
  # A second moment has no negative eigenvalues; those here are rounding.
  return np.maximum(values, 0.0)[..., ::-1], basis[..., ::-1]


def spectra(factors: Factors) -> dict[str, Spectrum]:
  """Eigendecompositions by site, of the factors averaged over examples.

  Raises:
    ValueError: the factors hold no example, or entries that are not finite.
  """
  count = float(factors.count)
  if not count > 0:
    raise ValueError('The factors hold no example: collect at least one batch.')
  return {
    site: Spectrum(
      *_eigh(f'input {site!r}', np.asarray(moment, np.float64) / count),
      *_eigh(
        f'output {site!r}',
        np.asarray(factors.outputs[site], np.float64) / count,
      ),
    )
    for site, moment in factors.inputs.items()
  }


def keep_mass(
  rows: np.ndarray, columns: np.ndarray, share: float
) -> np.ndarray:
  """The fewest components that hold a share of the total mass, exactly.

  Components `(i, j)` of mass `rows[i] * columns[j]` are taken in descending
  order, equal ones in row-major order, until their sum reaches `share` of the
  total. No array of all products is formed: the threshold is found by
  bisection over the bit patterns of floats, and each row's share of the set by
  bisection over its columns, O(64 (m log n)) in all.

  Args:
    rows: `[m]`, not negative.
    columns: `[n]`, descending, not negative.
    share: in (0, 1]. At 1 everything is kept, mass zero included, so that the
      edit is the identity.

  Returns:
    `counts [m]`: row `i` keeps its first `counts[i]` columns.

  Raises:
    ValueError: the share is out of range or the columns are not descending.
  """
  _check(rows, columns, share)
  rows, columns = _unit(rows), _unit(columns)
  m, n = len(rows), len(columns)
  prefix = np.concatenate([[0.0], np.cumsum(columns)])

  def mass(threshold: float) -> float:
    return float(rows @ prefix[_at_least(rows, columns, threshold)])

  total = mass(0.0)
  if share == 1 or total == 0:
    return np.full(m, n)
  threshold = _largest_float(lambda t: mass(t) >= share * total)
  if threshold == 0:  # What is left underflows next to the largest.
    return np.full(m, n)
  above = _at_least(rows, columns, np.nextafter(threshold, np.inf))
  lacking = share * total - float(rows @ prefix[above])
  return _with_ties(
    rows,
    columns,
    above,
    threshold,
    int(min(np.ceil(lacking / threshold), m * n)),
  )


def keep_count(rows: np.ndarray, columns: np.ndarray, count: int) -> np.ndarray:
  """The `count` components of largest mass, exactly; as `keep_mass` else."""
  _check(rows, columns, 1.0)
  rows, columns = _unit(rows), _unit(columns)
  m, n = len(rows), len(columns)
  if not 0 <= count <= m * n:
    raise ValueError(f'count must be in [0, {m * n}], not {count}.')
  if count == m * n:
    return np.full(m, n)
  if count == 0:
    return np.zeros(m, int)
  threshold = _largest_float(
    lambda t: _at_least(rows, columns, t).sum() >= count
  )
  above = _at_least(rows, columns, np.nextafter(threshold, np.inf))
  return _with_ties(rows, columns, above, threshold, count - int(above.sum()))


def staircase(counts: np.ndarray, n: int) -> np.ndarray:
  """`[m, n]` mask that is true in the first `counts[i]` columns of row `i`."""
  return np.arange(n) < np.asarray(counts)[:, None]


def _check(rows, columns, share) -> None:
  if not 0 < share <= 1:
    raise ValueError(f'share must be in (0, 1], not {share}.')
  if not (np.isfinite(rows).all() and np.isfinite(columns).all()):
    raise ValueError('Masses must be finite.')
  if (np.diff(columns) > 0).any():
    raise ValueError('columns must be in descending order.')
  if (rows < 0).any() or (columns < 0).any():
    raise ValueError('Masses must not be negative.')


def _unit(masses: np.ndarray) -> np.ndarray:
  """Scaled by a power of two, exactly, to at most 1, so products exist."""
  largest = np.max(masses, initial=0.0)
  return np.ldexp(masses, -int(np.frexp(largest)[1])) if largest else masses


def _at_least(rows, columns, threshold: float) -> np.ndarray:
  """How many columns of each row have `row * column >= threshold`."""
  low, high = np.zeros(len(rows), int), np.full(len(rows), len(columns))
  # The rounded product is monotone in the column, so bisection is exact.
  while (low < high).any():
    middle = (low + high) // 2
    open_ = low < high
    reaches = rows * columns[np.minimum(middle, len(columns) - 1)] >= threshold
    low = np.where(open_ & reaches, middle + 1, low)
    high = np.where(open_ & ~reaches, middle, high)
  return low


def _largest_float(enough) -> float:
  """The largest float at which a monotone decreasing predicate holds.

  Floats that are not negative are ordered as their bit patterns are.
  """
  low, high = 0, int(np.float64(np.finfo(np.float64).max).view(np.int64))
  while low < high:
    middle = (low + high + 1) // 2
    if enough(float(np.int64(middle).view(np.float64))):
      low = middle
    else:
      high = middle - 1
  return float(np.int64(low).view(np.float64))


def _with_ties(rows, columns, above, threshold, ties: int) -> np.ndarray:
  """Adds the first `ties` components at the threshold, in row-major order."""
  at = _at_least(rows, columns, threshold) - above
  before = np.cumsum(at) - at
  return above + np.clip(ties - before, 0, at)
