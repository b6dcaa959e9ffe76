"""Kullback-Leibler divergence of a policy from a reference, per token.

`KL(pi || ref) = E_{x ~ pi}[log pi(x) - log ref(x)]`. The estimators take the
log-probabilities of the token that was sampled from `pi`
(http://joschu.net/blog/kl-approx.html); the exact one all of them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def k1(
  logprobs: Float[Array, '...'], reference: Float[Array, '...']
) -> Float[Array, '...']:
  """`log pi - log ref`: unbiased, and of either sign.

  As a part of a reward its policy gradient is that of the divergence;
  differentiated itself it is not: its gradient is 0 on average.
  """
  return logprobs - reference


def k3(
  logprobs: Float[Array, '...'],
  reference: Float[Array, '...'],
  sampled: Float[Array, '...'] | None = None,
) -> Float[Array, '...']:
  """`r - 1 - log r` with `r = ref / pi`: unbiased, never negative.

  Differentiated, its gradient is on average that of `KL(ref || pi)`. Times
  `rho = exp(logprobs - sampled)` it is that of `KL(pi || ref)`, and unbiased
  also where the tokens were sampled from another policy
  (https://arxiv.org/abs/2512.02556).

  Args:
    logprobs: of the tokens, under the policy.
    reference: under the reference.
    sampled: under what they were sampled from; None: without `rho`.
  """
  log_ratio = reference - logprobs
  value = jnp.expm1(log_ratio) - log_ratio
  return value if sampled is None else jnp.exp(logprobs - sampled) * value


def exact(
  logits: Float[Array, '... V'], reference: Float[Array, '... V']
) -> Float[Array, '...']:
  """`sum_v pi_v (log pi_v - log ref_v)`, float32; 0 where `pi_v` is 0.

  Also where `ref_v` is 0 as well, which is NaN in Optax's: masked tokens.
  """
  logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
  other = jax.nn.log_softmax(reference.astype(jnp.float32), axis=-1)
  # Where pi is 0 its logarithm is not finite, nor is its gradient.
  out = jnp.isneginf(logprobs)
  safe = jnp.where(out, 0, logprobs)
  return jnp.sum(
    jnp.where(out, 0, jnp.exp(safe) * (safe - jnp.where(out, 0, other))),
    axis=-1,
  )
