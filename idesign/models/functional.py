"""Pure functions from NNX modules: how a model leaves this room."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class DTypePolicy:
  """The three dtypes of a model.

  Attributes:
    param: dtype in which parameters are stored and optimised.
    compute: dtype of matrix products and of the residual stream. Softmax,
      normalisation statistics and rotary angles are always float32.
    output: dtype of the logits.
  """

  param: jax.typing.DTypeLike = jnp.float32
  compute: jax.typing.DTypeLike = jnp.float32
  output: jax.typing.DTypeLike = jnp.float32


class Model(NamedTuple):
  """A model as two pure functions.

  Attributes:
    init: `init(key) -> params`, a nested dict of arrays with string keys.
    apply: `apply(params, inputs, ...) -> outputs`.
    config: the frozen dataclass the model was built from.
  """

  init: Callable[[jax.Array], Params]
  apply: Callable[..., Any]
  config: Any


def functional(build: Callable[[nnx.Rngs], nnx.Module], config: Any) -> Model:
  """Splits an NNX module into `init` and `apply`.

  Args:
    build: makes the module from its random streams. All of its state must be
      `nnx.Param` under string keys: modules with other state (batch
      statistics, dropout keys) have no pure form here.
    config: what `build` was configured with; carried along.

  Returns:
    The `Model`. Both functions work under `jit`, `grad`, `vmap` and
    `eval_shape`; nothing is allocated here.

  Raises:
    ValueError: if the module holds state that is not a parameter.
  """
  graphdef, state = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
  for path, variable in nnx.to_flat_state(state):
    if not isinstance(variable, nnx.Param):
      raise ValueError(
        f'{"/".join(map(str, path))} is a {type(variable).__name__}; only '
        'nnx.Param state can be handed out as a pure function.'
      )

  def init(key: jax.Array) -> Params:
    module = build(nnx.Rngs(key))
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))

  def apply(params: Params, *args, **kwargs):
    return nnx.merge(graphdef, params)(*args, **kwargs)

  return Model(init, apply, config)
