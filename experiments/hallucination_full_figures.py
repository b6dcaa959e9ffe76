"""Figures of a run on a real model, from `results.json` alone."""

from __future__ import annotations

import json
import pathlib

import matplotlib.pyplot as plt
import numpy as np

from experiments.contract.claims import interval
from experiments.contract.figures import save_figures
from experiments.hallucination_figures import colour
from experiments.hallucination_full_claims import by_prompt

PANELS = (
  ('claims', 'claims an answer'),
  ('doubted', 'of them doubted, frozen'),
  ('divergence', 'KL from the base, nats'),
)


def draw(workdir: pathlib.Path) -> None:
  """Draws every figure of a run."""
  results = json.loads((workdir / 'results.json').read_text('utf-8'))
  arms = [k for k in results if k != 'probe']
  save_figures(
    workdir,
    {
      'answers': lambda: _answers(results, arms),
      'training': lambda: _training(results, arms),
    },
  )


def _answers(results, arms):
  """Each arm's answers, means over prompts with intervals."""
  figure, axes = plt.subplots(
    1, len(PANELS), figsize=(7.5, 0.6 + 0.4 * len(arms)), sharey=True,
    constrained_layout=True,
  )  # fmt: skip
  for axis, (name, title) in zip(axes, PANELS):
    for i, arm in enumerate(arms):
      values = by_prompt(results[arm]['answers'][name])
      low, high = interval(values)
      axis.plot([low, high], [i, i], color=colour(arm), linewidth=1.5)
      axis.plot(values.mean(), i, 'o', color=colour(arm), markersize=4)
    axis.set_title(title, fontsize=9)
    axis.set_xlim(left=0)
  axes[0].set_yticks(range(len(arms)), arms)
  axes[0].invert_yaxis()
  return figure


def _training(results, arms):
  """The reward and what the constraint holds, step by step."""
  figure, axes = plt.subplots(1, 2, figsize=(7, 2.6), constrained_layout=True)
  for arm in (a for a in arms if 'training' in results[a]):
    steps, rows = zip(*results[arm]['training'])
    for axis, name in zip(axes, ('reward/claims', 'rate/enough')):
      values = np.array([r[name] for r in rows])
      axis.plot(steps, values, color=colour(arm), label=arm, linewidth=1.2)
  axes[0].set_ylabel('reward of an answer')
  axes[1].set_ylabel("answers with the base's\nmedian of claims, share")
  for axis in axes:
    axis.set_xlabel('steps')
  axes[0].legend(frameon=False, fontsize=8)
  return figure
