"""Advantages of the samples of a group: how much better than their siblings.

Every function takes rewards `[P, G]`, `G` samples of each of `P` prompts, and
gives advantages `[P, G]`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Baseline = Literal['mean', 'leave_one_out']
Scale = Literal['group', 'batch', 'none']


class Advantages(NamedTuple):
  """What samples are weighed with.

  Attributes:
    values_PG: the advantages, float32; 0 in groups that say nothing.
    informative_P: whether a group's rewards differ at all.
  """

  values_PG: Float[Array, 'P G']
  informative_P: Bool[Array, 'P']


def advantages(
  rewards_PG: Float[Array, 'P G'],
  *,
  baseline: Baseline,
  scale: Scale,
  eps: float = 1e-6,
) -> Advantages:
  """`(r - baseline) / (scale + eps)`.

  The baseline is the group's mean, or the mean of a sample's siblings
  (`leave_one_out`: the same times `G / (G - 1)`). The scale is the standard
  deviation, with `n - 1`, of the group's rewards, or of what is left of the
  rewards of all informative groups after the baseline, about zero; or 1.

  | method | baseline | scale | |
  |---|---|---|---|
  | RLOO | leave_one_out | none | https://arxiv.org/abs/2402.14740 |
  | GRPO | mean | group | https://arxiv.org/abs/2402.03300 |
  | Dr. GRPO | mean | none | https://arxiv.org/abs/2503.20783 |
  | RLFR, ScaleRL | mean | batch | https://arxiv.org/abs/2510.13786 |

  Groups whose rewards are all the same have advantage 0 and are not counted in
  the scale of the batch, whose size would otherwise depend on how many there
  are.

  Args:
    rewards_PG: rewards; computed with in float32.
    baseline: what is subtracted.
    scale: what is divided by.
    eps: added to the scale where there is one.

  Raises:
    ValueError: for a group of one, another rank, or an unknown choice.
  """
  if rewards_PG.ndim != 2 or rewards_PG.shape[1] < 2:
    raise ValueError(
      f'rewards have shape {rewards_PG.shape}; they must be [prompts, samples] '
      'with at least two samples of each prompt, to be compared.'
    )
  for name, value, choices in (
    ('baseline', baseline, get_args(Baseline)),
    ('scale', scale, get_args(Scale)),
  ):
    if value not in choices:
      raise ValueError(f'{name}={value!r}; choose from {choices}.')
  r_PG = rewards_PG.astype(jnp.float32)
  size = r_PG.shape[1]
  informative_P = jnp.max(r_PG, axis=1) > jnp.min(r_PG, axis=1)
  left_PG = r_PG - jnp.mean(r_PG, axis=1, keepdims=True)
  # Not left to rounding: the mean of equal numbers need not be one of them.
  left_PG = jnp.where(informative_P[:, None], left_PG, 0)
  if baseline == 'leave_one_out':
    left_PG = left_PG * (size / (size - 1))
  if scale == 'group':
    left_PG = left_PG / (jnp.std(r_PG, axis=1, ddof=1, keepdims=True) + eps)
  if scale == 'batch':
    count = jnp.sum(informative_P) * size
    square = jnp.sum(left_PG**2) / jnp.maximum(count - 1, 1)
    left_PG = left_PG / (jnp.sqrt(square) + eps)
  return Advantages(left_PG, informative_P)
