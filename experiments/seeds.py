"""Training the networks of several seeds side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec
import jax.numpy as jnp
import numpy as np
import optax

from experiments import contract
from idesign import training


class _Stacked:
  """The batches of several runs at once: arrays `[B, seeds, ...]`."""

  def __init__(
    self, rows: Sequence[Mapping[str, np.ndarray]], seeds, size, mesh
  ):
    self._streams = [
      training.Batches(dict(r), size, seed=seed, mesh=mesh)
      for r, seed in zip(rows, seeds)
    ]

  def batch(self, step: int) -> dict[str, np.ndarray]:
    batches = [stream.batch(step) for stream in self._streams]
    return jax.tree.map(lambda *rows: np.stack(rows, axis=1), *batches)

  def position(self, step: int) -> dict[str, Any]:
    return {str(i): s.position(step) for i, s in enumerate(self._streams)}


def train_seeds(
  init: Callable[[jax.Array], Any],
  loss: Callable[[Any, Any], jax.Array],
  optimizer: optax.GradientTransformation,
  rows: Sequence[Mapping[str, np.ndarray]],
  seeds: Sequence[int],
  workdir: contract.Workdir,
  *,
  batch_size: int,
  num_steps: int,
  save_every: int,
  log_every: int,
) -> list[Any]:
  """Trains all seeds side by side; each batch is split over all devices.

  Args:
    init: key -> parameters.
    loss: `loss(params, batch) -> [B]`.
    optimizer: any Optax transformation.
    rows: the data of each seed, equally much.
    seeds: of parameters and of the order of the data.
    workdir: where it checkpoints and resumes, and writes its metrics.
    batch_size: rows per seed and step.
    num_steps: in all.
    save_every: steps between checkpoints.
    log_every: steps between rows of metrics, which are means over seeds.

  Returns:
    The parameters of every seed, in the order of `seeds`.
  """
  mesh = training.make_mesh()
  everywhere = NamedSharding(mesh, PartitionSpec())
  axes = training.TrainState(step=None, params=0, opt_state=0, key=None)
  one = training.make_train_step(loss, optimizer)
  all_seeds = jax.vmap(one, in_axes=(axes, 1), out_axes=(axes, 0))

  def step(state, batch):
    state, metrics = all_seeds(state, batch)
    return state, jax.tree.map(jnp.mean, metrics)

  def start():
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
    params = jax.vmap(init)(keys)
    return training.TrainState(
      jnp.zeros((), jnp.int32),
      params,
      jax.vmap(optimizer.init)(params),
      jax.random.key(seeds[0]),
    )

  with (
    training.Checkpointer(
      workdir.path, workdir.config, ignore=['environment']
    ) as checkpointer,
    training.MetricsWriter(workdir.path / 'metrics.jsonl') as writer,
  ):
    state = training.fit(
      jax.jit(start, out_shardings=everywhere)(),
      jax.jit(step, donate_argnums=0, out_shardings=everywhere),
      _Stacked(rows, seeds, batch_size, mesh),
      num_steps=num_steps,
      mesh=mesh,
      checkpointer=checkpointer,
      save_every=save_every,
      writer=writer,
      log_every=log_every,
    )
  params = jax.device_get(state.params)
  return [
    jax.tree.map(lambda a, i=i: jnp.asarray(a[i]), params)
    for i in range(len(seeds))
  ]
