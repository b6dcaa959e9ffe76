"""The components of largest score, exactly and without sorting.

Components are taken in descending order, equal ones in row-major order. Where
scores are products of two spectra no array of all products is formed: a
threshold is found by bisection over the bit patterns of floats. Stored scores
are searched by the leading bits of those patterns, a histogram at a time.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
import numpy as np

_DIGIT = 16  # Bits of a pattern that one histogram tells apart.


def keep_mass(
  rows: np.ndarray, columns: np.ndarray, share: float
) -> np.ndarray:
  """The fewest components that hold a share of the total mass, exactly.

  Components `(i, j)` of mass `rows[i] * columns[j]` are taken in descending
  order, equal ones in row-major order, until their sum reaches `share` of the
  total. The threshold is found by bisection over the bit patterns of floats,
  and each row's share of the set by bisection over its columns, O(64 (m log
  n)) in all.

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
  _check(rows, columns)
  check_mass(share)
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
  ties = int(min(np.ceil(lacking / threshold), m * n))
  return _with_ties(rows, columns, above, threshold, ties)


def keep_count(rows: np.ndarray, columns: np.ndarray, count: int) -> np.ndarray:
  """The `count` components of largest mass, exactly; as `keep_mass` else."""
  _check(rows, columns)
  rows, columns = _unit(rows), _unit(columns)
  m, n = len(rows), len(columns)
  _check_count(count, m * n)
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


def largest_mass(
  scores: Float[np.ndarray, 'm n'], share: float
) -> Bool[np.ndarray, 'm n']:
  """As `keep_mass`, of scores that are stored; all of them if they are zero.

  Args:
    scores: finite, not negative.
    share: of their sum to keep, in (0, 1].
  """
  check_mass(share)
  patterns = _patterns(scores)
  values = patterns.view(np.float64)
  total = float(values.sum())
  if share == 1 or total == 0:
    return np.ones(scores.shape, bool)
  target = share * total
  threshold, above = _radix(patterns, values, target)
  mask = patterns > threshold
  value = float(np.uint64(threshold).view(np.float64))
  if value == 0:  # What is left underflows next to the largest.
    return np.ones(scores.shape, bool)
  ties = max(int(np.ceil((target - above) / value)), 1)
  return _first(mask, patterns == threshold, ties).reshape(scores.shape)


def largest_count(
  scores: Float[np.ndarray, 'm n'], count: int
) -> Bool[np.ndarray, 'm n']:
  """The `count` components of largest score, of scores that are stored."""
  patterns = _patterns(scores)
  _check_count(count, patterns.size)
  if count == 0:
    return np.zeros(scores.shape, bool)
  threshold, above = _radix(patterns, None, count)
  mask = patterns > threshold
  ties = count - int(above)
  return _first(mask, patterns == threshold, ties).reshape(scores.shape)


def check_mass(share: float) -> None:
  """Raises a ValueError unless the share of mass is in (0, 1]."""
  if not 0 < share <= 1:
    raise ValueError(f'The mass share must be in (0, 1], not {share}.')


def _patterns(scores) -> np.ndarray:
  """Flat bit patterns, which are ordered as the scores are."""
  flat = np.ascontiguousarray(scores, np.float64).reshape(-1)
  if not (np.isfinite(flat).all() and (flat >= 0).all()):
    raise ValueError('Scores must be finite and not negative.')
  return (flat + 0.0).view(np.uint64)  # Of -0, too.


def _radix(patterns, weights, target) -> tuple[int, float]:
  """The largest pattern down to which weights add up to the target.

  Returns:
    That pattern, and the weight of everything above it.
  """
  chosen, prefix, above = np.arange(len(patterns)), 0, 0.0
  for shift in range(64 - _DIGIT, -1, -_DIGIT):
    digits = (patterns[chosen] >> np.uint64(shift)).astype(np.int64)
    digits &= 2**_DIGIT - 1
    here = None if weights is None else weights[chosen]
    by_digit = np.bincount(digits, here, minlength=2**_DIGIT)
    down = above + np.cumsum(by_digit[::-1])
    # Rounding may leave the sum of everything short of the target.
    last = len(down) - 1 - int(digits.min())
    at = min(int(np.searchsorted(down, target)), last)
    above = float(down[at - 1]) if at else above
    digit = len(down) - 1 - at
    prefix = (prefix << _DIGIT) | digit
    chosen = chosen[digits == digit]
  return np.uint64(prefix), above


def _first(mask, tied, ties: int) -> np.ndarray:
  """The mask with the first `ties` of the tied entries as well."""
  mask = mask.copy()
  mask[np.flatnonzero(tied)[:ties]] = True
  return mask


def _check(rows, columns) -> None:
  if not (np.isfinite(rows).all() and np.isfinite(columns).all()):
    raise ValueError('Masses must be finite.')
  if (np.diff(columns) > 0).any():
    raise ValueError('columns must be in descending order.')
  if (rows < 0).any() or (columns < 0).any():
    raise ValueError('Masses must not be negative.')


def _check_count(count: int, size: int) -> None:
  if not 0 <= count <= size:
    raise ValueError(f'count must be in [0, {size}], not {count}.')


def _unit(masses: np.ndarray) -> np.ndarray:
  """Scaled by a power of two, exactly, to at most 1, so products exist."""
  largest = np.max(masses, initial=0.0)
  return np.ldexp(masses, -int(np.frexp(largest)[1])) if largest else masses


def _at_least(rows, columns, threshold: float) -> np.ndarray:
  """How many columns of each row have `row * column >= threshold`."""
  n = len(columns)
  with np.errstate(divide='ignore', over='ignore', invalid='ignore'):
    needed = threshold / rows
  counts = n - np.searchsorted(columns[::-1], needed)
  # The quotient is rounded. The rounded product is what counts: it is monotone
  # in the column, so that the columns next to the guess prove it right.
  last = rows * columns[np.maximum(counts - 1, 0)] >= threshold
  next_ = rows * columns[np.minimum(counts, n - 1)] >= threshold
  wrong = np.flatnonzero(~((counts == 0) | last) | (next_ & (counts < n)))
  counts[wrong] = _bisect(rows[wrong], columns, threshold)
  return counts


def _bisect(rows, columns, threshold: float) -> np.ndarray:
  """As `_at_least`, by the products alone."""
  low, high = np.zeros(len(rows), int), np.full(len(rows), len(columns))
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
