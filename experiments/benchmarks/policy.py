"""What reinforcement learning costs, beside transformers and TRL.

  python -m experiments.benchmarks.policy [--prompts=1,8] [--repeats=7] \
      [--out=results/benchmarks/policy.json]

A Llama of the shape of stories260K (64 wide, 5 layers, 512 tokens) with random
weights, batches of so many prompts of 32 tokens, groups of 8, 64 new tokens
each; no stop token, so that everybody samples as many. All run in one process,
in turn:

  sampling        `rewards.sample_groups` and `generate` of transformers
  step            `rewards.make_policy_step` with a divergence from the frozen
                  model, and `GRPOTrainer` of TRL with the same; the reward
                  counts a token
  probe           the frozen model's pass with a probe read from it, over the
                  pass alone, which a divergence needs anyway
  memory          temporaries of the compiled step by size of group, and arrays
                  alive after few and many steps

transformers comes with the `test` extra. TRL does not: `scripts/peers trl`
runs this in an environment that has it, and without it that row is left out.

Two targets are missed where a batch is large: 5 times `generate`, 3 times the
step of TRL. With 8 texts PyTorch waits for its own dispatch and both hold; with
64 most of the time is in products, in which XLA is not faster on two cores: a
step is 20 GFLOP (`rewards.forward_flops`, five passes), nearly 0.2 s of the
half second at the 110 GFLOP/s that a gradient of a larger model reaches here.

What helped, with 64 texts, sampling from 0.32 s and a step from 0.96: products
over the rows of all texts as one axis (gradients took 1.7 times as long), a
cache laid out as attention reads it and written in place, scores computed again
in the backward pass instead of kept (together 0.20 and 0.60), one random number
for each row instead of one for each token of the vocabulary, a prompt read once
for its group (0.16 and 0.49). What did not: layers unrolled in decoding (1.2
times slower), queries scaled instead of scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import importlib.util
import os
import pathlib
import statistics as stats
import tempfile
import time
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks import command
from experiments.benchmarks.policy_peers import (
  BETA, GROUP, NEW, PROMPT, VOCAB, after_each_step, counted, make_generate,
  make_trainer, write_model,
)  # fmt: skip
from idesign import models
from idesign import probes
from idesign import rewards

_PROMPTS = flags.DEFINE_list(
  'prompts', ['1', '8'], 'Prompts of each batch that is measured.'
)

GROUPS = (4, 8, 16, 32)
STEPS = (4, 24)
TARGETS = {'sampling': 5.0, 'step': 3.0}  # Times as fast, at least.
PROBE_TARGET = 1.05


class Ours:
  """This library's side."""

  def __init__(self, folder: pathlib.Path, prompts: np.ndarray):
    self.model, self.params = models.load_pretrained(folder)
    self.prompts = jnp.asarray(prompts)
    self.mask = jnp.ones(prompts.shape, bool)
    width = self.model.config.d_model
    self.observe = probes.observer(self.model.apply, ['resid_post[2:3]'])
    config = probes.ProbeConfig(kind='mlp', d_in=width)
    quality = probes.ProbeQuality(0.95, 0.02, 500, 500, 100)
    self.probe = probes.freeze(
      self.params, probes.init_probe(config, jax.random.key(1)),
      observe=self.observe, config=config, quality=quality,
    )  # fmt: skip
    self._sample = jax.jit(
      lambda params, key: rewards.sample_groups(
        self.model.apply,
        params,
        self.prompts,
        self.mask,
        config=self.model.config,
        group=GROUP,
        max_new_tokens=NEW,
        key=key,
      )  # fmt: skip
    )
    self.optimizer = optax.adam(1e-5)
    self.step = self.make_step(GROUP)
    self.state = self.start(GROUP)

  def _config(self, group: int) -> rewards.PolicyConfig:
    return rewards.PolicyConfig(
      group=group, max_new_tokens=NEW, baseline='mean', scale='group',
      average='sequence', divergence='k3', divergence_weight=BETA,
    )  # fmt: skip

  def make_step(self, group: int):
    term = rewards.Term(
      name='count',
      value=lambda s: counted(
        jnp.where(s.samples.sampled_BT, s.samples.tokens_BT, -1)
      ).astype(jnp.float32),
    )
    return rewards.make_policy_step(
      self.model.apply, self.model.config, self.observe, self.optimizer,
      [term], rewards.clipped(), self._config(group),
    )  # fmt: skip

  def start(self, group: int) -> rewards.PolicyState:
    return rewards.init_policy(
      self.params, self.optimizer, jax.random.key(2), self._config(group)
    )

  def batch(self) -> dict[str, Any]:
    return {'prompts': self.prompts, 'mask': self.mask}

  def sample(self) -> None:
    jax.block_until_ready(self._sample(self.params, jax.random.key(3)))

  def improve(self) -> None:
    self.state, metrics = self.step(self.state, self.batch(), probe=self.probe)
    jax.block_until_ready((self.state, metrics))


def clock(call: Callable[[], Any]) -> float:
  start = time.perf_counter()
  call()
  return time.perf_counter() - start


def in_turn(calls: dict[str, Callable[[], Any]], repeats: int):
  """Seconds of each call, interleaved; the first round warms up."""
  out: dict[str, list[float]] = {name: [] for name in calls}
  for repeat in range(repeats + 1):
    for name, call in calls.items():
      seconds = clock(call)
      if repeat:
        out[name].append(seconds)
  return out


def ratio(theirs: list[float], ours: list[float]) -> dict[str, Any]:
  each = [a / b for a, b in zip(theirs, ours)]
  return {
    'ours': stats.median(ours),
    'theirs': stats.median(theirs),
    'ratio': stats.median(each),
    'range': [min(each), max(each)],
  }


def probe_cost(ours: Ours, repeats: int) -> dict[str, Any]:
  """The pass a divergence needs, with a probe read from it and without."""
  tokens = jnp.tile(ours.prompts, (GROUP, (PROMPT + NEW) // PROMPT))
  mask = jnp.ones(tokens.shape, bool)
  spans = jnp.arange(tokens.shape[1])[None] >= PROMPT
  spans = jnp.broadcast_to(spans, tokens.shape)
  alone = jax.jit(lambda p, x, m: p.read(x, m).logits_BTV)

  @jax.jit
  def read(probe, tokens, mask, spans):
    seen = probe.read(tokens, mask)
    return seen.logits_BTV, probe.scores(seen, spans)

  done = jax.block_until_ready
  times = in_turn(
    {
      'alone': lambda: done(alone(ours.probe, tokens, mask)),
      'read': lambda: done(read(ours.probe, tokens, mask, spans)),
    },
    3 * repeats,
  )
  return ratio(times['read'], times['alone'])


def memory(ours: Ours) -> dict[str, Any]:
  """Temporaries by size of group; arrays alive after some steps."""
  sizes = []
  for group in GROUPS:
    lowered = ours.make_step(group).lower(
      ours.start(group), ours.batch(), probe=ours.probe
    )
    analysis = lowered.compile().memory_analysis()
    sizes.append(analysis.temp_size_in_bytes / 2**20)
  slope, offset = np.polyfit(GROUPS, sizes, 1)
  off = max(abs(offset + slope * g - s) / s for g, s in zip(GROUPS, sizes))
  alive = []
  for step in range(1, STEPS[-1] + 1):
    ours.improve()
    if step in STEPS:
      alive.append(sum(a.nbytes for a in jax.live_arrays()) / 2**20)
  return {
    'groups': list(GROUPS), 'temporary_mib': sizes, 'off_a_line': float(off),
    'steps': list(STEPS), 'alive_mib': alive,
  }  # fmt: skip


def measure(prompts: Sequence[int], repeats: int) -> dict[str, Any]:
  """Everything; see the module's docstring."""
  random = np.random.default_rng(0)
  rows, versions = {}, {'jax': jax.__version__}
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    write_model(folder)
    for count in prompts:
      tokens = random.integers(3, VOCAB, (count, PROMPT))
      ours = Ours(folder, tokens)
      times = in_turn(
        {'ours': ours.sample, 'theirs': make_generate(folder, tokens)}, repeats
      )
      row = ratio(times['theirs'], times['ours'])
      for key in ('ours', 'theirs'):
        row[f'{key}_tokens_per_second'] = count * GROUP * NEW / row[key]
      rows[f'sampling/{count}'] = row
      if importlib.util.find_spec('trl'):
        import trl

        versions['trl'] = trl.__version__
        rows[f'step/{count}'] = steps_in_turn(folder, tokens, ours, repeats)
    probe, used = probe_cost(ours, repeats), memory(ours)
  return {
    'repeats': repeats,
    'versions': versions,
    'device': f'{jax.devices()[0].device_kind} with {os.cpu_count()} cores',
    'rows': rows,
    'probe': probe,
    'memory': used,
  }


def steps_in_turn(folder, tokens, ours: Ours, repeats: int) -> dict[str, Any]:
  """TRL's steps, one of ours after each: both see the same neighbours."""
  trainer, theirs = make_trainer(folder, tokens, repeats + 1)
  mine: list[float] = []
  trainer.add_callback(
    after_each_step(lambda: mine.append(clock(ours.improve)))
  )
  trainer.train()
  return ratio(theirs[1:], mine[1:])


def markdown(result: dict[str, Any]) -> str:
  """The table of a result."""
  verdict = lambda holds: 'holds' if holds else '**fails**'
  lines = ['| what | ours | theirs | ratio [range] | target | |',
           '|---|---|---|---|---|---|']  # fmt: skip
  names = {
    'sampling': 'sampling, over `generate` of transformers',
    'step': 'a step, over `GRPOTrainer` of TRL',
  }
  for key, r in result['rows'].items():
    name, count = key.split('/')
    low, high = r['range']
    holds = verdict(r['ratio'] >= TARGETS[name])
    lines.append(
      f'| {names[name]}, {count} x {GROUP} texts | {r["ours"]:.3f} s '
      f'| {r["theirs"]:.3f} s '
      f'| {r["ratio"]:.1f} [{low:.1f}, {high:.1f}] times as fast '
      f'| ≥ {TARGETS[name]:g} | {holds} |'
    )
  r = result['probe']
  low, high = r['range']
  lines.append(
    f'| frozen pass with a probe, over without | {r["theirs"]:.4f} s '
    f'| {r["ours"]:.4f} s | {r["ratio"]:.2f} [{low:.2f}, {high:.2f}] '
    f'| ≤ {PROBE_TARGET:g} | {verdict(r["ratio"] <= PROBE_TARGET)} |'
  )
  m = result['memory']
  grown = ', '.join(f'{s:.0f}' for s in m['temporary_mib'])
  lines.append(
    f'| temporaries of a step, groups of {", ".join(map(str, m["groups"]))} '
    f'| {grown} MiB | | {100 * m["off_a_line"]:.0f} % off a line | ≤ 5 % '
    f'| {verdict(m["off_a_line"] <= 0.05)} |'
  )
  few, many = m['alive_mib']
  lines.append(
    f'| arrays alive after {m["steps"][0]} and {m["steps"][1]} steps '
    f'| {few:.1f}, {many:.1f} MiB | | {many / few:.2f} | ≤ 1 '
    f'| {verdict(many <= few)} |'
  )
  return (
    '\n'.join(lines) + f'\n\nPrompts of {PROMPT} tokens, groups of {GROUP}, '
    f'{NEW} new tokens; {result["device"]}, '
    f'{result["repeats"]} repeats.\n'
  )


if __name__ == '__main__':
  command.run(
    lambda repeats: measure([int(p) for p in _PROMPTS.value], repeats), markdown
  )
