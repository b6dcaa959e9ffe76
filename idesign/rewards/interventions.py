"""Claims that are doubted: kept, taken back or corrected, and the accounting.

A monitor flags claims; of each the policy is asked again and chooses to
maintain it, to retract it or to correct it (RLFR,
https://arxiv.org/abs/2602.10067). There maintaining earned nothing, and the
share of true claims that were flagged by mistake and kept fell from .4 to 0;
here it earns what the claim is worth.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

MAINTAIN, RETRACT, CORRECT, MALFORMED = range(4)


def intervention_reward(
  action_B: Int[Array, 'B'],
  doubt_B: Float[Array, 'B'],
  new_doubt_B: Float[Array, 'B'],
  *,
  retraction: float = 0.4,
  malformed: float = -0.2,
) -> Float[Array, 'B']:
  """What a choice is worth, given how likely claims are made up.

  | action | reward |
  |---|---|
  | maintain | `1 - doubt` |
  | correct | `1 - new_doubt` |
  | retract | `retraction`: worth it where no claim is likelier true than that |
  | malformed | `malformed` |

  Args:
    action_B: one of `MAINTAIN`, `RETRACT`, `CORRECT`, `MALFORMED`.
    doubt_B: probability that the claim is made up.
    new_doubt_B: the same of what replaces it; read for corrections only.
    retraction: what saying nothing is worth, between 0 and 1.
    malformed: what anything else is worth.
  """
  if not 0 <= retraction <= 1:
    raise ValueError(f'retraction={retraction} must be from 0 to 1.')
  return jnp.select(
    [action_B == MAINTAIN, action_B == CORRECT, action_B == RETRACT],
    [1 - doubt_B, 1 - new_doubt_B, jnp.full_like(doubt_B, retraction)],
    malformed,
  )


def best_of_n(
  action_BN: Int[np.ndarray, 'B N'], score_BN: Float[np.ndarray, 'B N']
) -> Int[np.ndarray, 'B']:
  """Which of `N` choices to take: the best of those that most agree with.

  The action that most samples chose, ties going to the one with the better
  best score; of these the sample with the highest score, ties to the first.

  Raises:
    ValueError: for shapes that differ, or scores that are not numbers.
  """
  action_BN, score_BN = np.asarray(action_BN), np.asarray(score_BN, float)
  if action_BN.shape != score_BN.shape or action_BN.ndim != 2:
    raise ValueError(
      f'actions {action_BN.shape} and scores {score_BN.shape} must be [B, N].'
    )
  if np.isnan(score_BN).any():
    raise ValueError('a score is not a number.')
  same_BNN = action_BN[:, :, None] == action_BN[:, None, :]
  votes_BN = same_BNN.sum(axis=2)
  # Lexicographic: votes first, then the score.
  most_B = votes_BN.max(axis=1, keepdims=True)
  return np.where(votes_BN == most_B, score_BN, -np.inf).argmax(axis=1)


class Reductions(NamedTuple):
  """Shares of the base's made-up claims that are gone, and where they went.

  `policy + in_context + direct = overall`.

  Attributes:
    policy: not made in the first place, with nobody watching.
    in_context: not made after earlier claims had been taken back or corrected.
    direct: made, caught, and corrected or retracted; less the true claims that
      were flagged by mistake and not kept.
    overall: all of it.
  """

  policy: float
  in_context: float
  direct: float
  overall: float


class Counts(NamedTuple):
  """Claims of a policy under a monitor, per completion or in all.

  Attributes:
    made_up: false claims, as first made.
    caught: of these, flagged.
    fixed: of the caught, replaced by a true one.
    retracted: of the caught, taken back.
    mistaken: true claims that were flagged.
    kept: of the mistaken, those that still stand.
  """

  made_up: float
  caught: float
  fixed: float
  retracted: float
  mistaken: float
  kept: float

  @property
  def standing(self) -> float:
    """False claims that stand at the end, and true ones that no longer do."""
    return (
      self.made_up - self.fixed - self.retracted + self.mistaken - self.kept
    )


def reductions(base: float, alone: float, watched: Counts) -> Reductions:
  """Where the reduction comes from (RLFR, appendix; as it is printed there).

  Args:
    base: made-up claims of the model before training, nobody watching.
    alone: those of the policy, nobody watching.
    watched: of the policy with interventions, of as many completions.

  Raises:
    ValueError: if the base makes nothing up, or counts contradict each other.
  """
  if base <= 0:
    raise ValueError(f'base={base} made-up claims: nothing can be reduced.')
  w = watched
  if w.caught > w.made_up or w.fixed + w.retracted > w.caught:
    raise ValueError(f'more is caught or mended than there was: {w}.')
  if w.kept > w.mistaken:
    raise ValueError(f'more is kept than was flagged by mistake: {w}.')
  return Reductions(
    policy=(base - alone) / base,
    in_context=(alone - w.made_up) / base,
    direct=(w.fixed + w.retracted - (w.mistaken - w.kept)) / base,
    overall=(base - w.standing) / base,
  )
