"""A multilayer perceptron classifier."""

from __future__ import annotations

import dataclasses

from flax import nnx
import jax
from jaxtyping import Array, Float

from idesign.models.functional import DTypePolicy, Model, functional


@dataclasses.dataclass(frozen=True)
class MLPConfig:
  """Sizes: `d_in -> hidden[0] -> ... -> num_classes`, ReLU between."""

  d_in: int
  hidden: tuple[int, ...]
  num_classes: int
  dtypes: DTypePolicy = DTypePolicy()


class _MLP(nnx.Module):
  def __init__(self, config: MLPConfig, rngs: nnx.Rngs):
    self.config = config
    widths = (config.d_in, *config.hidden, config.num_classes)
    for i, (d_in, d_out) in enumerate(zip(widths[:-1], widths[1:])):
      layer = nnx.Linear(
        d_in,
        d_out,
        kernel_init=nnx.initializers.he_normal(),
        dtype=config.dtypes.compute,
        param_dtype=config.dtypes.param,
        rngs=rngs,
      )
      setattr(self, f'layer_{i}', layer)

  def __call__(self, x_BD: Float[Array, 'B D']) -> Float[Array, 'B C']:
    h_BD = x_BD.astype(self.config.dtypes.compute)
    depth = len(self.config.hidden)
    for i in range(depth):
      h_BD = jax.nn.relu(getattr(self, f'layer_{i}')(h_BD))
    logits_BC = getattr(self, f'layer_{depth}')(h_BD)
    return logits_BC.astype(self.config.dtypes.output)


def mlp(config: MLPConfig) -> Model:
  """An MLP classifier as pure functions.

  `apply(params, x)` maps `x [B, d_in]` to logits `[B, num_classes]`. The
  weight of layer `i` is `layer_{i}/kernel`, `[d_in_i, d_out_i]`.
  """
  return functional(lambda rngs: _MLP(config, rngs), config)
