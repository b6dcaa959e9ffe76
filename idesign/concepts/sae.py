"""Sparse autoencoders as pytrees: encode, decode, and where they are sharded.

Dimensions: `D` the width of the activation, `F` the number of features.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import functools
import typing
from typing import Literal

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import jax.numpy as jnp
from jaxtyping import Array, Float

Architecture = Literal['relu', 'topk', 'batchtopk', 'jumprelu', 'gated']

_SHAPES = {
  'W_enc': ('D', 'F'),
  'b_enc': ('F',),
  'b_gate': ('F',),
  'b_mag': ('F',),
  'r_mag': ('F',),
  'threshold': ('F',),
  'W_dec': ('F', 'D'),
  'b_dec': ('D',),
}
_ENCODERS = {
  'relu': {'b_enc'},
  'topk': {'b_enc'},
  'batchtopk': {'b_enc', 'threshold'},
  'jumprelu': {'b_enc', 'threshold'},
  'gated': {'b_gate', 'b_mag', 'r_mag'},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SAEConfig:
  """What a sparse autoencoder computes.

  Attributes:
    architecture: how pre-activations become features; see `SAE`.
    d_in: width of the activation, D.
    d_sae: number of features, F.
    k: active features per token, exactly (`topk`), on average over a batch
      while training (`batchtopk`), or as the target of training (`jumprelu`).
    prefixes: Matryoshka (https://arxiv.org/abs/2503.17547): increasing numbers
      of features, the last one `d_sae`, of which each first so many are trained
      to reconstruct by themselves; empty: only all of them.
    centered: the encoder reads `h - b_dec` rather than `h`.
  """

  architecture: Architecture
  d_in: int
  d_sae: int
  k: int | None = None
  prefixes: tuple[int, ...] = ()
  centered: bool = True

  def __post_init__(self):
    choices = typing.get_args(Architecture)
    if self.architecture not in choices:
      raise ValueError(
        f'architecture={self.architecture!r}; choose from {choices}.'
      )
    for name in ('d_in', 'd_sae'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} must be at least 1.')
    if self.k is None and self.architecture == 'topk':
      raise ValueError('a topk autoencoder needs k.')
    if self.k is not None and not 1 <= self.k <= self.d_sae:
      raise ValueError(f'k={self.k} must be in [1, d_sae={self.d_sae}].')
    sizes = self.prefixes
    if sizes and (
      list(sizes) != sorted(set(sizes))
      or sizes[0] < 1
      or sizes[-1] != self.d_sae
    ):
      raise ValueError(
        f'prefixes={sizes} must increase from at least 1 to d_sae={self.d_sae}.'
      )

  @property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter."""
    size = {'D': self.d_in, 'F': self.d_sae}
    names = {'W_enc', 'W_dec', 'b_dec'} | _ENCODERS[self.architecture]
    return {
      name: tuple(size[d] for d in dims)
      for name, dims in _SHAPES.items()
      if name in names
    }


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['params'],
  meta_fields=['config'],
)
@dataclasses.dataclass(frozen=True)
class SAE:
  r"""A sparse autoencoder of an activation: `h ~ f(h) W_dec + b_dec`.

  With `x = h - b_dec` (or `h`, if not centered) and `z = x W_enc + b_enc`:

    relu        f = relu(z)                     (Bricken et al. 2023)
    topk        f = relu(z) where z is among the k largest of its token
                                                (https://arxiv.org/abs/2406.04093)
    batchtopk   f = relu(z) where z > threshold (https://arxiv.org/abs/2412.06410)
    jumprelu    the same, a threshold per feature
                                                (https://arxiv.org/abs/2407.14435)
    gated       f = relu(x W_enc e^r_mag + b_mag) where x W_enc + b_gate > 0
                                                (https://arxiv.org/abs/2404.16014)

  Features tied at the k-th place are all kept.

  Attributes:
    params: arrays by the names above; shapes are `config.shapes`.
    config: the `SAEConfig`.
  """

  params: Mapping[str, Array]
  config: SAEConfig

  @property
  def directions(self) -> Float[Array, 'F D']:
    """What one unit of each feature adds to the activation, `W_dec`."""
    return self.params['W_dec']

  def preactivations(self, h: Float[Array, '*B D']) -> Float[Array, '*B F']:
    """What decides whether a feature is active, before anything is cut off.

    `z`, and for `gated` that of the gate, `x W_enc + b_gate`. Unlike features
    these move smoothly when `h` does, also those of inactive features.

    Raises:
      ValueError: if `h` is not as wide as the autoencoder.
    """
    p, config = self.params, self.config
    if h.shape[-1] != config.d_in:
      raise ValueError(
        f'activations of width {h.shape[-1]} for an autoencoder of width '
        f'{config.d_in}: it was trained on another layer or model.'
      )
    x = h - _row(p['b_dec'], h) if config.centered else h
    bias = 'b_gate' if config.architecture == 'gated' else 'b_enc'
    z = x @ p['W_enc']
    return z + _row(p[bias], z)

  def encode(self, h: Float[Array, '*B D']) -> Float[Array, '*B F']:
    """Features, at least 0."""
    return self.activate(self.preactivations(h))

  def activate(self, z: Float[Array, '*B F']) -> Float[Array, '*B F']:
    """Features from pre-activations."""
    p, kind = self.params, self.config.architecture
    if kind == 'relu':
      return jax.nn.relu(z)
    if kind == 'topk':
      return jax.nn.relu(jnp.where(z >= kth_largest(z, self.config.k), z, 0))
    if kind == 'gated':
      x = z - _row(p['b_gate'], z)
      magnitude = x * _row(jnp.exp(p['r_mag']), x) + _row(p['b_mag'], x)
      return jnp.where(z > 0, jax.nn.relu(magnitude), 0)
    return jax.nn.relu(jnp.where(z > _row(p['threshold'], z), z, 0))

  def decode(self, f: Float[Array, '*B F']) -> Float[Array, '*B D']:
    """The activation that features stand for."""
    h = f @ self.params['W_dec']
    return h + _row(self.params['b_dec'], h)

  def __call__(self, h: Float[Array, '*B D']) -> Float[Array, '*B D']:
    """The reconstruction, `decode(encode(h))`."""
    return self.decode(self.encode(h))


def make_sae(config: SAEConfig, params: Mapping[str, Array]) -> SAE:
  """An `SAE` from arrays, checked.

  Raises:
    ValueError: if an array is missing, not known, of another shape, or not
      finite; names it.
  """
  for name in sorted(set(params) ^ set(config.shapes)):
    problem = 'is missing' if name in config.shapes else 'is not known'
    raise ValueError(
      f'{name} {problem}: a {config.architecture} autoencoder has '
      f'{sorted(config.shapes)}.'
    )
  for name, shape in config.shapes.items():
    if params[name].shape != shape:
      raise ValueError(
        f'{name} has shape {params[name].shape}; with d_in={config.d_in} and '
        f'd_sae={config.d_sae} it must be {shape}.'
      )
    if not bool(jnp.isfinite(params[name]).all()):
      raise ValueError(f'{name} holds NaN or infinity.')
  return SAE(dict(params), config)


def sae_shardings(config: SAEConfig, mesh: Mesh) -> dict[str, NamedSharding]:
  """Where the parameters go: features split over the axis `model`.

  Raises:
    ValueError: if the mesh has no such axis or it does not divide `d_sae`.
  """
  if 'model' not in mesh.axis_names:
    raise ValueError(f"the mesh has axes {mesh.axis_names}, none is 'model'.")
  if config.d_sae % mesh.shape['model']:
    raise ValueError(
      f'd_sae={config.d_sae} cannot be split over {mesh.shape["model"]} '
      'devices; choose a multiple.'
    )
  return {
    name: NamedSharding(
      mesh,
      PartitionSpec(*('model' if d == 'F' else None for d in _SHAPES[name])),
    )
    for name in config.shapes
  }


def kth_largest(z: Float[Array, '*B F'], k: int) -> Float[Array, '*B 1']:
  """The k-th largest of the last axis, a constant to gradients."""
  # The last column of `top_k` is a slice, of which XLA on CPUs makes a full
  # sort, twenty times as slow; of its minimum, and of rows, it does not.
  rows = jax.lax.stop_gradient(z).reshape(-1, z.shape[-1])
  least = jnp.min(jax.lax.top_k(rows, k)[0], axis=-1)
  return least.reshape(*z.shape[:-1], 1)


def _row(vector: Array, like: Array) -> Array:
  """A vector of the last axis, with the rank of `like`."""
  return jnp.expand_dims(vector, tuple(range(like.ndim - 1)))
