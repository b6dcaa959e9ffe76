"""Some steps of a policy on all devices there are, as a process of its own.

  python -m tests.rewards.script FILE.npz
"""

import sys

import jax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from idesign import training
from idesign.probes import reading
from tests.rewards import test_policy as policy

STEPS, PROMPTS = 3, 8


def learn(mesh):
  """Parameters at the end, and the metrics of each step."""
  everywhere = NamedSharding(mesh, PartitionSpec())
  place = lambda tree: jax.jit(lambda: tree, out_shardings=everywhere)()
  step, state = policy.make()
  state, probe = place(state), place(policy.frozen())
  rows = training.process_rows(mesh, PROMPTS)
  metrics = []
  for i in range(STEPS):
    batch = policy.make_batch(i, prompts=PROMPTS)
    local = {k: np.asarray(v)[rows] for k, v in batch.items()}
    state, new = step(state, training.shard_batch(local, mesh), probe=probe)
    metrics.append({k: float(v) for k, v in new.items()})
  leaves = jax.tree.leaves(state.params)
  return multihost_utils.process_allgather(leaves, tiled=True), metrics


def read(mesh):
  """Sums of rows that are split over the devices, an odd number of them."""
  split = NamedSharding(mesh, PartitionSpec(mesh.axis_names[0]))
  call = jax.jit(lambda x: x.sum(axis=1), out_shardings=split)
  rows = np.arange(3 * 13.0).reshape(13, 3)
  return reading.in_batches(call, [rows], 8)


def main():
  training.initialize_distributed()
  mesh = training.make_mesh()
  leaves, metrics = learn(mesh)
  rows = read(mesh)
  print(jax.process_count(), jax.device_count(), flush=True)
  if jax.process_index() == 0:
    names = {f'{i}/{k}': v for i, m in enumerate(metrics) for k, v in m.items()}
    np.savez(sys.argv[1], *leaves, **names, read=rows)


if __name__ == '__main__':
  main()
