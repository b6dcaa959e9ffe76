"""Norms, rotary positions and the MLP, as NNX modules and pure functions."""

from __future__ import annotations

import functools

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from idesign.models.config import BlockConfig, LinearScaling, RopeConfig

_ACTIVATIONS = {
  'silu': jax.nn.silu,
  'gelu': lambda h: jax.nn.gelu(h, approximate=False),
  'gelu_tanh': lambda h: jax.nn.gelu(h, approximate=True),
  'relu': jax.nn.relu,
}


def _per_feature(weight_D: Array, like: Array) -> Array:
  """A float32 weight of the last axis, with the rank of `like`."""
  return jnp.expand_dims(
    weight_D.astype(jnp.float32), tuple(range(like.ndim - 1))
  )


def _initial_scale(width: int, config: BlockConfig) -> nnx.Param:
  """The scale with which a norm multiplies by 1."""
  start = 0 if config.norm_unit_offset else 1
  return nnx.Param(jnp.full((width,), start, config.dtypes.param))


def _gain(scale_D: Array, like: Array, unit_offset: bool) -> Array:
  """What a norm multiplies by, float32: `scale` or `1 + scale`."""
  gain = _per_feature(scale_D, like)
  return 1 + gain if unit_offset else gain


# What is elementwise keeps nothing but its inputs for the backward pass and is
# done again there: that is cheap, and anything kept is kept for every layer of
# the stack. In a scan nothing could undo this, so there is nothing to prevent.
recomputed = functools.partial(jax.checkpoint, prevent_cse=False)


class RMSNorm(nnx.Module):
  """`x / sqrt(mean(x^2) + eps) * scale`, computed in float32.

  With `norm_unit_offset` it is `1 + scale` that multiplies, a float32 sum: a
  scale near zero has digits that `1 + scale` in bfloat16 would lose. The result
  has the dtype of the input.
  """

  def __init__(self, width: int, config: BlockConfig):
    self.eps = config.norm_eps
    self.unit_offset = config.norm_unit_offset
    self.scale = _initial_scale(width, config)

  def __call__(self, x: Float[Array, '*B D']) -> Float[Array, '*B D']:
    return _rms_norm(x, self.scale[...], self.unit_offset, self.eps)


@functools.partial(recomputed, static_argnums=(2, 3))
def _rms_norm(x: Array, scale: Array, unit_offset: bool, eps: float) -> Array:
  x32 = x.astype(jnp.float32)
  y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + eps)
  return (y * _gain(scale, y, unit_offset)).astype(x.dtype)


class LayerNorm(nnx.Module):
  """`(x - mean) / sqrt(var + eps) * scale + bias`, computed in float32.

  With `norm_unit_offset` it is `1 + scale` that multiplies. The result has the
  dtype of the input.
  """

  def __init__(self, width: int, config: BlockConfig):
    self.eps = config.norm_eps
    self.unit_offset = config.norm_unit_offset
    self.scale = _initial_scale(width, config)
    self.bias = nnx.Param(jnp.zeros((width,), config.dtypes.param))

  def __call__(self, x: Float[Array, '*B D']) -> Float[Array, '*B D']:
    return _layer_norm(
      x, self.scale[...], self.bias[...], self.unit_offset, self.eps
    )


@functools.partial(recomputed, static_argnums=(3, 4))
def _layer_norm(
  x: Array, scale: Array, bias: Array, unit_offset: bool, eps: float
) -> Array:
  x32 = x.astype(jnp.float32)
  x32 = x32 - jnp.mean(x32, -1, keepdims=True)
  variance = jnp.mean(jnp.square(x32), -1, keepdims=True)
  y = x32 * jax.lax.rsqrt(variance + eps)
  y = y * _gain(scale, y, unit_offset) + _per_feature(bias, y)
  return y.astype(x.dtype)


def norm(config: BlockConfig) -> RMSNorm | LayerNorm:
  """The norm over the residual stream that the config names."""
  return {'rms': RMSNorm, 'layer': LayerNorm}[config.norm](
    config.d_model, config
  )


def flat_dot(x: Array, kernel: Array, *_, **kwargs) -> Array:
  """`x [..., d_in] @ kernel [d_in, d_out]` with all rows of `x` as one axis.

  To be the `dot_general` of a linear layer; the dimension numbers are always
  these and are not read. The gradient of the kernel is then one plain matrix
  product; summed over two axes it is, on CPUs, a transposing copy and a slower
  product (the gradient of a small transformer takes up to 1.7 times as long).
  """
  y = jax.lax.dot_general(
    x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())), **kwargs
  )
  return y.reshape(*x.shape[:-1], y.shape[-1])


def linear(
  d_in: int,
  d_out: int,
  config: BlockConfig,
  rngs: nnx.Rngs,
  *,
  use_bias: bool,
  gain: float = 1.0,
) -> nnx.Linear:
  """A projection with kernel `[d_in, d_out]` of variance `gain^2 / d_in`."""
  return nnx.Linear(
    d_in,
    d_out,
    use_bias=use_bias,
    kernel_init=nnx.initializers.variance_scaling(gain**2, 'fan_in', 'normal'),
    dtype=config.dtypes.compute,
    param_dtype=config.dtypes.param,
    dot_general=flat_dot,
    rngs=rngs,
  )


def residual_gain(config: BlockConfig) -> float:
  """Gain of what writes to the residual stream, `1/sqrt(2 n_layers)`.

  With it the variance of the stream does not grow with depth (GPT-2).
  """
  return (2 * config.n_layers) ** -0.5


class MLP(nnx.Module):
  """`down(act(gate(h)) * up(h))`, or `down(act(up(h)))` without a gate."""

  def __init__(self, config: BlockConfig, rngs: nnx.Rngs):
    self.config = config
    bias = config.mlp_bias
    if config.gated:
      self.gate = linear(
        config.d_model, config.d_ff, config, rngs, use_bias=bias
      )
    self.up = linear(config.d_model, config.d_ff, config, rngs, use_bias=bias)
    self.down = linear(
      config.d_ff,
      config.d_model,
      config,
      rngs,
      use_bias=bias,
      gain=residual_gain(config),
    )

  def __call__(self, h_BTD: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
    activate = _ACTIVATIONS[self.config.activation]
    if self.config.gated:
      gated = recomputed(lambda gate, up: activate(gate) * up)
      h_BTF = gated(self.gate(h_BTD), self.up(h_BTD))
    else:
      h_BTF = recomputed(activate)(self.up(h_BTD))
    return self.down(h_BTF)


def rope_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
  """Angular frequencies in radians per position, float32 `[rotary_dim / 2]`.

  `theta^(-2i / rotary_dim)`, then the scaling. Computed in float32 step by
  step as the reference implementations do: at position 10^5 a difference in
  the last digit of a frequency is a hundredth of a radian.
  """
  dim = rope.rotary_dim(head_dim)
  exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
  frequencies = np.float32(1) / np.power(np.float32(rope.theta), exponents)
  if rope.scaling is None:
    return frequencies
  scaling = rope.scaling
  if isinstance(scaling, LinearScaling):
    return frequencies / np.float32(scaling.factor)
  wavelengths = np.float32(2 * np.pi) / frequencies
  turns = scaling.original_max_len / wavelengths
  # 0 at the slow end, 1 at the fast end.
  keep = (turns - scaling.low_freq_factor) / (
    scaling.high_freq_factor - scaling.low_freq_factor
  )
  keep = np.clip(keep, 0, 1).astype(np.float32)
  return (1 - keep) * frequencies / np.float32(scaling.factor) + (
    keep * frequencies
  )


def rope_angles(
  rope: RopeConfig, head_dim: int, positions_BT: Int[Array, 'B T']
) -> Float[Array, 'B T R']:
  """Rotation angles in float32, one per position and pair of features."""
  frequencies_R = rope_frequencies(rope, head_dim)
  return positions_BT[..., None].astype(jnp.float32) * frequencies_R[None, None]


def rotate(
  x_BTNH: Float[Array, 'B T N H'], angles_BTR: Float[Array, 'B T R']
) -> Float[Array, 'B T N H']:
  """Rotates features `(i, i + R)` of each head by angle `i`, in float32.

  The first `2 R` features are rotated, the others pass. The result has the
  dtype of the input.
  """
  half = angles_BTR.shape[-1]
  cos = jnp.cos(angles_BTR)[:, :, None]
  sin = jnp.sin(angles_BTR)[:, :, None]
  x32 = x_BTNH.astype(jnp.float32)
  a, b, rest = jnp.split(x32, [half, 2 * half], axis=-1)
  rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)
  return rotated.astype(x_BTNH.dtype)
