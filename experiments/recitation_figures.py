"""Figures of the recitation experiment, from `results.json` alone."""

from __future__ import annotations

import json
import pathlib

import matplotlib.pyplot as plt
import numpy as np

from experiments import components_figures
from experiments.contract.claims import interval
from experiments.contract.figures import save_figures
from experiments.recitation_claims import KEPT
from experiments.recitation_measure import FACTS, RULES, kept_share

LABELS = {
  'kfac': 'K-FAC, normalized, without what is memorized (ours)',
  'kfac_mix': 'K-FAC, normalized, of everything',
  'kfac_t1': 'K-FAC, published recipe',
  'ekfac': 'EK-FAC',
  'measured': 'measured curvature, gold labels',
  'svd': 'SVD rank truncation',
  'magnitude': 'magnitude',
  'salient': 'saliency (OBD)',
  'random': 'random components',
  'subnet': 'BalancedSubnet, told half',
}
COLORS = {
  'kfac': '#0072B2', 'kfac_mix': '#56B4E9', 'kfac_t1': '#009E73',
  'ekfac': '#332288', 'measured': '#CC79A7', 'svd': '#D55E00',
  'magnitude': '#E69F00', 'salient': '#882255', 'random': '#7F7F7F',
  'subnet': '#000000',
}  # fmt: skip
VARIANTS = ('kfac_mix', 'kfac_t1', 'ekfac', 'measured')
KINDS = {
  'copy': 'copy', 'reverse': 'reverse', 'increment': 'increment',
  'sort': 'sort', 'book': 'open\nbook', 'frequent facts': 'frequent\nfacts',
  'rare facts': 'rare\nfacts', 'sums': 'sums',
}  # fmt: skip


def draw(workdir: pathlib.Path) -> None:
  """Draws every figure of a run."""
  results = json.loads((workdir / 'results.json').read_text('utf-8'))
  config = json.loads((workdir / 'config.json').read_text('utf-8'))
  seeds = range(config['seed'], config['seed'] + config['num_seeds'])
  figures = {
    'frontier': _frontier,
    'retention': _retention,
    'order': _order,
    'recitation': _recitation,
  }
  if config['leave_out']:
    figures['left_out'] = _left_out
  drawings = {
    name: lambda figure=figure: figure(results, config, seeds)
    for name, figure in figures.items()
  }
  if config['components']['per_layer']:
    analyses = [results[f'{s}/components'] for s in seeds]
    drawings |= components_figures.figures(analyses)
  save_figures(workdir, drawings)


def _line(axis, x, curves, **style):
  """The mean over seeds, with its interval as a band."""
  curves = np.asarray(curves, float)
  axis.plot(x, curves.mean(0), **style)
  low, high = np.array([interval(c) for c in curves.T]).T
  axis.fill_between(x, low, high, color=style['color'], alpha=0.15, lw=0)


def _frontier(results, config, seeds):
  """Least recitation at which the worst task still keeps a share.

  At the left all 12 tokens, of every method; at the right the first five, where
  the methods that work are told apart.
  """
  figure, axes = plt.subplots(
    1, 2, figsize=(8.2, 4.0), gridspec_kw={'width_ratios': (1.25, 1)}
  )
  for axis, key, least in zip(axes, ('recited', 'five'), (60, 94)):
    floors = np.linspace(least, 100, 121)
    for arm in config['arms']:

      def lowest(seed, floor, arm=arm, key=key):
        points = results[f'{seed}/{arm}']
        good = [p[key] for p in points if p['worst'] >= floor]
        return min([results[f'{seed}/unedited'][key], *good])

      curves = [[lowest(s, f) for f in floors] for s in seeds]
      variant = arm in VARIANTS
      style = {'lw': 1, 'ls': (0, (4, 1.5))} if variant else {'lw': 1.8}
      style |= {'zorder': 3} if arm == 'kfac' else {}
      _line(axis, floors, curves, color=COLORS[arm], label=LABELS[arm], **style)
    rows = [results[f'{s}/kfac/operating'] for s in seeds]
    axis.plot(
      np.mean([r['worst'] for r in rows]), np.mean([r[key] for r in rows]),
      '*', ms=12, color=COLORS['kfac'], mec='black', mew=0.6, zorder=4,
    )  # fmt: skip
    axis.axvline(KEPT, color='black', lw=0.5, ls=':')
    axis.set(xlim=(least, 100.2), ylim=(-2, 102))
  axes[0].set_ylabel('sequences recited (%)')
  axes[1].set_ylabel('first five tokens recited (%)')
  figure.supxlabel(
    'the worst rule task or open book keeps (% of its own accuracy)', fontsize=9
  )
  figure.legend(
    *axes[0].get_legend_handles_labels(), fontsize=7.5,
    loc='outside upper center', ncols=3,
  )  # fmt: skip
  return figure


def _bars(axis, groups, kinds, base):
  """Groups of `(rows, label, color)`; each kind in percent of its own."""
  width = 0.8 / len(groups)
  for i, (rows, label, color) in enumerate(groups):
    x = np.arange(len(kinds)) + (i - (len(groups) - 1) / 2) * width
    values = [
      [kept_share(r, b, [k]) for r, b in zip(rows, base)] for k in kinds
    ]
    means = np.array([np.mean(v) for v in values])
    bounds = np.array([interval(v) for v in values]).T
    axis.bar(x, means, width * 0.92, color=color, label=label)
    axis.errorbar(
      x, means, np.abs(bounds - means), fmt='none', ecolor='#444444', lw=0.8
    )
  axis.set(
    xticks=np.arange(len(kinds)), xticklabels=list(kinds.values()),
    ylabel='% of its own accuracy', ylim=(0, 108),
  )  # fmt: skip
  axis.axhline(100, color='black', lw=0.5, ls=':')


def _retention(results, config, seeds):
  """What every kind keeps, of each method at its operating point."""
  figure, axis = plt.subplots(figsize=(8.4, 3.4))
  base = [results[f'{s}/unedited'] for s in seeds]
  arms = [a for a in config['arms'] if a not in VARIANTS]
  groups = [
    ([results[f'{s}/{a}/operating'] for s in seeds], LABELS[a], COLORS[a])
    for a in arms
  ]
  _bars(axis, groups, {'recited': 'recited', **KINDS}, base)
  figure.legend(fontsize=7.5, loc='outside upper center', ncols=3)
  return figure


def _order(results, config, seeds):
  """What is lost first as less and less is kept."""
  figure, axis = plt.subplots(figsize=(5.6, 3.8))
  kinds = {
    'recitation': (('recited',), '#D55E00'),
    'rare facts': (('rare facts',), '#CC79A7'),
    'frequent facts': (('frequent facts',), '#E69F00'),
    'sums': (('sums',), '#7F7F7F'),
    'rules, mean': (RULES, '#0072B2'),
    'open book': (('book',), '#009E73'),
  }
  shares = [p['strength'] for p in results[f'{seeds[0]}/order']]
  for label, (names, color) in kinds.items():

    def left(seed, names=names):
      base, points = results[f'{seed}/unedited'], results[f'{seed}/order']
      return [kept_share(p, base, names) for p in points]

    _line(
      axis, 100 * np.array(shares), [left(s) for s in seeds], color=color,
      label=label, marker='.',
    )  # fmt: skip
  axis.set(
    xscale='log', xlabel='components kept, by curvature (%)',
    ylabel='% of its own accuracy', ylim=(-2, 108),
  )  # fmt: skip
  ticks = (100, 50, 20, 10, 5, 2)
  axis.set_xticks(ticks, labels=[str(x) for x in ticks])
  axis.minorticks_off()
  axis.invert_xaxis()
  figure.legend(fontsize=7.5, loc='outside upper center', ncols=3)
  return figure


def _recitation(results, config, seeds):
  """Strict recitation and milder measures; and how fast it comes back."""
  figure, (left, right) = plt.subplots(1, 2, figsize=(8.2, 3.4))
  kinds = {
    'recited': 'all 12\ntokens', 'free': 'the same,\nfree-running',
    'five': 'first 5', 'tokens': 'single\ntokens',
  }  # fmt: skip
  base = [results[f'{s}/unedited'] for s in seeds]
  arms = [a for a in config['arms'] if a not in VARIANTS]
  groups = [
    ([results[f'{s}/{a}/operating'] for s in seeds], LABELS[a], COLORS[a])
    for a in arms
  ]
  _bars(left, groups, kinds, base)
  every = config['relearning']['every']
  for kind, color in (('recited before', '#D55E00'), ('never seen', '#7F7F7F')):
    curves = [results[f'{s}/relearning'][kind] for s in seeds]
    x = every * np.arange(len(curves[0]))
    _line(right, x, curves, color=color, label=f'sequences {kind}')
  right.set(
    xlabel='steps of learning again', ylabel='recited (%)', ylim=(-2, 102)
  )
  right.legend(fontsize=7.5, loc='center right')
  figure.legend(
    *left.get_legend_handles_labels(), fontsize=7.5,
    loc='outside upper center', ncols=3,
  )  # fmt: skip
  return figure


def _left_out(results, config, seeds):
  """What a task keeps if factors see it, and if they do not."""
  figure, axis = plt.subplots(figsize=(6.6, 3.2))
  parts = {t: (t,) for t in (*RULES, 'book', 'sums')} | {'facts': FACTS}
  width = 0.4
  for i, (label, color) in enumerate(
    (('seen by the factors', '#0072B2'), ('left out', '#D55E00'))
  ):
    values = []
    for task, names in parts.items():
      key = f'without/{task}' if i else 'kfac/operating'
      values.append(
        [
          kept_share(results[f'{s}/{key}'], results[f'{s}/unedited'], names)
          for s in seeds
        ]
      )
    means = np.array([np.mean(v) for v in values])
    bounds = np.array([interval(v) for v in values]).T
    x = np.arange(len(parts)) + (i - 0.5) * width
    axis.bar(x, means, width * 0.92, color=color, label=label)
    axis.errorbar(
      x, means, np.abs(bounds - means), fmt='none', ecolor='#444444', lw=0.9
    )
  axis.set(
    xticks=np.arange(len(parts)), xticklabels=list(parts), ylim=(0, 108),
    ylabel='% of its own accuracy',
  )  # fmt: skip
  figure.legend(fontsize=7.5, loc='outside upper center', ncols=2)
  return figure
