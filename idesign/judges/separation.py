"""How well each concept tells some examples from others, and by what chance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Float
import numpy as np
import scipy.special
import scipy.stats


class Contrast(NamedTuple):
  """How well each concept tells one decision's examples from the others'.

  There are several groups of other examples (those of each other decision);
  each statistic is that of the group told apart worst, so that a concept which
  is merely about what two groups share does not stand out.

  Attributes:
    auroc: probability that a random example of the clause activates it more
      than a random other one, ties counting half, `[F]`.
    effect_size: Cohen's d, `(m1 - m2) / sqrt((v1 + v2) / 2)`; plus or minus
      infinity where both groups are constant and differ.
    selectivity: of its mean activation, `m1 / (m1 + m2)`; 0.5 if never active.
    p_value: one-sided, of the area under random relabellings of the examples;
      where none of them reached it, by the tail described at `contrast`. Never
      0.
    q_value: the same with the false-discovery rate controlled over concepts
      (Benjamini and Hochberg 1995).
  """

  auroc: np.ndarray
  effect_size: np.ndarray
  selectivity: np.ndarray
  p_value: np.ndarray
  q_value: np.ndarray


def contrast(
  present: Float[np.ndarray, 'N F'],
  others: Sequence[Float[np.ndarray, 'M F']],
  *,
  permutations: int = 10_000,
  seed: int = 0,
) -> Contrast:
  """Compares activations on examples of one clause with each other group.

  Relabellings alone give no p below `1 / (permutations + 1)`; with many
  concepts that is not small enough to reject anything. So where no relabelling
  reached the observed rank sum, p is that of the Mann-Whitney test: the normal
  approximation, corrected for ties and continuity; but not above the said
  bound, and not below the exact probability of splitting the examples in just
  this way, given the ties. The latter matters for concepts that are active on
  few examples, where the normal tail is far too thin.

  Args:
    present: on the examples where the concept should be present.
    others: on those of each other group, at least one.
    permutations: random relabellings, at least one.
    seed: of the relabellings.

  Raises:
    ValueError: for fewer than two examples in a group, groups with different
      concepts, activations that are not finite, or no relabelling.
  """
  if permutations < 1:
    raise ValueError(f'permutations={permutations} must be positive.')
  groups = [np.asarray(g, np.float64) for g in (present, *others)]
  for g in groups:
    if g.ndim != 2 or len(g) < 2 or g.shape[1:] != groups[0].shape[1:]:
      raise ValueError(
        f'activations {[x.shape for x in groups]} must be [examples, concepts] '
        'with at least two examples each and the same concepts.'
      )
    if not np.isfinite(g).all():
      raise ValueError('an activation is not finite.')
  if len(groups) < 2:
    raise ValueError('there is no other group to compare with.')
  random = np.random.default_rng(seed)
  a = groups[0]
  parts = [_one(a, b, permutations, random) for b in groups[1:]]
  auroc, effect, selectivity = (
    np.min([p[i] for p in parts], axis=0) for i in range(3)
  )
  p = np.max([p[3] for p in parts], axis=0)
  q = scipy.stats.false_discovery_control(p)
  return Contrast(auroc, effect, selectivity, p, q)


def _one(a, b, permutations, random):
  n, m = len(a), len(b)
  ranks = scipy.stats.rankdata(np.concatenate([a, b]), axis=0)
  observed = ranks[:n].sum(0)
  # A relabelling is a row of n ones: all rank sums are one product.
  at_least = np.zeros(a.shape[1])
  for start in range(0, permutations, 1000):
    rows = np.zeros((min(1000, permutations - start), n + m), np.float32)
    for row in rows:
      row[random.choice(n + m, n, replace=False)] = 1
    # Rank sums are multiples of a half: the slack only absorbs rounding.
    drawn = rows @ ranks.astype(np.float32)
    at_least += (drawn >= observed - 0.25).sum(0)
  p = (at_least + 1) / (permutations + 1)
  for i in np.flatnonzero(at_least == 0):
    p[i] = min(p[i], _tail(ranks[:, i], n))
  (mean_a, var_a), (mean_b, var_b) = _moments(a), _moments(b)
  spread = np.sqrt((var_a + var_b) / 2)
  with np.errstate(divide='ignore', invalid='ignore'):
    effect = np.where(mean_a == mean_b, 0.0, (mean_a - mean_b) / spread)
    share = np.where(mean_a + mean_b > 0, mean_a / (mean_a + mean_b), 0.5)
  return (observed - n * (n + 1) / 2) / (n * m), effect, share, p


def _tail(ranks, n) -> float:
  """See `contrast`; for ranks of which the first n are observed."""
  total = len(ranks)
  m = total - n
  _, group = np.unique(ranks, return_inverse=True)
  ties = np.bincount(group).astype(float)
  ours = np.bincount(group[:n], minlength=len(ties))
  above = ranks[:n].sum() - n * (total + 1) / 2 - 0.5
  variance = (
    n * m / 12 * (total + 1 - (ties**3 - ties).sum() / (total * (total - 1)))
  )
  normal = scipy.stats.norm.sf(above / np.sqrt(variance)) if variance else 1.0
  exact = np.exp(_log_choose(ties, ours).sum() - _log_choose(total, n))
  return float(max(normal, exact, np.finfo(float).tiny))


def _log_choose(n, k):
  log_factorial = lambda x: scipy.special.gammaln(np.asarray(x) + 1.0)
  return log_factorial(n) - log_factorial(k) - log_factorial(n - k)


def _moments(x):
  """Mean and variance per concept; those of a constant without rounding."""
  constant = x.min(0) == x.max(0)
  mean = np.where(constant, x[0], x.mean(0))
  return mean, np.where(constant, 0.0, x.var(0, ddof=1))


def auroc(
  a: Float[np.ndarray, 'N F'], b: Float[np.ndarray, 'M F']
) -> Float[np.ndarray, 'F']:
  """Area under the curve of each concept, ties counting half."""
  n, m = len(a), len(b)
  ranks = scipy.stats.rankdata(np.concatenate([a, b]), axis=0)
  return (ranks[:n].sum(0) - n * (n + 1) / 2) / (n * m)
