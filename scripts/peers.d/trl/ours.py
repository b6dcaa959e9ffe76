"""Runs in our environment: our formulas on the batches that TRL logged.

  python ours.py write FOLDER
  python ours.py compare FOLDER REPORT.json

`write` has nothing to write. `compare` reads what `theirs.py` logged, computes
advantages, losses and gradients with respect to log-probabilities, writes the
report with the benchmark, and exits 1 if anything differs by more than the
bound: the largest difference relative to the largest value.

Where definitions differ ours are given theirs: `epsilon_high` of CISPO is the
cap itself there and one more than ours; 1e-4 is added to deviations.
GRPO's `scale_rewards='batch'`, the deviation of raw rewards, is not ours, which
is that of what is left after the baseline, as in RLOO's `normalize_advantages`.
RLOO's ratios are of whole samples: gradients are compared where they are 1.
"""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import policy as benchmark
from idesign import rewards

BOUND = 1e-5
# Name -> objective, average, scale of advantages.
LOSSES = {
  'grpo': (rewards.clipped(0.2), 'sequence', 'group'),
  'dr_grpo': (rewards.clipped(0.2), 'constant', 'none'),
  'dapo': (rewards.clipped(0.2, 0.28), 'token', 'group'),
  'cispo': (rewards.cispo(1.0, 0.05), 'token', 'none'),
}
# Name -> scale of advantages, over the samples' siblings.
RLOO = {'rloo': 'none', 'rloo_batch': 'batch'}
NEW, GROUP = 6, 4


def difference(ours, theirs, scale=0.0) -> float:
  ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
  return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), scale))


def compare_loss(name: str, logged) -> dict[str, float]:
  objective, average, _ = LOSSES[name]
  # `constant` is over the longest completion there may be.
  wide = lambda x: jnp.pad(jnp.asarray(x), ((0, 0), (0, NEW - x.shape[1])))
  mask = wide(logged['mask'])
  advantages = jnp.broadcast_to(logged['advantages'][:, None], mask.shape)

  def loss(logps):
    old = wide(logged['old'])
    tokens = objective(logps, old, advantages)
    apart = rewards.divergence.k3(logps, wide(logged['reference']), old)
    return rewards.mean_loss(
      tokens + logged['beta'] * apart, mask, average=average
    )

  value, gradient = jax.value_and_grad(loss)(wide(logged['logps']))
  gradient = gradient[:, : logged['logps'].shape[1]]
  ratio = np.exp(logged['logps'] - logged['old'])[logged['mask']]
  return {
    # Advantages cancel in the mean, which may be 0.
    'loss': difference(
      value, logged['loss'], np.abs(logged['advantages']).mean()
    ),
    'gradient': difference(gradient, logged['gradient']),
    'largest_ratio': float(ratio.max()),
  }


def compare_rloo(logged) -> dict[str, float]:
  """On policy; theirs is a mean over samples of the sum over tokens."""
  mask = jnp.asarray(logged['mask'])
  advantages = jnp.broadcast_to(logged['advantages'][:, None], mask.shape)

  def loss(logps):
    tokens = rewards.reinforce(4.0)(logps, logged['old'], advantages)
    mean = rewards.mean_loss(tokens, mask, average='constant')
    return mask.shape[1] * mean

  gradient = jax.grad(loss)(jnp.asarray(logged['logps']))
  return {'gradient': difference(gradient, logged['gradient'])}


def compare(folder: pathlib.Path, report: pathlib.Path) -> bool:
  rows: dict[str, dict[str, float]] = {}
  scales = {name: scale for name, (_, _, scale) in LOSSES.items()} | RLOO
  for name, scale in scales.items():
    row: dict[str, float] = {}
    for path in sorted(folder.glob(f'{name}-[0-9]*.npz')):
      logged = dict(np.load(path))
      if path.stem.endswith('advantages'):
        ours = rewards.advantages(
          jnp.asarray(logged['rewards']).reshape(-1, GROUP),
          baseline='leave_one_out' if name in RLOO else 'mean',
          scale=scale, eps=1e-4,
        )  # fmt: skip
        got = {'advantages': difference(
          ours.values_PG.reshape(-1), logged['advantages']
        )}  # fmt: skip
      elif name in RLOO:
        got = compare_rloo(logged)
      else:
        got = compare_loss(name, logged)
      row |= {k: max(v, row.get(k, 0.0)) for k, v in got.items()}
    rows[name] = row
  worst = max(
    v for r in rows.values() for k, v in r.items() if k != 'largest_ratio'
  )
  measured = json.loads((folder / 'benchmark.json').read_text('utf-8'))
  out = {
    'same_numbers': worst <= BOUND,
    'largest_difference': worst,
    'losses': rows,
    'benchmark': measured,
  }
  report.parent.mkdir(parents=True, exist_ok=True)
  report.write_text(json.dumps(out, indent=2) + '\n', 'utf-8')
  print(json.dumps(rows, indent=2))
  print(benchmark.markdown(measured))
  return out['same_numbers']


if __name__ == '__main__':
  if sys.argv[1] == 'compare':
    ok = compare(*map(pathlib.Path, sys.argv[2:4]))
    sys.exit(0 if ok else 'our formulas and those of TRL differ')
