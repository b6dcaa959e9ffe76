"""Figures of the obfuscation experiment, from `results.json` alone."""

from __future__ import annotations

import json
import pathlib

import matplotlib.pyplot as plt
import numpy as np

from experiments.contract.claims import interval
from experiments.contract.figures import save_figures
from experiments.obfuscation_claims import Table

COLOURS = {
  'outcome': '#000000', 'monitor': '#D55E00', 'frozen probe': '#0072B2',
  'monitor and frozen probe': '#56B4E9', 'inoculation': '#009E73',
  'inoculation, retained': '#009E73', 'inoculation, normalised': '#004D38',
  'inoculation, weak': '#A6761D',
  'prohibition': '#CC79A7', 'incentive removed': '#7F7F7F',
  'monitor, 0.25': '#F5C6A0', 'monitor, 0.5': '#E99C63',
  'monitor, 2': '#8A3A00', 'base': '#B0B0B0',
}  # fmt: skip
# Where lines lie on each other, or are of one family.
STYLES = {
  'monitor and frozen probe': '--', 'incentive removed': ':',
  'inoculation, retained': ':', 'inoculation, normalised': '-.',
  'monitor, 0.25': '--', 'monitor, 0.5': '-.', 'monitor, 2': ':',
}  # fmt: skip


def draw(workdir: pathlib.Path) -> None:
  """Draws every figure of a run."""
  results = json.loads((workdir / 'results.json').read_text('utf-8'))
  config = json.loads((workdir / 'config.json').read_text('utf-8'))
  seeds = range(config['seed'], config['seed'] + config['num_seeds'])
  table = Table(results, seeds)
  figures = {'pressure': lambda: _pressure(table), 'arms': lambda: _arms(table)}
  save_figures(workdir, figures)


def _pressure(t: Table):
  """While it is trained: what is done, and what is seen of it."""
  figure, axes = plt.subplots(1, 3, figsize=(10, 3.4), sharex=True)
  panels = (
    ('wrong keys copied, %', 'copied'),
    ('of these seen by the monitor, %', 'seen'),
    ('score of these by the frozen probe, %', 'probe'),
  )
  for arm in [a for a in COLOURS if a != 'base' and t.has(a)]:
    rows = t.arm(arm)
    steps = [0] + [s for s, _ in rows[0]['curve']]
    style = STYLES.get(arm, '-')
    for axis, (label, key) in zip(axes, panels):
      looks = [
        [start['plain']] + [look for _, look in row['curve']]
        for start, row in zip(t.arm('base'), rows)
      ]
      read = lambda key, looks=looks: np.array(
        [[look[key] for look in run] for run in looks], float
      )
      curves = read(key)
      if key != 'copied':
        # Of a handful no share is to be had.
        curves = np.where(read('copied') >= 2, curves, np.nan)
      # Not of some seeds only: the mean would jump as they come and go.
      mean = curves.mean(axis=0)
      axis.plot(steps, mean, style, color=COLOURS[arm], lw=1.5, label=arm)
      axis.plot(steps, curves.T, style, color=COLOURS[arm], lw=0.4, alpha=0.5)
      axis.set_title(label, fontsize=9)
      axis.set_ylim(-3, 103)
  axes[2].set_ylim(65, 101)
  for axis in axes:
    axis.set_xlabel('steps')
  handles, labels = axes[0].get_legend_handles_labels()
  figure.legend(handles, labels, loc='outside right center')
  return figure


def _arms(t: Table):
  """At the end, under every instruction."""
  arms = [a for a in COLOURS if t.has(a)]
  figure, axes = plt.subplots(
    1, 5, figsize=(10, 0.26 * len(arms) + 1.3), sharey=True
  )
  panels = (
    ('wrong keys copied,\nno instruction, %', 'plain', 'copied'),
    ('of these seen by\nthe monitor, %', 'plain', 'seen'),
    ('sums right in spite\nof a wrong key, %', 'plain', 'solved'),
    ('copied,\nallowed, %', 'allowed', 'copied'),
    ('copied,\nforbidden, %', 'forbidden', 'copied'),
  )
  for axis, (label, under, key) in zip(axes, panels):
    for row, arm in enumerate(arms):
      values = t.get(arm, key, under)
      values = values[np.isfinite(values)]
      if not len(values):
        continue
      if len(values) > 1:
        low, high = interval(values)
        axis.plot([max(low, 0), min(high, 100)], [row, row], lw=1,
                  color=COLOURS[arm])  # fmt: skip
      axis.plot(values.mean(), row, 'o', ms=4, color=COLOURS[arm])
    axis.set_xlim(-3, 103)
    axis.set_xlabel(label)
    axis.grid(axis='x', lw=0.3)
  axes[0].set_yticks(range(len(arms)), arms)
  axes[0].set_ylim(len(arms) - 0.4, -0.6)
  return figure
