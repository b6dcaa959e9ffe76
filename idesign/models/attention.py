"""Multi-head attention with grouped keys and values, and its cache."""

from __future__ import annotations

from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from idesign.models.config import BlockConfig, TransformerConfig
from idesign.models.layers import RMSNorm, linear, residual_gain, rotate


class KVCache(NamedTuple):
  """Keys and values of the tokens seen so far, for every layer.

  Slots are filled in the order in which tokens arrive, padding included;
  `valid_BS` says which hold real tokens.

  Attributes:
    k_LBSKH: rotated keys: layers, batch, slots, key-value heads, head_dim.
    v_LBSKH: values, likewise.
    positions_BS: position of each slot's token in its own sequence.
    valid_BS: whether a slot holds a real token.
    length: number of slots filled, a scalar.
  """

  k_LBSKH: Float[Array, 'L B S K H']
  v_LBSKH: Float[Array, 'L B S K H']
  positions_BS: Int[Array, 'B S']
  valid_BS: Bool[Array, 'B S']
  length: Int[Array, '']


def init_cache(config: TransformerConfig, batch: int, slots: int) -> KVCache:
  """An empty cache for `batch` sequences of up to `slots` tokens each.

  Prompt, padding and generated tokens all take a slot.

  Raises:
    ValueError: more slots than the model has learned positions.
  """
  if config.rope is None and slots > config.max_len:
    raise ValueError(
      f'a cache of {slots} slots, but there are learned positions for '
      f'max_len={config.max_len}.'
    )
  shape = (config.n_layers, batch, slots, config.n_kv_heads, config.head_dim)
  return KVCache(
    k_LBSKH=jnp.zeros(shape, config.dtypes.compute),
    v_LBSKH=jnp.zeros(shape, config.dtypes.compute),
    positions_BS=jnp.zeros((batch, slots), jnp.int32),
    valid_BS=jnp.zeros((batch, slots), bool),
    length=jnp.zeros((), jnp.int32),
  )


class KeySlots(NamedTuple):
  """One layer's part of a cache, and where new keys go in it."""

  k_BSKH: Float[Array, 'B S K H']
  v_BSKH: Float[Array, 'B S K H']
  start: Int[Array, '']


class Attention(nnx.Module):
  """`o(softmax(scale q k^T) v)` with scale, biases and norms as configured.

  Query heads `g n .. g n + n - 1` share key-value head `g`, where
  `n = n_heads / n_kv_heads`. Scores and softmax are float32.
  """

  def __init__(self, config: BlockConfig, rngs: nnx.Rngs):
    self.config = config
    d_model, head_dim = config.d_model, config.head_dim
    d_q, d_kv = config.n_heads * head_dim, config.n_kv_heads * head_dim
    bias = config.qkv_bias
    self.q = linear(d_model, d_q, config, rngs, use_bias=bias)
    self.k = linear(d_model, d_kv, config, rngs, use_bias=bias)
    self.v = linear(d_model, d_kv, config, rngs, use_bias=bias)
    self.o = linear(
      d_q,
      d_model,
      config,
      rngs,
      use_bias=config.attn_out_bias,
      gain=residual_gain(config),
    )
    if config.qk_norm is not None:
      whole = config.qk_norm == 'width'
      self.q_norm = RMSNorm(d_q if whole else head_dim, config)
      self.k_norm = RMSNorm(d_kv if whole else head_dim, config)

  def __call__(
    self,
    h_BTD: Float[Array, 'B T D'],
    *,
    mask_BTS: Bool[Array, 'B T S'] | None,
    angles_BTR: Float[Array, 'B T R'] | None,
    slots: KeySlots | None,
  ) -> tuple[Float[Array, 'B T D'], KeySlots | None]:
    """Attends.

    Args:
      h_BTD: inputs.
      mask_BTS: which keys each query may see; None: all of them. A query that
        may see none gets zeros.
      angles_BTR: rotary angles of the new tokens; None: no rotation.
      slots: earlier keys and values; None: the new tokens are all there is.

    Returns:
      The output, and the slots with the new keys and values written.
    """
    cfg = self.config
    q_BTNH = self._heads(self.q(h_BTD), cfg.n_heads, 'q_norm')
    k_BSKH = self._heads(self.k(h_BTD), cfg.n_kv_heads, 'k_norm')
    v_BSKH = self._heads(self.v(h_BTD), cfg.n_kv_heads, None)
    if angles_BTR is not None:
      q_BTNH, k_BSKH = rotate(q_BTNH, angles_BTR), rotate(k_BSKH, angles_BTR)
    if slots is not None:
      at = (0, slots.start, 0, 0)
      k_BSKH = jax.lax.dynamic_update_slice(slots.k_BSKH, k_BSKH, at)
      v_BSKH = jax.lax.dynamic_update_slice(slots.v_BSKH, v_BSKH, at)
      slots = slots._replace(k_BSKH=k_BSKH, v_BSKH=v_BSKH)

    batch, time = h_BTD.shape[:2]
    q_BTKGH = q_BTNH.reshape(batch, time, cfg.n_kv_heads, -1, cfg.head_dim)
    scores_BKGTS = jnp.einsum(
      'BTKGH,BSKH->BKGTS', q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
    )
    scale = cfg.head_dim**-0.5 if cfg.attn_scale is None else cfg.attn_scale
    scores_BKGTS = scores_BKGTS * scale
    scores_BKGTS = softcap(scores_BKGTS, cfg.attn_softcap)
    weights_BKGTS = _masked_softmax(scores_BKGTS, mask_BTS)
    out_BTKGH = jnp.einsum(
      'BKGTS,BSKH->BTKGH', weights_BKGTS.astype(v_BSKH.dtype), v_BSKH
    )
    return self.o(out_BTKGH.reshape(batch, time, -1)), slots

  def _heads(self, x_BTE: Array, heads: int, norm: str | None) -> Array:
    """Splits into heads, normalising before or after as configured."""
    qk_norm = self.config.qk_norm if norm else None
    if qk_norm == 'width':
      x_BTE = getattr(self, norm)(x_BTE)
    x_BTNH = x_BTE.reshape(*x_BTE.shape[:2], heads, self.config.head_dim)
    return getattr(self, norm)(x_BTNH) if qk_norm == 'head' else x_BTNH


def softcap(x: Array, cap: float | None) -> Array:
  """`cap tanh(x / cap)`: bounded, and the identity near zero."""
  return x if cap is None else cap * jnp.tanh(x / cap)


def _masked_softmax(
  scores_BKGTS: Float[Array, 'B K G T S'],
  mask_BTS: Bool[Array, 'B T S'] | None,
) -> Float[Array, 'B K G T S']:
  if mask_BTS is None:
    return jax.nn.softmax(scores_BKGTS, axis=-1)
  # A query that may see nothing: the finite floor keeps its softmax from being
  # 0/0, and the second `where` makes its uniform weights zeros.
  mask = mask_BTS[:, None, None]
  floor = jnp.finfo(scores_BKGTS.dtype).min
  weights = jax.nn.softmax(jnp.where(mask, scores_BKGTS, floor), axis=-1)
  return jnp.where(mask, weights, 0)
