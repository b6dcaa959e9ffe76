"""Figures of decay, from `results.json` alone."""

from __future__ import annotations

import json
import pathlib

import matplotlib.pyplot as plt
import numpy as np

from experiments.contract.figures import save_figures
from experiments.memorization_decay_claims import rows_of

COLORS = {
  'plain': '#7F7F7F', 'kfac': '#332288', 'batch': '#0072B2', 'added': '#009E73'
}  # fmt: skip
LABELS = {
  'plain': 'weight decay',
  'kfac': 'sparing K-FAC curvature',
  'batch': 'sparing batch curvature',
  'added': 'plain, and more of what has little batch curvature',
}


def draw(workdir: pathlib.Path) -> None:
  """Draws every figure of a run."""
  results = json.loads((workdir / 'results.json').read_text('utf-8'))
  config = json.loads((workdir / 'config.json').read_text('utf-8'))
  seeds = range(config['seed'], config['seed'] + config['num_seeds'])
  save_figures(workdir, {'frontier': lambda: _frontier(results, config, seeds)})


def _frontier(results, config, seeds):
  """Memorized labels against the loss on test images, by strength."""
  figure, axis = plt.subplots(figsize=(4.8, 3.7))
  for arm, color in COLORS.items():
    curves = np.array(
      [
        [
          (r['test_loss'], r['memorized'])
          for r in rows_of(results, s, arm, config['strengths'][arm])
        ]
        for s in seeds
      ]
    )
    for curve in curves:
      axis.plot(*curve.T, color=color, lw=0.6, alpha=0.4)
    axis.plot(*curves.mean(0).T, 'o-', ms=4, color=color, label=LABELS[arm])
  axis.set(
    xlabel='loss on test images (nats)', ylabel='memorized labels (%)',
    ylim=(-2, 103),
  )  # fmt: skip
  figure.legend(fontsize=7.5, loc='outside upper center')
  return figure
