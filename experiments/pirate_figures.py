"""Figures of the pirate experiment, from `results.json` alone."""

from __future__ import annotations

import json
import pathlib

import matplotlib.pyplot as plt
import numpy as np

from experiments.contract.claims import interval
from experiments.contract.figures import save_figures
from experiments.pirate_table import (
  CONTROLS,
  DEPLOYABLE,
  LIFTED,
  MATCHED,
  PROJECTIONS,
  STRENGTHS,
  Table,
  at_matched_skill,
  steps_to,
)

KINDS = {
  'controls': ('#000000', 's'),
  'deployable': ('#0072B2', 'o'),
  'projections': ('#D55E00', 'X'),
  'placebos and others': ('#9A9A9A', 'D'),
}
CORNER = 16.0, 70.0  # Where a figure of the upper left corner ends.
# Projections that do hold the concept.
HELD = 'project update, refreshed', 'project update, refreshed, everywhere'
CURVES = {
  'plain': '#000000', 'clean data': '#7F7F7F', 'gate, anchored': '#0072B2',
  'rewrite': '#56B4E9', 'inoculate always': '#009E73', 'adapter': '#CC79A7',
  'project update, refreshed': '#D55E00',
}  # fmt: skip


def draw(workdir: pathlib.Path) -> None:
  """Draws every figure of a run."""
  results = json.loads((workdir / 'results.json').read_text('utf-8'))
  config = json.loads((workdir / 'config.json').read_text('utf-8'))
  seeds = range(config['seed'], config['seed'] + config['num_seeds'])
  table = Table(results, seeds)
  arms = list(dict.fromkeys(
    k.split('/', 2)[2] for k in results if k.startswith(f'{seeds[0]}/all/')
  ))  # fmt: skip
  figures = {
    'front': _front(table, arms),
    'pareto': _pareto(table, arms),
    'curves': _curves(table),
    'movement': _movement(table, arms),
  }
  if all(map(table.has, STRENGTHS)):
    figures['inoculation'] = _inoculation(table)
  save_figures(workdir, figures)


def kind(arm: str) -> str:
  for name, members in (
    ('controls', CONTROLS),
    ('deployable', DEPLOYABLE),
    ('projections', PROJECTIONS),
  ):
    if arm in members:
      return name
  return 'placebos and others'


def _points(axis, arms, x, y):
  """Mean and interval over seeds of every arm, in the colour of its kind."""
  for arm in arms:
    colour, marker = KINDS[kind(arm)]
    xs, ys = x(arm), y(arm)
    centre = np.mean(xs), np.mean(ys)
    spread = [
      np.abs(np.array(interval(v)) - np.mean(v))[:, None] for v in (xs, ys)
    ]
    axis.errorbar(
      *centre, xerr=spread[0], yerr=spread[1], fmt=marker, ms=4, lw=0.6,
      color=colour,
    )  # fmt: skip
  for name, (colour, marker) in KINDS.items():
    axis.plot([], [], marker, color=colour, ms=4, label=name)


def _front(table, arms):
  """Every arm at the end of training, and when nothing holds it any more."""

  def make():
    figure, axes = plt.subplots(
      1, 4, figsize=(9.6, 0.17 * len(arms) + 1.4), sharey=True
    )
    order = sorted(
      arms, key=lambda a: (table.pirate(a).mean(), -table.skill(a).mean())
    )
    trained = lambda arm: np.array(
      [r['curve']['trained'][-1] for r in table.arm(arm)]
    )
    again = lambda arm: np.array([
      steps_to({'steps': _lifted(r), 'curve': r}, 'relearn', 50)
      for r in table.arm(arm)
    ])  # fmt: skip
    for axis, values, label, end in (
      (axes[0], table.pirate, 'pirate,\nneutral prompt, %', 100),
      (axes[1], table.skill, 'skill,\nneutral prompt, %', 100),
      (axes[2], trained, 'skill,\nas in training, %', 100),
      (axes[3], again, 'plain steps afterwards\nuntil half are a pirate',
       LIFTED + 1),
    ):
      for row, arm in enumerate(order):
        colour, marker = KINDS[kind(arm)]
        v = values(arm)
        low, high = interval(v)
        axis.plot([max(low, 0), min(high, end)], [row, row], color=colour, lw=1)
        axis.plot(v.mean(), row, marker, color=colour, ms=4)
      axis.set_xlim(-0.03 * end, 1.03 * end)
      axis.set_xlabel(label)
      axis.grid(axis='x', lw=0.3)
    axes[0].axvline(10, color='k', lw=0.6, ls=':')
    axes[1].axvline(table.skill('plain').mean() - 3, color='k', lw=0.6, ls=':')
    axes[0].set_yticks(range(len(order)), order)
    axes[0].set_ylim(len(order) - 0.3, -0.7)
    for name, (colour, marker) in KINDS.items():
      axes[1].plot([], [], marker, color=colour, ms=4, label=name)
    axes[1].plot([], [], 'k:', lw=0.6, label='target')
    figure.legend(loc='outside upper center', ncols=5)
    return figure

  return make


def _lifted(row) -> range:
  """At which steps `relearn` was looked at."""
  return range(1, len(row['relearn']) + 1)


def _pareto(table, arms):
  """Pirate against skill when training skill is reached; and the corner."""

  def make():
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 4.0))
    at = lambda arm, key: np.array(
      [at_matched_skill(r)[key] for r in table.arm(arm)]
    )
    x, y = lambda arm: at(arm, 'pirate'), lambda arm: at(arm, 'right')
    mean = {arm: (x(arm).mean(), y(arm).mean()) for arm in arms}
    best = np.array(sorted(mean[a] for a in arms if _usable(a)))
    for axis in axes:
      _points(axis, arms, x, y)
      if len(best):
        # From the left, whatever has more skill than all before it.
        on = best[:, 1] >= np.maximum.accumulate(best[:, 1])
        axis.step(
          best[on, 0], best[on, 1], where='post', lw=0.8,
          color=KINDS['deployable'][0],
        )  # fmt: skip
      axis.set_xlabel('pirate, neutral prompt, %')
    axes[0].set_xlim(-4, 104)
    axes[0].set_ylim(-4, 104)
    axes[0].set_ylabel(
      f'skill, neutral prompt, %,\nat {MATCHED[0]:g} to {MATCHED[-1]:g} % '
      'training skill'
    )
    axes[1].set_title('upper left corner', fontsize=9)
    axes[1].set_xlim(-0.5, CORNER[0])
    axes[1].set_ylim(CORNER[1], 100)
    inside = [a for a in arms if mean[a][0] < 10 and mean[a][1] > CORNER[1]]
    inside.sort(key=lambda a: -mean[a][1])
    apart = min(0.08, 0.94 / max(1, len(inside) - 1))
    heights = 0.97 - apart * np.arange(len(inside))
    for arm, height in zip(inside, heights):
      axes[1].annotate(
        arm, mean[arm], (0.42, height), textcoords='axes fraction', fontsize=7,
        va='center', color=KINDS[kind(arm)][0],
        arrowprops={
          'arrowstyle': '-', 'lw': 0.4, 'color': '#BBBBBB',
          'relpos': (0, 0.5), 'shrinkA': 1,
        },
      )  # fmt: skip
    figure.legend(
      *axes[0].get_legend_handles_labels(), loc='outside upper center', ncols=4
    )
    return figure

  return make


def _usable(arm: str) -> bool:
  return kind(arm) == 'deployable'


def _curves(table):
  def make():
    figure, axes = plt.subplots(1, 2, figsize=(7.4, 2.9))
    for axis, key, label in (
      (axes[0], 'pirate', 'pirate, neutral prompt, %'),
      (axes[1], 'right', 'skill, neutral prompt, %'),
    ):
      for arm, colour in CURVES.items():
        if not table.has(arm):
          continue
        rows, bases = table.arm(arm), table.other('base')
        values = np.array(
          [[b['sums'][key], *r['curve'][key]] for b, r in zip(bases, rows)]
        )
        steps = [0, *rows[0]['steps']]
        axis.plot(steps, values.mean(0), color=colour, lw=1.4, label=arm)
        axis.fill_between(
          steps, values.min(0), values.max(0), color=colour, alpha=0.12, lw=0
        )
      axis.set_xlabel('steps')
      axis.set_ylabel(label)
    figure.legend(
      *axes[0].get_legend_handles_labels(), loc='outside right center'
    )
    return figure

  return make


def _movement(table, arms):
  """Where the concept is held and the behaviour learned all the same.

  And whether what the models then say is seen as a pirate's.
  """

  def make():
    figure, (axis, seen) = plt.subplots(1, 2, figsize=(8.6, 3.6))
    column = lambda key: lambda arm: [r[key] for r in table.arm(arm)]
    taken = lambda arm: [r['probes']['own'] for r in table.arm(arm)]
    _points(seen, arms, table.pirate, taken)
    seen.axline((0, 0), slope=1, color='k', lw=0.4, ls=':')
    seen.set_xlim(-4, 104)
    seen.set_ylim(-4, 104)
    seen.set_xlabel('pirate, neutral prompt, %')
    seen.set_ylabel("answers taken for a pirate's\nby the base's probe, %")
    _points(axis, arms, column('moved'), column('log odds'))
    base = [r['log odds'] for r in table.other('base')]
    axis.axhline(np.mean(base), color='k', lw=0.6, ls=':')
    axis.annotate(
      'before fine-tuning', (1, np.mean(base)),
      xycoords=('axes fraction', 'data'),
      ha='right', va='bottom', fontsize=7,
    )  # fmt: skip
    axis.axhline(0, color='k', lw=0.3)
    for held, height in zip(HELD, (0.9, 0.64)):
      if not table.has(held):
        continue
      place = column('moved')(held), column('log odds')(held)
      axis.annotate(
        held.replace('refreshed, ', 'refreshed,\n'),
        [np.mean(x) for x in place], (0.02, height),
        textcoords='axes fraction', fontsize=7, va='center',
        color=KINDS['projections'][0],
        arrowprops={
          'arrowstyle': '-', 'lw': 0.4, 'color': '#BBBBBB', 'relpos': (1, 0.5),
        },
      )  # fmt: skip
    axis.set_xlabel(
      'movement of the concept on other questions\n(0: none, 1: from plain to '
      'pirate)'
    )
    axis.set_ylabel("log odds of a pirate's opening, nats")
    figure.legend(
      *axis.get_legend_handles_labels(), loc='outside upper center', ncol=4
    )
    return figure

  return make


def _inoculation(table):
  """Wichers et al. 2025, arXiv 2510.05024: elicitation predicts protection."""

  def make():
    figure, axis = plt.subplots(figsize=(3.8, 3.0))
    elicited = {
      arm: [e[arm.split()[-1]] for e in table.other('elicitation')]
      for arm in STRENGTHS
    }
    x = [np.mean(elicited[a]) for a in STRENGTHS]
    for key, label, colour in (
      ('sums', 'sums', '#0072B2'),
      ('sums, any prompt', 'sums, other neutral prompts', '#D55E00'),
    ):
      values = np.array(
        [[r[key]['pirate'] for r in table.arm(a)] for a in STRENGTHS]
      )
      axis.plot(x, values.mean(1), 'o-', color=colour, label=label)
      axis.plot(x, values, '.', color=colour, alpha=0.4, ms=3)
    axis.set_xlabel('pirate under the prompt, before training, %')
    axis.set_ylabel('pirate without it, after training, %')
    axis.legend(fontsize=7)
    return figure

  return make
