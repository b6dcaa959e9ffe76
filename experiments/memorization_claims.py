"""What the memorization experiment chooses by, and what it claims."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments import components_claims, contract

# Seeds that operating points were chosen on; nothing is claimed of them.
CHOSEN_ON = (0, 1, 2, 3)
SCORE = 'batch curvature'  # Of components, as these chose.
# World -> the arm that is judged: what did better on these, of digits.
OURS = {
  'mlp': 'soft',
  'mnist-mlp': 'soft',
  'vit': 'kfac_soft',
  'mnist-vit': 'kfac_soft',
}
# Arm -> its name, and why it is there.
CONTROLS = {
  'kfac': ('K-FAC', 'the same bases, by K-FAC curvature'),
  'soft': ('soft batch-curvature', 'the same masks, of batch curvature'),
  'kfac_soft': ('soft K-FAC', 'the same masks, of K-FAC curvature'),
  'svd': ('SVD', 'Merullo et al. 2025: SVD equal in memorization'),
  'magnitude': ('magnitude', 'magnitude pruning'),
  'salient': ('saliency', 'LeCun et al. 1989, optimal brain damage'),
  'random': ('random-mask', 'placebo: a random choice of components'),
  'subnet': ('BalancedSubnet', 'Sakarvadia et al. 2024; told half of them'),
}


def choose(results: Mapping[str, Any], seeds, arm: str) -> tuple[int, float]:
  """The operating point of an arm, by one rule.

  Among the grid points whose held-out accuracy is, averaged over the seeds, at
  least that of the unedited network: the one with the lowest mean memorized
  accuracy. The first such point if several tie. Where there is none, the one of
  the highest held-out accuracy.
  """
  rows = list(zip(*(results[f'{seed}/{arm}'] for seed in seeds)))
  mean = lambda points, key: np.mean([p[key] for p in points])
  floor = mean([results[f'{seed}/unedited'] for seed in seeds], 'held_out')
  allowed = [points for points in rows if mean(points, 'held_out') >= floor]
  if allowed:
    best = min(allowed, key=lambda points: mean(points, 'memorized'))
  else:
    best = max(rows, key=lambda points: mean(points, 'held_out'))
  return best[0]['layer_set'], best[0]['strength']


def make_claims(config, results, seeds) -> list[contract.Claim]:
  """Judges the frozen operating point on the reported seeds."""
  base = [results[f'{s}/unedited'] for s in seeds]
  judged = OURS[config.world]
  ours = [results[f'{s}/{judged}/operating'] for s in seeds]

  def difference(arm, key='memorized'):
    """Ours minus the lowest of the arm's points that are as accurate as ours.

    Where there is none, that of leaving the network as it is.
    """
    out = []
    for s, b, r in zip(seeds, base, ours):
      good = [p for p in results[f'{s}/{arm}'] if p['test'] >= r['test']]
      out.append(r[key] - min(p[key] for p in [*good, b]))
    return out

  paper = 'Merullo et al. 2025, arXiv 2510.24256, Table 2'
  column = lambda rows, name: [r[name] for r in rows]
  lost = [b['test'] - r['test'] for b, r in zip(base, ours)]
  gained = [r['test'] - b['test'] for b, r in zip(base, ours)]
  rows = [
      ('fitted', 'memorized labels before the edit, %',
       column(base, 'memorized'), '>=', 95, f'{paper}: 81.6'),
      ('forgotten', 'memorized labels after the edit, %',
       column(ours, 'memorized'), '<=', 5, f'{paper}: 3.5'),
      ('recovered', 'noisy images given their true label after the edit, %',
       column(ours, 'recovered'), '>=', 85, f'{paper}: 66.5'),
      ('recovered_more', 'noisy images given their true label, gained by the '
       'edit, points',
       [r['recovered'] - b['recovered'] for r, b in zip(ours, base)], '>=', 0,
       f'{paper}: +56.0'),
      ('test_kept', 'test accuracy lost by the edit, points',
       lost, '<=', 2, f'{paper}: -4.7'),
      ('test_improved', 'test accuracy gained by the edit, points',
       gained, '>=', 0, f'{paper}: +4.7'),
  ]  # fmt: skip
  rows += [
      (f'below_{arm}', f'memorized labels, ours minus the best {what} grid '
       'point of at least our test accuracy, points',
       difference(arm), '<=', 0, CONTROLS[arm][1])
      for arm, (what, _) in CONTROLS.items()
      if arm in config.arms and arm != judged
  ]  # fmt: skip
  if 'subnet' in config.arms:
    rows.append(
      ('below_subnet_untold', 'of those not told to it, memorized labels, ours '
       'minus the best BalancedSubnet point of at least our test accuracy, '
       'points', difference('subnet', 'memorized_untold'), '<=', 0,
       CONTROLS['subnet'][1])
    )  # fmt: skip
  if config.components.per_layer:
    analyses = [results[f'{s}/components'] for s in seeds]
    rows += components_claims.rows(analyses, SCORE)
  return [
      contract.claim(
          f'{config.world}_{id_}', f'{config.world}: {text}', samples,
          comparator, target, seeds=seeds, reference=reference,
      )
      for id_, text, samples, comparator, target, reference in rows
  ]  # fmt: skip
