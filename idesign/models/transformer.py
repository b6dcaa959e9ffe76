"""One decoder for many families of language models."""

from __future__ import annotations

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from idesign.models import blocks as blocks_lib
from idesign.models.attention import KVCache, softcap
from idesign.models.config import TransformerConfig
from idesign.models.functional import Model, functional
from idesign.models.layers import flat_dot, norm, rope_angles


def transformer(config: TransformerConfig) -> Model:
  """A decoder-only language model as pure functions.

  `apply(params, tokens_BT, *, mask_BT=None, positions_BT=None, cache=None)`
  returns logits `[B, T, vocab]` in the output dtype, or `(logits, cache)` when
  a cache (`init_cache`) is given: then the tokens continue those in the cache.

  * `mask_BT`: true where there is a token, false for padding, on whichever
    side. Padding is never attended to; what is returned at padding is finite
    and means nothing. A token sees itself and what came before it.
  * `positions_BT`: position of each token in its own sequence; left out, they
    count the real tokens from 0: `cumsum(mask) - 1`, at least 0, plus the
    number of real tokens in the cache. Sliding windows are measured in them;
    causality is not: it follows the order of the tokens.

  Parameters of the blocks are stacked, `blocks/... [n_layers, ...]`, and
  applied in one scan. Kernels are `[d_in, d_out]`. Paths:

    embed/embedding [V, D]            positions/embedding [max_len, D]
    blocks/attn/{q,k,v,o}/{kernel,bias}
    blocks/attn/{q_norm,k_norm}/scale
    blocks/mlp/{gate,up,down}/{kernel,bias}
    blocks/{pre,post}_{attn,mlp}_norm/{scale,bias}
    final_norm/{scale,bias}           lm_head/kernel [D, V]

  Each block names its activations `resid_pre`, `attn_out`, `mlp_out` and
  `resid_post` with `jax.ad_checkpoint.checkpoint_name`.

  Kernels start normal with variance `1 / d_in`, those that write to the
  residual stream divided by a further `2 n_layers`; embeddings with variance
  `1 / d_model`.

  Edge cases:

    a token outside the vocabulary    NaN logits in its row
    a learned position >= max_len     NaN logits in its row; `T > max_len`
                                      raises ValueError
    more tokens than cache slots      ValueError if known when traced, else
                                      NaN logits
    a row without any real token      finite logits
  """
  return functional(lambda rngs: _Transformer(config, rngs), config)


class _Transformer(nnx.Module):
  def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
    self.config = config
    self.embed = _embed(config.vocab_size, config, rngs)
    if config.rope is None:
      self.positions = _embed(config.max_len, config, rngs)
    self.blocks = blocks_lib.stack(config, rngs)
    self.final_norm = norm(config)
    if not config.tie_embeddings:
      self.lm_head = nnx.Linear(
        config.d_model,
        config.vocab_size,
        use_bias=False,
        kernel_init=nnx.initializers.variance_scaling(1, 'fan_in', 'normal'),
        dtype=config.dtypes.compute,
        param_dtype=config.dtypes.param,
        preferred_element_type=config.dtypes.output,
        dot_general=flat_dot,
        rngs=rngs,
      )

  def __call__(
    self,
    tokens_BT: Int[Array, 'B T'],
    *,
    mask_BT: Bool[Array, 'B T'] | None = None,
    positions_BT: Int[Array, 'B T'] | None = None,
    cache: KVCache | None = None,
  ):
    config = self.config
    _check_shapes(tokens_BT, mask_BT, positions_BT, cache, config)
    if mask_BT is None:
      mask_BT = jnp.ones(tokens_BT.shape, bool)
    mask_BT = mask_BT.astype(bool)
    if positions_BT is None:
      positions_BT = jnp.maximum(
        jnp.cumsum(mask_BT, axis=1, dtype=jnp.int32) - 1, 0
      )
      if cache is not None:
        seen_B = jnp.sum(cache.valid_BS, axis=1, dtype=jnp.int32)
        positions_BT = positions_BT + seen_B[:, None]
    if cache is None:
      start, valid_BS, key_positions_BS = 0, mask_BT, positions_BT
    else:
      start = cache.length
      valid_BS = jax.lax.dynamic_update_slice(
        cache.valid_BS, mask_BT, (0, start)
      )
      key_positions_BS = jax.lax.dynamic_update_slice(
        cache.positions_BS, positions_BT.astype(jnp.int32), (0, start)
      )
    queries_T = start + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
    keys_S = jnp.arange(valid_BS.shape[1], dtype=jnp.int32)
    causal_TS = keys_S[None, :] <= queries_T[:, None]
    mask_BTS = causal_TS[None] & valid_BS[:, None, :]
    distance_BTS = positions_BT[:, :, None] - key_positions_BS[:, None, :]

    # A negative index would count from the end.
    x_BTD = self.embed(_index(tokens_BT, mask_BT, config.vocab_size))
    if config.scale_embeddings:
      # Rounded to the compute dtype, as these models were trained: in bfloat16
      # sqrt(3072) is 55.5.
      x_BTD = x_BTD * jnp.asarray(config.d_model**0.5, x_BTD.dtype)
    angles_BTR = local_angles_BTR = None
    if config.rope is None:
      where = _index(positions_BT, mask_BT, config.max_len)
      x_BTD = x_BTD + self.positions(where)
    else:
      angles_BTR = rope_angles(config.rope, config.head_dim, positions_BT)
    if config.rope_local is not None:
      local_angles_BTR = rope_angles(
        config.rope_local, config.head_dim, positions_BT
      )
    x_BTD, cache = blocks_lib.run(
      self.blocks,
      x_BTD,
      mask_BTS=mask_BTS,
      distance_BTS=distance_BTS,
      angles_BTR=angles_BTR,
      local_angles_BTR=local_angles_BTR,
      cache=cache,
    )
    logits_BTV = self._head(self.final_norm(x_BTD))
    logits_BTV = softcap(logits_BTV, config.logit_softcap)
    if cache is None:
      return logits_BTV
    length = start + tokens_BT.shape[1]
    # Past the last slot the writes above were shifted over older tokens.
    logits_BTV = jnp.where(length > valid_BS.shape[1], jnp.nan, logits_BTV)
    cache = cache._replace(
      positions_BS=key_positions_BS,
      valid_BS=valid_BS,
      length=jnp.asarray(length, jnp.int32),
    )
    return logits_BTV, cache

  def _head(self, h_BTD: Float[Array, 'B T D']) -> Float[Array, 'B T V']:
    if not self.config.tie_embeddings:
      return self.lm_head(h_BTD)
    kernel_DV = self.embed.embedding[...].astype(h_BTD.dtype).T
    return flat_dot(
      h_BTD, kernel_DV, preferred_element_type=self.config.dtypes.output
    )


def _embed(rows: int, config: TransformerConfig, rngs: nnx.Rngs) -> nnx.Embed:
  return nnx.Embed(
    rows,
    config.d_model,
    embedding_init=nnx.initializers.normal(config.d_model**-0.5),
    dtype=config.dtypes.compute,
    param_dtype=config.dtypes.param,
    rngs=rngs,
  )


def _index(index_BT, mask_BT, rows: int):
  """Rows to look up; what does not exist is NaN, but for padding."""
  missing_BT = (index_BT < 0) | (index_BT >= rows)
  return jnp.where(missing_BT, jnp.where(mask_BT, rows, 0), index_BT)


def _check_shapes(tokens_BT, mask_BT, positions_BT, cache, config) -> None:
  """Raises ValueError before anything is traced."""
  if tokens_BT.ndim != 2:
    raise ValueError(f'tokens must be [batch, time], not {tokens_BT.shape}.')
  for name, array in (('mask_BT', mask_BT), ('positions_BT', positions_BT)):
    if array is not None and array.shape != tokens_BT.shape:
      raise ValueError(
        f'{name} is {array.shape}, tokens are {tokens_BT.shape}.'
      )
  batch, time = tokens_BT.shape
  if config.rope is None and time > config.max_len:
    raise ValueError(
      f'{time} tokens, but there are learned positions for max_len='
      f'{config.max_len}.'
    )
  if cache is None:
    return
  if cache.valid_BS.shape[0] != batch:
    raise ValueError(
      f'the cache holds {cache.valid_BS.shape[0]} sequences, tokens {batch}.'
    )
  slots = cache.valid_BS.shape[1]
  known = not isinstance(cache.length, jax.core.Tracer)
  if (int(cache.length) if known else 0) + time > slots:
    raise ValueError(
      f'{time} more tokens do not fit into a cache of {slots} slots'
      + (f' of which {int(cache.length)} are taken.' if known else '.')
    )
