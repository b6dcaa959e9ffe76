"""A stack of transformer blocks: parameters stacked by layer, one `scan`."""

from __future__ import annotations

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from idesign.models.attention import Attention, KeySlots, KVCache
from idesign.models.config import BlockConfig
from idesign.models.layers import MLP, norm


class Block(nnx.Module):
  """Attention and MLP around a residual stream.

  With `n` the configured norm, `x` the input and `m = x` if the residual is
  parallel, else `m = x + attn_out`:

    pre-norm:   attn_out = attn(n(x)),      mlp_out = mlp(n(m))
    post-norm:  attn_out = n(attn(x)),      mlp_out = n(mlp(m))
    both:       attn_out = n(attn(n(x))),   mlp_out = n(mlp(n(m)))

  and the output is `x + attn_out + mlp_out`. The four activations are named
  `resid_pre`, `attn_out`, `mlp_out` and `resid_post`.
  """

  def __init__(self, config: BlockConfig, rngs: nnx.Rngs):
    self.config = config
    self.attn = Attention(config, rngs)
    self.mlp = MLP(config, rngs)
    if config.norm_position != 'post':
      self.pre_attn_norm = norm(config)
      self.pre_mlp_norm = norm(config)
    if config.norm_position != 'pre':
      self.post_attn_norm = norm(config)
      self.post_mlp_norm = norm(config)

  def __call__(
    self,
    x_BTD: Float[Array, 'B T D'],
    *,
    mask_BTS: Bool[Array, 'B T S'] | None,
    angles_BTR: Float[Array, 'B T R'] | None,
    slots: KeySlots | None,
  ) -> tuple[Float[Array, 'B T D'], KeySlots | None]:
    pre = self.config.norm_position != 'post'
    post = self.config.norm_position != 'pre'
    x_BTD = checkpoint_name(x_BTD, 'resid_pre')
    h_BTD = self.pre_attn_norm(x_BTD) if pre else x_BTD
    h_BTD, slots = self.attn(
      h_BTD, mask_BTS=mask_BTS, angles_BTR=angles_BTR, slots=slots
    )
    h_BTD = self.post_attn_norm(h_BTD) if post else h_BTD
    attn_out_BTD = checkpoint_name(h_BTD, 'attn_out')
    after_BTD = x_BTD + attn_out_BTD
    h_BTD = x_BTD if self.config.parallel_residual else after_BTD
    h_BTD = self.mlp(self.pre_mlp_norm(h_BTD) if pre else h_BTD)
    h_BTD = self.post_mlp_norm(h_BTD) if post else h_BTD
    mlp_out_BTD = checkpoint_name(h_BTD, 'mlp_out')
    return checkpoint_name(after_BTD + mlp_out_BTD, 'resid_post'), slots


def stack(config: BlockConfig, rngs: nnx.Rngs) -> Block:
  """`n_layers` independent blocks as one, its parameters `[n_layers, ...]`."""

  def init(key: jax.Array) -> nnx.State:
    return nnx.state(Block(config, nnx.Rngs(key)))

  graphdef = nnx.graphdef(nnx.eval_shape(lambda: Block(config, nnx.Rngs(0))))
  keys = jax.random.split(rngs.params(), config.n_layers)
  return nnx.merge(graphdef, jax.vmap(init)(keys))


def run(
  blocks: Block,
  x_BTD: Float[Array, 'B T D'],
  *,
  mask_BTS: Bool[Array, 'B T S'] | None = None,
  distance_BTS: Int[Array, 'B T S'] | None = None,
  angles_BTR: Float[Array, 'B T R'] | None = None,
  local_angles_BTR: Float[Array, 'B T R'] | None = None,
  cache: KVCache | None = None,
) -> tuple[Float[Array, 'B T D'], KVCache | None]:
  """Runs stacked blocks in one `jax.lax.scan` over layers.

  Args:
    blocks: from `stack`.
    x_BTD: the residual stream before the first block.
    mask_BTS: which keys each query may see in a layer without a window; None:
      all.
    distance_BTS: position of the query minus position of the key; needed with
      sliding windows.
    angles_BTR: rotary angles; None: no rotation.
    local_angles_BTR: rotary angles in layers with a window; None: the same.
    cache: keys and values seen so far; None: none.

  Returns:
    The stream after the last block, and the cache with the keys and values of
    the new tokens (its bookkeeping is the caller's).
  """
  config = blocks.config
  graphdef, layers = nnx.split(blocks)
  windows_L = local_L = None
  if config.sliding_window is not None:
    endless = jnp.iinfo(jnp.int32).max
    windows_L = jnp.array(
      [endless if w is None else w for w in config.sliding_window], jnp.int32
    )
    local_L = jnp.array([w is not None for w in config.sliding_window])

  def body(carry, layer):
    x_BTD, slots = carry
    state, window, local, i = layer
    mask = mask_BTS
    if window is not None:
      mask = mask_BTS & (distance_BTS < window)
    angles = angles_BTR
    if local_angles_BTR is not None:
      angles = jnp.where(local, local_angles_BTR, angles_BTR)
    if slots is not None:
      slots = slots._replace(layer=i)
    carry = nnx.merge(graphdef, state)(
      x_BTD, mask_BTS=mask, angles_BTR=angles, slots=slots
    )
    return carry, None

  if config.remat:
    body = jax.checkpoint(body, prevent_cse=False)
  layers_L = jnp.arange(config.n_layers, dtype=jnp.int32)
  slots = None
  if cache is not None:
    slots = KeySlots(cache.k_LBKSH, cache.v_LBKSH, layers_L[0], cache.length)
  (x_BTD, slots), _ = jax.lax.scan(
    body,
    (x_BTD, slots),
    (layers, windows_L, local_L, layers_L),
    unroll=config.unroll,
  )
  if cache is None:
    return x_BTD, None
  return x_BTD, cache._replace(k_LBKSH=slots.k_LBKSH, v_LBKSH=slots.v_LBKSH)
