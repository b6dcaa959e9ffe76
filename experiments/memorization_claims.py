"""What the memorization experiment chooses by, and what it claims."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments import contract

# Seeds that operating points were chosen on; nothing is claimed of them.
CHOSEN_ON = (0, 1)


def choose(results: Mapping[str, Any], seeds, arm: str) -> tuple[int, float]:
  """The operating point of an arm, by one rule.

  Among the grid points whose held-out accuracy is, on each of the seeds, at
  least that of the unedited network minus 2 points: the one with the lowest
  mean memorized accuracy. The first such point if several tie.
  """
  rows = [results[f'{seed}/{arm}'] for seed in seeds]
  floors = [results[f'{seed}/unedited']['held_out'] - 2 for seed in seeds]
  allowed = [
    points
    for points in zip(*rows)
    if all(p['held_out'] >= floor for p, floor in zip(points, floors))
  ]
  if not allowed:
    raise ValueError(
      f'No grid point of {arm!r} keeps the held-out accuracy; extend '
      f'config.strengths.{arm} towards keeping more.'
    )
  best = min(allowed, key=lambda ps: np.mean([p['memorized'] for p in ps]))
  return best[0]['layer_set'], best[0]['strength']


def make_claims(config, results, seeds) -> list[contract.Claim]:
  """Judges the frozen operating point on the reported seeds."""
  base = [results[f'{s}/unedited'] for s in seeds]
  ours = [results[f'{s}/kfac/operating'] for s in seeds]

  def best_of(arm, seed, row):
    """Lowest memorized accuracy among points as accurate as ours.

    Where there is none, it is that of leaving the network as it is.
    """
    points = results[f'{seed}/{arm}']
    good = [p['memorized'] for p in points if p['test'] >= row['test']]
    return min([*good, results[f'{seed}/unedited']['memorized']])

  def difference(arm):
    return [r['memorized'] - best_of(arm, s, r) for s, r in zip(seeds, ours)]

  paper = 'Merullo et al. 2025, arXiv 2510.24256, Table 2'
  column = lambda rows, name: [r[name] for r in rows]
  lost = [b['test'] - r['test'] for b, r in zip(base, ours)]
  gained = [r['test'] - b['test'] for b, r in zip(base, ours)]
  rows = [
      ('fitted', 'memorized labels before the edit, %',
       column(base, 'memorized'), '>=', 95, f'{paper}: 81.6'),
      ('forgotten', 'memorized labels after the edit, %',
       column(ours, 'memorized'), '<=', 10, f'{paper}: 3.5'),
      ('recovered', 'noisy images given their true label after the edit, %',
       column(ours, 'recovered'), '>=', 80, f'{paper}: 66.5'),
      ('test_kept', 'test accuracy lost by the edit, points',
       lost, '<=', 3, f'{paper}: -4.7'),
      ('below_svd', 'memorized labels, ours minus the best SVD grid point of '
       'at least our test accuracy, points',
       difference('svd'), '<=', 0, f'{paper}: SVD equal in memorization'),
      ('below_random', 'memorized labels, ours minus the best random-mask grid '
       'point of at least our test accuracy, points',
       difference('random'), '<=', 0, 'placebo: a random choice of components'),
      ('test_improved', 'test accuracy gained by the edit, points',
       gained, '>=', 0, f'{paper}: +4.7'),
  ]  # fmt: skip
  return [
      contract.claim(
          f'{config.world}_{id_}', f'{config.world}: {text}', samples,
          comparator, target, seeds=seeds, reference=reference,
      )
      for id_, text, samples, comparator, target, reference in rows
  ]  # fmt: skip
