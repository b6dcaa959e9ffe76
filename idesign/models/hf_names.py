"""Names and layouts of tensors in Hugging Face checkpoints, by family.

One table per family serves both directions. A row says which parameters of
ours one checkpoint tensor holds, and how it is cut into them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import re
from typing import NamedTuple

import numpy as np

from idesign.models.config import TransformerConfig


class Layout(NamedTuple):
  """How one checkpoint tensor holds one or more parameters.

  Attributes:
    split: `split(tensor, config) -> parameters`.
    join: its inverse, `join(parameters, config) -> tensor`.
  """

  split: Callable[[np.ndarray, TransformerConfig], Sequence[np.ndarray]]
  join: Callable[[Sequence[np.ndarray], TransformerConfig], np.ndarray]


def _split_heads(tensor, config):
  """`[n_heads, 3, head_dim, ...]`, flattened, into q, k and v."""
  shape = (config.n_heads, 3, config.head_dim, *tensor.shape[1:])
  parts = np.moveaxis(tensor.reshape(shape), 1, 0)
  return [part.reshape(-1, *tensor.shape[1:]).T for part in parts]


def _join_heads(parts, config):
  shape = (config.n_heads, config.head_dim)
  parts = [part.T.reshape(*shape, *part.T.shape[1:]) for part in parts]
  stacked = np.stack(parts, axis=1)
  return stacked.reshape(-1, *stacked.shape[3:])


SAME = Layout(lambda t, c: [t], lambda p, c: p[0])
# torch.nn.Linear keeps [d_out, d_in].
TRANSPOSED = Layout(lambda t, c: [t.T], lambda p, c: p[0].T)
# q, k, v side by side in the output features, [d_in, 3 d_out] (GPT-2).
FUSED_COLUMNS = Layout(
  lambda t, c: np.split(t, 3, axis=-1),
  lambda p, c: np.concatenate(p, axis=-1),
)
# q, k, v side by side within each head, [3 d_out, d_in] (GPT-NeoX).
FUSED_HEADS = Layout(_split_heads, _join_heads)


class Row(NamedTuple):
  """One checkpoint tensor, or one per layer if its name has a `{}`."""

  name: str
  paths: tuple[str, ...]
  layout: Layout = SAME

  @property
  def stacked(self) -> bool:
    return '{}' in self.name


@dataclasses.dataclass(frozen=True)
class Table:
  """The tensors of one family.

  Attributes:
    prefix: what the names of all tensors but the output head begin with when
      the checkpoint is of a language model; checkpoints of the bare decoder
      leave it out. Rows are written without.
    rows: every tensor the family can have.
    head: name of the output head, without prefix in either case.
    head_aliases: older or newer names of the head, accepted when reading.
    buffers: patterns of tensors that hold no parameters and are ignored.
  """

  prefix: str
  rows: tuple[Row, ...]
  head: str = 'lm_head.weight'
  head_aliases: tuple[str, ...] = ()
  buffers: tuple[str, ...] = ()

  def canonical(self, name: str) -> str:
    """The name as in `rows`."""
    name = name.removeprefix(self.prefix)
    return self.head if name in self.head_aliases else name

  def written(self, name: str) -> str:
    """The name in a checkpoint of a language model."""
    return name if name == self.head else self.prefix + name

  def is_buffer(self, canonical: str) -> bool:
    return any(re.fullmatch(p, canonical) for p in self.buffers)

  def used_rows(self, paths: set[str]) -> list[Row]:
    """The rows of a model with these parameters.

    Raises:
      ValueError: if a row is used in part, or the rows do not cover the
        parameters exactly: the table does not describe this model.
    """
    rows = [row for row in self.rows if set(row.paths) & paths]
    covered = [path for row in rows for path in row.paths]
    if sorted(covered) != sorted(paths):
      odd = sorted(set(covered) ^ paths)
      raise ValueError(f'parameters and the name table disagree on {odd}.')
    return rows


def _pair(name: str, path: str, layout: Layout = TRANSPOSED) -> list[Row]:
  """A projection's weight and bias."""
  return [
    Row(f'{name}.weight', (f'{path}/kernel',), layout),
    Row(f'{name}.bias', (f'{path}/bias',)),
  ]


def _layer_norm(name: str, path: str) -> list[Row]:
  return [
    Row(f'{name}.weight', (f'{path}/scale',)),
    Row(f'{name}.bias', (f'{path}/bias',)),
  ]


def _llama_like(**norms: str) -> Table:
  """Names of Llama, with the norms of a block as given."""
  rows = [Row('embed_tokens.weight', ('embed/embedding',))]
  for part in 'qkvo':
    rows += _pair(f'layers.{{}}.self_attn.{part}_proj', f'blocks/attn/{part}')
  for part in ('q_norm', 'k_norm'):
    name = f'layers.{{}}.self_attn.{part}.weight'
    rows.append(Row(name, (f'blocks/attn/{part}/scale',)))
  for part in ('gate', 'up', 'down'):
    rows += _pair(f'layers.{{}}.mlp.{part}_proj', f'blocks/mlp/{part}')
  rows += [
    Row(f'layers.{{}}.{name}.weight', (f'blocks/{path}/scale',))
    for path, name in norms.items()
  ]
  rows += [
    Row('norm.weight', ('final_norm/scale',)),
    Row('lm_head.weight', ('lm_head/kernel',), TRANSPOSED),
  ]
  return Table(
    'model.',
    tuple(rows),
    buffers=(r'(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq',),
  )


def _gpt2() -> Table:
  qkv = [f'blocks/attn/{part}' for part in 'qkv']
  rows = [
    Row('wte.weight', ('embed/embedding',)),
    Row('wpe.weight', ('positions/embedding',)),
    *_layer_norm('h.{}.ln_1', 'blocks/pre_attn_norm'),
    *_layer_norm('h.{}.ln_2', 'blocks/pre_mlp_norm'),
    *_layer_norm('ln_f', 'final_norm'),
    Row('lm_head.weight', ('lm_head/kernel',), TRANSPOSED),
  ]
  for kind, ours in (('weight', 'kernel'), ('bias', 'bias')):
    paths = tuple(f'{path}/{ours}' for path in qkv)
    rows.append(Row(f'h.{{}}.attn.c_attn.{kind}', paths, FUSED_COLUMNS))
  # GPT-2's Conv1D keeps [d_in, d_out].
  rows += _pair('h.{}.attn.c_proj', 'blocks/attn/o', SAME)
  rows += _pair('h.{}.mlp.c_fc', 'blocks/mlp/up', SAME)
  rows += _pair('h.{}.mlp.c_proj', 'blocks/mlp/down', SAME)
  return Table(
    'transformer.',
    tuple(rows),
    buffers=(r'h\.\d+\.attn\.(bias|masked_bias)',),
  )


def _gpt_neox() -> Table:
  qkv = [f'blocks/attn/{part}' for part in 'qkv']
  rows = [
    Row('embed_in.weight', ('embed/embedding',)),
    *_layer_norm('layers.{}.input_layernorm', 'blocks/pre_attn_norm'),
    *_layer_norm('layers.{}.post_attention_layernorm', 'blocks/pre_mlp_norm'),
    *_layer_norm('final_layer_norm', 'final_norm'),
    Row('embed_out.weight', ('lm_head/kernel',), TRANSPOSED),
  ]
  for kind, ours in (('weight', 'kernel'), ('bias', 'bias')):
    paths = tuple(f'{path}/{ours}' for path in qkv)
    name = f'layers.{{}}.attention.query_key_value.{kind}'
    rows.append(Row(name, paths, FUSED_HEADS))
  rows += _pair('layers.{}.attention.dense', 'blocks/attn/o')
  rows += _pair('layers.{}.mlp.dense_h_to_4h', 'blocks/mlp/up')
  rows += _pair('layers.{}.mlp.dense_4h_to_h', 'blocks/mlp/down')
  return Table(
    'gpt_neox.',
    tuple(rows),
    head='embed_out.weight',
    head_aliases=('lm_head.weight',),
    buffers=(
      r'layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)',
      r'rotary_emb\.inv_freq',
    ),
  )


_PRE_NORM = _llama_like(
  pre_attn_norm='input_layernorm', pre_mlp_norm='post_attention_layernorm'
)
_POST_NORM = _llama_like(
  post_attn_norm='post_attention_layernorm',
  post_mlp_norm='post_feedforward_layernorm',
)
_BOTH_NORMS = _llama_like(
  pre_attn_norm='input_layernorm',
  post_attn_norm='post_attention_layernorm',
  pre_mlp_norm='pre_feedforward_layernorm',
  post_mlp_norm='post_feedforward_layernorm',
)
TABLES = {
  'llama': _PRE_NORM,
  'olmo2': _POST_NORM,
  'qwen2': _PRE_NORM,
  'qwen3': _PRE_NORM,
  'gpt2': _gpt2(),
  'gpt_neox': _gpt_neox(),
  'gemma2': _BOTH_NORMS,
  'gemma3_text': _BOTH_NORMS,
}
