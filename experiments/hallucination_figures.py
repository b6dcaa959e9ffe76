"""Figures of the hallucination experiment, from `results.json` alone."""

from __future__ import annotations

import json
import pathlib

import matplotlib.pyplot as plt
import numpy as np

from experiments.contract.claims import interval
from experiments.contract.figures import save_figures
from experiments.hallucination_claims import PLACEBOS, Table
from experiments.hallucination_pipeline import PUBLISHED

COLOURS = {
  'frozen': '#0072B2', 'live': '#E69F00', 'live, gradient': '#D55E00',
  'oracle': '#000000', 'none': '#9A9A9A', 'shuffled': '#C7C7C7',
  'random direction': '#7F9A7F',
}  # fmt: skip


def draw(workdir: pathlib.Path) -> None:
  """Draws every figure of a run."""
  results = json.loads((workdir / 'results.json').read_text('utf-8'))
  config = json.loads((workdir / 'config.json').read_text('utf-8'))
  seeds = range(config['seed'], config['seed'] + config['num_seeds'])
  table = Table(results, seeds)
  first = f'{seeds[0]}/'
  arms = [k.removeprefix(first) for k in results if k.startswith(first)]
  save_figures(
    workdir,
    {
      'arms': lambda: _arms(table, arms),
      'training': lambda: _training(table),
      'accounting': lambda: _accounting(table, arms),
      'probe': lambda: _probe(table),
    },
  )


def colour(arm: str) -> str:
  """That of the arm it is a variant of."""
  return COLOURS.get(arm, COLOURS.get(arm.split(',')[0], '#000000'))


def _arms(t: Table, arms):
  """Every arm at the end: truth, claims, and what the probe still sees."""
  order = [a for a in arms if a != 'base']
  panels = (
    ('fewer made up,\nmodel chooses, %',
     lambda a: 100 * t.reduction(a, 'chosen'), 60),
    ('fewer made up,\nasked, %', lambda a: 100 * t.reduction(a, 'asked'), 50),
    ('claims, model\nchooses, % of base',
     lambda a: 100 * t.relative(a, 'chosen', 'claims'), (95, 105)),
    ('true claims, asked,\n% of base',
     lambda a: 100 * t.relative(a, 'asked', 'right'), 95),
    ('true but doubted:\nkept, %',
     lambda a: 100 * t.get(a, 'doubted', 'kept of true'), None),
  )  # fmt: skip
  figure, axes = plt.subplots(
    1, len(panels) + 2, figsize=(12.5, 0.24 * len(order) + 1.6), sharey=True
  )
  for axis, (label, values, target) in zip(axes, panels):
    for row, arm in enumerate(order):
      _point(axis, row, values(arm), colour(arm))
    for bound in () if target is None else np.atleast_1d(target):
      axis.axvline(bound, color='k', lw=0.6, ls=':')
    axis.set_xlabel(label)
  axes[4].axvline(
    100 * np.nanmean(t.get('base', 'doubted', 'kept of true')),
    color='k',
    lw=0.6,
  )
  for row, arm in enumerate(order):
    for key, marker in (('live', 'o'), ('frozen', 'D')):
      score = t.get(arm, 'chosen', f'{key} score of made up')
      _point(axes[5], row, score, colour(arm), marker)
    for key, marker in (('auroc', 'o'), ('refitted_auroc', 's')):
      _point(axes[6], row, t.get(arm, 'fixed texts', key), colour(arm), marker)
  axes[5].set_xlabel('score of what is\nstill made up')
  axes[6].set_xlabel('AUROC on\nfixed texts')
  axes[6].axvline(
    t.get('base', 'fixed texts', 'auroc').mean(), color='k', lw=0.6
  )
  for axis, entries in (
    (axes[5], (('o', 'read live'), ('D', 'read frozen'))),
    (axes[6], (('o', 'original probe'), ('s', 'fitted anew'))),
  ):
    for marker, label in entries:
      filled = '#555555' if marker == 'o' else 'white'
      axis.plot(
        [], [], marker, color='#555555', ms=4, mfc=filled, ls='', label=label
      )
    axis.legend(loc='lower center', bbox_to_anchor=(0.5, 1.0))
  for axis in axes:
    axis.grid(axis='x', lw=0.3)
  axes[0].set_yticks(range(len(order)), order)
  axes[0].set_ylim(len(order) - 0.4, -0.6)
  return figure


def _point(axis, row, values, colour, marker='o'):
  values = values[np.isfinite(values)]
  if not len(values):
    return  # On no seed is there anything to measure.
  if len(values) > 1:
    axis.plot(interval(values), [row, row], color=colour, lw=1)
  filled = colour if marker == 'o' else 'white'
  axis.plot(values.mean(), row, marker, color=colour, ms=4, mfc=filled)


def _training(t: Table):
  """On the way: truth, probe, and the parts of the penalised reward."""
  panels = (
    ('made up, model chooses, %', lambda r: 100 * r['chosen']['made up']),
    ('live score of made up', lambda r: r['chosen']['live score of made up']),
    ('frozen score of the same',
     lambda r: r['chosen']['frozen score of made up']),
    ('AUROC, original probe', lambda r: r['fixed texts']['auroc']),
    ('AUROC, fitted anew', lambda r: r['fixed texts']['refitted_auroc']),
    ('reward: task', lambda r: r['reward']['task']),
    ('reward: penalty by the frozen', lambda r: r['reward']['penalty']),
    ('reward: change of representation', lambda r: r['reward']['change']),
  )  # fmt: skip
  figure, axes = plt.subplots(2, 4, figsize=(11, 5), sharex=True)
  start = [r['curve'][0][1] for r in t.arm('base')]
  for arm in filter(t.has, COLOURS):
    rows = t.arm(arm)
    steps = [0] + [s for s, _ in rows[0]['curve']]
    for axis, (label, value) in zip(axes.flat, panels):
      read = lambda r, value=value: np.nan if value(r) is None else value(r)
      values = np.array([
        [read(first)] + [read(look) for _, look in row['curve']]
        for first, row in zip(start, rows)
      ], float)  # fmt: skip
      axis.plot(
        steps, np.nanmean(values, axis=0), color=colour(arm), lw=1.4,
        label=arm, ls='--' if arm in PLACEBOS else '-',
      )  # fmt: skip
      axis.plot(steps, values.T, color=colour(arm), lw=0.4, alpha=0.5)
      axis.set_title(label, fontsize=9)
  for axis in axes[1]:
    axis.set_xlabel('steps')
  axes[0, 0].set_ylim(0)
  handles, labels = axes[0, 0].get_legend_handles_labels()
  figure.legend(
    handles, labels, loc='outside upper center', ncols=7,
    title='validation subjects',
  )  # fmt: skip
  return figure


def _accounting(t: Table, arms):
  """Where reductions under a monitor come from, and best of n."""
  figure, (left, right) = plt.subplots(
    1, 2, figsize=(10, 3.2), width_ratios=(1.6, 1)
  )
  watched = [a for a in arms if 'pipeline' in t.arm(a)[0]]
  modes = ('not in line', 'in line, 1')
  bars = [
    (f'{"monitor alone" if a == "base" else a}; {m.split(", ")[0]}',
     100 * np.mean(t.reductions(a, m), axis=0))
    for a in watched for m in modes
  ]  # fmt: skip
  bars.append(('RLFR, Gemma-3-12B; in line', list(PUBLISHED.values())))
  names = ('policy', 'in context', 'direct')
  for row, (_, values) in enumerate(bars):
    edge = {1: 0.0, -1: 0.0}
    for value, shade in zip(values[:3], ('#0072B2', '#56B4E9', '#009E73')):
      sign = 1 if value >= 0 else -1
      left.barh(row, value, left=edge[sign], color=shade, height=0.6)
      edge[sign] += value
    left.plot(values[3], row, 'k|', ms=12)
    left.text(
      max(edge[1], values[3]) + 2, row, f'{values[3]:.1f}', va='center',
      fontsize=8,
    )  # fmt: skip
  for name, shade in zip(names, ('#0072B2', '#56B4E9', '#009E73')):
    left.barh([0], [0], color=shade, label=name)
  left.plot([], [], 'k|', ms=10, label='overall')
  left.set_yticks(range(len(bars)), [b[0] for b in bars])
  left.invert_yaxis()
  left.axvline(0, color='k', lw=0.6)
  left.set_xlabel('fewer made-up claims in lists, %')
  left.set_xlim(right=max(b[1][3] for b in bars) + 15)
  left.legend(loc='lower center', bbox_to_anchor=(0.5, 1.0), ncols=4)
  for arm in watched:
    rows = t.arm(arm)
    for suffix, style in (('', '-'), (', no vote', ':')):
      counts = {
        int(m.split(', ')[1]): [
          (r['pipeline'][m]['fixed'] + r['pipeline'][m]['retracted'])
          / max(r['pipeline'][m]['caught'], 1e-9)
          for r in rows
        ]
        for m in rows[0]['pipeline']
        if m == 'in line, 1' or (m.startswith('in line') and
                                 m.endswith('no vote') == bool(suffix))
      }  # fmt: skip
      right.plot(
        list(counts), [100 * np.mean(v) for v in counts.values()], style,
        marker='o', ms=3, color='#777777' if arm == 'base' else colour(arm),
        alpha=1 if 'doubts' not in arm else 0.55,
        label=None if suffix else arm,
      )  # fmt: skip
  for style, label in (('-', 'vote'), (':', 'best of all')):
    right.plot([], [], style, color='k', label=label)
  right.set_xscale('log', base=2)
  right.xaxis.set_major_formatter('{x:g}')
  right.set_xlabel('answers to each doubt')
  right.set_ylabel('caught claims that are mended, %')
  right.set_ylim(0, 100)
  right.legend(loc='lower center', bbox_to_anchor=(0.5, 1.0), ncols=2)
  return figure


def _probe(t: Table):
  """Reliability of the probe, of every seed."""
  figure, axis = plt.subplots(figsize=(3.4, 3.2))
  axis.plot([0, 1], [0, 1], 'k:', lw=0.8)
  for row in t.arm('base'):
    bins = row['probe']['reliability']
    there = np.array(bins['count']) > 0
    axis.plot(
      np.array(bins['score'])[there], np.array(bins['rate'])[there], '-o',
      ms=3, lw=0.8, color='#0072B2', alpha=0.6,
    )  # fmt: skip
  axis.set_xlabel('score of a claim')
  axis.set_ylabel('share that is made up')
  area = t.get('base', 'probe', 'quality', 'claims', 'auroc')
  axis.set_title(f'AUROC {area.mean():.3f}, unseen subjects', fontsize=9)
  return figure
