"""What reading statistics costs, next to the plain gradient, in one run.

  python -m experiments.benchmarks.sites [--batch=64] [--repeats=7] \
      [--out=results/benchmarks/sites.json]

A decoder of 5 M parameters (6 layers, width 256, gated MLP of 704, 42
projections), 64 x 128 tokens. For each statistic: wall time as a ratio to the
plain mean gradient, XLA's own count of FLOPs and of temporary memory, and a
count of FLOPs by hand. Times are medians of interleaved repeats. FLOPs are
counted on the same program with the loop over layers unrolled, because XLA
counts the body of a loop once.

Three targets are missed on CPUs. All programs run at about the speed of plain
matrix products, so that times are as FLOPs are: norms need 0.87 of those of a
gradient (target 0.8), 512 directions 1.56 (1.1, and they take 1.3). These two
held while the gradient itself took 1.2 times as long, before its products were
over the rows of all examples as one axis (`idesign.models`).

K-FAC factors (0.8) need 1.38 of the FLOPs: the second moments of all 42
projections are 196 GFLOP, where the weight gradients that they replace are 79.
Tried, in one run, next to 0.96 of the slower gradient as it was: the upper
triangle only, in 2 or 4 blocks (0.95, 1.02); BLAS's `syrk` by callback (1.23);
products in bfloat16 (0.99). Sums over 8 to 32 chunks of tokens were no faster
than the one product. What did help was to sum over one axis instead of two
(before: 1.16), see `idesign.sites.statistics`.
"""

from __future__ import annotations

from collections.abc import Callable
import os
import statistics as stats
import time
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.subject import (
  D_FF,
  D_MODEL,
  PROJECTIONS,
  VOCAB,
  decoder,
  loss_of,
  run,
)
from idesign import models
from idesign import sites

DIRECTIONS = 512
# Per layer, what projections read the same input: its width and theirs.
READERS = [
  (D_MODEL, [D_MODEL] * 3),  # q, k, v
  (D_MODEL, [D_MODEL]),  # o
  (D_MODEL, [D_FF] * 2),  # gate, up
  (D_FF, [D_MODEL]),  # down
]


# Time over that of the plain gradient, at most.
TARGETS = {
  'norms': 0.8,
  'norms + gradient': 1.25,
  'K-FAC factors': 0.8,
  '512 rank-1 directions': 1.1,
}
# What a quarter of the layers costs of what all of them cost, at most.
QUARTER_TARGET = 0.5


def a_quarter(layers: int) -> int:
  """A quarter of the layers, rounded up: 2 of 6."""
  return -(-layers // 4)


def programs(model: models.Model, layers: int) -> dict[str, Callable[..., Any]]:
  """Name -> function of (params, tokens, directions)."""
  loss = loss_of(model)
  total = lambda p, x: loss(p, x).sum()
  last = [f'{PROJECTIONS}[{layers - a_quarter(layers)}:{layers}]']

  def read(statistics, select=PROJECTIONS, **kwargs):
    collect = sites.collect(loss, statistics, select, **kwargs)
    return lambda p, x, _: collect(p, x)

  norms = {'norms': sites.per_example_squared_norm}
  factors = {'a': sites.input_moment, 'g': sites.output_moment}
  rank1 = sites.collect(loss, {'d': sites.direction_product}, PROJECTIONS)

  def naive(p, x, directions):
    """`vmap(grad)`, then inner products with the same directions."""

    def one(x):
      grads = jax.grad(total)(p, x[None])['blocks']
      leaves = {
        f'blocks/{room}/{name}/kernel': grads[room][name]['kernel']
        for room in ('attn', 'mlp')
        for name in grads[room]
      }
      return {
        k: jnp.einsum('lio,lci,lco->lc', g, *directions[k])
        for k, g in leaves.items()
      }

    return jax.vmap(one)(x)

  return {
    'forward': lambda p, x, _: loss(p, x),
    'gradient': lambda p, x, _: jax.grad(total)(p, x),
    'norms': read(norms),
    'norms + gradient': read(norms, with_grads=True),
    'K-FAC factors': read(factors),
    'K-FAC factors + gradient': read(factors, with_grads=True),
    'the same, a quarter of the layers': read(factors, last, with_grads=True),
    '512 rank-1 directions': lambda p, x, d: rank1(p, x, inputs={'d': d}),
    '512 rank-1 directions, vmap(grad)': naive,
  }


def flops_by_hand(batch: int, time_: int, layers: int) -> dict[str, float]:
  """Matrix products alone; a product of m x k by k x n is 2 m k n.

  Let P be the projections' weights per layer, T tokens per sequence and
  N = B T. Forward: 2 N P per layer,
  4 N T D for scores and values, 2 N D V for the tied head. The backward pass
  to the activations costs the forward once more (attention twice), the one to
  the weights once more.
  """
  n, t = batch * time_, time_
  shapes = [(i, o) for i, outs in READERS for o in outs]
  project = 2 * n * layers * sum(i * o for i, o in shapes)
  attend = 4 * n * t * D_MODEL * layers
  head = 2 * n * D_MODEL * VOCAB
  forward = project + attend + head
  to_inputs = project + 2 * attend + head
  # The first layer's q, k and v have no use for their inputs' gradient when
  # nothing before them is differentiated.
  spared = 2 * n * 3 * D_MODEL**2
  # XLA forms a product of the input with itself once for all its readers.
  norms = factors = 0
  for i, outs in READERS:
    ghost = [o for o in outs if t * (i + o) <= i * o]
    norms += 2 * batch * t * t * (sum(ghost) + (i if ghost else 0))
    norms += 2 * batch * t * sum(i * o for o in outs if o not in ghost)
    factors += 2 * n * sum(d * d for d in (i, *outs))
  norms, factors = norms * layers, factors * layers
  rank1 = layers * sum(2 * n * DIRECTIONS * (i + o) for i, o in shapes)
  naive = (
    2 * batch * DIRECTIONS * layers * sum(i * o + min(i, o) for i, o in shapes)
  )
  gradient = forward + to_inputs + project + head
  return {
    'forward': forward,
    'gradient': gradient,
    'norms': forward + to_inputs - spared + norms,
    'norms + gradient': gradient + norms,
    'K-FAC factors': forward + to_inputs - spared + factors,
    'K-FAC factors + gradient': gradient + factors,
    'the same, a quarter of the layers': (
      gradient + factors * a_quarter(layers) / layers
    ),
    '512 rank-1 directions': forward + to_inputs - spared + rank1,
    '512 rank-1 directions, vmap(grad)': gradient + naive,
  }


def measure(
  batch: int, time_: int, layers: int, repeats: int
) -> dict[str, Any]:
  """Times and counts every program; see the module's docstring."""
  model = decoder(layers, unroll=False)
  params = jax.jit(model.init)(jax.random.key(0))
  tokens = jax.random.randint(jax.random.key(1), (batch, time_ + 1), 0, VOCAB)
  shapes = {
    s.name: (s.d_in, s.d_out)
    for s in sites.find_sites(loss_of(model), params, tokens, PROJECTIONS).sites
  }
  directions = {
    name: tuple(
      jax.random.normal(jax.random.key(k), (layers, DIRECTIONS, d))
      for k, d in enumerate(ds)
    )
    for name, ds in shapes.items()
  }
  arguments = (params, tokens, directions)
  compiled = {
    name: jax.jit(f).lower(*arguments).compile()
    for name, f in programs(model, layers).items()
  }
  unrolled = {
    name: jax.jit(f).lower(*arguments).compile()
    for name, f in programs(decoder(layers, unroll=True), layers).items()
  }
  times: dict[str, list[float]] = {name: [] for name in compiled}
  for repeat in range(repeats + 1):
    for name, f in compiled.items():
      start = time.perf_counter()
      jax.block_until_ready(f(*arguments))
      if repeat:  # The first one warms up.
        times[name].append(time.perf_counter() - start)
  by_hand = flops_by_hand(batch, time_, layers)
  rows = {}
  for name in compiled:
    flops = unrolled[name].cost_analysis()['flops']
    memory = compiled[name].memory_analysis()
    ratios = [a / b for a, b in zip(times[name], times['gradient'])]
    rows[name] = {
      'seconds': stats.median(times[name]),
      'time_ratio': stats.median(ratios),
      'time_ratio_range': [min(ratios), max(ratios)],
      'xla_gflops': flops / 1e9,
      'formula_gflops': by_hand[name] / 1e9,
      'flops_off_by': flops / by_hand[name] - 1,
      'temporary_mib': memory.temp_size_in_bytes / 2**20,
    }
  overhead = lambda name: rows[name]['time_ratio'] - 1
  all_layers = overhead('K-FAC factors + gradient')
  return {
    'parameters': sum(x.size for x in jax.tree.leaves(params)),
    'sites': len(shapes) * layers,
    'tokens': [batch, time_],
    'repeats': repeats,
    'device': f'{jax.devices()[0].device_kind} with {os.cpu_count()} cores',
    'programs': rows,
    'layers_read': [a_quarter(layers), layers],
    'layers_overhead': overhead('the same, a quarter of the layers')
    / all_layers,
  }


def markdown(result: dict[str, Any]) -> str:
  """The table of a result."""

  def verdict(value, target):
    return f'≤ {target:g} | {"holds" if value <= target else "**fails**"}'

  lines = [
    '| program | time / gradient [range] | target | | GFLOP, by formula '
    '| temporaries, MiB |',
    '|---|---|---|---|---|---|',
  ]
  for name, r in result['programs'].items():
    low, high = r['time_ratio_range']
    judged = ' | '
    if name in TARGETS:
      judged = verdict(r['time_ratio'], TARGETS[name])
    lines.append(
      f'| {name} | {r["time_ratio"]:.2f} [{low:.2f}, {high:.2f}] | {judged} '
      f'| {r["xla_gflops"]:.1f}, {r["formula_gflops"]:.1f} '
      f'| {r["temporary_mib"]:.0f} |'
    )
  some, layers = result['layers_read']
  lines.append(
    f'| overhead of {some} of {layers} layers / of all '
    f'| {result["layers_overhead"]:.2f} '
    f'| {verdict(result["layers_overhead"], QUARTER_TARGET)} | | |'
  )
  batch, time_ = result['tokens']
  return (
    '\n'.join(lines)
    + f'\n\n{result["parameters"] / 1e6:.1f} M parameters, {result["sites"]} '
    f'projections, {batch} x {time_} tokens, {result["device"]}, '
    f'{result["repeats"]} repeats.\n'
  )


if __name__ == '__main__':
  run(measure, markdown)
