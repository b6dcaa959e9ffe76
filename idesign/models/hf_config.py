"""Hugging Face `config.json` to and from `TransformerConfig`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import json
import pathlib
from typing import Any, NamedTuple

from idesign.models.config import TransformerConfig
from idesign.models.functional import DTypePolicy
from idesign.models.hf_fields import (
  CheckpointError,
  Reader,
  read_sizes,
  write_activation,
  write_rope,
  write_sizes,
  write_windows,
)
from idesign.models.hf_gemma import (
  read_gemma2,
  read_gemma3,
  write_gemma2,
  write_gemma3,
)


def _read_llama_like(hf: Reader) -> dict[str, Any]:
  return read_sizes(hf) | dict(
    n_kv_heads=hf.raw.get('num_key_value_heads'),
    head_dim=hf.raw.get('head_dim'),
    activation=hf.activation('hidden_act', 'silu'),
    norm_eps=hf.get('rms_norm_eps', 1e-6),
    rope=hf.rope('rope_theta', None, 1.0),
  )


def _write_llama_like(config: TransformerConfig) -> dict[str, Any]:
  return write_sizes(config) | dict(
    num_key_value_heads=config.n_kv_heads,
    head_dim=config.head_dim,
    hidden_act=write_activation(config.activation),
    rms_norm_eps=config.norm_eps,
    **write_rope(config.rope),
  )


def _read_llama(hf: Reader) -> dict[str, Any]:
  hf.reject('sliding_window')
  bias = hf.get('attention_bias', False)
  return _read_llama_like(hf) | dict(
    qkv_bias=bias, attn_out_bias=bias, mlp_bias=hf.get('mlp_bias', False)
  )


def _write_llama(config: TransformerConfig) -> dict[str, Any]:
  return _write_llama_like(config) | dict(
    attention_bias=config.qkv_bias, mlp_bias=config.mlp_bias
  )


def _read_olmo2(hf: Reader) -> dict[str, Any]:
  hf.reject('sliding_window')
  bias = hf.get('attention_bias', False)
  return _read_llama_like(hf) | dict(
    norm_eps=hf.get('rms_norm_eps', 1e-5),
    norm_position='post',
    qk_norm='width',
    qkv_bias=bias,
    attn_out_bias=bias,
  )


def _write_olmo2(config: TransformerConfig) -> dict[str, Any]:
  return _write_llama_like(config) | dict(attention_bias=config.qkv_bias)


def _read_qwen2(hf: Reader) -> dict[str, Any]:
  # The class default (32 heads) differs from that of the other families.
  hf.require('num_key_value_heads')
  kwargs = _read_llama_like(hf)
  return kwargs | dict(
    qkv_bias=True, sliding_window=hf.windows(kwargs['n_layers'])
  )


def _write_qwen2(config: TransformerConfig) -> dict[str, Any]:
  return _write_llama_like(config) | write_windows(config)


def _read_qwen3(hf: Reader) -> dict[str, Any]:
  hf.require('num_key_value_heads')
  kwargs = _read_llama_like(hf)
  bias = hf.get('attention_bias', False)
  return kwargs | dict(
    head_dim=hf.get('head_dim', 128),
    qk_norm='head',
    qkv_bias=bias,
    attn_out_bias=bias,
    sliding_window=hf.windows(kwargs['n_layers']),
  )


def _write_qwen3(config: TransformerConfig) -> dict[str, Any]:
  return _write_qwen2(config) | dict(attention_bias=config.qkv_bias)


def _read_gpt2(hf: Reader) -> dict[str, Any]:
  hf.reject(
    'scale_attn_by_inverse_layer_idx',
    'reorder_and_upcast_attn',
    'add_cross_attention',
  )
  if not hf.get('scale_attn_weights', True):
    raise hf.unsupported('scale_attn_weights', False)
  d_model = hf.require('n_embd')
  return dict(
    vocab_size=hf.require('vocab_size'),
    d_model=d_model,
    d_ff=hf.get('n_inner', 4 * d_model),
    n_layers=hf.require('n_layer'),
    n_heads=hf.require('n_head'),
    max_len=hf.get('n_positions', 1024),
    activation=hf.activation('activation_function', 'gelu_new'),
    norm_eps=hf.get('layer_norm_epsilon', 1e-5),
    tie_embeddings=hf.get('tie_word_embeddings', True),
    rope=None,
    norm='layer',
    gated=False,
    qkv_bias=True,
    attn_out_bias=True,
    mlp_bias=True,
  )


def _write_gpt2(config: TransformerConfig) -> dict[str, Any]:
  return dict(
    vocab_size=config.vocab_size,
    n_embd=config.d_model,
    n_inner=config.d_ff,
    n_layer=config.n_layers,
    n_head=config.n_heads,
    n_positions=config.max_len,
    activation_function=write_activation(config.activation),
    layer_norm_epsilon=config.norm_eps,
    tie_word_embeddings=config.tie_embeddings,
  )


def _read_gpt_neox(hf: Reader) -> dict[str, Any]:
  bias = hf.get('attention_bias', True)
  return read_sizes(hf) | dict(
    activation=hf.activation('hidden_act', 'gelu'),
    norm_eps=hf.get('layer_norm_eps', 1e-5),
    parallel_residual=hf.get('use_parallel_residual', True),
    rope=hf.rope('rotary_emb_base', 'rotary_pct', 0.25),
    norm='layer',
    gated=False,
    qkv_bias=bias,
    attn_out_bias=bias,
    mlp_bias=True,
  )


def _write_gpt_neox(config: TransformerConfig) -> dict[str, Any]:
  return write_sizes(config) | dict(
    hidden_act=write_activation(config.activation),
    layer_norm_eps=config.norm_eps,
    use_parallel_residual=config.parallel_residual,
    attention_bias=config.qkv_bias,
    **write_rope(config.rope, theta='rotary_emb_base', fraction='rotary_pct'),
  )


class _Family(NamedTuple):
  """How one family's config is read and written."""

  architectures: tuple[str, str]  # With a language-model head, and without.
  read: Callable[[Reader], dict[str, Any]]
  write: Callable[[TransformerConfig], dict[str, Any]]


# Where several families can express a model, the first is written.
FAMILIES = {
  'llama': _Family(
    ('LlamaForCausalLM', 'LlamaModel'), _read_llama, _write_llama
  ),
  'olmo2': _Family(
    ('Olmo2ForCausalLM', 'Olmo2Model'), _read_olmo2, _write_olmo2
  ),
  'qwen2': _Family(
    ('Qwen2ForCausalLM', 'Qwen2Model'), _read_qwen2, _write_qwen2
  ),
  'qwen3': _Family(
    ('Qwen3ForCausalLM', 'Qwen3Model'), _read_qwen3, _write_qwen3
  ),
  'gpt2': _Family(('GPT2LMHeadModel', 'GPT2Model'), _read_gpt2, _write_gpt2),
  'gpt_neox': _Family(
    ('GPTNeoXForCausalLM', 'GPTNeoXModel'),
    _read_gpt_neox,
    _write_gpt_neox,
  ),
  'gemma2': _Family(
    ('Gemma2ForCausalLM', 'Gemma2Model'), read_gemma2, write_gemma2
  ),
  'gemma3_text': _Family(
    ('Gemma3ForCausalLM', 'Gemma3TextModel'), read_gemma3, write_gemma3
  ),
}


def read_config(
  folder: pathlib.Path, dtypes: DTypePolicy = DTypePolicy()
) -> tuple[str, TransformerConfig]:
  """Reads `config.json`.

  Keys that transformers does not use for the family are ignored; a key that
  changes what the model computes in a way not supported here raises.

  Returns:
    The family, a key of `FAMILIES`, and the config.

  Raises:
    CheckpointError: if the file is missing or no JSON object, the architecture
      is not supported, a size is missing, or a setting is not supported.
  """
  path = folder / 'config.json'
  if not path.is_file():
    raise CheckpointError(
      f'{path} does not exist; a checkpoint folder needs config.json and '
      '*.safetensors files.'
    )
  try:
    raw = json.loads(path.read_text(encoding='utf-8'))
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise CheckpointError(f'{path} is not valid JSON: {error}.') from error
  if not isinstance(raw, dict):
    kind = type(raw).__name__
    raise CheckpointError(f'{path} holds a {kind}, not an object.')
  name, config = parse_config(raw, str(path))
  return name, dataclasses.replace(config, dtypes=dtypes)


def parse_config(
  raw: Mapping[str, Any], source: str
) -> tuple[str, TransformerConfig]:
  """As `read_config`, from the parsed JSON; `source` is named in errors."""
  name = raw.get('model_type')
  if name == 'gemma3':
    raise CheckpointError(
      f"{source}: model_type='gemma3' is not supported: it has images; of "
      'Gemma-3 only the text model, gemma3_text, is read.'
    )
  if name not in FAMILIES:
    raise CheckpointError(
      f'{source}: model_type={name!r} is not supported; supported are '
      f'{sorted(FAMILIES)}.'
    )
  family = FAMILIES[name]
  architectures = raw.get('architectures') or ()
  if isinstance(architectures, str):
    architectures = (architectures,)
  for architecture in architectures:
    if architecture not in family.architectures:
      raise CheckpointError(
        f'{source}: architecture {architecture} is not supported; supported '
        f'for {name} are {family.architectures}.'
      )
  hf = Reader(raw, source)
  hf.reject('quantization_config', 'pruned_heads', 'is_encoder_decoder')
  if not raw.get('is_causal', True):
    raise hf.unsupported('is_causal', raw['is_causal'])
  try:
    return name, TransformerConfig(**family.read(hf))
  except (TypeError, ValueError) as error:
    if isinstance(error, CheckpointError):
      raise
    raise CheckpointError(f'{source}: {error}') from error


def write_config(config: TransformerConfig) -> tuple[str, dict[str, Any]]:
  """The family that can express a model, and its `config.json`.

  A family can express a model if what it writes is read back as an equal
  config (up to dtypes, rematerialisation and unrolling).

  Raises:
    CheckpointError: if no family can, saying what each one would change.
  """
  plain = dataclasses.replace(
    config, dtypes=DTypePolicy(), remat=False, unroll=1
  )
  lost = []
  for name, family in FAMILIES.items():
    raw = family.write(plain) | {
      'model_type': name,
      'architectures': [family.architectures[0]],
    }
    try:
      _, read = parse_config(raw, f'{name} export')
    except CheckpointError as error:
      lost.append(f'{name}: {error}')
      continue
    if read == plain:
      return name, raw
    fields = [
      field.name
      for field in dataclasses.fields(plain)
      if getattr(plain, field.name) != getattr(read, field.name)
    ]
    lost.append(f'{name} cannot express {", ".join(fields)}')
  raise CheckpointError(
    'no supported Hugging Face family computes this model: '
    + '; '.join(lost)
    + '.'
  )
