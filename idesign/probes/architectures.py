"""Probes: small functions of a few activations that say how likely a label is.

A probe reads one span, `h [T, E]` with a mask `[T]` of the span's tokens, and
gives one logit per class (one alone for two classes). Write
`jax.vmap(apply, (None, 0, 0))` for many. Inputs are standardised by numbers
that were fixed when it was fitted.

| kind | logits |
|---|---|
| `logistic` | `w . mean_t z_t + b` |
| `mean_difference` | the same, `w` along the difference of the classes' means |
| `mlp` | `w . gelu(W mean_t z_t + a) + b` |
| `attention` | `w . concat_k sum_t softmax_t(q_k . K z_t / sqrt d) V z_t + b` |

Mean differences after Marks and Tegmark 2023
(https://arxiv.org/abs/2310.06824), attention after
https://arxiv.org/abs/2602.10067.

A mean over tokens can be diluted by filler (https://arxiv.org/abs/2506.14261);
`pool='max'` takes the largest logit of any token instead, `pool='last'` that of
the span's last token. Attention pools in its own way.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Kind = Literal['logistic', 'mean_difference', 'mlp', 'attention']
Pool = Literal['mean', 'max', 'last']
ProbeParams = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeConfig:
  """What a probe is.

  Attributes:
    kind: see the module.
    d_in: width `E` of what it reads; of several layers, their sum.
    classes: number of logits; 1 for two classes.
    pool: how tokens become one, where the kind does not say.
    hidden: width of the hidden layer (`mlp`), or of each head (`attention`).
    heads: of `attention`, each with a learned query.
  """

  kind: Kind
  d_in: int
  classes: int = 1
  pool: Pool = 'mean'
  hidden: int = 32
  heads: int = 4

  def __post_init__(self):
    for name, choices in (('kind', get_args(Kind)), ('pool', get_args(Pool))):
      if getattr(self, name) not in choices:
        raise ValueError(
          f'{name}={getattr(self, name)!r}; choose from {choices}.'
        )
    for name in ('d_in', 'classes', 'hidden', 'heads'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} must be at least 1.')
    if self.kind == 'mean_difference' and self.classes != 1:
      raise ValueError(
        f'classes={self.classes}: a mean difference tells two classes apart, '
        'with one logit.'
      )


def init_probe(config: ProbeConfig, key: jax.Array) -> ProbeParams:
  """Parameters that read every standardised activation as it is.

  A dictionary of float32 arrays: `mean` and `scale` `[E]`, `weight` and `bias`
  of the output, and those of the hidden layer or the heads.
  """
  d_in, hidden, classes = config.d_in, config.hidden, config.classes
  keys = jax.random.split(key, 3)
  normal = lambda key, *shape: jax.random.normal(key, shape) / math.sqrt(
    shape[0]
  )
  params = {'mean': jnp.zeros(d_in), 'scale': jnp.ones(d_in)}
  width = d_in
  if config.kind == 'mlp':
    params['in_weight'] = normal(keys[0], d_in, hidden)
    params['in_bias'] = jnp.zeros(hidden)
    width = hidden
  if config.kind == 'attention':
    # Keys start at zero: every head begins as the mean over the span.
    params['query'] = normal(keys[0], config.heads, hidden)
    params['key_weight'] = jnp.zeros((d_in, hidden))
    params['value_weight'] = normal(keys[1], d_in, hidden)
    width = config.heads * hidden
  linear = config.kind in ('logistic', 'mean_difference')
  params['weight'] = (
    jnp.zeros((width, classes)) if linear else normal(keys[2], width, classes)
  )
  params['bias'] = jnp.zeros(classes)
  return params


def apply_probe(
  config: ProbeConfig,
  params: ProbeParams,
  h_TE: Float[Array, 'T E'],
  mask_T: Bool[Array, 'T'],
) -> Float[Array, 'C']:
  """Logits of one span, float32.

  A span without a token gives the logits of the mean of the training set.

  Raises:
    ValueError: for activations of another width.
  """
  if h_TE.ndim != 2 or h_TE.shape[1] != config.d_in:
    raise ValueError(
      f'activations are {h_TE.shape}; this probe reads [tokens, '
      f'{config.d_in}] (layers side by side).'
    )
  standardise = lambda h_E: (h_E - params['mean']) / params['scale']
  z_TE = jax.vmap(standardise)(h_TE.astype(jnp.float32))
  # What stands outside the span makes no difference, NaN neither.
  z_TE = jnp.where(mask_T[:, None], z_TE, 0)
  if config.kind == 'attention':
    return _attend(config, params, z_TE, mask_T)
  if config.pool == 'mean':
    total = jnp.maximum(jnp.sum(mask_T), 1)
    return _head(config, params, jnp.sum(z_TE, axis=0) / total)
  if config.pool == 'last':
    last = jnp.max(jnp.where(mask_T, jnp.arange(len(mask_T)), 0))
    return _head(config, params, z_TE[last])
  logits_TC = jax.vmap(lambda z: _head(config, params, z))(z_TE)
  largest_C = jnp.max(jnp.where(mask_T[:, None], logits_TC, -jnp.inf), axis=0)
  return jnp.where(jnp.any(mask_T), largest_C, logits_TC[0])


def token_logits(
  config: ProbeConfig, params: ProbeParams, h_TE: Float[Array, 'T E']
) -> Float[Array, 'T C']:
  """Logits of every token as a span of its own: where something is said."""
  one = jnp.ones(1, bool)
  return jax.vmap(lambda h: apply_probe(config, params, h[None], one))(h_TE)


def _head(config, params, z_E):
  if config.kind == 'mlp':
    z_E = jax.nn.gelu(z_E @ params['in_weight'] + params['in_bias'])
  return z_E @ params['weight'] + params['bias']


def _attend(config, params, z_TE, mask_T):
  k_TF = z_TE @ params['key_weight']
  scores_KT = params['query'] @ k_TF.T / math.sqrt(config.hidden)
  floor = jnp.finfo(scores_KT.dtype).min
  share_KT = jax.nn.softmax(jnp.where(mask_T[None], scores_KT, floor), axis=-1)
  pooled_KF = share_KT @ (z_TE @ params['value_weight'])
  return pooled_KF.reshape(-1) @ params['weight'] + params['bias']
