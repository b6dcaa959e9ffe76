"""Bad checkpoints: clear errors before tensors are read, nothing half-done."""

import dataclasses
import json
import resource

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from idesign.models import (
  CheckpointError,
  DTypePolicy,
  MLPConfig,
  RopeConfig,
  TransformerConfig,
  load_pretrained,
  mlp,
  save_pretrained,
  transformer,
)
from idesign.models import hf_files
from idesign.models.hf_config import parse_config, write_config

TINY = TransformerConfig(
  vocab_size=7, d_model=8, n_layers=2, n_heads=2, d_ff=12, n_kv_heads=1
)
INDEX = 'model.safetensors.index.json'


def some_params(model):
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  return jax.tree.map(lambda a: np.full(a.shape, 0.25, a.dtype), shapes)


@pytest.fixture
def folder(tmp_path):
  """A small good checkpoint in three or more shards."""
  model = transformer(TINY)
  params = some_params(model)
  save_pretrained(tmp_path / 'good', model, params, max_shard_bytes=1_500)
  assert (tmp_path / 'good' / INDEX).exists()
  load_pretrained(tmp_path / 'good')
  return tmp_path / 'good'


def edit_json(path, change):
  content = json.loads(path.read_text())
  change(content)
  path.write_text(json.dumps(content))


def edit_tensor(folder, name, change):
  """Rewrites the shard that holds a tensor; None removes it."""
  index = json.loads((folder / INDEX).read_text())
  path = folder / index['weight_map'][name]
  with hf_files.TensorReader() as reader:
    tensors = {
      info.name: reader.read(info)
      for info in hf_files.list_tensors(folder)
      if info.path == path
    }
  changed = change(tensors.pop(name))
  hf_files.write_shard(path, tensors | changed)
  del index['weight_map'][name]
  index['weight_map'] |= {n: path.name for n in changed}
  (folder / INDEX).write_text(json.dumps(index))


Q = 'model.layers.1.self_attn.q_proj.weight'


@pytest.mark.parametrize(
  'change,message',
  [
    (lambda t: {}, f'lacks 1 of .*{Q.removeprefix("model.")}'),
    (lambda t: {Q: t, 'model.oddity': t}, 'safetensors has .*model.oddity'),
    (
      lambda t: {Q: t, Q.replace('weight', 'bias'): t[0]},
      'does not account.*q_proj.bias',
    ),
    (
      lambda t: {Q: t[:, :-1]},
      rf'{Q} in .*safetensors has shape \(8, 7\).* \(8, 8\)',
    ),
    (lambda t: {Q: t.astype(np.int8)}, f'{Q} in .* is I8'),
    (lambda t: {Q: t, Q.removeprefix('model.'): t}, 'q_proj.weight twice'),
  ],
)
def test_headers_are_checked_before_any_tensor_is_read(
  folder, monkeypatch, change, message
):
  edit_tensor(folder, Q, change)

  def read(self, info):
    raise AssertionError(f'{info.name} was read')

  monkeypatch.setattr(hf_files.TensorReader, 'read', read)
  with pytest.raises(CheckpointError, match=message):
    load_pretrained(folder)


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_tensors_that_are_not_finite_raise(folder, value):
  edit_tensor(folder, Q, lambda t: {Q: np.where(np.eye(8) > 0, value, t)})
  with pytest.raises(
    CheckpointError, match=f'{Q} in .*safetensors has 8 of 64 .*NaN'
  ):
    load_pretrained(folder)


def test_tensors_that_overflow_the_parameter_dtype_raise(folder):
  edit_tensor(folder, Q, lambda t: {Q: t + np.float32(1e5)})
  with pytest.raises(CheckpointError, match=f'{Q}.*float16'):
    load_pretrained(folder, dtypes=DTypePolicy(param=jnp.float16))


def test_bfloat16_files_are_read(folder):
  edit_tensor(folder, Q, lambda t: {Q: t.astype(ml_dtypes.bfloat16)})
  _, params = load_pretrained(folder)
  q = params['blocks']['attn']['q']['kernel'][1]
  np.testing.assert_array_equal(q, q.astype(jnp.bfloat16).astype(q.dtype))


def _truncate(path):
  path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize(
  'damage,message',
  [
    (lambda f: (f / 'config.json').unlink(), 'config.json does not exist'),
    (lambda f: _truncate(f / 'config.json'), 'config.json is not valid J'),
    (lambda f: (f / 'config.json').write_text('[]'), 'holds a list'),
    (lambda f: (f / INDEX).unlink(), 'has neither model.safetensors nor'),
    (lambda f: _truncate(f / INDEX), 'is not an index'),
    (lambda f: (f / INDEX).write_text('{}'), 'is not an index'),
    (
      lambda f: next(f.glob('model-00002*')).unlink(),
      'model-00002.* does not exist, though .*index.json names it',
    ),
    (
      lambda f: _truncate(next(f.glob('model-00002*'))),
      'model-00002.*safetensors is truncated',
    ),
    (
      lambda f: next(f.glob('model-00002*')).write_bytes(b''),
      'model-00002.*safetensors is truncated',
    ),
    (
      lambda f: edit_json(f / INDEX, lambda i: i['weight_map'].pop(Q) and None),
      None,
    ),
    (
      lambda f: edit_json(
        f / INDEX,
        lambda i: i['weight_map'].update(ghost='model-00001-of-'),
      ),
      'does not exist',
    ),
    (
      lambda f: edit_json(
        f / INDEX,
        lambda i: i['weight_map'].update({'ghost': i['weight_map'][Q]}),
      ),
      'has no ghost',
    ),
  ],
)
def test_damaged_folders_raise(folder, damage, message):
  damage(folder)
  if message is None:  # A shard's header tells more than the index: no harm.
    load_pretrained(folder)
    return
  with pytest.raises(CheckpointError, match=message):
    load_pretrained(folder)


@pytest.mark.parametrize('offset', [0, 1])
def test_a_tied_head_must_be_the_embedding(tmp_path, offset):
  model = transformer(dataclasses.replace(TINY, tie_embeddings=True))
  folder = tmp_path / 'tied'
  save_pretrained(folder, model, some_params(model))
  with hf_files.TensorReader() as reader:
    tensors = {i.name: reader.read(i) for i in hf_files.list_tensors(folder)}
  tensors['lm_head.weight'] = tensors['model.embed_tokens.weight'] + offset
  hf_files.write_shard(folder / 'model.safetensors', tensors)
  if not offset:
    load_pretrained(folder)
    return
  with pytest.raises(CheckpointError, match='lm_head.weight .*differs.*tie'):
    load_pretrained(folder)


LLAMA = write_config(TINY)[1]
GPT2 = dict(model_type='gpt2', vocab_size=7, n_embd=8, n_layer=1, n_head=2)
QWEN = dict(LLAMA, model_type='qwen2', architectures=None)
NEOX = dict(
  model_type='gpt_neox',
  vocab_size=7,
  hidden_size=16,
  intermediate_size=12,
  num_hidden_layers=1,
  num_attention_heads=2,
)
GEMMA2 = dict(
  NEOX, model_type='gemma2', num_hidden_layers=2, num_key_value_heads=1
)
GEMMA3 = dict(GEMMA2, model_type='gemma3_text')


@pytest.mark.parametrize(
  'raw,message',
  [
    (dict(LLAMA, model_type='mamba'), "'mamba' is not supported.*'gpt2'"),
    ({}, 'model_type=None'),
    (dict(LLAMA, architectures=['LlamaForX']), 'LlamaForX is not supp'),
    (dict(LLAMA, hidden_size=None), "has no 'hidden_size'"),
    (dict(LLAMA, hidden_act='mish'), "hidden_act='mish'"),
    (dict(LLAMA, num_key_value_heads=3), 'n_kv_heads=3'),
    (dict(LLAMA, num_attention_heads='2'), 'src'),
    (dict(LLAMA, quantization_config={'bits': 4}), 'quantization_config'),
    (dict(LLAMA, rope_scaling=[1]), r'rope_scaling=\[1\]'),
    (dict(LLAMA, architectures='OtherModel'), 'architecture OtherModel'),
    (dict(LLAMA, sliding_window=8), 'sliding_window=8'),
    (dict(LLAMA, partial_rotary_factor=0.5), 'partial_rotary_factor=0.5'),
    (
      dict(LLAMA, rope_parameters={'rope_type': 'yarn', 'factor': 2}),
      "rope_type='yarn' is not supported",
    ),
    (
      dict(LLAMA, rope_parameters=None, rope_scaling={'type': 'dynamic'}),
      "rope_type='dynamic' is not supported",
    ),
    (
      dict(LLAMA, rope_parameters=None, rope_scaling={'type': 'linear'}),
      "linear rope needs.*'factor'",
    ),
    (
      dict(LLAMA, rope_parameters={'rope_type': 'linear', 'factor': 0}),
      'factor=0 must be positive',
    ),
    (
      dict(LLAMA, rope_parameters={'rope_type': 'default', 'factor': 2}),
      'rope factor=2 changes',
    ),
    (
      dict(LLAMA, rope_scaling={'rope_type': 'llama3', 'factor': 2.0}),
      'disagree on rope_type',
    ),
    (
      dict(LLAMA, rope_parameters={'rope_type': 'llama3', 'factor': 2.0}),
      "llama3 rope needs.*'low_freq_factor'",
    ),
    (
      dict(LLAMA, rope_parameters={'mrope_section': [1]}),
      'rope mrope_section',
    ),
    (
      dict(LLAMA, rope_parameters={'full_attention': {}}),
      'rope_parameters.full_attention',
    ),
    (dict(QWEN, num_key_value_heads=None), 'num_key_value_heads'),
    (dict(QWEN, layer_types=['sliding_attention'] * 2), 'use_sliding_win'),
    (
      dict(
        QWEN,
        use_sliding_window=True,
        layer_types=['chunked_attention'] * 2,
      ),
      'chunked_attention',
    ),
    (
      dict(
        QWEN,
        use_sliding_window=True,
        layer_types=['sliding_attention'],
        sliding_window=3,
      ),
      'sliding_window has 1 entries for n_layers=2',
    ),
    (dict(GPT2, scale_attn_by_inverse_layer_idx=True), 'inverse_layer_idx'),
    (dict(GPT2, reorder_and_upcast_attn=True), 'reorder_and_upcast_attn'),
    (dict(GPT2, scale_attn_weights=False), 'scale_attn_weights=False'),
    (dict(GPT2, add_cross_attention=True), 'add_cross_attention'),
    (dict(GPT2, pruned_heads={'0': [1]}), 'pruned_heads'),
    (dict(GPT2, n_head=3), 'd_model=8 is not a multiple of n_heads=3'),
    (dict(NEOX, rotary_pct=0.4), 'rotates 3 features'),
    (dict(LLAMA, is_causal=False), 'is_causal=False'),
    (
      dict(model_type='gemma3', text_config=GEMMA3),
      'only the text model, gemma3_text',
    ),
    (
      dict(GEMMA3, architectures=['Gemma3ForConditionalGeneration']),
      'Gemma3ForConditionalGeneration is not supp',
    ),
    (dict(GEMMA2, use_bidirectional_attention=True), 'use_bidirectional_att'),
    (dict(GEMMA3, use_bidirectional_attention=True), 'use_bidirectional_att'),
    (dict(GEMMA2, num_key_value_heads=None), 'num_key_value_heads'),
    (dict(GEMMA2, hidden_activation='mish'), "hidden_activation='mish'"),
    (dict(GEMMA2, query_pre_attn_scalar=0), 'scalar=0 must be positive'),
    (dict(GEMMA2, query_pre_attn_scalar=-4), 'scalar=-4 must be positive'),
    (dict(GEMMA2, attn_logit_softcapping=0.0), 'attn_softcap=0.0'),
    (dict(GEMMA3, final_logit_softcapping=0.0), 'logit_softcap=0.0'),
    (dict(GEMMA2, sliding_window=None), 'need a sliding_window'),
    (dict(GEMMA2, layer_types=['full_attention']), '1 entries for n_layers=2'),
    (dict(GEMMA2, layer_types=['chunked_attention'] * 2), 'chunked_attention'),
    (
      dict(GEMMA2, rope_parameters={'full_attention': {}}),
      'rope_parameters.full_attention',
    ),
    (dict(GEMMA3, sliding_window_pattern=0), 'pattern=0 must be positive'),
    (
      dict(GEMMA3, _sliding_window_pattern=3),
      '_sliding_window_pattern=3 without layer_types.*takes 6',
    ),
    (
      dict(GEMMA3, rope_parameters={'rope_theta': 5.0}),
      'rope_theta.*must have entries full_attention and sliding_attention',
    ),
    (dict(GEMMA3, rope_parameters=[1]), r'rope_parameters=\[1\]'),
    (
      dict(
        GEMMA3, rope_parameters={'sliding_attention': {'rope_type': 'yarn'}}
      ),
      "rope_type='yarn' is not supported",
    ),
    (
      dict(GEMMA3, rope_scaling={'rope_type': 'longrope'}),
      "rope_type='longrope' is not supported",
    ),
  ],
)
def test_configs_that_are_not_supported_raise(raw, message):
  with pytest.raises(CheckpointError, match=message) as raised:
    parse_config(raw, 'src')
  assert 'src' in str(raised.value)


@pytest.mark.parametrize('raw', [LLAMA, QWEN, GPT2, NEOX, GEMMA2, GEMMA3])
def test_the_configs_above_are_good_without_the_fault(raw):
  parse_config(raw, 'src')


GEMMA = dict(norm_position='both', norm_unit_offset=True, scale_embeddings=True)


def test_the_gemma_below_is_exported():
  config = dataclasses.replace(TINY, **GEMMA)
  assert write_config(config)[0] == 'gemma2'
  config = dataclasses.replace(config, qk_norm='head')
  assert write_config(config)[0] == 'gemma3_text'


@pytest.mark.parametrize(
  'change,message',
  [
    (dict(attn_softcap=5.0), 'llama cannot express attn_softcap'),
    (dict(sliding_window=(2, 3)), 'cannot express'),
    (dict(norm='layer'), 'llama cannot express norm'),
    (dict(mlp_bias=True, qk_norm='head'), 'qwen3 cannot express mlp_bias'),
    (dict(attn_scale=0.3), 'llama cannot express attn_scale;'),
    (
      dict(sliding_window=3, rope_local=RopeConfig(theta=5.0)),
      'qwen2 cannot express qkv_bias, rope_local;',
    ),
    (GEMMA | dict(attn_scale=0.3), 'gemma2 cannot express attn_scale;'),
    (
      GEMMA | dict(attn_softcap=5.0, qk_norm='head'),
      'gemma3_text cannot express attn_softcap',
    ),
    (GEMMA | dict(scale_embeddings=False), 'gemma2 cannot express scale_emb'),
    (GEMMA | dict(norm_position='post'), 'gemma2 cannot express norm_position'),
    (
      GEMMA | dict(norm_unit_offset=False),
      'gemma2 cannot express norm_unit_offset',
    ),
    (GEMMA | dict(rope=None), 'gemma2 cannot express rope'),
  ],
)
def test_models_no_family_computes_are_not_exported(tmp_path, change, message):
  model = transformer(dataclasses.replace(TINY, **change))
  params = some_params(model)
  with pytest.raises(CheckpointError, match=message):
    save_pretrained(tmp_path / 'out', model, params)
  assert not list(tmp_path.iterdir())


def test_other_models_are_not_exported(tmp_path):
  model = mlp(MLPConfig(d_in=2, hidden=(3,), num_classes=2))
  with pytest.raises(CheckpointError, match='not MLPConfig'):
    save_pretrained(tmp_path / 'out', model, some_params(model))


def test_exports_do_not_overwrite(folder):
  model, params = load_pretrained(folder)
  before = {p.name: p.read_bytes() for p in folder.iterdir()}
  with pytest.raises(CheckpointError, match='not an empty folder'):
    save_pretrained(folder, model, params)
  assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_full_disk_is_told_and_nothing_left(tmp_path):
  model = transformer(TINY)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, hard))
  try:
    with pytest.raises(CheckpointError, match='safetensors could not.*make'):
      save_pretrained(tmp_path / 'out', model, some_params(model))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert not list(tmp_path.iterdir())


def test_weights_that_could_not_be_loaded_are_not_exported(tmp_path):
  model = transformer(TINY)
  params = some_params(model)
  params['final_norm']['scale'] = np.full(8, np.nan, np.float32)
  with pytest.raises(CheckpointError, match='norm.* NaN'):
    save_pretrained(tmp_path / 'out', model, params)
  assert not list(tmp_path.iterdir())


def test_failed_exports_leave_nothing(tmp_path, monkeypatch):
  model = transformer(TINY)
  params = some_params(model)
  write = hf_files.write_shard
  calls = []

  def full_disk(path, tensors):
    write(path, tensors)
    calls.append(path)
    if len(calls) == 2:
      raise OSError('no space left')

  monkeypatch.setattr('idesign.models.huggingface.write_shard', full_disk)
  with pytest.raises(OSError, match='no space left'):
    save_pretrained(tmp_path / 'out', model, params, max_shard_bytes=1_500)
  assert len(calls) == 2 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  'change,message',
  [
    (lambda p: p.pop('lm_head'), 'disagree on lm_head/kernel'),
    (lambda p: p.update(extra=jnp.ones(2)), 'disagree on extra'),
    (
      lambda p: p.update(final_norm={'scale': jnp.ones(3)}),
      r'final_norm/scale has shape \(3,\)',
    ),
  ],
)
def test_parameters_of_another_model_are_not_exported(
  tmp_path, change, message
):
  model = transformer(TINY)
  params = some_params(model)
  change(params)
  with pytest.raises(ValueError, match=message):
    save_pretrained(tmp_path / 'out', model, params)
  assert not list(tmp_path.iterdir())
