"""Figures of the memorization experiment, from `results.json` alone."""

from __future__ import annotations

import json
import pathlib

import matplotlib.pyplot as plt
import numpy as np

from experiments import components_figures
from experiments.contract.claims import interval
from experiments.contract.figures import save_figures
from experiments.memorization_claims import OURS

LABELS = {
  'soft': 'batch curvature, soft',
  'batch': 'batch curvature',
  'kfac_soft': 'K-FAC, soft',
  'kfac': 'K-FAC, normalized',
  'kfac_t1': 'K-FAC, published recipe',
  'kfac_t10': 'K-FAC, temperature 10',
  'kfac_gold': 'K-FAC, gold labels',
  'svd': 'SVD rank truncation',
  'magnitude': 'magnitude',
  'salient': 'saliency (OBD)',
  'subnet': 'BalancedSubnet, told half',
  'random': 'random components',
}
COLORS = {
    'soft': '#0072B2', 'batch': '#0072B2', 'kfac_soft': '#332288',
    'magnitude': '#E69F00', 'salient': '#882255',
    'subnet': '#000000', 'kfac': '#332288', 'kfac_t1': '#56B4E9',
    'kfac_t10': '#009E73', 'kfac_gold': '#CC79A7', 'svd': '#D55E00',
    'random': '#7F7F7F',
}  # fmt: skip
# Their bands are drawn, and those of the arm that is judged.
MAIN = ('random', 'svd')
# Dashed, some in the color of what they vary.
VARIANTS = ('batch', 'kfac_soft', 'kfac_t1', 'kfac_t10', 'kfac_gold')
HATCHED = ('batch', 'kfac_soft')  # Bars in the color of another arm.


def draw(workdir: pathlib.Path) -> None:
  """Draws every figure of a run."""
  results = json.loads((workdir / 'results.json').read_text('utf-8'))
  config = json.loads((workdir / 'config.json').read_text('utf-8'))
  seeds = range(config['seed'], config['seed'] + config['num_seeds'])
  figures = {
    'tradeoff': lambda: _tradeoff(results, config, seeds),
    'spectrum': lambda: _spectrum(results, config, seeds),
    'before_after': lambda: _bars(results, config, seeds),
  }
  if config['components']['per_layer']:
    analyses = [results[f'{s}/components'] for s in seeds]
    figures |= components_figures.figures(analyses)
  save_figures(workdir, figures)


def _lowest(points, base, floor: float) -> float:
  """Lowest memorized accuracy at a loss of test accuracy up to `floor`."""
  kept = [p['memorized'] for p in points if base['test'] - p['test'] <= floor]
  return min([base['memorized'], *kept])


def _tradeoff(results, config, seeds):
  """Per method, the best memorization reachable at each loss of accuracy."""
  figure, axis = plt.subplots(figsize=(4.6, 3.9))
  banded = (*MAIN, OURS[config['world']])
  losses = np.linspace(-2, 12, 113)
  for arm in config['arms']:
    curves = np.array([
        [_lowest(results[f'{s}/{arm}'], results[f'{s}/unedited'], f)
         for f in losses]
        for s in seeds
    ])  # fmt: skip
    mean = curves.mean(0)
    low, high = np.array([interval(c) for c in curves.T]).T
    main = arm in banded
    style = dict(lw=1.8) if main else dict(lw=1)
    if arm in VARIANTS and not main:
      style['ls'] = (0, (4, 1.5))
    label = f'{LABELS[arm]} (ours)' if arm == banded[-1] else LABELS[arm]
    axis.plot(losses, mean, color=COLORS[arm], label=label, **style)
    if main:  # Bands of all of them would hide one another.
      axis.fill_between(losses, low, high, color=COLORS[arm], alpha=0.2, lw=0)
  for arm in banded:
    rows = [results[f'{s}/{arm}/operating'] for s in seeds]
    lost = [results[f'{s}/unedited']['test'] - r['test']
            for s, r in zip(seeds, rows)]  # fmt: skip
    axis.plot(
        np.mean(lost), np.mean([r['memorized'] for r in rows]), '*', ms=11,
        color=COLORS[arm], mec='black', mew=0.6,
    )  # fmt: skip
  axis.plot([], [], '*', color='white', mec='black', label='operating point')
  axis.set(
      xlabel='test accuracy lost (points)', ylabel='memorized labels (%)',
      xlim=(losses[0], losses[-1]), ylim=(0, 102),
  )  # fmt: skip
  axis.axvline(0, color='black', lw=0.5, ls=':')
  figure.legend(fontsize=7.5, loc='outside upper center', ncols=2)
  return figure


def _spectrum(results, config, seeds):
  """Cumulative mass over components in descending order of curvature."""
  profiles = [results[f'{s}/profile'] for s in seeds]
  figure, (left, right) = plt.subplots(
    1, 2, figsize=(7.2, 3.2), gridspec_kw={'width_ratios': (1, 1.35)}
  )
  share = 100 * np.array(profiles[0]['share'])
  curves = np.array([p['relative_curvature'] for p in profiles])
  left.loglog(share, curves.T, color='black', lw=0.6, alpha=0.7)
  left.set(
      xlabel='component, by curvature (% of all)',
      ylabel='curvature / largest', ylim=(1e-12, 2),
  )  # fmt: skip
  styles = {
    'curvature': ('black', '-'),
    'clean, trained on': ('#0072B2', '-'),
    'noisy, memorized': ('#D55E00', '-'),
    'held out, true label': ('#0072B2', '--'),
    'held out, wrong label': ('#D55E00', '--'),
  }
  for name, (color, style) in styles.items():
    lines = 100 * np.array([p['lines'][name] for p in profiles])
    label = 'curvature' if name == 'curvature' else f'gradients: {name}'
    right.plot(share, lines.mean(0), color=color, ls=style, label=label)
    right.fill_between(
      share, lines.min(0), lines.max(0), color=color, alpha=0.12, lw=0
    )
  ours = OURS[config['world']]
  kept = [100 - results[f'{s}/{ours}/operating']['removed'] for s in seeds]
  for axis in (left, right):
    axis.axvline(np.mean(kept), color='black', lw=0.7, ls=':')
  right.annotate(
      'kept', (np.mean(kept), 101), xytext=(-3, 0), ha='right',
      textcoords='offset points', fontsize=7.5, annotation_clip=False,
  )  # fmt: skip
  right.set(
      xscale='log', xlabel='components kept (% of all)',
      ylabel='share of mass kept (%)', ylim=(0, 105),
  )  # fmt: skip
  right.legend(fontsize=7)
  figure.suptitle(f'Weight {profiles[0]["path"]}', fontsize=9)
  return figure


def _bars(results, config, seeds):
  """The unedited network and every method at its operating point."""
  metrics = {
      'memorized': 'memorized\nlabels', 'recovered': 'true labels\nrecovered',
      'clean': 'clean\ntraining', 'test': 'test',
  }  # fmt: skip
  groups = [('unedited', 'unedited', '#C8C8C8')]
  groups += [
    (f'{a}/operating', LABELS[a], COLORS[a])
    for a in config['arms']
    if a != 'random'
  ]
  groups.append(
    ('random/equal', 'as large a share, random', COLORS['random'])
  )
  figure, axis = plt.subplots(figsize=(6.2, 3.2))
  width = 0.8 / len(groups)
  for i, (key, label, color) in enumerate(groups):
    hatch = '/////' if key.split('/')[0] in HATCHED else None
    rows = [results[f'{s}/{key}'] for s in seeds]
    x = np.arange(len(metrics)) + (i - (len(groups) - 1) / 2) * width
    values = [[r[m] for r in rows] for m in metrics]
    means = [np.mean(v) for v in values]
    bounds = np.array([interval(v) for v in values]).T
    axis.bar(
      x, means, width * 0.92, color=color, label=label, hatch=hatch,
      edgecolor='white', lw=0,
    )  # fmt: skip
    axis.errorbar(
      x, means, np.abs(bounds - means), fmt='none', ecolor='#444444', lw=0.9
    )
  axis.set(
      xticks=np.arange(len(metrics)), xticklabels=list(metrics.values()),
      ylabel='%', ylim=(0, 103),
  )  # fmt: skip
  figure.legend(fontsize=7.5, loc='outside upper center', ncols=3)
  return figure
