"""Ours of K-FAC factors, their eigendecompositions, and the edit they make.

  python factors.py write FOLDER
  python factors.py compare FOLDER REPORT.json
  python factors.py ours FOLDER WHEN       measures, in a process of its own

The decoder of `experiments.benchmarks.subject` (5 M parameters), 64 x 128
tokens in passes of 16 sequences, every projection of every layer, gradients of
the tokens that follow (the empirical Fisher information). From the weights and
tokens on: factors, eigendecompositions in float64, and new weights that keep
the components of the largest curvature, 0.9 of its mass. The other library is
given the same weights (a Hugging Face folder) and tokens. Time and memory of
each are measured in fresh processes, ours before and after theirs, and the time
of a plain gradient in each. The report has how far its factors and new weights
are from ours, and whether ours is as much faster, and no larger, as we aim at.
"""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np

import clock
import records
from experiments.benchmarks import subject
from idesign import curvature, models, sites

BATCH, TIME, LAYERS, PART, MASS = 64, 128, 6, 16, 0.9
FISHER = curvature.Fisher(labels='gold')
BOUND = 1e-3  # Of the largest of each: float32, summed in another order.


def write(folder: pathlib.Path) -> None:
  """Weights and tokens, and ours."""
  model = subject.decoder(LAYERS, unroll=False)
  params = jax.jit(model.init)(jax.random.key(0))
  models.save_pretrained(folder / 'model', model, params)
  random = np.random.default_rng(0)
  tokens = random.integers(0, subject.VOCAB, (BATCH, TIME + 1))
  settings = {'part': PART, 'mass': MASS}
  (folder / 'problem.json').write_text(json.dumps(settings), 'utf-8')
  np.save(folder / 'tokens.npy', tokens)
  _ours(folder, 'before')


def ours(folder: pathlib.Path, when: str) -> None:
  """Measures this library; run in a process of its own."""
  model, params = models.load_pretrained(folder / 'model')
  tokens = np.load(folder / 'tokens.npy').astype(np.int32)
  parts = [tokens[i : i + PART] for i in range(0, BATCH, PART)]
  loss = subject.loss_of(model)
  at = sites.find_sites(loss, params, parts[0], subject.PROJECTIONS).by_name
  read = curvature.kfac_factors(model.apply, subject.PROJECTIONS, FISHER)
  add = lambda total, params, part: (
    total + read(params, part[:, :-1], labels=part[:, 1:])
  )
  start = lambda params, part: read(params, part[:, :-1], labels=part[:, 1:])

  def factors(programs):
    total = programs[0](params, parts[0])
    for part in parts[1:]:
      total = programs[1](total, params, part)
    return total

  def edit(total):
    spectra = curvature.spectra(total)
    kept = curvature.keep_high_curvature(params, at, spectra, mass=MASS)
    return kept.apply(params)

  def prepare():
    first = jax.jit(start).lower(params, parts[0]).compile()
    shapes = jax.eval_shape(start, params, parts[0])
    rest = jax.jit(add, donate_argnums=0).lower(shapes, params, parts[0])
    programs[:] = first, rest.compile()
    return lambda: jax.block_until_ready(edit(factors(programs)))

  programs = []
  measured = clock.measure(prepare)
  total = factors(programs)
  leaves = lambda p: dict(zip(sites.leaf_paths(p), jax.tree.leaves(p)))
  edited, arrays = leaves(edit(total)), {}
  for name, site in at.items():
    arrays[f'{name} input'] = np.asarray(total.inputs[name])
    arrays[f'{name} output'] = np.asarray(total.outputs[name])
    arrays[f'{name} edited'] = np.asarray(edited[site.path])
  np.savez(folder / 'ours.npz', **arrays)
  gradient = jax.jit(jax.grad(lambda p, x: loss(p, x).sum()))
  measured['factors'] = clock.seconds(
    lambda: jax.block_until_ready(factors(programs))
  )
  measured['gradient'] = clock.seconds(
    lambda: [jax.block_until_ready(gradient(params, part)) for part in parts]
  )
  (folder / f'ours, {when}.json').write_text(json.dumps(measured), 'utf-8')


def _ours(folder: pathlib.Path, when: str) -> None:
  command = [sys.executable, __file__, 'ours', str(folder), when]
  subprocess.run(command, check=True)


def difference(mine, got) -> dict[str, float]:
  """Largest relative Frobenius error of a layer, of each kind of array."""
  worst = dict.fromkeys(('input', 'output', 'edited'), 0.0)
  for name in mine.files:
    kind = name.rsplit(' ', 1)[1]
    apart = np.linalg.norm(got[name] - mine[name], axis=(1, 2))
    apart = apart / np.linalg.norm(mine[name], axis=(1, 2))
    worst[kind] = max(worst[kind], float(apart.max()))
  return worst


def compare(
  folder: pathlib.Path, report: pathlib.Path, targets: dict[str, float]
) -> None:
  """Measures ours again and writes the report; exits 1 if numbers differ.

  `theirs.py` left `theirs.json` (`python`, `packages` and `programs`, each as
  `clock.measure` has it, with seconds of `factors` and of a `gradient`) and the
  arrays of every program in `NAME.npz`.

  Args:
    folder: that `write` filled.
    report: to write.
    targets: measure -> at least so much; `times_faster`; `share_of_memory`, at
      most; `factors_over_gradient`, ours over theirs, at most.
  """
  _ours(folder, 'after')
  theirs = json.loads((folder / 'theirs.json').read_text('utf-8'))
  before, after = (
    json.loads((folder / f'ours, {when}.json').read_text('utf-8'))
    for when in ('before', 'after')
  )
  mean = lambda key: (before[key] + after[key]) / 2
  mine, worst = np.load(folder / 'ours.npz'), 0.0
  for name, row in theirs['programs'].items():
    row['difference'] = difference(mine, np.load(folder / f'{name}.npz'))
    row['times_faster'] = row['seconds'] / mean('seconds')
    row['share_of_memory'] = (
      max(before['peak_mib'], after['peak_mib']) / row['peak_mib']
    )
    # Each in gradients of its own.
    row['factors_over_gradient'] = (
      mean('factors') / mean('gradient') / (row['factors'] / row['gradient'])
    )
    row['holds'] = {
      key: row[key] >= target if key == 'times_faster' else row[key] <= target
      for key, target in targets.items()
    }
    worst = max([worst, *row['difference'].values()])
    print(
      f'{name}: {row["times_faster"]:.2f} times as fast, '
      f'{row["share_of_memory"]:.2f} of the memory, factors in gradients '
      f'{row["factors_over_gradient"]:.2f} of theirs; errors '
      + ', '.join(f'{k} {v:.1e}' for k, v in row['difference'].items())
    )
  record = {
    'problem': {
      'tokens': [BATCH, TIME], 'part': PART, 'layers': LAYERS, 'mass': MASS
    },
    'ours': {
      **records.versions(('jax', 'numpy')),
      'before': before,
      'after': after,
    },
    'theirs': theirs,
    'targets': targets,
  }  # fmt: skip
  records.write_report(report, record, worst, BOUND)


def main(targets: dict[str, float]) -> None:
  part, *paths = sys.argv[1:]
  folder = pathlib.Path(paths[0])
  if part == 'write':
    write(folder)
  elif part == 'compare':
    compare(folder, pathlib.Path(paths[1]), targets)
  else:
    ours(folder, *paths[1:])


if __name__ == '__main__':
  main({})
