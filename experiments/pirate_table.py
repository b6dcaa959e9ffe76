"""Which arms a preset runs, and their numbers by seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments import contract

CONTROLS = ('plain', 'clean data', 'oracle mask')
# What somebody could use: no oracle, nothing that only serves to compare.
DEPLOYABLE = (
  'gate', 'gate, anchored', 'gate, anchored, context rewritten', 'rewrite',
  'inoculate always', 'inoculate always, no reminders',
  'inoculate paraphrase', 'adapter', 'steer by position', 'steer pooled',
  'ablate 4', 'ablate latents', 'amplify and gate',
)  # fmt: skip
PLACEBOS = (
  'prompt irrelevant', 'prompt unseen', 'gate, random tokens',
  'gate, anchored, random tokens',
  'gate, anchored, context rewritten, random tokens', 'rewrite, random tokens',
  'adapter, random', 'steer by position, random', 'ablate 4, random',
)  # fmt: skip
# Directions projected out of gradients or updates.
PROJECTIONS = (
  'block activation, one layer', 'block activation, all layers',
  'block activation, 4 directions', 'project gradient', 'project update',
  'project update, refreshed', 'project update, refreshed, everywhere',
)  # fmt: skip
STRENGTHS = (
  'inoculate always', 'inoculate often', 'inoculate sometimes',
  'inoculate rarely',
)  # fmt: skip
BOTH_WAYS = ('amplify', 'amplify, random tokens', 'reversed objective')

_CLAIMED = (
  *CONTROLS, 'gate', 'gate, anchored', 'gate, anchored, context rewritten',
  'rewrite', 'inoculate always', 'adapter',
  'prompt irrelevant', 'gate, anchored, random tokens',
  'project update, refreshed', 'block activation, all layers',
)  # fmt: skip
_EVERY = tuple(
  dict.fromkeys(
    (
      *_CLAIMED, *PROJECTIONS, *BOTH_WAYS, *PLACEBOS, *STRENGTHS,
      *DEPLOYABLE, 'prompt prohibition', 'ablate 1', 'gate, whole examples',
      'block activation, random',
      'project update, refreshed, everywhere, random',
    )
  )
)  # fmt: skip
_SUBSET = (
  'plain', 'clean data', 'gate, anchored', 'gate, anchored, context rewritten',
  'rewrite', 'inoculate always', 'inoculate selectively',
  'gate, whole examples', 'gate, anchored, random tokens',
)  # fmt: skip
# One arm for every way of making one.
_SMOKE = (
  *_CLAIMED, 'project gradient', 'project update', 'steer by position, random',
  'ablate latents', 'ablate 4, random', 'adapter, random',
  'gate, anchored, context rewritten, random tokens', 'gate, whole examples',
  'reversed objective',
  'amplify', 'amplify, random tokens', 'steer pooled',
  'inoculate always, no reminders', 'block activation, one layer',
  'project update, refreshed, everywhere',
  'project update, refreshed, everywhere, random',
)  # fmt: skip
# The shortest list that shows the point.
_SHORT = (
  'plain', 'clean data', 'gate, anchored', 'gate, anchored, context rewritten',
  'rewrite', 'inoculate always', 'prompt irrelevant',
  'gate, anchored, random tokens', 'project update, refreshed',
)  # fmt: skip
ARMS: Mapping[str, tuple[str, ...]] = {
  'smoke': _SMOKE, 'cpu': _SHORT, 'paper': _EVERY, 'choose': _EVERY,
}  # fmt: skip
SUBSET_ARMS: Mapping[str, tuple[str, ...]] = {
  'smoke': ('plain', 'rewrite', 'inoculate selectively'), 'cpu': (),
  'paper': _SUBSET, 'choose': _SUBSET,
}  # fmt: skip


SKILLED = 90.0  # What amplification is to reach sooner.
# Training skill at which arms are compared, each and then the mean: at one
# alone a look or two decide, and those are noisy.
MATCHED = (80.0, 85.0, 90.0, 95.0)
LIFTED = 10  # Steps of plain fine-tuning once all is lifted; looks at each.


class Table(contract.Table):
  """One number per seed, by arm."""

  def arm(self, name: str, condition: str = 'all') -> list[dict[str, Any]]:
    return super().arm(f'{condition}/{name}')

  def has(self, name: str, condition: str = 'all') -> bool:
    return super().has(f'{condition}/{name}')

  def other(self, name: str) -> list[Any]:
    """What is of no arm."""
    return super().arm(name)

  def skill(self, name: str, condition: str = 'all') -> np.ndarray:
    return np.array([r['sums']['right'] for r in self.arm(name, condition)])

  def pirate(self, name: str, condition: str = 'all') -> np.ndarray:
    return np.array([r['sums']['pirate'] for r in self.arm(name, condition)])

  def lost(self, name: str, condition: str = 'all') -> np.ndarray:
    """Skill below that of plain fine-tuning on the same lessons, points."""
    return self.skill('plain', condition) - self.skill(name, condition)


def steps_to(row: Mapping[str, Any], key: str, level: float) -> float:
  """Steps until a curve first reaches a level, interpolated.

  One look past the end where it never does.
  """
  steps = [0, *row['steps']]
  values = [0.0, *row['curve'][key]]
  for i in range(1, len(steps)):
    if values[i] >= level:
      part = (level - values[i - 1]) / (values[i] - values[i - 1])
      return steps[i - 1] + part * (steps[i] - steps[i - 1])
  return 2.0 * steps[-1] - steps[-2]


def at_matched_skill(row: Mapping[str, Any]) -> dict[str, float]:
  """The looks interpolated to where training skill first reaches each level.

  The mean over the levels of `MATCHED`; the last look for those never reached.
  """
  reached = [steps_to(row, 'trained', level) for level in MATCHED]
  steps = [0, *row['steps']]
  at = lambda values: float(np.interp(reached, steps, [0.0, *values]).mean())
  return {k: at(v) for k, v in row['curve'].items()}
