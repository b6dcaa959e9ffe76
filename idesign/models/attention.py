"""Multi-head attention with grouped keys and values, and its cache."""

from __future__ import annotations

import functools
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from idesign.models.config import BlockConfig, TransformerConfig
from idesign.models.layers import (
  RMSNorm, linear, recomputed, residual_gain, rotate,
)  # fmt: skip


class KVCache(NamedTuple):
  """Keys and values of the tokens seen so far, for every layer.

  Slots are filled in the order in which tokens arrive, padding included;
  `valid_BS` says which hold real tokens.

  Attributes:
    k_LBKSH: rotated keys: layers, batch, key-value heads, slots, head_dim.
    v_LBKSH: values, likewise.
    positions_BS: position of each slot's token in its own sequence.
    valid_BS: whether a slot holds a real token.
    length: number of slots filled, a scalar.
  """

  k_LBKSH: Float[Array, 'L B K S H']
  v_LBKSH: Float[Array, 'L B K S H']
  positions_BS: Int[Array, 'B S']
  valid_BS: Bool[Array, 'B S']
  length: Int[Array, '']

  def repeated(self, repeats: int) -> KVCache:
    """Each sequence `repeats` times, next to each other."""
    repeat = lambda x, axis: jnp.repeat(x, repeats, axis=axis)
    return KVCache(
      repeat(self.k_LBKSH, 1), repeat(self.v_LBKSH, 1),
      repeat(self.positions_BS, 0), repeat(self.valid_BS, 0), self.length,
    )  # fmt: skip


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
  shape = (config.n_layers, batch, config.n_kv_heads, slots, config.head_dim)
  return KVCache(
    k_LBKSH=jnp.zeros(shape, config.dtypes.compute),
    v_LBKSH=jnp.zeros(shape, config.dtypes.compute),
    positions_BS=jnp.zeros((batch, slots), jnp.int32),
    valid_BS=jnp.zeros((batch, slots), bool),
    length=jnp.zeros((), jnp.int32),
  )


class KeySlots(NamedTuple):
  """A cache's keys and values, and where in it a layer's new ones go."""

  k_LBKSH: Float[Array, 'L B K S H']
  v_LBKSH: Float[Array, 'L B K S H']
  layer: Int[Array, '']
  start: Int[Array, '']

  def written(self, k_BKTH: Array, v_BKTH: Array) -> KeySlots:
    """With new keys and values; in place where XLA may."""
    at = (self.layer, 0, 0, self.start, 0)
    write = lambda slots, new: jax.lax.dynamic_update_slice(
      slots, new[None], at
    )
    return self._replace(
      k_LBKSH=write(self.k_LBKSH, k_BKTH), v_LBKSH=write(self.v_LBKSH, v_BKTH)
    )

  def read(self) -> tuple[Float[Array, 'B K S H'], Float[Array, 'B K S H']]:
    """The layer's keys and values."""
    read = lambda slots: jax.lax.dynamic_index_in_dim(
      slots, self.layer, keepdims=False
    )
    return read(self.k_LBKSH), read(self.v_LBKSH)


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
    k_BTKH = self._heads(self.k(h_BTD), cfg.n_kv_heads, 'k_norm')
    v_BTKH = self._heads(self.v(h_BTD), cfg.n_kv_heads, None)
    if angles_BTR is not None:
      q_BTNH, k_BTKH = rotate(q_BTNH, angles_BTR), rotate(k_BTKH, angles_BTR)
    batch, time = h_BTD.shape[:2]
    q_BTKGH = q_BTNH.reshape(batch, time, cfg.n_kv_heads, -1, cfg.head_dim)
    q_BKGTH = jnp.moveaxis(q_BTKGH, 1, 3)
    k_BKSH, v_BKSH = jnp.moveaxis(k_BTKH, 1, 2), jnp.moveaxis(v_BTKH, 1, 2)
    if slots is not None:
      slots = slots.written(k_BKSH, v_BKSH)
      k_BKSH, v_BKSH = slots.read()
    out_BKGTH = _attend(q_BKGTH, k_BKSH, v_BKSH, mask_BTS, cfg)
    out_BTKGH = jnp.moveaxis(out_BKGTH, 3, 1)
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


# There are as many scores as pairs of tokens: for the backward pass a layer
# keeps queries, keys and values, and scores are computed again.
@functools.partial(recomputed, static_argnums=4)
def _attend(
  q_BKGTH: Float[Array, 'B K G T H'],
  k_BKSH: Float[Array, 'B K S H'],
  v_BKSH: Float[Array, 'B K S H'],
  mask_BTS: Bool[Array, 'B T S'] | None,
  config: BlockConfig,
) -> Float[Array, 'B K G T H']:
  scores_BKGTS = jnp.einsum(
    'BKGTH,BKSH->BKGTS', q_BKGTH, k_BKSH, preferred_element_type=jnp.float32
  )
  scale = config.attn_scale
  scores_BKGTS = scores_BKGTS * (
    config.head_dim**-0.5 if scale is None else scale
  )
  scores_BKGTS = softcap(scores_BKGTS, config.attn_softcap)
  if mask_BTS is not None:
    # Added, not chosen by `where`: one small array for all heads. It is finite,
    # so that the softmax of a query that may see nothing is not 0/0.
    floor = jnp.finfo(scores_BKGTS.dtype).min
    scores_BKGTS = scores_BKGTS + jnp.where(mask_BTS, 0, floor)[:, None, None]
  weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1)
  out_BKGTH = jnp.einsum(
    'BKGTS,BKSH->BKGTH', weights_BKGTS.astype(v_BKSH.dtype), v_BKSH
  )
  if mask_BTS is None:
    return out_BKGTH
  sees_BT = jnp.any(mask_BTS, axis=2)
  return jnp.where(sees_BT[:, None, None, :, None], out_BKGTH, 0)
