"""What a decoder or an encoder block is made of: frozen, validated settings."""

from __future__ import annotations

import dataclasses
import typing
from typing import Literal

from idesign.models.functional import DTypePolicy

Activation = Literal['silu', 'gelu', 'gelu_tanh', 'relu']


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
  """Llama-3 stretching of slow frequencies (https://arxiv.org/abs/2407.21783).

  A frequency whose wavelength exceeds `original_max_len / low_freq_factor` is
  divided by `factor`; one below `original_max_len / high_freq_factor` is kept;
  those between are interpolated.
  """

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_len: int

  def __post_init__(self):
    if self.factor <= 0 or self.original_max_len <= 0:
      raise ValueError(f'factor and original_max_len must be positive: {self}.')
    if not 0 < self.low_freq_factor < self.high_freq_factor:
      raise ValueError(f'need 0 < low_freq_factor < high_freq_factor: {self}.')


@dataclasses.dataclass(frozen=True)
class LinearScaling:
  """Every frequency divided by `factor` (https://arxiv.org/abs/2306.15595)."""

  factor: float

  def __post_init__(self):
    require_positive(self, 'factor')


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Rotary positions (https://arxiv.org/abs/2104.09864), half-split pairs.

  Attributes:
    theta: base of the geometric series of wavelengths.
    fraction: share of each head that is rotated: its first
      `int(head_dim * fraction)` features.
    scaling: how frequencies are changed for longer contexts, if at all.
  """

  theta: float = 10_000.0
  fraction: float = 1.0
  scaling: Llama3Scaling | LinearScaling | None = None

  def __post_init__(self):
    if self.theta <= 0:
      raise ValueError(f'rope theta={self.theta} must be positive.')
    if not 0 < self.fraction <= 1:
      raise ValueError(f'rope fraction={self.fraction} must be in (0, 1].')

  def rotary_dim(self, head_dim: int) -> int:
    return int(head_dim * self.fraction)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
  """A stack of identical transformer blocks.

  Attributes:
    d_model: width of the residual stream.
    n_layers: number of blocks.
    n_heads: query heads.
    n_kv_heads: key and value heads, a divisor of `n_heads`; None: `n_heads`.
    head_dim: features per head; None: `d_model // n_heads`.
    d_ff: hidden width of the MLP.
    activation: nonlinearity of the MLP. `gelu` is exact, `gelu_tanh` its tanh
      approximation (Hugging Face `gelu_new`).
    gated: `down(act(gate(h)) * up(h))` if true, else `down(act(up(h)))`.
    norm: `rms` (https://arxiv.org/abs/1910.07467) or `layer` with bias.
    norm_eps: added to the variance or mean square.
    norm_unit_offset: every norm multiplies by `1 + scale`, not by `scale`, and
      its scale starts at zero (Gemma).
    norm_position: `pre` normalises the inputs of attention and MLP; `post`
      normalises their outputs, before these are added (OLMo-2); `both` does
      both (Gemma-2).
    parallel_residual: the MLP reads the block's input, not the attention's
      result (GPT-NeoX).
    qkv_bias: biases on the query, key and value projections.
    attn_out_bias: bias on the output projection of attention.
    mlp_bias: biases in the MLP.
    qk_norm: RMS-normalise queries and keys over the whole projected `width`
      (OLMo-2) or per `head` (Qwen3), before rotation.
    attn_scale: what the products of queries and keys are multiplied by; None:
      `head_dim**-0.5`.
    attn_softcap: scores become `c tanh(scores / c)`.
    sliding_window: how many positions back a token sees, itself included; one
      number, or one per layer with None where the layer sees everything.
    remat: recompute each block's activations in the backward pass.
    unroll: layers per iteration of the compiled loop; more of them compile
      longer and may run faster.
    dtypes: dtypes of parameters, computation and logits.
  """

  d_model: int
  n_layers: int
  n_heads: int
  n_kv_heads: int | None = None
  head_dim: int | None = None
  d_ff: int
  activation: Activation = 'silu'
  gated: bool = True
  norm: Literal['rms', 'layer'] = 'rms'
  norm_eps: float = 1e-5
  norm_unit_offset: bool = False
  norm_position: Literal['pre', 'post', 'both'] = 'pre'
  parallel_residual: bool = False
  qkv_bias: bool = False
  attn_out_bias: bool = False
  mlp_bias: bool = False
  qk_norm: Literal['width', 'head'] | None = None
  attn_scale: float | None = None
  attn_softcap: float | None = None
  sliding_window: int | tuple[int | None, ...] | None = None
  remat: bool = False
  unroll: int = 1
  dtypes: DTypePolicy = DTypePolicy()

  def __post_init__(self):
    require_positive(self, 'd_model', 'n_layers', 'n_heads', 'd_ff', 'unroll')
    if self.n_kv_heads is None:
      object.__setattr__(self, 'n_kv_heads', self.n_heads)
    if self.head_dim is None:
      if self.d_model % self.n_heads:
        raise ValueError(
          f'd_model={self.d_model} is not a multiple of n_heads='
          f'{self.n_heads}; give head_dim.'
        )
      object.__setattr__(self, 'head_dim', self.d_model // self.n_heads)
    require_positive(self, 'n_kv_heads', 'head_dim', 'norm_eps')
    if self.n_heads % self.n_kv_heads:
      raise ValueError(
        f'n_heads={self.n_heads} is not a multiple of n_kv_heads='
        f'{self.n_kv_heads}: every key-value head serves equally many query '
        'heads.'
      )
    require_choice(self, 'activation', typing.get_args(Activation))
    require_choice(self, 'norm', ('rms', 'layer'))
    require_choice(self, 'norm_position', ('pre', 'post', 'both'))
    require_choice(self, 'qk_norm', (None, 'width', 'head'))
    if self.attn_softcap is not None:
      require_positive(self, 'attn_softcap')
    if self.attn_scale is not None:
      require_positive(self, 'attn_scale')
      # One form of the same model: equal models have equal configs.
      if self.attn_scale == self.head_dim**-0.5:
        object.__setattr__(self, 'attn_scale', None)
    object.__setattr__(self, 'sliding_window', self._windows())

  def _windows(self) -> tuple[int | None, ...] | None:
    windows = self.sliding_window
    if windows is None or isinstance(windows, int):
      windows = (windows,) * self.n_layers
    if len(windows) != self.n_layers:
      raise ValueError(
        f'sliding_window has {len(windows)} entries for n_layers='
        f'{self.n_layers}: {windows}.'
      )
    if any(w is not None and w <= 0 for w in windows):
      raise ValueError(f'sliding_window={windows} must be positive or None.')
    # All None and None are the same model: one form, so that equal models have
    # equal configs.
    return None if set(windows) == {None} else tuple(windows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig(BlockConfig):
  """A decoder-only language model.

  Attributes:
    vocab_size: number of tokens.
    max_len: longest sequence. A hard limit for learned positions; with rotary
      positions it is only recorded.
    rope: rotary positions; None: learned absolute positions.
    rope_local: rotary positions of the layers with a sliding window (Gemma-3);
      None: `rope`.
    scale_embeddings: the embeddings of tokens are multiplied by
      `sqrt(d_model)`; a tied output head is not (Gemma).
    tie_embeddings: the output head is the transposed embedding.
    logit_softcap: logits become `c tanh(logits / c)`.
  """

  vocab_size: int
  max_len: int = 2048
  rope: RopeConfig | None = RopeConfig()
  rope_local: RopeConfig | None = None
  scale_embeddings: bool = False
  tie_embeddings: bool = False
  logit_softcap: float | None = None

  def __post_init__(self):
    super().__post_init__()
    require_positive(self, 'vocab_size', 'max_len')
    if self.logit_softcap is not None:
      require_positive(self, 'logit_softcap')
    if self.rope is not None:
      width = self.rope.rotary_dim(self.head_dim)
      if width < 2 or width % 2:
        raise ValueError(
          f'head_dim={self.head_dim} with rope fraction={self.rope.fraction} '
          f'rotates {width} features; rotation needs an even number.'
        )
    if self.rope_local is not None:
      self._check_rope_local()

  def _check_rope_local(self) -> None:
    if self.rope is None:
      raise ValueError('rope_local without rope: learned positions are added.')
    if self.sliding_window is None:
      raise ValueError(
        'rope_local is for layers with a sliding window, of which there are '
        'none; leave it None.'
      )
    widths = [
      rope.rotary_dim(self.head_dim) for rope in (self.rope, self.rope_local)
    ]
    if widths[0] != widths[1]:
      raise ValueError(
        f'rope rotates {widths[0]} features and rope_local {widths[1]}; they '
        'must be equally many: give both the same fraction.'
      )
    if self.rope_local == self.rope:
      object.__setattr__(self, 'rope_local', None)


def require_positive(config: object, *names: str) -> None:
  """Raises ValueError for the first of these fields that is not positive."""
  for name in names:
    if not getattr(config, name) > 0:
      raise ValueError(f'{name}={getattr(config, name)} must be positive.')


def require_choice(config: object, name: str, choices: tuple) -> None:
  """Raises ValueError if the field is none of the choices."""
  if getattr(config, name) not in choices:
    value = getattr(config, name)
    raise ValueError(f'{name}={value!r}; choose from {choices}.')
