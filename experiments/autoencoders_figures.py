"""Figures of the experiment on autoencoders, from `results.json` alone."""

from __future__ import annotations

import json
import pathlib

import matplotlib.pyplot as plt
import numpy as np

from experiments.contract.claims import interval
from experiments.contract.figures import save_figures

STYLES = {
    'topk': ('TopK', '#0072B2', 'o'),
    'batchtopk': ('BatchTopK', '#56B4E9', 's'),
    'matryoshka': ('Matryoshka', '#009E73', '^'),
    'jumprelu': ('JumpReLU', '#D55E00', 'D'),
    'gated': ('Gated', '#CC79A7', 'v'),
    'relu': ('ReLU', '#E69F00', 'P'),
    'pca': ('principal components', '#7F7F7F', 'X'),
}  # fmt: skip


def draw(workdir: pathlib.Path) -> None:
  """Draws every figure of a run."""
  results = json.loads((workdir / 'results.json').read_text('utf-8'))
  config = json.loads((workdir / 'config.json').read_text('utf-8'))
  seeds = range(config['seed'], config['seed'] + config['num_seeds'])
  figures = {'training': lambda: _training(results, config, seeds)}
  if set(config['arms']) > {'topk', 'pca'}:
    figures['sparsity'] = lambda: _sparsity(results, config, seeds)
  save_figures(workdir, figures)


def _label_percents(axis):
  """Plain numbers along a logarithmic axis."""
  low, high = axis.get_ylim()
  ticks = [t for t in (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100)
           if low <= t <= high]  # fmt: skip
  axis.set_yticks(ticks, labels=[str(t) for t in ticks])
  axis.set_yticks([], minor=True)


def _drawn(config):
  """The arms of a run, in the order of the legend."""
  return [arm for arm in STYLES if arm in config['arms']]


def _column(results, seeds, arm, strength, name):
  return np.array([results[f'{s}/{arm}/{strength}'][name] for s in seeds])


def _sparsity(results, config, seeds):
  """What is lost of variance and of loss at each number of features."""
  figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.3))
  for axis, name in zip(axes, ('fvu', 'loss_recovered')):
    for arm in _drawn(config):
      label, color, marker = STYLES[arm]
      points = []
      for strength in config['strengths'][arm]:
        values = 100 * _column(results, seeds, arm, strength, name)
        if name == 'loss_recovered':
          values = 100 - values
        l0 = _column(results, seeds, arm, strength, 'l0').mean()
        points.append((l0, values.mean(), *interval(values)))
      x, y, low, high = np.array(sorted(points)).T
      axis.errorbar(
          x, y, (y - low, high - y), color=color, marker=marker, ms=4.5,
          lw=1.4, elinewidth=0.9, label=label,
          ls=(0, (4, 1.5)) if arm == 'pca' else '-',
      )  # fmt: skip
    ticks = sorted(set(config['strengths']['topk']))
    axis.set(xscale='log', yscale='log', xlabel='active features per token')
    axis.set_xticks(ticks, labels=[str(t) for t in ticks])
    axis.set_xticks([], minor=True)
    _label_percents(axis)
  axes[0].set(ylabel='variance unexplained (%)')
  axes[1].set(ylabel='loss not recovered (%)')
  handles, labels = axes[0].get_legend_handles_labels()
  figure.legend(
    handles, labels, fontsize=8, loc='outside upper center', ncols=4
  )
  return figure


def _training(results, config, seeds):
  """Unexplained variance of the documents while training."""
  figure, axis = plt.subplots(figsize=(4.6, 3.7))
  for arm in _drawn(config):
    if arm == 'pca':
      continue
    label, color, _ = STYLES[arm]
    middle = len(config['strengths'][arm]) // 2
    strength = config['strengths'][arm][middle]
    curves = [results[f'{s}/{arm}/{strength}']['curve'] for s in seeds]
    steps = np.array(curves[0])[:, 0]
    values = 100 * np.array(curves)[:, :, 1]
    low, high = np.array([interval(v) for v in values.T]).T
    l0 = _column(results, seeds, arm, strength, 'l0').mean()
    label = f'{label}, {l0:.0f} active'
    axis.plot(steps, values.mean(0), color=color, lw=1.6, label=label)
    axis.fill_between(steps, low, high, color=color, alpha=0.2, lw=0)
  k = config['k']
  flat = 100 * _column(results, seeds, 'pca', k, 'fvu').mean()
  label, color, _ = STYLES['pca']
  axis.axhline(
      flat, color=color, lw=1.2, ls=(0, (4, 1.5)), label=f'{k} {label}',
  )  # fmt: skip
  axis.set(
      xlabel='updates', ylabel='variance of unseen documents\nunexplained (%)',
      yscale='log', xlim=(0, config['steps']),
  )  # fmt: skip
  _label_percents(axis)
  figure.legend(fontsize=7.5, loc='outside upper center', ncols=2)
  return figure
