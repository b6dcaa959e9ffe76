"""Figures of an edited pretrained model, from `results.json` alone."""

from __future__ import annotations

import json
import pathlib

import matplotlib.pyplot as plt
import numpy as np

from experiments.contract.figures import save_figures
from experiments.recitation_pretrained_claims import best, each, mean_perplexity

COLORS = {'kfac': '#0072B2', 'svd': '#D55E00', 'random': '#7F7F7F'}
LABELS = {'kfac': 'K-FAC (ours)', 'svd': 'SVD', 'random': 'random components'}


def draw(workdir: pathlib.Path) -> None:
  """Draws every figure of a run."""
  results = json.loads((workdir / 'results.json').read_text('utf-8'))
  config = json.loads((workdir / 'config.json').read_text('utf-8'))
  save_figures(
    workdir,
    {
      'tradeoff': lambda: _tradeoff(results),
      'recitation': lambda: _recitation(results, config),
    },
  )


def _tradeoff(results):
  """Recitation against perplexity, of every arm."""
  figure, axis = plt.subplots(figsize=(4.6, 3.6))
  base = mean_perplexity(results['unedited'])
  for kind, color in COLORS.items():
    rows = [v for k, v in results.items() if k.startswith(f'{kind}/')]
    points = sorted(
      (mean_perplexity(r) / base, 100 * np.mean(each(r))) for r in rows
    )
    if points:
      axis.plot(*zip(*points), 'o-', ms=4, color=color, label=LABELS[kind])
  axis.plot(1, 100, 'k*', ms=9, label='unedited')
  axis.set(
    xscale='log', xlabel='perplexity, over that before',
    ylabel='passages recited (%)', ylim=(-3, 105),
  )  # fmt: skip
  figure.legend(fontsize=7.5, loc='outside upper center', ncols=3)
  return figure


def _recitation(results, config):
  """Strict and milder measures, before and after, by file of passages."""
  limit = config['perplexity_limit'] * mean_perplexity(results['unedited'])
  rows = {'unedited': results['unedited'], 'kfac': best(results, 'kfac', limit)}
  kinds = ('strict', 'free', 'loose', 'tokens')
  files = list(results['unedited']['recitation'])
  figure, axes = plt.subplots(
    1, len(files), figsize=(3.2 * len(files) + 0.6, 2.9), squeeze=False
  )
  for axis, file in zip(axes[0], files):
    for i, (arm, color) in enumerate(
      (('unedited', 'black'), ('kfac', COLORS['kfac']))
    ):
      row = rows[arm]['recitation'][file]
      x = np.arange(len(kinds)) + (i - 0.5) * 0.4
      axis.bar(x, [row[k] for k in kinds], 0.37, color=color, label=arm)
    axis.set(
      xticks=range(len(kinds)), xticklabels=kinds, ylim=(0, 105), title=file,
      ylabel='%',
    )  # fmt: skip
  figure.legend(
    *axes[0][0].get_legend_handles_labels(), fontsize=7.5,
    loc='outside upper center', ncols=2,
  )  # fmt: skip
  return figure
