"""Figures of components, from `results.json` alone."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np

from experiments.components import SHARED_GROUP, UNUSUAL, told_apart
from experiments.components_claims import mean_effect
from experiments.contract.claims import interval

MAPS = {
  'curvature': 'curvature',
  'participation': 'participation',
  'participation, at equal curvature': 'participation,\nequal curvature',
  'participation of the null, at equal curvature': 'the same,\nshuffled',
}


def effects(analyses):
  """d of memorized examples against both other groups, by map."""
  figure, axis = plt.subplots(figsize=(5.6, 3.2))
  groups = ((SHARED_GROUP, '#0072B2'), (UNUSUAL, '#D55E00'))
  for i, (group, color) in enumerate(groups):
    values = [
      [mean_effect(a, name, f'against {group}') for a in analyses]
      for name in MAPS
    ]
    means = np.array([np.mean(v) for v in values])
    bounds = np.array([interval(v) for v in values]).T
    x = np.arange(len(MAPS)) + (i - 0.5) * 0.38
    axis.bar(x, means, 0.35, color=color, label=f'against {group}')
    axis.errorbar(
      x, means, np.abs(bounds - means), fmt='none', ecolor='#444444', lw=0.9
    )
  axis.axhline(0, color='black', lw=0.6)
  axis.axhline(-0.5, color='black', lw=0.6, ls=':')
  axis.set(
    xticks=np.arange(len(MAPS)), xticklabels=list(MAPS.values()),
    ylabel="memorized examples, Cohen's d",
  )  # fmt: skip
  figure.legend(fontsize=7.5, loc='outside upper center', ncols=2)
  return figure


def participation(analyses):
  """How many examples share a component, with the shuffled null."""
  layers = list(analyses[0]['histogram'])
  figure, axes = plt.subplots(
    1, len(layers), figsize=(2.3 * len(layers) + 0.6, 2.6), sharey=True,
    squeeze=False,
  )  # fmt: skip
  for axis, layer in zip(axes[0], layers):
    edges = np.array(analyses[0]['histogram'][layer]['edges'])
    for key, label, color in (
      ('real', 'examples as they are', '#0072B2'),
      ('null', 'shuffled', '#7F7F7F'),
    ):
      mean = np.mean([a['histogram'][layer][key] for a in analyses], axis=0)
      axis.stairs(100 * mean, edges, color=color, label=label, lw=1.4)
    axis.set(xscale='log', title=_short(layer), xlabel='participation')
    axis.title.set_fontsize(8)
  axes[0][0].set_ylabel('components (%)')
  figure.legend(
    *axes[0][0].get_legend_handles_labels(), fontsize=7.5,
    loc='outside upper center', ncols=2,
  )  # fmt: skip
  return figure


def scores(analyses):
  """AUROC of every score, of all pairs and of those of like curvature."""
  judged = [told_apart(a) for a in analyses]
  names = [k for k in judged[0] if k not in ('memorization', 'shared')]
  figure, axis = plt.subplots(figsize=(6.4, 3.2))
  for i, (key, color) in enumerate(
    (('auroc', '#0072B2'), ('at equal curvature', '#E69F00'))
  ):
    for k, name in enumerate(names):
      values = [a[name][key] for a in judged]
      values = [v for v in values if v is not None]
      x = k + (i - 0.5) * 0.3
      if len(values) >= 2:
        low, high = interval(values)
        axis.plot([x, x], [low, high], color=color, lw=1.5)
      axis.plot([x] * len(values), values, '.', color=color, alpha=0.5, ms=5)
      if values:
        axis.plot(x, np.mean(values), 'o', color=color, ms=5)
    axis.plot([], [], 'o', color=color, label=_PAIRS[key])
  for level in (0.5, 0.8):
    axis.axhline(level, color='black', lw=0.6, ls=':')
  axis.set(
    xticks=range(len(names)), xticklabels=[n.replace(' ', '\n') for n in names],
    ylabel='AUROC, shared above memorization', ylim=(0, 1.02),
  )  # fmt: skip
  figure.legend(fontsize=7.5, loc='outside upper center', ncols=2)
  return figure


_PAIRS = {'auroc': 'all pairs', 'at equal curvature': 'pairs of like curvature'}


def _short(layer: str) -> str:
  return layer.replace('blocks/mlp/', '').replace('/kernel', '')


def figures(analyses):
  """Name -> drawing."""
  return {
    'effects': lambda: effects(analyses),
    'participation': lambda: participation(analyses),
    'scores': lambda: scores(analyses),
  }
