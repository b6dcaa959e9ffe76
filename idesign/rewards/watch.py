"""Stopping a run that has nothing more to learn from its rewards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import math


class RewardError(FloatingPointError):
  """A reward is not a number."""


class CollapsedPolicyError(RuntimeError):
  """All samples of every prompt are rewarded alike, step after step."""


def make_watch(
  patience: int = 20,
) -> Callable[[int, Mapping[str, float]], None]:
  """What `training.fit` calls with the metrics of every step, as `watch`.

  It raises before anything is saved of the step, so that the last checkpoint is
  from before.

  Args:
    patience: so many steps in a row without an informative group are a
      collapse.

  Returns:
    A function that raises `RewardError`, naming the term, the step and the
    first sample, and `CollapsedPolicyError`.
  """
  if patience < 1:
    raise ValueError(f'patience={patience} must be at least 1.')
  silent = 0

  def watch(step: int, metrics: Mapping[str, float]) -> None:
    nonlocal silent
    for name, value in metrics.items():
      kind, _, term = name.partition('/')
      if kind == 'reward' and term and not math.isfinite(value):
        raise RewardError(
          f'the reward {term!r} is {value} at step {step}, first in sample '
          f'{int(metrics[f"sample/{term}"])} of the batch. The last checkpoint '
          'is from before; look at what that term does with such a text.'
        )
    silent = 0 if metrics['informative'] > 0 else silent + 1
    if silent >= patience:
      raise CollapsedPolicyError(
        f'at step {step} no prompt has had samples of different rewards for '
        f'{patience} steps: nothing is learned any more. Sample hotter, hold '
        'the policy nearer to the reference, or stop earlier.'
      )

  return watch
