"""Which components memorize, which are shared, and which one cannot tell.

A score of components (their curvature on single examples, on a batch, their
participation; see `moments`) is compared with two edges: what lies above the
upper one, its whole interval, is *shared*, what lies below the lower one is of
*memorization*, the rest is undecided. Edges come from a null or from an edit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
import operator
from typing import NamedTuple

import numpy as np
from scipy import stats

from idesign.curvature.moments import Moments
from idesign.curvature.spectrum import Spectrum

MEMORIZATION, UNDECIDED, SHARED = -1, 0, 1
Score = Callable[[Moments], dict[str, np.ndarray]]


class Classes(NamedTuple):
  """The components of one site.

  Attributes:
    scores: `[*stack, d_in, d_out]`; the larger the more shared.
    low, high: their interval, likewise.
    classes: likewise, int8: `MEMORIZATION`, `UNDECIDED` or `SHARED`.
  """

  scores: np.ndarray
  low: np.ndarray
  high: np.ndarray
  classes: np.ndarray

  def fractions(self) -> dict[str, np.ndarray]:
    """The share of each class by layer, `[*stack]`; they sum to one."""
    names = {
      'memorization': MEMORIZATION, 'undecided': UNDECIDED, 'shared': SHARED
    }  # fmt: skip
    return {
      name: (self.classes == value).mean((-2, -1))
      for name, value in names.items()
    }


def classify(
  groups: Sequence[Moments],
  score: Score,
  edges: dict[str, tuple[np.ndarray, np.ndarray]],
  *,
  confidence: float = 0.95,
) -> dict[str, Classes]:
  """Classes of components, with intervals over groups of examples.

  Scores are of all groups together. Their intervals are those of the
  delete-one-group jackknife with Student's t (Tukey 1958), of the logarithm, as
  scores range over many orders of magnitude; where a score is zero or not a
  number for all or for some groups, the component is undecided.

  Args:
    groups: moments of disjoint groups of examples, at least 3.
    score: such as `Moments.curvature`; not negative.
    edges: site -> lower and upper edge, by layer, `[*stack]`, from `null_edges`
      or `kept_edges`.
    confidence: of the intervals.

  Returns:
    Site -> classes.
  """
  if len(groups) < 3:
    raise ValueError(f'A jackknife needs at least 3 groups, not {len(groups)}.')
  if not 0 < confidence < 1:
    raise ValueError(f'confidence must be in (0, 1), not {confidence}.')
  add = functools.partial(functools.reduce, operator.add)
  whole = score(add(groups))
  without = [
    score(add([*groups[:i], *groups[i + 1 :]])) for i in range(len(groups))
  ]
  n = len(groups)
  t = stats.t.ppf((1 + confidence) / 2, n - 1)
  out = {}
  for name, scores in whole.items():
    with np.errstate(divide='ignore', invalid='ignore'):
      left = np.log(np.stack([w[name] for w in without]))
      variance = (n - 1) / n * np.sum((left - left.mean(0)) ** 2, axis=0)
      width = t * np.sqrt(variance)
      low, high = scores * np.exp(-width), scores * np.exp(width)
    lower, upper = (np.asarray(e)[..., None, None] for e in edges[name])
    classes = np.zeros(scores.shape, np.int8)
    known = np.isfinite(width)
    classes[known & (high < lower)] = MEMORIZATION
    classes[known & (low > upper)] = SHARED
    out[name] = Classes(scores, low, high, classes)
  return out


def null_edges(
  null: Moments, score: Score, *, confidence: float = 0.95
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Between which values a score lies where example identity is shuffled.

  Args:
    null: moments of shuffled examples (`component_moments(..., shuffle=key)`).
    score: the score that is classified.
    confidence: share of a layer's components between the edges.

  Returns:
    Site -> lower and upper edge, `[*stack]`.
  """
  tail = (1 - confidence) / 2
  return {
    name: tuple(
      np.nanquantile(s.reshape(*s.shape[:-2], -1), q, axis=-1)
      for q in (tail, 1 - tail)
    )
    for name, s in score(null).items()
  }


def kept_edges(
  scores: dict[str, np.ndarray], *, share: float
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """The score above which a share of each layer's components lies, twice."""
  if not 0 < share < 1:
    raise ValueError(f'share must be in (0, 1), not {share}.')
  out = {}
  for name, s in scores.items():
    edge = np.quantile(s.reshape(*s.shape[:-2], -1), 1 - share, axis=-1)
    out[name] = edge, edge
  return out


def weight_scores(scores: np.ndarray, spectrum: Spectrum) -> np.ndarray:
  """A score for every weight, from those of the components it is made of.

  Weight `(a, b)` is `sum_ij u_ai C_ij v_bj`; it has the mean of their scores
  with weights `u_ai^2 v_bj^2`, which sum to one.

  Args:
    scores: `[*stack, d_in, d_out]`, of components.
    spectrum: their bases.

  Returns:
    `[*stack, d_in, d_out]`, of weights.
  """
  u, v = spectrum.input_basis**2, spectrum.output_basis**2
  return u @ scores @ v.swapaxes(-1, -2)
