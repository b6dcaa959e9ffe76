"""Tiny random checkpoints, written by transformers, for every family."""

import atexit
import functools
import json
import pathlib
import shutil
import tempfile

import jax
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from idesign.models import load_pretrained

LENGTH = 24
VOCAB = 29
WINDOW = 5

_LLAMA = dict(
  vocab_size=VOCAB,
  hidden_size=32,
  intermediate_size=40,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=64,
  rms_norm_eps=1e-2,
)
_GPT2 = dict(
  vocab_size=VOCAB,
  n_embd=32,
  n_layer=3,
  n_head=4,
  n_positions=48,
  n_inner=40,
  layer_norm_epsilon=1e-2,
)
_NEOX = dict(
  vocab_size=VOCAB,
  hidden_size=32,
  intermediate_size=40,
  num_hidden_layers=3,
  num_attention_heads=2,
  max_position_embeddings=64,
  layer_norm_eps=1e-2,
)
_LLAMA3 = dict(
  rope_type='llama3',
  rope_theta=100.0,
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=32,
)
_GEMMA = _LLAMA | dict(
  head_dim=12, query_pre_attn_scalar=20, sliding_window=WINDOW
)
# Name: (prefix of the transformers classes, settings). No setting that a family
# reads is at its default in all of its cases.
CASES = {
  'llama': (
    'Llama',
    _LLAMA | dict(head_dim=12, attention_bias=True, mlp_bias=True),
  ),
  'llama-tied': (
    'Llama',
    _LLAMA | dict(tie_word_embeddings=True, hidden_act='relu'),
  ),
  'llama-rope': ('Llama', _LLAMA | dict(rope_parameters=_LLAMA3)),
  'olmo2': ('Olmo2', _LLAMA),
  'olmo2-bias': (
    'Olmo2',
    _LLAMA | dict(attention_bias=True, hidden_act='relu'),
  ),
  'qwen2': (
    'Qwen2',
    _LLAMA | dict(tie_word_embeddings=True, hidden_act='gelu'),
  ),
  'qwen2-window': (
    'Qwen2',
    _LLAMA
    | dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
  ),
  'qwen3': (
    'Qwen3',
    _LLAMA | dict(head_dim=12, attention_bias=True, hidden_act='relu'),
  ),
  'qwen3-window': (
    'Qwen3',
    _LLAMA
    | dict(
      head_dim=16,
      use_sliding_window=True,
      sliding_window=WINDOW,
      layer_types=[
        'sliding_attention',
        'full_attention',
        'sliding_attention',
      ],
    ),
  ),
  'gpt2': ('GPT2', _GPT2),
  'gpt2-untied': (
    'GPT2',
    _GPT2 | dict(tie_word_embeddings=False, activation_function='relu'),
  ),
  'neox': ('GPTNeoX', _NEOX),
  'neox-serial': (
    'GPTNeoX',
    _NEOX
    | dict(
      use_parallel_residual=False,
      hidden_act='gelu_new',
      tie_word_embeddings=True,
      attention_bias=False,
      rope_parameters=dict(
        rope_type='default', rope_theta=500.0, partial_rotary_factor=0.5
      ),
    ),
  ),
  # Caps that bend most scores and logits.
  'gemma2': (
    'Gemma2',
    _GEMMA | dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
  ),
  'gemma2-untied': (
    'Gemma2',
    _GEMMA
    | dict(
      tie_word_embeddings=False,
      attention_bias=True,
      hidden_activation='silu',
      attn_logit_softcapping=None,
      final_logit_softcapping=None,
      layer_types=['full_attention', 'full_attention', 'sliding_attention'],
      rope_parameters=dict(rope_type='linear', rope_theta=500.0, factor=3.0),
    ),
  ),
  'gemma3': (
    'Gemma3',
    _GEMMA
    | dict(
      final_logit_softcapping=3.0,
      # The class has it, the model does not use it.
      attn_logit_softcapping=2.0,
      layer_types=['sliding_attention', 'full_attention', 'sliding_attention'],
      rope_parameters=dict(
        full_attention=dict(rope_type='linear', rope_theta=500.0, factor=3.0),
        sliding_attention=dict(rope_type='default', rope_theta=20.0),
      ),
    ),
  ),
  'gemma3-untied': (
    'Gemma3',
    _GEMMA
    | dict(
      tie_word_embeddings=False, attention_bias=True, hidden_activation='relu'
    ),
  ),
  'gemma3-full': (
    'Gemma3',
    _GEMMA | dict(head_dim=16, layer_types=['full_attention'] * 3),
  ),
  'llama-linear': (
    'Llama',
    _LLAMA
    | dict(
      rope_parameters=dict(rope_type='linear', rope_theta=50.0, factor=3.0)
    ),
  ),
}


@functools.cache
def torch_model(case: str):
  """The transformers model, every tensor redrawn from normal(0, 0.5)."""
  import torch
  import transformers

  torch.set_num_threads(1)  # Threads cost more than they gain at this size.
  prefix, settings = CASES[case]
  head = 'LMHeadModel' if prefix == 'GPT2' else 'ForCausalLM'
  # The plain name is that of the model with images.
  kind = 'TextConfig' if prefix == 'Gemma3' else 'Config'
  config = getattr(transformers, prefix + kind)(
    **settings, bos_token_id=None, eos_token_id=None, pad_token_id=None
  )
  model = getattr(transformers, f'{prefix}{head}')(config).eval()
  generator = torch.Generator().manual_seed(list(CASES).index(case))
  with torch.no_grad():
    for tensor in model.parameters():
      tensor.normal_(0, 0.5, generator=generator)
  return model


@functools.cache
def checkpoint(case: str) -> pathlib.Path:
  """A folder with the model of the case; the first is written in shards."""
  folder = _root() / case
  limit = '20KB' if case == next(iter(CASES)) else '1GB'
  torch_model(case).save_pretrained(folder, max_shard_size=limit)
  return folder


@functools.cache
def _root() -> pathlib.Path:
  root = tempfile.mkdtemp()
  atexit.register(shutil.rmtree, root)
  return pathlib.Path(root)


def batch(padding: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """Tokens and mask `[3, LENGTH]`; padding `none`, `left` or `right`."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, VOCAB, (3, LENGTH))
  mask = np.ones(tokens.shape, bool)
  if padding == 'left':
    mask[1, :5] = mask[2, :11] = False
  if padding == 'right':
    mask[1, -5:] = mask[2, -11:] = False
  return tokens, mask


def positions(mask: np.ndarray) -> np.ndarray:
  return np.maximum(np.cumsum(mask, axis=1) - 1, 0)


def torch_logits(model, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
  import torch

  with torch.no_grad():
    out = model(
      input_ids=torch.tensor(tokens),
      attention_mask=torch.tensor(mask.astype(np.int64)),
      position_ids=torch.tensor(positions(mask)),
    )
  return out.logits.float().numpy()


@functools.cache
def ours(case):
  """Model, parameters and one compiled function of all of them."""
  model, params = load_pretrained(checkpoint(case))
  forward = jax.jit(lambda p, t, m: model.apply(p, t, mask_BT=m))
  return model, params, forward


def distance(a, b, mask):
  """Largest difference over largest logit, at real tokens."""
  return float(np.abs(a - b)[mask].max() / np.abs(a)[mask].max())


@functools.cache
def reference(case, padding):
  tokens, mask = batch(padding)
  logits = torch_logits(torch_model(case), tokens, mask)
  return tokens, mask, logits


def flat(params):
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return {'/'.join(k.key for k in path): leaf for path, leaf in leaves}


def replaced(params, path, value):
  """The parameters with one leaf changed."""
  return jax.tree_util.tree_map_with_path(
    lambda p, leaf: value if '/'.join(k.key for k in p) == path else leaf,
    params,
  )


def rewritten(case, folder, change_config=None, change_tensors=None):
  """A copy of the checkpoint with config and tensors changed."""
  source = checkpoint(case)
  folder.mkdir()
  config = json.loads((source / 'config.json').read_text())
  if change_config:
    change_config(config)
  (folder / 'config.json').write_text(json.dumps(config))
  tensors = {}
  for path in source.glob('*.safetensors'):
    with safe_open(path, 'numpy') as file:
      tensors |= {name: file.get_tensor(name) for name in file.keys()}
  if change_tensors:
    tensors = change_tensors(tensors)
  save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})
  return folder
