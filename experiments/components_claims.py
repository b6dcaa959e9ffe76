"""What is claimed of components: the field's claim, its controls, a score."""

from __future__ import annotations

import numpy as np

from experiments.components import SHARED_GROUP, UNUSUAL, told_apart

PAPER = 'Merullo et al. 2025, arXiv 2510.24256, section 3: not tested there'
AGAINST = f'against {SHARED_GROUP}', f'against {UNUSUAL}'


def mean_effect(analysis, name: str, against: str) -> float:
  """Cohen's d of a map, averaged over layers."""
  return float(
    np.mean([layer[name][against] for layer in analysis['effects'].values()])
  )


def rows(analyses, score: str):
  """Rows of claims, `(id, statement, samples, comparator, target, why)`.

  Effects are of memorized examples against others, d below zero where they lie
  with less curvature or participation. Medium effects are asked for.

  Args:
    analyses: of every seed, from `components.analyse`.
    score: the one that was chosen on seeds 0 and 1.
  """
  shared, unusual = AGAINST
  effect = lambda name, against: [
    mean_effect(a, name, against) for a in analyses
  ]
  matched = 'participation, at equal curvature'
  null = 'participation of the null, at equal curvature'
  beyond = [
    a - b for a, b in zip(effect(matched, shared), effect(null, shared))
  ]
  told = [told_apart(a)[score]['auroc'] for a in analyses]
  known = [t for t in told if t is not None]
  out = [
    ('low_curvature', 'gradients of memorized examples lie with less curvature '
     'than those of others, d', effect('curvature', shared), '<=', -0.5, PAPER),
    ('low_curvature_unusual', 'and than those of the same form, never '
     'memorized, d', effect('curvature', unusual), '<=', -0.5, PAPER),
    ('few_share', 'they lie with components that fewer examples share, d',
     effect('participation', shared), '<=', -0.5, PAPER),
    ('few_share_matched', 'the same at equal curvature, d',
     effect(matched, shared), '<=', -0.5, PAPER),
    ('few_share_null', 'that, beyond what shuffled examples show, d', beyond,
     '<=', -0.5, PAPER),
    ('few_share_unusual', 'the same against examples of the same form, never '
     'memorized, d', effect(matched, unusual), '<=', -0.5, PAPER),
  ]  # fmt: skip
  if len(known) >= 2:
    out.append(
      ('score', f'AUROC of {score}, of components that others need against '
       'those that memorized examples alone need', known, '>=', 0.8, PAPER)
    )  # fmt: skip
  return out
