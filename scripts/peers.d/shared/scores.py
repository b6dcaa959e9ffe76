"""Ours of `<g_i, D_c>`: every example's gradient on rank-1 directions.

  python scores.py write FOLDER
  python scores.py compare FOLDER REPORT.json
  python scores.py ours FOLDER PROGRAM WHEN    measures, in a process of its own

The decoder of `experiments.benchmarks.subject` (5 M parameters), 64 x 128
tokens, 64 directions on all projections of all layers. The other library is
given the same weights (a Hugging Face folder), tokens and directions and asked
for the same numbers by way of the gradients of the examples, which it forms:
of the whole batch at once, and in microbatches of 8; ours likewise.
Time and memory of each are measured in fresh processes, ours before and after
theirs. The report says of each of its programs whether ours is as much faster
and smaller as we aim at.
"""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

import clock
import problem
import records
from experiments.benchmarks import subject
from idesign import concepts, models, sites

BATCH, TIME, LAYERS, DIRECTIONS = 64, 128, 6, 64
BOUND = 1e-4  # Of the largest score: float32, summed in another order.
FASTER, SMALLER = 3.0, 1 / 3


def write(folder: pathlib.Path) -> None:
  """Weights, tokens and directions, and our scores of them."""
  model = subject.decoder(LAYERS, unroll=False)
  params = jax.jit(model.init)(jax.random.key(0))
  models.save_pretrained(folder / 'model', model, params)
  rng = np.random.default_rng(0)
  arrays = {'tokens': rng.integers(0, subject.VOCAB, (BATCH, TIME + 1))}
  leaves = dict(zip(sites.leaf_paths(params), jax.tree.leaves(params)))
  loss = subject.loss_of(model)
  tokens = jnp.asarray(arrays['tokens'])
  for site in sites.find_sites(loss, params, tokens, subject.PROJECTIONS).sites:
    *_, d_in, d_out = leaves[site.path].shape
    for side, width in (('in', d_in), ('out', d_out)):
      a = rng.normal(size=(DIRECTIONS, LAYERS, width)) / np.sqrt(width)
      arrays[f'{site.path} {side}'] = a.astype(np.float32)
  np.savez(folder / 'problem.npz', **arrays)
  _ours(folder, 'before')


def ours(folder: pathlib.Path, program: str, when: str) -> None:
  """Measures this library; run in a process of its own."""
  model, params = models.load_pretrained(folder / 'model')
  tokens, sides = problem.load(folder)
  tokens = jnp.asarray(tokens)
  size = jnp.ones((DIRECTIONS, LAYERS))
  directions = {
    path: concepts.RankOne(jnp.asarray(a), jnp.asarray(b), size, 1)
    for path, (a, b) in sides.items()
  }
  read = concepts.concept_scores(
    subject.loss_of(model), directions, microbatch=problem.PROGRAMS[program]
  )

  def prepare():
    compiled = jax.jit(read).lower(params, tokens).compile()
    return lambda: jax.block_until_ready(compiled(params, tokens))

  measured = clock.measure(prepare)
  np.save(folder / f'ours, {program}.npy', np.asarray(prepare()()))
  file = folder / f'ours, {program}, {when}.json'
  file.write_text(json.dumps(measured), 'utf-8')


def _ours(folder: pathlib.Path, when: str) -> None:
  for program in problem.PROGRAMS:
    command = [sys.executable, __file__, 'ours', str(folder), program, when]
    subprocess.run(command, check=True)


def compare(folder: pathlib.Path, report: pathlib.Path) -> None:
  """Measures ours again and writes the report; exits 1 if numbers differ.

  `theirs.py` left `theirs.json` (`python`, `packages` and `programs`, each as
  `clock.measure` has it) and the scores of every program in `NAME.npy`.
  """
  _ours(folder, 'after')
  theirs = json.loads((folder / 'theirs.json').read_text('utf-8'))
  programs, worst = {}, 0.0
  for name, row in theirs['programs'].items():
    mine, got = (
      np.load(folder / f'{who}{name}.npy') for who in ('ours, ', '')
    )
    before, after = (
      json.loads((folder / f'ours, {name}, {when}.json').read_text('utf-8'))
      for when in ('before', 'after')
    )
    programs[name] = {'before': before, 'after': after}
    seconds = (before['seconds'] + after['seconds']) / 2
    peak = max(before['peak_mib'], after['peak_mib'])
    row['difference'] = float(np.abs(got - mine).max() / np.abs(mine).max())
    row['times_faster'] = row['seconds'] / seconds
    row['share_of_memory'] = peak / row['peak_mib']
    row['faster'] = row['times_faster'] >= FASTER
    row['smaller'] = row['share_of_memory'] <= SMALLER
    worst = max(worst, row['difference'])
    print(
      f'{name}: {row["times_faster"]:.2f} times as fast (target {FASTER:g}), '
      f'{row["share_of_memory"]:.2f} of the memory (target {SMALLER:.2f}), '
      f'difference {row["difference"]:.1e}'
    )
  record = {
    'problem': {
      'tokens': [BATCH, TIME], 'layers': LAYERS, 'directions': DIRECTIONS,
    },
    'ours': {
      **records.versions(('jax', 'numpy')),
      'programs': programs,
    },
    'theirs': theirs,
    'targets': {'times_faster': FASTER, 'share_of_memory': SMALLER},
  }  # fmt: skip
  records.write_report(report, record, worst, BOUND)


def main() -> None:
  part, *paths = sys.argv[1:]
  folder = pathlib.Path(paths[0])
  if part == 'write':
    write(folder)
  elif part == 'compare':
    compare(folder, pathlib.Path(paths[1]))
  else:
    ours(folder, *paths[1:])


if __name__ == '__main__':
  main()
