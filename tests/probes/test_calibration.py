"""Reliability, quality and thresholds, counted by hand."""

import numpy as np
import pytest

from idesign import probes

SCORES = np.array([0.05, 0.05, 0.55, 0.55, 0.55, 0.55, 1.0])
LABELS = np.array([0, 1, 1, 1, 0, 1, 1])


def test_bins():
  got = probes.reliability(SCORES, LABELS)
  assert got.count.tolist() == [2, 0, 0, 0, 0, 4, 0, 0, 0, 1]
  np.testing.assert_allclose(got.score[[0, 5, 9]], [0.05, 0.55, 1.0])
  np.testing.assert_allclose(got.rate[[0, 5, 9]], [0.5, 0.75, 1.0])
  assert np.isnan(got.score[1])
  want = (2 * 0.45 + 4 * 0.2 + 0) / 7
  np.testing.assert_allclose(got.error, want)


def test_quality():
  got = probes.quality(SCORES, LABELS, np.array([1, 1, 2, 2, 3, 3, 3]))
  # Pairs won by positives: 2 negatives at .05 and .55.
  wins = (0.5 + 4) + (0 + 3 * 0.5 + 1)
  np.testing.assert_allclose(got.auroc, wins / 10)
  assert (got.positives, got.negatives, got.entities) == (5, 2, 3)


@pytest.mark.parametrize('rate', [0.0, 0.1, 0.25, 0.5])
def test_threshold(rate):
  random = np.random.default_rng(0)
  scores, labels = random.random(200), random.random(200) < 0.4
  t = probes.threshold_at(scores, labels, rate)
  share = lambda t: np.mean(scores[~labels] >= t)
  assert share(t) <= rate
  lower = scores[scores < t]
  assert not len(lower) or share(lower.max()) > rate


def test_threshold_by_hand():
  """One of four negatives may be flagged, and is: .4."""
  scores = np.array([0.1, 0.2, 0.3, 0.35, 0.4, 0.9])
  labels = np.array([0, 0, 0, 1, 0, 1])
  assert probes.threshold_at(scores, labels, 0.25) == 0.35
  assert probes.threshold_at(scores, labels, 0.24) == 0.9


def test_no_threshold_is_high_enough():
  got = probes.threshold_at(np.array([1.0, 1.0]), np.array([0, 1]), 0.0)
  assert got == np.inf


@pytest.mark.parametrize(
  'call,message',
  [
    (lambda: probes.quality(SCORES, 0 * LABELS, LABELS), 'all 7 labels'),
    (lambda: probes.quality(SCORES, LABELS, LABELS[:3]), 'entities'),
    (lambda: probes.reliability(3 * SCORES, LABELS), 'to 3'),
    (lambda: probes.reliability(SCORES[:3], LABELS), r'\(3,\)'),
    (lambda: probes.reliability(SCORES, LABELS + 1), 'true or false'),
    (lambda: probes.reliability(SCORES * np.nan, LABELS), 'not finite'),
    (lambda: probes.threshold_at(SCORES, 0 * LABELS + 1, 0.1), 'no negative'),
    (lambda: probes.threshold_at(SCORES, LABELS, 1.0), 'rate=1'),
  ],
)
def test_bad_data(call, message):
  with pytest.raises(ValueError, match=message):
    call()
