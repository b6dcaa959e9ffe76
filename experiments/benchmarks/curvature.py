"""What curvature costs, next to a gradient, a full sort, and one device.

  python -m experiments.benchmarks.curvature [--batch=64] [--repeats=7] \
      [--out=results/benchmarks/curvature.json]

The decoder of `experiments.benchmarks.subject` (5 M parameters). Times are
medians over interleaved repeats, each as a ratio to the program that it is to
be compared with, in the same run:

  Hessian product, Gauss-Newton product   of one batch; over its gradient
  factors           a batch's K-FAC factors of all projections, labels sampled
  EK-FAC            its eigenvalues in given bases
  edit              of factors that are there: eigendecompositions in float64,
                    selection and the new weights of all projections
  selection         the components of a 4096 x 11008 weight that hold 0.9 of the
                    curvature mass, without forming the products; a full sort of
                    them takes so many times as long
  stored selection  the same of scores that are stored

`scaling`: of the program that adds a batch to a stream of factors, FLOP, bytes
that it moves, and what it holds beside its arguments, of each device, on 1, 2,
4 and 8 virtual devices; counted by XLA, hence the same on every machine.

A Gauss-Newton product has to run the tangent through the model, two products
for each of the forward pass (of the weight and the tangent of its input, of the
weight's tangent and the input), and a backward pass with both of its products:
5/3 of a gradient, of which no implementation is rid. The target, 1.3, is below
that.
"""

from __future__ import annotations

from collections.abc import Callable
import json
import os
import statistics as stats
import subprocess
import sys
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import command
from experiments.benchmarks.subject import (
  PROJECTIONS,
  VOCAB,
  decoder,
  loss_of,
  run,
)
from idesign import curvature
from idesign import sites
from idesign import training

_SCALING = flags.DEFINE_bool('scaling_only', False, 'Print the counts alone.')
DEVICES = (1, 2, 4, 8)
# Name -> (what it is compared with, at most how often its time).
TARGETS = {
  'Hessian product': ('gradient', 2.8),
  'Gauss-Newton product': ('gradient', 1.3),
  'factors': ('gradient', None),
  'EK-FAC': ('gradient', None),
  'edit': ('gradient', None),
  'selection': ('full sort', 0.01),
  'stored selection': ('full sort', None),
}
SCALING_TARGET = 0.15  # Off from one over the number of devices.
WEIGHT, MASS = (4096, 11008), 0.9
FISHER = curvature.Fisher()


def programs(batch: int, time_: int, layers: int) -> dict[str, Callable]:
  """Name -> call."""
  model = decoder(layers, unroll=False)
  params = jax.jit(model.init)(jax.random.key(0))
  tokens = jax.random.randint(jax.random.key(1), (batch, time_ + 1), 0, VOCAB)
  loss, x, key = loss_of(model), tokens[:, :-1], jax.random.key(2)
  vector = jax.tree.map(jnp.ones_like, params)
  factors = jax.jit(curvature.kfac_factors(model.apply, PROJECTIONS, FISHER))
  read = jax.jit(curvature.ekfac_eigenvalues(model.apply, PROJECTIONS, FISHER))
  sums = factors(params, x, key=key)
  bases = curvature.as_bases(curvature.spectra(sums))
  at = sites.find_sites(loss, params, tokens, PROJECTIONS).by_name

  def edit():
    spectra = curvature.spectra(sums)
    return curvature.keep_high_curvature(params, at, spectra, mass=MASS)

  # Spectra such as factors have: powers of the rank.
  rows, columns = (np.arange(1.0, n + 1) ** -1.5 for n in WEIGHT)
  scores = np.outer(rows, columns)
  return {
    'gradient': _compiled(
      jax.grad(lambda p, x: loss(p, x).sum()), params, tokens
    ),
    'Hessian product': _compiled(
      curvature.hessian_product(loss), params, tokens, vector
    ),
    'Gauss-Newton product': _compiled(
      curvature.gauss_newton_product(model.apply), params, x, vector
    ),
    'factors': lambda: jax.block_until_ready(factors(params, x, key=key)),
    'EK-FAC': lambda: jax.block_until_ready(read(params, x, bases, key=key)),
    'edit': edit,
    'full sort': lambda: np.sort(scores.reshape(-1)),
    'selection': lambda: curvature.keep_mass(rows, columns, MASS),
    'stored selection': lambda: curvature.largest_mass(scores, MASS),
  }


def _compiled(f, *arguments) -> Callable:
  program = jax.jit(f).lower(*arguments).compile()
  return lambda: jax.block_until_ready(program(*arguments))


def count(batch: int, time_: int, layers: int) -> dict[str, list[dict]]:
  """FLOP and bytes of each device, by mesh axis and number of devices."""
  model = decoder(layers, unroll=False)
  params = jax.jit(model.init)(jax.random.key(0))
  rows = {'inputs': np.zeros((batch, time_), np.int32)}
  out: dict[str, list[dict]] = {'data': [], 'model': []}
  for axis in out:
    for n in DEVICES:
      sizes = (n, 1) if axis == 'data' else (1, n)
      mesh = training.make_mesh(*sizes, devices=jax.devices()[:n])
      stream = curvature.FactorStream(model.apply, PROJECTIONS, FISHER, mesh)
      rules = [
        (
          '.*kernel',
          jax.sharding.PartitionSpec(None, None, 'model')
          if axis == 'model'
          else jax.sharding.PartitionSpec(),
        ),
        ('.*', jax.sharding.PartitionSpec()),
      ]
      placed = jax.device_put(
        params, training.tree_shardings(params, mesh, rules)
      )
      data = training.shard_batch(rows, mesh)
      state = stream.init(placed, data, jax.random.key(3))
      program = stream.lower(state, placed, data).compile()
      cost, memory = program.cost_analysis(), program.memory_analysis()
      out[axis].append(
        {
          'devices': n,
          'gflop': cost['flops'] / 1e9,
          'mib_moved': cost['bytes accessed'] / 2**20,
          'mib_held': (
            memory.temp_size_in_bytes + memory.argument_size_in_bytes
          ) / 2**20,
        }
      )  # fmt: skip
  return out


def measure(
  batch: int, time_: int, layers: int, repeats: int
) -> dict[str, Any]:
  """Times every program, and counts; see the module's docstring."""
  if _SCALING.value:
    return {'scaling': count(batch, time_, layers)}
  calls = programs(batch, time_, layers)
  times = command.interleaved(calls, repeats)
  rows = {}
  for name in calls:
    base, target = TARGETS.get(name, (name, None))
    ratios = [a / b for a, b in zip(times[name], times[base])]
    rows[name] = {
      'seconds': stats.median(times[name]),
      'over': base,
      'ratio': stats.median(ratios),
      'range': [min(ratios), max(ratios)],
      'target': target,
    }
  return {
    'tokens': [batch, time_],
    'repeats': repeats,
    'device': f'{jax.devices()[0].device_kind} with {os.cpu_count()} cores',
    'programs': rows,
    'scaling': _count_elsewhere(batch, time_, layers),
  }


def _count_elsewhere(batch, time_, layers):
  """In a process with virtual devices, which would disturb the times."""
  flags_ = f'--xla_force_host_platform_device_count={DEVICES[-1]}'
  environment = {**os.environ, 'XLA_FLAGS': flags_, 'JAX_PLATFORMS': 'cpu'}
  said = subprocess.run(
    [
      sys.executable, '-m', 'experiments.benchmarks.curvature',
      '--scaling_only', f'--batch={batch}', f'--time={time_}',
      f'--layers={layers}',
    ],
    env=environment, capture_output=True, text=True, check=True,
  )  # fmt: skip
  return json.loads(said.stdout)['scaling']


def off_scale(parts: list[dict], key: str) -> float:
  """How far from one over the number of devices, at worst, as a share."""
  first = parts[0][key]
  return max(abs(p[key] * p['devices'] / first - 1) for p in parts)


def markdown(result: dict[str, Any]) -> str:
  """The table of a result; the counts as JSON if there is nothing else."""
  if 'programs' not in result:
    return json.dumps(result)
  lines = [
    '| program | over | ratio [range] | target | |',
    '|---|---|---|---|---|',
  ]
  for name, r in result['programs'].items():
    low, high = r['range']
    judged = ' | '
    if r['target'] is not None:
      holds = r['ratio'] <= r['target']
      judged = f'≤ {r["target"]:g} | {"holds" if holds else "**fails**"}'
    lines.append(
      f'| {name} | {r["over"]} | {r["ratio"]:.3g} [{low:.3g}, {high:.3g}] '
      f'| {judged} |'
    )
  what = {
    'gflop': 'GFLOP of a device', 'mib_moved': 'MiB that a device moves',
    'mib_held': 'MiB that a device holds',
  }  # fmt: skip
  for axis, parts in result['scaling'].items():
    for key, name in what.items():
      off = off_scale(parts, key)
      numbers = ', '.join(f'{p[key]:.0f}' for p in parts)
      lines.append(
        f'| {name}, on {", ".join(map(str, DEVICES))} along `{axis}` | '
        f'{numbers} | {100 * off:.0f} % off | ≤ {100 * SCALING_TARGET:.0f} % | '
        f'{"holds" if off <= SCALING_TARGET else "**fails**"} |'
      )
  batch, time_ = result['tokens']
  return (
    '\n'.join(lines) + f'\n\n{batch} x {time_} tokens, {result["device"]}, '
    f'{result["repeats"]} repeats.\n'
  )


if __name__ == '__main__':
  run(measure, markdown)
