"""Whether a probability means what it says."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Bool, Float
import numpy as np
import sklearn.metrics


class Reliability(NamedTuple):
  """Of equally wide bins of the score, from 0 to 1.

  Attributes:
    score: mean score in each bin, NaN where there is none, `[K]`.
    rate: share of positives in each bin, likewise.
    count: how many scores are in each bin.
  """

  score: np.ndarray
  rate: np.ndarray
  count: np.ndarray

  @property
  def error(self) -> float:
    """Expected calibration error, `sum_k n_k |score_k - rate_k| / n`.

    Naeini et al. 2015. A small sample has an error of its own: of a perfectly
    calibrated score it is about `sum_k sqrt(n_k rate_k (1 - rate_k)) / n`.
    """
    there = self.count > 0
    gap = np.abs(self.score - self.rate)[there] * self.count[there]
    return float(gap.sum() / self.count.sum())


class ProbeQuality(NamedTuple):
  """How good a probe is on examples it was not fitted on.

  Attributes:
    auroc: probability that a random positive scores above a random negative.
    ece: expected calibration error, in ten bins.
    positives: number of positive examples.
    negatives: and of others.
    entities: number of entities that the examples are of, none of which the
      probe was fitted on.
  """

  auroc: float
  ece: float
  positives: int
  negatives: int
  entities: int


def reliability(
  scores: Float[np.ndarray, 'N'], labels: Bool[np.ndarray, 'N'], bins: int = 10
) -> Reliability:
  """Bins scores in [0, 1] and counts what came true in each.

  Raises:
    ValueError: for scores outside of [0, 1], or of another number than labels.
  """
  scores, labels = _checked(scores, labels)
  if scores.min() < 0 or scores.max() > 1:
    raise ValueError(
      f'scores from {scores.min():g} to {scores.max():g}: probabilities are '
      'needed, such as the sigmoid of a logit.'
    )
  index = np.minimum((scores * bins).astype(int), bins - 1)
  count = np.bincount(index, minlength=bins)
  mean = lambda x: np.divide(
    np.bincount(index, weights=x, minlength=bins), count,
    out=np.full(bins, np.nan), where=count > 0,
  )  # fmt: skip
  return Reliability(mean(scores), mean(labels.astype(float)), count)


def quality(scores, labels, entities) -> ProbeQuality:
  """Of probabilities on examples of entities that the probe has not seen.

  Args:
    scores: probabilities, `[N]`.
    labels: what is true, `[N]`.
    entities: which entity each example is of, `[N]`.

  Raises:
    ValueError: if all labels are the same, or as `reliability`.
  """
  scores, labels = _checked(scores, labels)
  if labels.all() or not labels.any():
    raise ValueError(
      f'all {len(labels)} labels are {bool(labels[0])}: nothing can be said '
      'about telling two classes apart. Sample more, or from other entities.'
    )
  if np.shape(entities) != labels.shape:
    raise ValueError(f'{np.shape(entities)} entities, {labels.shape} labels.')
  return ProbeQuality(
    float(sklearn.metrics.roc_auc_score(labels, scores)),
    reliability(scores, labels).error,
    int(labels.sum()),
    int((~labels).sum()),
    len(np.unique(entities)),
  )


def threshold_at(
  scores: Float[np.ndarray, 'N'],
  labels: Bool[np.ndarray, 'N'],
  false_positive_rate: float,
) -> float:
  """The lowest threshold at which few enough negatives are flagged.

  Flagged is `score >= threshold`. Infinity if no threshold among the scores is
  high enough.

  Args:
    scores: any numbers.
    labels: which are positives; at least one is not.
    false_positive_rate: share of the negatives that may be flagged.
  """
  scores, labels = _checked(scores, labels)
  if labels.all():
    raise ValueError('no negative example: their rate cannot be bounded.')
  if not 0 <= false_positive_rate < 1:
    raise ValueError(
      f'false_positive_rate={false_positive_rate} must be in [0, 1).'
    )
  negatives = np.sort(scores[~labels])
  candidates = np.unique(scores)
  flagged = len(negatives) - np.searchsorted(negatives, candidates, 'left')
  enough = candidates[flagged <= false_positive_rate * len(negatives)]
  return float(enough[0]) if len(enough) else float('inf')


def _checked(scores, labels) -> tuple[np.ndarray, np.ndarray]:
  scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
  if scores.ndim != 1 or scores.shape != labels.shape or not len(scores):
    raise ValueError(
      f'scores {scores.shape} and labels {labels.shape} must be [N], N > 0.'
    )
  if not np.isfinite(scores).all():
    raise ValueError('a score is not finite.')
  if not np.isin(labels, (0, 1)).all():
    raise ValueError(f'labels must be true or false, got {np.unique(labels)}.')
  return scores, labels.astype(bool)
