"""One training step: loss, gradient, update, metrics, in one jitted function.

**The loss contract.** A loss is `loss(params, batch) -> [B]`, one value per
example; `batch` is a dict of arrays whose axis 0 is the example. The step
minimises the weighted mean

    L = sum_i w_i l_i / sum_i w_i

with `w = batch["weight"]`, `[B]`, where the batch has one and 1 otherwise. A
weight of 0 removes an example (padding at the end of a data set); masks over
tokens belong inside the loss.

**Randomness.** A loss that needs noise (dropout, sampling) reads it from
`batch["key"]`, `[B]`: the step adds one key per example,
`fold_in(fold_in(state.key, state.step), i)`. So a noisy loss keeps the
contract, and its noise depends neither on accumulation nor on the mesh.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key
import optax

from idesign.training import sharding as sharding_lib

PyTree = Any
Batch = Mapping[str, Array]
Loss = Callable[[PyTree, Batch], Float[Array, 'B']]


class TrainState(NamedTuple):
  """Everything a run needs to go on, apart from its data.

  Attributes:
    step: number of updates made, int32.
    params: the parameters.
    opt_state: the optimizer's state.
    key: root of the noise of the loss; it never changes, the step is folded
      into it.
  """

  step: Int[Array, '']
  params: PyTree
  opt_state: optax.OptState
  key: Key[Array, '']


def init_state(
  init: Callable[[Key[Array, '']], PyTree],
  optimizer: optax.GradientTransformation,
  key: Key[Array, ''],
  *,
  mesh: Mesh | None = None,
  rules: sharding_lib.Rules | None = None,
) -> TrainState:
  """A new `TrainState`, born with its shardings.

  Args:
    init: `init(key) -> params`.
    optimizer: any Optax transformation.
    key: `jax.random.key(seed)`; parameters and noise get keys of their own.
    mesh: where to put it; the default device if None.
    rules: shardings of the parameters, see `tree_shardings`; the optimizer
      state follows them. Required with a mesh.

  Raises:
    ValueError: if only one of `mesh` and `rules` is given, or a rule does not
      fit.
  """
  if (mesh is None) != (rules is None):
    raise ValueError('mesh and rules are given together or not at all.')

  def build(key):
    init_key, noise_key = jax.random.split(key)
    params = init(init_key)
    return TrainState(
      jnp.zeros((), jnp.int32), params, optimizer.init(params), noise_key
    )

  if mesh is None:
    return jax.jit(build)(key)
  shardings = state_shardings(jax.eval_shape(build, key), mesh, rules)
  return jax.jit(build, out_shardings=shardings)(key)


def state_shardings(
  state: TrainState, mesh: Mesh, rules: sharding_lib.Rules
) -> TrainState:
  """A `TrainState` of `NamedSharding`s.

  Args:
    state: arrays or `jax.ShapeDtypeStruct`s (`jax.eval_shape`).
    mesh: the mesh.
    rules: shardings of the parameters; see `tree_shardings`, whose errors this
      raises.
  """
  replicated = NamedSharding(mesh, PartitionSpec())
  params = sharding_lib.tree_shardings(state.params, mesh, rules)
  opt_state = sharding_lib.follow_shardings(
    state.opt_state, state.params, params, mesh
  )
  return TrainState(replicated, params, opt_state, replicated)


def mean_gradient(
  loss: Loss, params: PyTree, batch: Batch, *, accumulate: int = 1
) -> tuple[Float[Array, ''], PyTree]:
  """The weighted mean loss and its gradient.

  The batch is cut into `accumulate` microbatches that are visited one after
  the other, so that activations of only `B / accumulate` examples are alive.
  Microbatch `k` holds the examples `k, k + accumulate, ...`: taken with a
  stride, each is spread over all data shards as the batch was. The sum of
  weights is that of the whole batch, so the result is the same mean whatever
  the number of microbatches and wherever the zero weights are; only the order
  of summation differs. Sums run in float32 (float64 for float64 parameters).

  Args:
    loss: `loss(params, batch) -> [B]`.
    params: differentiated; every leaf is floating.
    batch: arrays `[B, ...]`, with optional `weight`, `[B]`.
    accumulate: number of microbatches.

  Returns:
    The mean loss, float32, and the gradient with the dtypes of `params`. Both
    are NaN if all weights are zero.

  Raises:
    ValueError: while tracing, if the arrays of the batch disagree about B, B
      is no multiple of `accumulate`, or the loss does not return `[B]`.
  """
  size = _batch_size(batch)
  if accumulate < 1 or size % accumulate:
    raise ValueError(
      f'accumulate={accumulate} must be positive and divide the batch of '
      f'{size} examples.'
    )
  weight_B = batch.get('weight', jnp.ones(size, jnp.float32))
  weight_B = jnp.asarray(weight_B, jnp.float32)
  if weight_B.shape != (size,):
    raise ValueError(
      f'batch["weight"] has shape {weight_B.shape}; it must be ({size},), '
      'one weight per example (token masks belong inside the loss).'
    )
  weight_B = weight_B / weight_B.sum()

  def weighted_sum(params, batch, weight_b):
    loss_b = loss(params, batch)
    if jnp.shape(loss_b) != weight_b.shape:
      raise ValueError(
        f'the loss returned shape {jnp.shape(loss_b)} for a batch of '
        f'{weight_b.shape[0]} examples; it must return one value per '
        f'example, shape {weight_b.shape}, and leave the mean to the step.'
      )
    return jnp.sum(loss_b.astype(jnp.float32) * weight_b)

  value_and_grad = jax.value_and_grad(weighted_sum)
  if accumulate == 1:
    return value_and_grad(params, batch, weight_B)

  def visit(total, microbatch):
    value, gradient = value_and_grad(params, *microbatch)
    add = lambda a, b: a + b.astype(a.dtype)
    return jax.tree.map(add, total, (value, gradient)), None

  zeros = lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32))
  total = (jnp.zeros((), jnp.float32), jax.tree.map(zeros, params))
  (value, gradient), _ = jax.lax.scan(
    visit, total, split_batch((dict(batch), weight_B), accumulate)
  )
  cast = lambda g, p: g.astype(p.dtype)
  return value, jax.tree.map(cast, gradient, params)


def split_batch(batch: PyTree, parts: int) -> PyTree:
  """Cuts axis 0 in parts, `[B, ...] -> [parts, B / parts, ...]`.

  Part `k` holds the rows `k, k + parts, ...`: taken with a stride, each is
  spread over all data shards as the batch was.

  Raises:
    ValueError: if `parts` does not divide the rows.
  """

  def split(x):
    if parts < 1 or len(x) % parts:
      raise ValueError(f'{parts} parts must divide {len(x)} rows.')
    return jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)

  return jax.tree.map(split, batch)


def _batch_size(batch: Batch) -> int:
  sizes = {
    name: jnp.shape(x)[0] if jnp.ndim(x) else None for name, x in batch.items()
  }
  if not sizes or None in sizes.values() or len(set(sizes.values())) > 1:
    raise ValueError(
      'every array of a batch has the examples on axis 0, equally many; got '
      + (', '.join(f'{k}: {v}' for k, v in sizes.items()) or 'no array')
    )
  return next(iter(sizes.values()))


def make_train_step(
  loss: Loss,
  optimizer: optax.GradientTransformation,
  *,
  accumulate: int = 1,
  shardings: TrainState | None = None,
) -> Callable[..., tuple[TrainState, dict[str, Float[Array, '']]]]:
  """Builds `step(state, batch, **extra) -> (state, metrics)`, jitted.

  The state is **donated**: its buffers are reused and the one passed in is
  deleted. The step compiles once per shape of batch.

  Args:
    loss: `loss(params, batch) -> [B]`; see the module for the contract.
    optimizer: any Optax transformation. It receives the mean loss as `value`
      (the name Optax uses) and `extra`, unless it takes no extra arguments.
    accumulate: number of microbatches; see `mean_gradient`.
    shardings: of the state, by `state_shardings`; the new state is kept there.
      None leaves it to JAX (one device, or layouts that follow the inputs).

  Returns:
    The step. `extra` are pytrees of arrays passed on to
    `optimizer.update(..., **extra)`. The metrics are float32 scalars: `loss`
    (before the update), `grad_norm`, `update_norm` and `param_norm` (after
    it), Euclidean norms over all leaves.
  """
  optimizer = optax.with_extra_args_support(optimizer)

  def train_step(state: TrainState, batch: Batch, **extra):
    if 'key' in batch:
      raise ValueError(
        'batch["key"] is added by the step; rename the array of that name.'
      )
    key = jax.random.fold_in(state.key, state.step)
    index_B = jnp.arange(_batch_size(batch))
    key_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index_B)
    value, gradient = mean_gradient(
      loss, state.params, {**batch, 'key': key_B}, accumulate=accumulate
    )
    updates, opt_state = optimizer.update(
      gradient, state.opt_state, state.params, value=value, **extra
    )
    params = optax.apply_updates(state.params, updates)
    metrics = {
      'loss': value,
      'grad_norm': _norm(gradient),
      'update_norm': _norm(updates),
      'param_norm': _norm(params),
    }
    return TrainState(state.step + 1, params, opt_state, state.key), metrics

  out_shardings = None
  if shardings is not None:
    out_shardings = (
      shardings,
      NamedSharding(shardings.step.mesh, PartitionSpec()),
    )
  return jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)


def _norm(tree: PyTree) -> Float[Array, '']:
  wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))
  norm = optax.tree.norm(jax.tree.map(wide, tree))
  return jnp.asarray(norm, jnp.float32)
