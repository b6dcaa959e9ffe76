"""A vision transformer classifier (https://arxiv.org/abs/2010.11929)."""

from __future__ import annotations

import dataclasses

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Array, Float

from idesign.models import blocks as blocks_lib
from idesign.models.config import BlockConfig, require_positive
from idesign.models.functional import Model, functional
from idesign.models.layers import linear, norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig(BlockConfig):
  """A pre-norm ViT: layer norms, biases and an exact-GELU MLP by default.

  Attributes:
    image_size: height and width of the image.
    patch_size: height and width of a patch, a divisor of `image_size`.
    channels: channels of the image.
    num_classes: number of classes.
  """

  image_size: int
  patch_size: int
  channels: int
  num_classes: int
  activation: str = 'gelu'
  gated: bool = False
  norm: str = 'layer'
  norm_eps: float = 1e-6
  qkv_bias: bool = True
  attn_out_bias: bool = True
  mlp_bias: bool = True

  def __post_init__(self):
    super().__post_init__()
    require_positive(
      self, 'image_size', 'patch_size', 'channels', 'num_classes'
    )
    if self.image_size % self.patch_size:
      raise ValueError(
        f'image_size={self.image_size} is not a multiple of patch_size='
        f'{self.patch_size}.'
      )
    if self.sliding_window is not None:
      raise ValueError(
        f'sliding_window={self.sliding_window}: patches have no order; leave '
        'it None.'
      )

  @property
  def num_patches(self) -> int:
    return (self.image_size // self.patch_size) ** 2


def vit(config: ViTConfig) -> Model:
  """An image classifier as pure functions.

  `apply(params, images_BHWC)` maps images to logits `[B, num_classes]` in the
  output dtype. The image is cut into patches; each, flattened in the order
  (row, column, channel), is projected to the stream; a class token is put
  before them and learned positions are added; the class token's final state
  is normalised and read by the head. Attention sees all patches.

  Paths and activation names are those of the decoder's blocks, and

    patch/{kernel,bias}       kernel [patch_size^2 channels, D]
    cls/embedding [1, D]      positions/embedding [1 + num_patches, D]
    final_norm/{scale,bias}   head/{kernel,bias}

  Raises:
    ValueError: when applied to images of another shape.
  """
  return functional(lambda rngs: _ViT(config, rngs), config)


def patchify(
  images_BHWC: Float[Array, 'B H W C'], size: int
) -> Float[Array, 'B N P']:
  """Flattened patches in reading order: `[B, (H/size)(W/size), size^2 C]`."""
  batch, height, width, channels = images_BHWC.shape
  grid = images_BHWC.reshape(
    batch, height // size, size, width // size, size, channels
  )
  return jnp.swapaxes(grid, 2, 3).reshape(batch, -1, size * size * channels)


class _Table(nnx.Module):
  """Learned vectors, `embedding [rows, D]`, starting at deviation 0.02."""

  def __init__(self, rows: int, config: ViTConfig, rngs: nnx.Rngs):
    init = nnx.initializers.normal(0.02)
    self.embedding = nnx.Param(
      init(rngs.params(), (rows, config.d_model), config.dtypes.param)
    )


class _ViT(nnx.Module):
  def __init__(self, config: ViTConfig, rngs: nnx.Rngs):
    self.config = config
    d_patch = config.patch_size**2 * config.channels
    self.patch = linear(d_patch, config.d_model, config, rngs, use_bias=True)
    self.cls = _Table(1, config, rngs)
    self.positions = _Table(1 + config.num_patches, config, rngs)
    self.blocks = blocks_lib.stack(config, rngs)
    self.final_norm = norm(config)
    self.head = linear(
      config.d_model, config.num_classes, config, rngs, use_bias=True
    )

  def __call__(
    self, images_BHWC: Float[Array, 'B H W C']
  ) -> Float[Array, 'B K']:
    config = self.config
    expected = (config.image_size, config.image_size, config.channels)
    if images_BHWC.shape[1:] != expected:
      raise ValueError(
        f'images are {images_BHWC.shape}; the model takes [batch, '
        f'{", ".join(map(str, expected))}].'
      )
    dtype = config.dtypes.compute
    patches_BNP = patchify(images_BHWC.astype(dtype), config.patch_size)
    h_BND = self.patch(patches_BNP)
    cls_11D = self.cls.embedding[...].astype(dtype)[None]
    cls_B1D = jnp.broadcast_to(cls_11D, (h_BND.shape[0], 1, config.d_model))
    x_BTD = jnp.concatenate([cls_B1D, h_BND], axis=1)
    x_BTD = x_BTD + self.positions.embedding[...].astype(dtype)[None]
    x_BTD, _ = blocks_lib.run(self.blocks, x_BTD)
    logits_BK = self.head(self.final_norm(x_BTD[:, 0]))
    return logits_BK.astype(config.dtypes.output)
