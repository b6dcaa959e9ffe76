"""`config.json` of the Gemma families, to and from `TransformerConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from idesign.models.config import RopeConfig, TransformerConfig
from idesign.models.hf_fields import (
  FULL,
  SLIDING,
  CheckpointError,
  Reader,
  read_sizes,
  write_activation,
  write_rope,
  write_sizes,
  write_typed_windows,
)

_WINDOW = 4096  # Where the file names none.


def _read_gemma(hf: Reader, period: int, max_len: int) -> dict[str, Any]:
  """What both have; by default every `period`-th layer has no window."""
  hf.reject('use_bidirectional_attention')
  kwargs = read_sizes(hf)
  types = [
    FULL if (i + 1) % period == 0 else SLIDING
    for i in range(kwargs['n_layers'])
  ]
  bias = hf.get('attention_bias', False)
  return kwargs | dict(
    max_len=hf.get('max_position_embeddings', max_len),
    tie_embeddings=hf.get('tie_word_embeddings', True),
    scale_embeddings=True,
    # The class default (4 heads) differs from that of the other families.
    n_kv_heads=hf.require('num_key_value_heads'),
    head_dim=hf.get('head_dim', 256),
    # Older files also have hidden_act, which transformers does not read.
    activation=hf.activation('hidden_activation', 'gelu_pytorch_tanh'),
    norm_eps=hf.get('rms_norm_eps', 1e-6),
    norm_unit_offset=True,
    norm_position='both',
    qkv_bias=bias,
    attn_out_bias=bias,
    attn_scale=hf.positive('query_pre_attn_scalar', 256) ** -0.5,
    sliding_window=hf.typed_windows(
      types, hf.raw.get('sliding_window', _WINDOW)
    ),
  )


def _write_gemma(config: TransformerConfig) -> dict[str, Any]:
  # transformers takes an integer. Where none gives this scale, another one is
  # read back, and so the family is found not to express the model.
  scale = config.attn_scale
  scalar = config.head_dim if scale is None else max(1, round(scale**-2))
  # The name of Gemma's own files, not that of GPT-2's.
  tanh = config.activation == 'gelu_tanh'
  windows = write_typed_windows(config)
  # transformers makes the mask of a window even where no layer uses it.
  windows['sliding_window'] = windows['sliding_window'] or _WINDOW
  return write_sizes(config) | dict(
    num_key_value_heads=config.n_kv_heads,
    head_dim=config.head_dim,
    hidden_activation=(
      'gelu_pytorch_tanh' if tanh else write_activation(config.activation)
    ),
    rms_norm_eps=config.norm_eps,
    attention_bias=config.qkv_bias,
    query_pre_attn_scalar=scalar,
    final_logit_softcapping=_write_cap(config.logit_softcap),
    **windows,
  )


def _write_cap(cap: float | None) -> float | None:
  # transformers refuses an integer.
  return None if cap is None else float(cap)


def read_gemma2(hf: Reader) -> dict[str, Any]:
  # Without the key there is a cap; with null there is none.
  return _read_gemma(hf, period=2, max_len=8192) | dict(
    attn_softcap=hf.raw.get('attn_logit_softcapping', 50.0),
    logit_softcap=hf.raw.get('final_logit_softcapping', 30.0),
    rope=hf.rope('rope_theta', None, 1.0),
  )


def write_gemma2(config: TransformerConfig) -> dict[str, Any]:
  return _write_gemma(config) | dict(
    attn_logit_softcapping=_write_cap(config.attn_softcap),
    **write_rope(config.rope),
  )


def read_gemma3(hf: Reader) -> dict[str, Any]:
  period = hf.positive('sliding_window_pattern', 6)
  unread = hf.get('_sliding_window_pattern', period)
  if unread != period and not hf.raw.get('layer_types'):
    raise CheckpointError(
      f'{hf.source}: _sliding_window_pattern={unread} without layer_types: '
      f'transformers does not read it, and takes {period}; give layer_types.'
    )
  kwargs = _read_gemma(hf, period, max_len=131_072)
  rope, rope_local = _read_ropes(hf)
  windowed = any(w is not None for w in kwargs['sliding_window'])
  return kwargs | dict(
    qk_norm='head',
    # attn_logit_softcapping is in the class, but transformers does not use it.
    logit_softcap=hf.raw.get('final_logit_softcapping'),
    rope=rope,
    rope_local=rope_local if windowed else None,
  )


def write_gemma3(config: TransformerConfig) -> dict[str, Any]:
  return _write_gemma(config) | _write_ropes(config)


def _read_ropes(hf: Reader) -> tuple[RopeConfig, RopeConfig]:
  """Rotary settings of layers that see everything, and of those that do not.

  In transformers 5 each has an entry in `rope_parameters`; in 4 they have a
  base each, and `rope_scaling` is that of the former.
  """
  by_type = hf.get('rope_parameters', {})
  if not isinstance(by_type, Mapping) or set(by_type) - {FULL, SLIDING}:
    raise CheckpointError(
      f'{hf.source}: rope_parameters={by_type!r} must have entries {FULL} and '
      f'{SLIDING}, and no others.'
    )
  everything = Reader(
    dict(
      hf.raw,
      rope_parameters=by_type.get(FULL),
      rope_theta=hf.get('rope_theta', 1_000_000.0),
    ),
    hf.source,
  )
  local = Reader(
    dict(hf.raw, rope_parameters=by_type.get(SLIDING), rope_scaling=None),
    hf.source,
  )
  return (
    everything.rope('rope_theta', None, 1.0),
    local.rope('rope_local_base_freq', None, 1.0),
  )


def _write_ropes(config: TransformerConfig) -> dict[str, Any]:
  if config.rope is None:
    return {}
  everything = write_rope(config.rope)
  local = write_rope(config.rope_local or config.rope)
  return everything | dict(
    rope_parameters={
      FULL: everything['rope_parameters'],
      SLIDING: local['rope_parameters'],
    },
    rope_local_base_freq=local['rope_theta'],
  )
