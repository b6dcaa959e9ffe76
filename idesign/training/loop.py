"""The training loop.

**Where a run starts from**, in this order: the latest checkpoint in the
workdir; else the state given to `fit`. A checkpoint that cannot be read is an
error, never a reason to start elsewhere. Killed at any moment, the same
command goes on from its last complete checkpoint and ends at the same bits:
batch `n` is a function of the seed and `n`, noise of the key and the step, and
lines of the metrics after the checkpoint are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import math
from typing import Any, Protocol

import jax
from jax.sharding import Mesh
import numpy as np
import tqdm

from idesign.training.checkpoint import Checkpointer
from idesign.training.metrics import MetricsWriter
from idesign.training.sharding import shard_batch
from idesign.training.step import TrainState
from idesign.training.workdir import differences


class Data(Protocol):
  """Batches by number; `idesign.training.Batches` is one."""

  def batch(self, step: int) -> dict[str, np.ndarray]:
    """This process's rows of batch `step`, from 0; a pure function."""

  def position(self, step: int) -> dict[str, Any]:
    """What identifies the stream when batch `step` comes next, as JSON."""


def fit(
  state: TrainState,
  train_step: Callable[..., tuple[TrainState, dict[str, jax.Array]]],
  data: Data,
  *,
  num_steps: int,
  mesh: Mesh | None = None,
  checkpointer: Checkpointer | None = None,
  save_every: int = 1000,
  writer: MetricsWriter | None = None,
  log_every: int = 1,
  evaluate: Callable[[TrainState], Mapping[str, Any]] | None = None,
  evaluate_every: int = 1000,
  extra: Callable[..., dict[str, Any]] | None = None,
  watch: Callable[[int, Mapping[str, float]], None] | None = None,
) -> TrainState:
  """Trains until `num_steps` updates have been made, resuming if it can.

  Step `n` is dispatched before the metrics of step `n - 1` are downloaded, so
  the device does not wait for the host. Metrics of a step are always checked
  and written before a checkpoint of that step is saved.

  Args:
    state: from `init_state`, or another with a `step` (`rewards.PolicyState`).
      It is consumed: donated to the first step, or
      deleted when a checkpoint takes its place.
    train_step: from `make_train_step`, or another `step(state, batch, **extra)`
      (`rewards.make_policy_step`).
    data: batches by number.
    num_steps: total number of updates, counted from the beginning of the run.
    mesh: to split batches over; None leaves them on the default device.
    checkpointer: an open one; None saves nothing.
    save_every: save after every so many updates, and after the last.
    writer: of the metrics; None writes nothing.
    log_every: write after every so many updates, and after the last.
    evaluate: called with the state; what it returns is written with that
      step's metrics.
    evaluate_every: call it after every so many updates, and after the last.
    extra: `extra(state, batch)` gives keyword arguments of the step about to be
      made: those of the optimizer, or the frozen probe of a policy.
    watch: called with every step's number and metrics, after they are written
      and before anything of that step is saved; it may raise.

  Returns:
    The state after `num_steps` updates, with no save left running.

  Raises:
    FloatingPointError: if a metric of a step is not finite, naming the step,
      one step late at most. No checkpoint holds a state that came after it.
    ValueError: if the checkpoint is beyond `num_steps`, or was made with other
      data (another seed, number of rows, batch size).
    CheckpointError: see `Checkpointer`.
  """
  for name, every in (
    ('save_every', save_every),
    ('log_every', log_every),
    ('evaluate_every', evaluate_every),
  ):
    if every < 1:
      raise ValueError(f'{name}={every} must be at least 1.')
  if checkpointer is not None and checkpointer.latest_step is not None:
    state = _resume(state, checkpointer, data)
  start = int(state.step)
  if start > num_steps:
    raise ValueError(
      f'the run has already made {start} updates, more than '
      f'num_steps={num_steps}; raise num_steps or choose another workdir.'
    )
  if writer is not None:
    writer.resume(start)

  def due(step, every):
    return step % every == 0 or step == num_steps

  progress = tqdm.tqdm(
    initial=start, total=num_steps, disable=jax.process_index() != 0
  )

  def record(step, metrics, evaluation):
    metrics = {name: float(value) for name, value in metrics.items()}
    if writer is not None and (due(step, log_every) or evaluation):
      writer.write(step, {**metrics, **evaluation})
    if watch is not None:
      watch(step, metrics)
    wrong = [n for n, value in metrics.items() if not math.isfinite(value)]
    if wrong:
      values = ', '.join(f'{name}={metrics[name]}' for name in wrong)
      raise FloatingPointError(
        f'step {step}: {values}. Look at the batch of that step (are all of '
        'its weights zero?), lower the learning rate, or clip the gradient; '
        'no checkpoint was saved from this step on.'
      )
    progress.update()
    progress.set_postfix(loss=metrics['loss'], refresh=False)

  waiting = None
  with progress:
    for step in range(start + 1, num_steps + 1):
      batch = data.batch(step - 1)
      if mesh is not None:
        batch = shard_batch(batch, mesh)
      arguments = {} if extra is None else extra(state, batch)
      state, metrics = train_step(state, batch, **arguments)
      if waiting is not None:
        record(*waiting)
      evaluation = {}
      if evaluate is not None and due(step, evaluate_every):
        evaluation = evaluate(state)
      waiting = (step, metrics, evaluation)
      if checkpointer is not None and due(step, save_every):
        record(*waiting)
        waiting = None
        if writer is not None:
          writer.sync()
        checkpointer.save(step, state, data.position(step))
    if waiting is not None:
      record(*waiting)
  if checkpointer is not None:
    checkpointer.wait()
  return state


def _resume(
  state: TrainState, checkpointer: Checkpointer, data: Data
) -> TrainState:
  template = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    state,
  )
  # Two copies of a large state do not fit; the one given is consumed anyway.
  jax.tree.map(lambda x: x.delete(), state)
  state, position = checkpointer.restore(template)
  different = differences(position, data.position(int(state.step)))
  if different:
    raise ValueError(
      f'the checkpoint of step {int(state.step)} in {checkpointer.directory} '
      'was made with other data. Different (found -> given): '
      f'{"; ".join(different)}. Use the same data, seed and batch size.'
    )
  return state
