"""What concepts cost: reports, gates and scores, next to a training step.

  python -m experiments.benchmarks.concepts [--batch=64] [--repeats=7] \
      [--out=results/benchmarks/concepts.json]

The decoder of `experiments.benchmarks.subject` (5 M parameters), 64 x 128
tokens.
Times are medians over interleaved repeats, each as a ratio to the program that
it is to be compared with, in the same run:

  movement, F       the predicted change of all F concepts under the update that
                    was applied, for every sequence of the batch; over one step
  whole report, F   `concepts.report` of the same: statistics on the host, and
                    the share of each concept at every token; over one step
  gated step        a step whose gate weighs every token by two concepts, over
                    the plain `training.make_train_step`
  anchored step     the same, that keeps the frozen model's answers
  attribution       what 6 tokens of every sequence owe to a concept, asked of
                    the frozen model; once per data set, not per step
  64 rank-1 scores  the inner product of every sequence's gradient with 64
                    directions on all projections; over one gradient
"""

from __future__ import annotations

from collections.abc import Callable
import functools
import os
import statistics as stats
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.benchmarks import command
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
ATTRIBUTED = 6  # Tokens of each text.
# Name -> (what it is compared with, at most how often its time).
TARGETS = {
  **{f'movement, {size} concepts': ('step', 2.5) for size in SIZES},
  **{f'whole report, {size} concepts': ('step', 2.5) for size in SIZES},
  'gated step': ('step', 1.05),
  'anchored step': ('step', None),
  'attribution': ('step', None),
  f'{DIRECTIONS} rank-1 scores': ('gradient', 1.15),
}
# Of the most concepts over the fewest: independent of their number.
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

  def start(optimizer):
    return training.TrainState(
      jnp.zeros((), jnp.int32),
      params,
      optimizer.init(params),
      jax.random.key(3),
    )

  adam = optax.adam(1e-3)
  # Nothing is donated, since every repeat takes the same arguments.
  plain = training.make_train_step(
    lambda p, d: token_losses(p, d).mean(axis=1), adam
  )

  def gated(anchor=None):
    optimizer = optax.chain(shaping.gate_losses(), adam)
    made = shaping.make_gated_step(token_losses, optimizer, anchor=anchor)
    gates = jnp.array([0.0, 2.0])
    step = jax.jit(lambda s, d, g: made(s, d, gates=g))
    return step, (start(optimizer), data, gates)

  frozen = jax.tree.map(jnp.copy, params)

  def divergence(params, data):
    logits = lambda p: model.apply(p, data['tokens'][:, :-1])
    return optax.kl_divergence(
      jax.nn.log_softmax(logits(params)), jax.nn.softmax(logits(frozen))
    )

  loss = loss_of(model)
  read = concepts.reader(
    lambda p, x: model.apply(p, x[:, :-1]),
    f'resid_post[{layers - 1}:{layers}]',
  )
  update = jax.tree.map(lambda p: 1e-3 * jnp.sign(p), params)
  moved = jax.jit(
    lambda p, u, x, columns: concepts.predicted_change(read, columns, p, u, x)
  )
  out: dict[str, Any] = {
    'gradient': (
      jax.jit(jax.grad(lambda p, x: loss(p, x).sum())),
      (params, tokens),
    ),
    'step': (jax.jit(plain), (start(adam), data)),
    'gated step': gated(),
    'anchored step': gated(divergence),
    'attribution': _attribution(model, params, tokens, layers),
  }
  for size in SIZES:
    sae = _autoencoder(size)
    columns = sae.params['W_enc']
    out[f'movement, {size} concepts'] = moved, (params, update, tokens, columns)
    # Not one program: part of it is done on the host.
    out[f'whole report, {size} concepts'] = (
      functools.partial(concepts.report, jax.jit(read)),
      (sae, params, update, tokens),
    )
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
  compiled = lambda f, arguments: (
    f.lower(*arguments).compile() if hasattr(f, 'lower') else f
  )
  return {name: (compiled(f, a), a) for name, (f, a) in out.items()}


def _autoencoder(size: int) -> concepts.SAE:
  key = jax.random.split(jax.random.key(4), 2)
  config = concepts.SAEConfig(
    architecture='topk', d_in=D_MODEL, d_sae=size, k=16
  )
  return concepts.make_sae(
    config,
    {
      'W_enc': jax.random.normal(key[0], (D_MODEL, size)),
      'W_dec': jax.random.normal(key[1], (size, D_MODEL)),
      'b_enc': jnp.zeros(size),
      'b_dec': jnp.zeros(D_MODEL),
    },
  )


def _attribution(model, params, tokens, layers: int):
  """A program that sets and removes four features of the frozen model."""
  name = f'resid_post[{layers // 2}:{layers // 2 + 1}]'
  sae = _autoencoder(SIZES[0])
  chosen = jnp.zeros(SIZES[0]).at[:4].set(1)

  def under(params, value):
    apply = shaping.set_features(
      model.apply, name, sae, jnp.full(SIZES[0], value), chosen
    )
    return lambda t: apply(params, t)

  read = lambda params, tokens: shaping.counterfactual(
    under(params, 1.0),
    under(params, 0.0),
    tokens,
    start=tokens.shape[1] - ATTRIBUTED,
  )
  return jax.jit(read), (params, tokens)


def measure(
  batch: int, time_: int, layers: int, repeats: int
) -> dict[str, Any]:
  """Times every program; see the module's docstring."""
  compiled: dict[str, tuple[Callable[..., Any], Any]]
  compiled = programs(batch, time_, layers)
  times = command.interleaved(
    {
      name: lambda f=f, arguments=arguments: jax.block_until_ready(
        f(*arguments)
      )
      for name, (f, arguments) in compiled.items()
    },
    repeats,
  )
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
      'temporary_mib': f.memory_analysis().temp_size_in_bytes / 2**20
      if hasattr(f, 'memory_analysis')
      else None,
    }
  growth = {}
  for what in ('movement', 'whole report'):
    few, many = (times[f'{what}, {s} concepts'] for s in (SIZES[0], SIZES[-1]))
    growth[what] = stats.median([a / b for a, b in zip(many, few)])
  return {
    'tokens': [batch, time_],
    'repeats': repeats,
    'device': f'{jax.devices()[0].device_kind} with {os.cpu_count()} cores',
    'programs': rows,
    'growth': growth,
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
    (low, high), memory = r['range'], r['temporary_mib']
    judged = ' | ' if r['target'] is None else verdict(r['ratio'], r['target'])
    lines.append(
      f'| {name} | {r["over"]} | {r["ratio"]:.2f} [{low:.2f}, {high:.2f}] '
      f'| {judged} | {"" if memory is None else f"{memory:.0f}"} |'
    )
  for what, growth in result['growth'].items():
    lines.append(
      f'| {what}, {SIZES[-1]} concepts | {what}, {SIZES[0]} '
      f'| {growth:.2f} | {verdict(growth, GROWTH_TARGET)} | |'
    )
  batch, time_ = result['tokens']
  return (
    '\n'.join(lines) + f'\n\n{batch} x {time_} tokens, {result["device"]}, '
    f'{result["repeats"]} repeats.\n'
  )


if __name__ == '__main__':
  run(measure, markdown)
