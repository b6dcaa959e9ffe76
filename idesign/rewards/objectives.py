"""Policy objectives: what is minimised, given samples and their advantages.

Each is `objective(logprobs_BN, sampled_BN, advantages_BN) -> [B, N]`, the loss
of every token, whose gradient with respect to `logprobs_BN` is what matters.
With the ratio `rho = exp(logprobs - sampled)` of the policy to what the tokens
were sampled from:

| objective | loss of a token | used by |
|---|---|---|
| `reinforce` | `-sg(min(rho, cap)) A log pi` | RLOO |
| `clipped` | `-min(rho A, clip(rho, 1 - low, 1 + high) A)` | PPO, GRPO |
| `cispo` | `-sg(clip(rho, 1 - low, 1 + high)) A log pi` | CISPO |

and `mean_loss` says how tokens are averaged. On policy, where `rho` is 1, all
three have the same gradient, `-A grad log pi`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Objective = Callable[
  [Float[Array, 'B N'], Float[Array, 'B N'], Float[Array, 'B N']],
  Float[Array, 'B N'],
]
Average = Literal['sequence', 'token', 'constant']


def reinforce(cap: float = jnp.inf) -> Objective:
  """REINFORCE with the importance ratio truncated at `cap`.

  Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740, for the objective of
  RLOO; truncation as in https://arxiv.org/abs/2602.10067 (there at 4).
  """
  if not cap >= 1:
    raise ValueError(f'cap={cap} must be at least 1, the ratio on policy.')
  return cispo(low=1.0, high=cap - 1)


def clipped(low: float = 0.2, high: float | None = None) -> Objective:
  """The clipped surrogate of PPO and GRPO; `high` is `low` if None.

  Schulman et al. 2017, https://arxiv.org/abs/1707.06347; Shao et al. 2024,
  https://arxiv.org/abs/2402.03300. A token whose ratio is already beyond the
  bound on the side that its advantage asks for has no gradient.
  """
  low, high = _bounds(low, high)

  def objective(logprobs_BN, sampled_BN, advantages_BN):
    ratio_BN = jnp.exp(logprobs_BN - sampled_BN)
    near_BN = jnp.clip(ratio_BN, 1 - low, 1 + high)
    return -jnp.minimum(ratio_BN * advantages_BN, near_BN * advantages_BN)

  return objective


def cispo(low: float = 1.0, high: float | None = 3.0) -> Objective:
  """REINFORCE with the importance ratio clipped to `[1 - low, 1 + high]`.

  MiniMax 2025, https://arxiv.org/abs/2506.13585: the weight is clipped, not the
  token left out, so that rare tokens keep their gradient. With `low=1` only
  the upper bound remains, as published; `high=3` is a cap of 4.
  """
  low, high = _bounds(low, high)

  def objective(logprobs_BN, sampled_BN, advantages_BN):
    ratio_BN = jnp.exp(logprobs_BN - sampled_BN)
    weight_BN = jax.lax.stop_gradient(jnp.clip(ratio_BN, 1 - low, 1 + high))
    return -weight_BN * advantages_BN * logprobs_BN

  return objective


def _bounds(low: float, high: float | None) -> tuple[float, float]:
  high = low if high is None else high
  if not 0 <= low <= 1 or high < 0:
    raise ValueError(
      f'low={low} must be from 0 to 1 and high={high} at least 0: the ratio is '
      'kept in [1 - low, 1 + high].'
    )
  return low, high


def mean_loss(
  loss_BN: Float[Array, 'B N'],
  mask_BN: Bool[Array, 'B N'],
  *,
  average: Average,
) -> Float[Array, '']:
  """One number from the losses of tokens.

  | average | formula | used by |
  |---|---|---|
  | `sequence` | mean over samples of the mean over their tokens | GRPO |
  | `token` | mean over all tokens | DAPO, CISPO |
  | `constant` | sum over all tokens `/ (B N)` | Dr. GRPO, RLOO up to `N` |

  In the first a token of a long sample counts less than one of a short sample;
  the last does not depend on lengths at all. Samples without a token count as
  0.

  Raises:
    ValueError: for an unknown average, or shapes that differ.
  """
  if average not in get_args(Average):
    raise ValueError(f'average={average!r}; choose from {get_args(Average)}.')
  if loss_BN.shape != mask_BN.shape:
    raise ValueError(f'losses {loss_BN.shape}, their mask {mask_BN.shape}.')
  # A weight of 0 would not do: what stands where nothing was sampled may be
  # infinite.
  loss_BN = jnp.where(mask_BN, loss_BN, 0)
  if average == 'constant':
    return jnp.mean(loss_BN)
  if average == 'token':
    return jnp.sum(loss_BN) / jnp.maximum(jnp.sum(mask_BN), 1)
  lengths_B = jnp.maximum(jnp.sum(mask_BN, axis=1), 1)
  return jnp.mean(jnp.sum(loss_BN, axis=1) / lengths_B)
