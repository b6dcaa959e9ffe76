"""What concepts cost: reports, gates and scores, next to a training step.

  python -m experiments.benchmarks.concepts [--batch=64] [--repeats=7] \
      [--out=results/benchmarks/concepts.json]

The decoder of `experiments.benchmarks.subject` (5 M parameters), 64 x 128
tokens.
Times are medians over interleaved repeats, each as a ratio to the program that
it is to be compared with, in the same run:

  report, F         the movement of all F concepts under the update that was
                    applied, for every sequence of the batch; over one step
  gated step        a step whose gate weighs every token by two concepts; over
                    one step
  64 rank-1 scores  the inner product of every sequence's gradient with 64
                    directions on all projections; over one gradient
"""

from __future__ import annotations

from collections.abc import Callable
import os
import statistics as stats
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.benchmarks.subject import (
  D_MODEL,
  PROJECTIONS,
  VOCAB,
  decoder,
  loss_of,
  run,
)
from idesign import concepts
from idesign import shaping
from idesign import sites
from idesign import training

SIZES = (1024, 4096, 16384)  # Numbers of concepts.
DIRECTIONS = 64
# Name -> (what it is compared with, at most how often its time).
TARGETS = {
  **{f'report, {size} concepts': ('step', 2.5) for size in SIZES},
  'gated step': ('step', 1.05),
  f'{DIRECTIONS} rank-1 scores': ('gradient', 1.15),
}
# The report of the most concepts over that of the fewest: independent of them.
GROWTH_TARGET = 1.1


def programs(batch: int, time_: int, layers: int) -> dict[str, Any]:
  """Name -> (compiled program, its arguments)."""
  model = decoder(layers, unroll=False)
  params = jax.jit(model.init)(jax.random.key(0))
  tokens = jax.random.randint(jax.random.key(1), (batch, time_ + 1), 0, VOCAB)
  data = {
    'tokens': tokens,
    'mask': jnp.ones((batch, time_)),
    'attribution': jax.random.normal(jax.random.key(2), (batch, time_, 2)),
  }

  def token_losses(params, data):
    logits = model.apply(params, data['tokens'][:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, data['tokens'][:, 1:]
    )

  def step(*gate):
    optimizer = optax.chain(*gate, optax.adam(1e-3))
    state = training.TrainState(
      jnp.zeros((), jnp.int32),
      params,
      optimizer.init(params),
      jax.random.key(3),
    )
    # The same wrapper, so that only the gate differs; nothing is donated, since
    # every repeat takes the same arguments.
    made = shaping.make_gated_step(token_losses, optimizer)
    gates = jnp.array([0.0, 2.0])
    return jax.jit(lambda s, d, g: made(s, d, gates=g)), (state, data, gates)

  loss = loss_of(model)
  read = concepts.reader(
    lambda p, x: model.apply(p, x[:, :-1]),
    f'resid_post[{layers - 1}:{layers}]',
  )
  update = jax.tree.map(lambda p: 1e-3 * jnp.sign(p), params)
  report = jax.jit(
    lambda p, u, x, columns: concepts.predicted_change(read, columns, p, u, x)
  )
  out: dict[str, Any] = {
    'gradient': (
      jax.jit(jax.grad(lambda p, x: loss(p, x).sum())),
      (params, tokens),
    ),
    'step': step(),
    'gated step': step(shaping.gate_losses()),
  }
  for size in SIZES:
    columns = jax.random.normal(jax.random.key(4), (D_MODEL, size))
    out[f'report, {size} concepts'] = report, (params, update, tokens, columns)
  found = sites.find_sites(loss, params, tokens, PROJECTIONS).sites
  k = jax.random.split(jax.random.key(5), 2)
  leaves = dict(zip(sites.leaf_paths(params), jax.tree.leaves(params)))
  directions = {}
  for site in found:
    *_, d_in, d_out = leaves[site.path].shape
    directions[site.path] = concepts.RankOne(
      jax.random.normal(k[0], (DIRECTIONS, layers, d_in)),
      jax.random.normal(k[1], (DIRECTIONS, layers, d_out)),
      jnp.ones((DIRECTIONS, layers)),
      1,
    )
  out[f'{DIRECTIONS} rank-1 scores'] = (
    jax.jit(lambda p, x, d: concepts.concept_scores(loss, d)(p, x)),
    (params, tokens, directions),
  )
  return {
    name: (f.lower(*arguments).compile(), arguments)
    for name, (f, arguments) in out.items()
  }


def measure(
  batch: int, time_: int, layers: int, repeats: int
) -> dict[str, Any]:
  """Times every program; see the module's docstring."""
  compiled: dict[str, tuple[Callable[..., Any], Any]]
  compiled = programs(batch, time_, layers)
  times: dict[str, list[float]] = {name: [] for name in compiled}
  for repeat in range(repeats + 1):
    for name, (f, arguments) in compiled.items():
      start = time.perf_counter()
      jax.block_until_ready(f(*arguments))
      if repeat:  # The first one warms up.
        times[name].append(time.perf_counter() - start)
  rows = {}
  for name, (f, _) in compiled.items():
    base, target = TARGETS.get(name, (name, None))
    ratios = [a / b for a, b in zip(times[name], times[base])]
    rows[name] = {
      'seconds': stats.median(times[name]),
      'over': base,
      'ratio': stats.median(ratios),
      'range': [min(ratios), max(ratios)],
      'target': target,
      'temporary_mib': f.memory_analysis().temp_size_in_bytes / 2**20,
    }
  few, many = (f'report, {size} concepts' for size in (SIZES[0], SIZES[-1]))
  return {
    'tokens': [batch, time_],
    'repeats': repeats,
    'device': f'{jax.devices()[0].device_kind} with {os.cpu_count()} cores',
    'programs': rows,
    'growth': stats.median([a / b for a, b in zip(times[many], times[few])]),
  }


def markdown(result: dict[str, Any]) -> str:
  """The table of a result."""
  verdict = lambda value, target: (
    f'≤ {target:g} | {"holds" if value <= target else "**fails**"}'
  )
  lines = [
    '| program | over | ratio [range] | target | | temporaries, MiB |',
    '|---|---|---|---|---|---|',
  ]
  for name, r in result['programs'].items():
    low, high = r['range']
    judged = ' | ' if r['target'] is None else verdict(r['ratio'], r['target'])
    lines.append(
      f'| {name} | {r["over"]} | {r["ratio"]:.2f} [{low:.2f}, {high:.2f}] '
      f'| {judged} | {r["temporary_mib"]:.0f} |'
    )
  lines.append(
    f'| report, {SIZES[-1]} concepts | report, {SIZES[0]} '
    f'| {result["growth"]:.2f} | {verdict(result["growth"], GROWTH_TARGET)} | |'
  )
  batch, time_ = result['tokens']
  return (
    '\n'.join(lines) + f'\n\n{batch} x {time_} tokens, {result["device"]}, '
    f'{result["repeats"]} repeats.\n'
  )


if __name__ == '__main__':
  run(measure, markdown)
