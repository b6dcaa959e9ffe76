"""Fields of a Hugging Face `config.json` that several families share."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from idesign.models.config import (
  LinearScaling,
  Llama3Scaling,
  RopeConfig,
  TransformerConfig,
)


# The types of layers, with and without a window.
SLIDING, FULL = 'sliding_attention', 'full_attention'


class CheckpointError(ValueError):
  """A checkpoint that cannot be read or written as asked."""


# Two names of the tanh approximation are read; the first is written.
_ACTIVATIONS = {
  'silu': 'silu',
  'swish': 'silu',
  'gelu': 'gelu',
  'gelu_new': 'gelu_tanh',
  'gelu_pytorch_tanh': 'gelu_tanh',
  'relu': 'relu',
}
_SCALINGS = {'linear': LinearScaling, 'llama3': Llama3Scaling}
# The keys of a scaling, in the order of its class's fields.
_ROPE_KEYS = {
  'default': (),
  'linear': ('factor',),
  'llama3': (
    'factor',
    'low_freq_factor',
    'high_freq_factor',
    'original_max_position_embeddings',
  ),
}


class Reader:
  """Looks keys up in a config; errors name the file and the key."""

  def __init__(self, raw: Mapping[str, Any], source: str):
    self.raw = raw
    self.source = source

  def require(self, key: str) -> Any:
    if self.raw.get(key) is None:
      raise CheckpointError(f'{self.source} has no {key!r}.')
    return self.raw[key]

  def get(self, key: str, default: Any) -> Any:
    value = self.raw.get(key)
    return default if value is None else value

  def positive(self, key: str, default: float) -> float:
    value = self.get(key, default)
    if not value > 0:
      raise CheckpointError(f'{self.source}: {key}={value} must be positive.')
    return value

  def reject(self, *keys: str) -> None:
    """Raises for the first of these keys that is switched on."""
    for key in keys:
      if self.raw.get(key):
        raise self.unsupported(key, self.raw[key])

  def unsupported(self, key: str, value: Any) -> CheckpointError:
    return CheckpointError(
      f'{self.source}: {key}={value!r} changes what the model computes and '
      'is not supported.'
    )

  def activation(self, key: str, default: str) -> str:
    name = self.get(key, default)
    if name not in _ACTIVATIONS:
      raise CheckpointError(
        f'{self.source}: {key}={name!r} is not supported; supported are '
        f'{sorted(_ACTIVATIONS)}.'
      )
    return _ACTIVATIONS[name]

  def rope(
    self, theta_key: str, fraction_key: str | None, fraction: float
  ) -> RopeConfig:
    """Rotary settings as transformers 5 writes them, or as 4 did.

    Version 5 has everything in `rope_parameters`; version 4 has
    `rope_scaling` and the base (and fraction) beside it.
    """
    found: dict[str, Any] = {}
    for key in ('rope_parameters', 'rope_scaling'):
      settings = self.raw.get(key) or {}
      if not isinstance(settings, Mapping):
        raise self.unsupported(key, settings)
      for name, value in settings.items():
        name = 'rope_type' if name == 'type' else name
        if isinstance(value, Mapping):
          raise self.unsupported(f'{key}.{name}', value)
        if value is None:
          continue
        if found.setdefault(name, value) != value:
          raise CheckpointError(
            f'{self.source}: rope_parameters and rope_scaling disagree on '
            f'{name}: {found[name]!r} and {value!r}; keep one of them.'
          )
    kind = found.pop('rope_type', 'default')
    theta = found.pop('rope_theta', None) or self.get(theta_key, 10_000.0)
    rotated = found.pop('partial_rotary_factor', None)
    if rotated is None:
      rotated = self.get(fraction_key or 'partial_rotary_factor', fraction)
    if fraction_key is None and rotated != 1:
      raise self.unsupported('partial_rotary_factor', rotated)
    if kind not in _ROPE_KEYS:
      raise CheckpointError(
        f'{self.source}: rope_type={kind!r} is not supported; supported are '
        f'{sorted(_ROPE_KEYS)}.'
      )
    for name, value in found.items():
      if name not in _ROPE_KEYS[kind]:
        raise self.unsupported(f'rope {name}', value)
    if kind == 'llama3':
      found.setdefault(
        'original_max_position_embeddings',
        self.get('max_position_embeddings', 2048),
      )
    missing = [name for name in _ROPE_KEYS[kind] if name not in found]
    if missing:
      raise CheckpointError(f'{self.source}: {kind} rope needs {missing}.')
    scaling = None
    if kind != 'default':
      scaling = _SCALINGS[kind](*(found[name] for name in _ROPE_KEYS[kind]))
    return RopeConfig(theta=theta, fraction=rotated, scaling=scaling)

  def windows(self, n_layers: int) -> tuple[int | None, ...] | None:
    """Sliding windows of the Qwen families."""
    if not self.get('use_sliding_window', False):
      if SLIDING in (self.raw.get('layer_types') or ()):
        raise CheckpointError(
          f'{self.source}: layer_types has {SLIDING} but use_sliding_window '
          'is off.'
        )
      return None
    first = self.get('max_window_layers', 28)
    types = [SLIDING if i >= first else FULL for i in range(n_layers)]
    return self.typed_windows(types, self.get('sliding_window', 4096))

  def typed_windows(
    self, default: list[str], window: int | None
  ) -> tuple[int | None, ...]:
    """The window in the layers that `layer_types`, or the default, names."""
    types = self.get('layer_types', default)
    unknown = set(types) - {SLIDING, FULL}
    if unknown:
      raise self.unsupported('layer_types', sorted(unknown))
    if window is None and SLIDING in types:
      raise CheckpointError(
        f'{self.source}: layers of type {SLIDING} need a sliding_window, which '
        'is null.'
      )
    return tuple(window if t == SLIDING else None for t in types)


def read_sizes(hf: Reader) -> dict[str, Any]:
  return dict(
    vocab_size=hf.require('vocab_size'),
    d_model=hf.require('hidden_size'),
    d_ff=hf.require('intermediate_size'),
    n_layers=hf.require('num_hidden_layers'),
    n_heads=hf.require('num_attention_heads'),
    max_len=hf.get('max_position_embeddings', 2048),
    tie_embeddings=hf.get('tie_word_embeddings', False),
  )


def write_sizes(config: TransformerConfig) -> dict[str, Any]:
  return dict(
    vocab_size=config.vocab_size,
    hidden_size=config.d_model,
    intermediate_size=config.d_ff,
    num_hidden_layers=config.n_layers,
    num_attention_heads=config.n_heads,
    max_position_embeddings=config.max_len,
    tie_word_embeddings=config.tie_embeddings,
  )


def write_rope(rope: RopeConfig | None, **also: str) -> dict[str, Any]:
  """Rotary settings for transformers 5 and, beside them, for 4."""
  if rope is None:
    return {}
  name = next(
    (name for name, of in _SCALINGS.items() if isinstance(rope.scaling, of)),
    'default',
  )
  kind: dict[str, Any] = {'rope_type': name}
  if rope.scaling is not None:
    kind |= zip(_ROPE_KEYS[name], dataclasses.astuple(rope.scaling))
  parameters = kind | {'rope_theta': rope.theta}
  if rope.fraction != 1 or 'fraction' in also:
    parameters['partial_rotary_factor'] = rope.fraction
  result = {
    'rope_parameters': parameters,
    'rope_scaling': None if rope.scaling is None else kind,
    also.get('theta', 'rope_theta'): rope.theta,
  }
  if 'fraction' in also:
    result[also['fraction']] = rope.fraction
  return result


def write_activation(activation: str) -> str:
  return next(hf for hf, ours in _ACTIVATIONS.items() if ours == activation)


def write_windows(config: TransformerConfig) -> dict[str, Any]:
  """Sliding windows of the Qwen families."""
  windows = config.sliding_window or (None,) * config.n_layers
  sizes = [w for w in windows if w is not None]
  return write_typed_windows(config) | dict(
    use_sliding_window=bool(sizes),
    max_window_layers=windows.index(sizes[0]) if sizes else config.n_layers,
  )


def write_typed_windows(config: TransformerConfig) -> dict[str, Any]:
  windows = config.sliding_window or (None,) * config.n_layers
  return dict(
    sliding_window=max((w for w in windows if w is not None), default=None),
    layer_types=[FULL if w is None else SLIDING for w in windows],
  )
