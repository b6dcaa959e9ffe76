"""Import against transformers, on random and real weights."""

import dataclasses
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idesign.models import (
  DTypePolicy,
  generate,
  init_cache,
  load_pretrained,
  transformer,
)
from idesign.models.hf_config import parse_config
from tests.models import hf_cases
from tests.models.hf_cases import CASES

# Both sides compute in float32, in different orders, through three layers of
# random weights. Leaving anything out is held to exceed the same bound; it is
# tight enough to tell exact GELU from its tanh approximation.
TOLERANCE = 84 * float(np.finfo(np.float32).eps)  # 1.0e-5


@pytest.mark.parametrize('padding', ['none', 'left', 'right'])
@pytest.mark.parametrize('case', CASES)
def test_logits_are_those_of_transformers(case, padding):
  _, params, forward = hf_cases.ours(case)
  tokens, mask, expected = hf_cases.reference(case, padding)
  got = forward(params, tokens, mask)
  assert hf_cases.distance(expected, got, mask) <= TOLERANCE


@pytest.mark.parametrize('case', CASES)
def test_every_tensor_matters(case):
  model, params, forward = hf_cases.ours(case)
  tokens, mask, expected = hf_cases.reference(case, 'none')
  whole = forward(params, tokens, mask)
  assert hf_cases.distance(expected, whole, mask) <= TOLERANCE
  indifferent = []
  neutral = 0 if model.config.norm_unit_offset else 1
  for path, leaf in hf_cases.flat(params).items():
    layers = range(leaf.shape[0]) if path.startswith('blocks/') else [...]
    for layer in layers:
      value = np.array(leaf)
      value[layer] = neutral if path.endswith('/scale') else 0
      changed = hf_cases.replaced(params, path, value)
      got = forward(changed, tokens, mask)
      if hf_cases.distance(whole, got, mask) <= TOLERANCE:
        indifferent.append((path, layer))
  # A key bias adds q.b to every score of a query, which softmax does not see,
  # unless keys are rotated (after the bias) by their positions.
  exempt = []
  if model.config.rope is None:
    exempt = [('blocks/attn/k/bias', i) for i in range(model.config.n_layers)]
  assert indifferent == exempt


def _rope(config, name='rope', **changes):
  return {name: dataclasses.replace(getattr(config, name), **changes)}


@pytest.mark.parametrize(
  'case,change',
  [
    ('llama-rope', lambda c: _rope(c, scaling=None)),
    ('llama', lambda c: _rope(c, theta=5e3)),
    ('llama', lambda c: dict(activation='gelu')),
    ('llama', lambda c: dict(norm_eps=1e-6)),
    ('llama-tied', lambda c: dict(activation='silu')),
    ('olmo2', lambda c: dict(norm_eps=1e-5)),
    ('olmo2-bias', lambda c: dict(activation='silu')),
    ('qwen2', lambda c: dict(norm_eps=1e-6)),
    ('qwen2', lambda c: dict(activation='silu')),
    ('qwen3', lambda c: dict(norm_eps=1e-6)),
    ('qwen3', lambda c: dict(activation='silu')),
    ('gpt2', lambda c: dict(norm_eps=1e-5)),
    ('gpt2-untied', lambda c: dict(activation='gelu_tanh')),
    ('neox', lambda c: dict(norm_eps=1e-5)),
    ('neox-serial', lambda c: dict(activation='gelu')),
    ('qwen2-window', lambda c: dict(sliding_window=None)),
    ('qwen3-window', lambda c: dict(sliding_window=hf_cases.WINDOW)),
    ('gpt2', lambda c: dict(activation='gelu')),
    ('neox', lambda c: dict(parallel_residual=False)),
    ('neox-serial', lambda c: _rope(c, fraction=1.0)),
    ('llama-linear', lambda c: _rope(c, scaling=None)),
    ('gemma2', lambda c: dict(norm_unit_offset=False)),
    ('gemma2', lambda c: dict(norm_eps=1e-6)),
    ('gemma2', lambda c: dict(scale_embeddings=False)),
    ('gemma2', lambda c: dict(attn_scale=None)),
    ('gemma2', lambda c: dict(attn_softcap=None)),
    ('gemma2', lambda c: dict(logit_softcap=None)),
    ('gemma2', lambda c: dict(activation='gelu')),
    ('gemma2', lambda c: dict(sliding_window=None)),
    ('gemma2', lambda c: dict(sliding_window=hf_cases.WINDOW)),
    ('gemma2-untied', lambda c: dict(activation='gelu_tanh')),
    ('gemma2-untied', lambda c: dict(sliding_window=None)),
    ('gemma2-untied', lambda c: _rope(c, theta=1e4)),
    ('gemma2-untied', lambda c: _rope(c, scaling=None)),
    ('gemma3', lambda c: dict(norm_unit_offset=False)),
    ('gemma3', lambda c: dict(norm_eps=1e-6)),
    ('gemma3', lambda c: dict(scale_embeddings=False)),
    ('gemma3', lambda c: dict(attn_scale=None)),
    ('gemma3', lambda c: dict(attn_softcap=2.0)),
    ('gemma3', lambda c: dict(logit_softcap=None)),
    ('gemma3', lambda c: dict(sliding_window=(99, None, 99))),
    ('gemma3', lambda c: dict(rope_local=None)),
    ('gemma3', lambda c: _rope(c, 'rope_local', theta=1e4)),
    ('gemma3', lambda c: _rope(c, theta=1e6)),
    ('gemma3', lambda c: _rope(c, scaling=None)),
    ('gemma3-untied', lambda c: dict(activation='gelu_tanh')),
    ('gemma3-untied', lambda c: dict(rope_local=None)),
    ('gemma3-full', lambda c: dict(sliding_window=hf_cases.WINDOW)),
    ('gemma3-full', lambda c: _rope(c, theta=1e4)),
  ],
)
def test_every_setting_matters(case, change):
  model, params, _ = hf_cases.ours(case)
  changed = dataclasses.replace(model.config, **change(model.config))
  tokens, mask, expected = hf_cases.reference(case, 'none')
  got = jax.jit(transformer(changed).apply)(params, tokens)
  assert hf_cases.distance(expected, got, mask) > TOLERANCE


@pytest.mark.parametrize('case', ['qwen3', 'gpt2', 'neox', 'gemma3'])
def test_positions_matter(case):
  model, params, _ = hf_cases.ours(case)
  tokens, mask, expected = hf_cases.reference(case, 'none')
  ignored = jnp.zeros_like(tokens)
  got = jax.jit(model.apply)(params, tokens, positions_BT=ignored)
  assert hf_cases.distance(expected, got, mask) > TOLERANCE


@pytest.mark.parametrize(
  'case',
  [
    'llama',
    'olmo2',
    'qwen2-window',
    'qwen3-window',
    'gpt2',
    'neox',
    'gemma2',
    'gemma3',
  ],
)
def test_greedy_generation_is_that_of_transformers(case):
  import torch

  model, params, forward = hf_cases.ours(case)
  tokens, mask = hf_cases.batch('left', seed=3)
  prompt, new = hf_cases.LENGTH - 8, 8
  cached = generate(
    model.apply,
    params,
    tokens[:, :prompt],
    mask[:, :prompt],
    key=jax.random.key(0),
    max_new_tokens=new,
    cache=init_cache(model.config, 3, hf_cases.LENGTH),
    temperature=0.0,
  ).tokens_BN
  with torch.no_grad():
    theirs = hf_cases.torch_model(case).generate(
      torch.tensor(tokens[:, :prompt]),
      attention_mask=torch.tensor(mask[:, :prompt].astype(np.int64)),
      do_sample=False,
      max_new_tokens=new,
      pad_token_id=0,
    )
  np.testing.assert_array_equal(cached, theirs[:, prompt:].numpy())
  # Without a cache: the whole sequence again for every token.
  tokens, mask = tokens.copy(), mask.copy()
  mask[:, prompt:] = False
  for at in range(prompt, hf_cases.LENGTH):
    logits = forward(params, tokens, mask)[:, at - 1]
    tokens[:, at] = np.argmax(logits, axis=-1)
    mask[:, at] = True
  np.testing.assert_array_equal(cached, tokens[:, prompt:])


@pytest.mark.parametrize('case', ['llama', 'gemma2', 'gemma3'])
def test_bfloat16_computation_is_as_close_as_that_of_transformers(case):
  import torch

  tokens, mask, exact = hf_cases.reference(case, 'none')
  folder = hf_cases.checkpoint(case)
  dtypes = DTypePolicy(param=jnp.bfloat16, compute=jnp.bfloat16)
  model, params = load_pretrained(folder, dtypes=dtypes)
  theirs = type(hf_cases.torch_model(case)).from_pretrained(
    folder, dtype=torch.bfloat16
  )
  their_error = np.abs(hf_cases.torch_logits(theirs, tokens, mask) - exact)
  our_error = np.abs(np.asarray(jax.jit(model.apply)(params, tokens)) - exact)
  # Mean over 2,000 logits, each with independent rounding: ours may not be
  # worse than theirs by more than a quarter.
  assert 0 < our_error.mean() <= 1.25 * their_error.mean()


def _llama_4(config):
  rope = config.pop('rope_parameters')
  config['rope_theta'] = rope.pop('rope_theta')
  rope['type'] = rope.pop('rope_type')
  config['rope_scaling'] = rope


def _neox_4(config):
  rope = config.pop('rope_parameters')
  config['rotary_emb_base'] = rope['rope_theta']
  config['rotary_pct'] = rope['partial_rotary_factor']


def _qwen_4(config):
  del config['layer_types']


def _gemma2_4(config):
  del config['layer_types']
  config['rope_theta'] = config.pop('rope_parameters')['rope_theta']
  config['hidden_act'] = 'silu'  # There, and not read.


def _gemma3_4(config):
  rope = config.pop('rope_parameters')
  config['rope_theta'] = rope['full_attention'].pop('rope_theta')
  config['rope_scaling'] = rope['full_attention']
  config['rope_local_base_freq'] = rope['sliding_attention']['rope_theta']


def _gemma3_early_4(config):
  _gemma3_4(config)
  del config['layer_types'], config['_sliding_window_pattern']
  config['sliding_window_pattern'] = 2


def _gemma3_pattern(config):
  del config['layer_types'], config['_sliding_window_pattern']


@pytest.mark.parametrize(
  'case,change',
  [
    ('llama-rope', _llama_4),
    ('neox-serial', _neox_4),
    ('qwen2-window', _qwen_4),
    ('gemma2', _gemma2_4),
    ('gemma3', _gemma3_4),
    ('gemma3', _gemma3_early_4),
    ('gemma3-untied', _gemma3_pattern),
  ],
)
def test_configs_of_transformers_4_are_read(case, change, tmp_path):
  model, _ = load_pretrained(hf_cases.rewritten(case, tmp_path / 'old', change))
  assert model.config == hf_cases.ours(case)[0].config


@pytest.mark.parametrize('kind', ['Gemma2Config', 'Gemma3TextConfig'])
def test_what_a_config_leaves_out_is_as_in_transformers(kind):
  import transformers

  sizes = dict(
    vocab_size=7,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=13,
    num_attention_heads=2,
    num_key_value_heads=1,
  )
  full = getattr(transformers, kind)(**sizes).to_dict()
  _, expected = parse_config(full, 'full')
  _, got = parse_config(sizes | dict(model_type=full['model_type']), 'short')
  assert got == expected


def _bare(prefix):
  return lambda tensors: {
    name.removeprefix(prefix): tensor for name, tensor in tensors.items()
  }


def _gpt2_buffers(tensors):
  for layer in range(3):
    name = f'transformer.h.{layer}.attn'
    tensors[f'{name}.bias'] = np.ones((1, 1, 48, 48), np.uint8)
    tensors[f'{name}.masked_bias'] = np.array(-1e4, np.float32)
  return tensors


def _neox_buffers(tensors):
  for layer in range(3):
    name = f'gpt_neox.layers.{layer}.attention'
    tensors[f'{name}.bias'] = np.ones((1, 1, 64, 64), bool)
    tensors[f'{name}.masked_bias'] = np.array(-1e9, np.float32)
    tensors[f'{name}.rotary_emb.inv_freq'] = np.ones(2, np.float32)
  tensors['lm_head.weight'] = tensors.pop('embed_out.weight')
  return tensors


def _tied_head(tensors):
  tensors['lm_head.weight'] = tensors['model.embed_tokens.weight'].copy()
  return tensors


@pytest.mark.parametrize(
  'case,change',
  [
    ('llama-tied', _bare('model.')),
    ('gpt2', _bare('transformer.')),
    ('neox', _bare('gpt_neox.')),
    ('gpt2', _gpt2_buffers),
    ('neox', _neox_buffers),
    ('llama-tied', _tied_head),
    ('gemma3', _bare('model.')),
    ('gemma2', _tied_head),
  ],
)
def test_other_spellings_of_a_checkpoint_are_read(case, change, tmp_path):
  folder = hf_cases.rewritten(case, tmp_path / 'other', change_tensors=change)
  _, params = load_pretrained(folder)
  jax.tree.map(np.testing.assert_array_equal, params, hf_cases.ours(case)[1])


def test_parameters_arrive_sharded():
  mesh = jax.make_mesh(
    (2, 4), ('data', 'model'), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  model, params, _ = hf_cases.ours('llama-tied')
  # Kernels: what a projection makes goes over `model`, and back.
  specs = {
    'q/kernel': (None, None, 'model'),
    'up/kernel': (None, None, 'model'),
    'down/kernel': (None, 'model', None),
    'o/kernel': (None, 'model', 'data'),
    'k/kernel': (None, 'data', None),
  }

  def shardings(path):
    spec = specs.get('/'.join(path.split('/')[-2:]), ())
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

  folder = hf_cases.checkpoint('llama-tied')
  _, sharded = load_pretrained(folder, shardings=shardings)
  for path, leaf in hf_cases.flat(sharded).items():
    assert leaf.sharding == shardings(path), path
    np.testing.assert_array_equal(leaf, hf_cases.flat(params)[path])
  kernel = sharded['blocks']['attn']['o']['kernel']
  assert kernel.addressable_shards[0].data.shape == (3, 32 // 4, 32 // 2)
  as_tree = jax.tree_util.tree_map_with_path(
    lambda p, _: shardings('/'.join(k.key for k in p)), params
  )
  _, from_tree = load_pretrained(folder, shardings=as_tree)
  assert jax.tree.map(lambda a: a.sharding, from_tree) == as_tree
  tokens, mask, expected = hf_cases.reference('llama-tied', 'none')
  got = jax.jit(model.apply)(sharded, tokens)
  assert hf_cases.distance(expected, got, mask) <= TOLERANCE


def test_bad_shardings_raise_before_reading():
  folder = hf_cases.checkpoint('llama-tied')
  mesh = jax.make_mesh((8,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('x'))
  with pytest.raises(ValueError, match='sharding of .*blocks/.*'):
    load_pretrained(
      folder, shardings=lambda p: sharding if 'blocks' in p else None
    )
  with pytest.raises(ValueError, match='no entry for blocks/attn/k/kernel'):
    load_pretrained(folder, shardings={'embed': {'embedding': sharding}})


def _data_folder() -> pathlib.Path:
  beside = pathlib.Path(__file__).resolve().parents[2].parent / 'shared/data'
  return pathlib.Path(os.environ.get('IDESIGN_DATA', beside))


def test_a_real_model_predicts_stories():
  import tokenizers

  data = _data_folder()
  folder = data / 'lm_stories260K/hf'
  text = data / 'text_tinystories/tinystories_sample.txt'
  if not (folder / 'config.json').exists() or not text.exists():
    pytest.skip(f'no stories260K and TinyStories in {data} (IDESIGN_DATA)')
  model, params = load_pretrained(folder)
  tokenizer = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
  documents = text.read_text(encoding='utf-8').split('<|endoftext|>')
  ids = [tokenizer.encode(d.strip()).ids for d in documents if d.strip()]
  assert [i[0] for i in ids] == [1] * 5  # BOS
  longest = max(map(len, ids))
  tokens = np.array([i + [0] * (longest - len(i)) for i in ids])
  mask = np.array([[j < len(i) for j in range(longest)] for i in ids])
  logits = jax.jit(model.apply)(params, tokens, mask_BT=mask)
  logprobs = jax.nn.log_softmax(logits[:, :-1], axis=-1)
  nats = -np.take_along_axis(np.asarray(logprobs), tokens[:, 1:, None], 2)
  per_token = nats[..., 0][mask[:, 1:]]
  assert per_token.size == 1804
  # 1.266 nats per token is what two other implementations found.
  assert abs(per_token.mean() - 1.266) <= 0.01


def test_loading_leaves_the_folder_alone(tmp_path):
  folder = tmp_path / 'copy'
  shutil.copytree(hf_cases.checkpoint('gpt2'), folder)
  before = {p.name: p.read_bytes() for p in folder.iterdir()}
  load_pretrained(folder)
  assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
