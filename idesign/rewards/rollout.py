"""Sampling groups of completions, as whole texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from idesign import models


class Samples(NamedTuple):
  """Prompts with what a policy said, row `p G + g` sample `g` of prompt `p`.

  Attributes:
    tokens_BT: prompt and completion.
    mask_BT: which are real tokens.
    sampled_BT: which of them the policy chose, its stop token included.
    logprobs_BT: log-probability of the chosen ones under what they were sampled
      from; 0 elsewhere.
  """

  tokens_BT: Int[Array, 'B T']
  mask_BT: Bool[Array, 'B T']
  sampled_BT: Bool[Array, 'B T']
  logprobs_BT: Float[Array, 'B T']

  def rows(self, rows) -> Samples:
    """Some of them."""
    return jax.tree.map(lambda x: x[rows], self)


def sample_groups(
  apply: Callable[..., Any],
  params: Any,
  prompts_PT: Int[Array, 'P T'],
  mask_PT: Bool[Array, 'P T'],
  *,
  config: models.TransformerConfig,
  group: int,
  max_new_tokens: int,
  key: jax.Array,
  temperature: float = 1.0,
  stop_tokens: Sequence[int] = (),
  pad_token: int = 0,
) -> Samples:
  """`group` completions of each prompt; jittable.

  Args:
    apply: `Model.apply`, or a function around it.
    params: its first argument.
    prompts_PT: prompts, padded on the left or right.
    mask_PT: their real tokens.
    config: of the model, for the cache.
    group: completions of each prompt.
    max_new_tokens: of each.
    key: random key.
    temperature: of sampling.
    stop_tokens: that end a completion.
    pad_token: what follows them.

  Raises:
    ValueError: if prompt and completion do not fit in the model's context.
  """
  batch, time = prompts_PT.shape
  if time + max_new_tokens > config.max_len:
    raise ValueError(
      f'prompts of {time} tokens and max_new_tokens={max_new_tokens} do not '
      f'fit in max_len={config.max_len}: shorten one of them.'
    )
  prompts_BT = jnp.repeat(prompts_PT, group, axis=0)
  mask_BT = jnp.repeat(mask_PT, group, axis=0)
  said = models.generate(
    apply,
    params,
    prompts_PT,
    mask_PT,
    key=key,
    max_new_tokens=max_new_tokens,
    cache=models.init_cache(config, batch, time + max_new_tokens),
    repeats=group,
    temperature=temperature,
    stop_tokens=stop_tokens,
    pad_token=pad_token,
  )
  there_BN = jnp.arange(max_new_tokens)[None] < said.lengths_B[:, None]
  return Samples(
    jnp.concatenate([prompts_BT, said.tokens_BN], axis=1),
    jnp.concatenate([mask_BT, there_BN], axis=1),
    jnp.concatenate([jnp.zeros_like(mask_BT), there_BN], axis=1),
    jnp.pad(said.sampling_logprobs_BN, ((0, 0), (time, 0))),
  )
