"""Runs in our environment: autoencoders for SAELens to read, and the report.

  python ours.py write FOLDER
  python ours.py compare FOLDER REPORT.json

`write` makes `FOLDER/ours/NAME/` in SAELens' format, with our outputs beside
it. `compare` reads what `theirs.py` made in between, `FOLDER/theirs/NAME/`,
compares outputs in both directions, writes the report, and exits 1 if any
differs by more than the bound: the largest difference relative to the largest
value.
"""

import importlib.metadata
import json
import pathlib
import platform
import sys

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from idesign import concepts

BOUND = 1e-5
D, F, K = 8, 24, 3
HOOK = 'blocks.3.hook_resid_post'
OUTPUTS = ('features', 'reconstruction')


def outputs(sae, inputs):
  features = sae.encode(jnp.asarray(inputs))
  return {
    'inputs': np.asarray(inputs),
    'features': np.asarray(features),
    'reconstruction': np.asarray(sae.decode(features)),
  }


def difference(ours, theirs) -> float:
  worst = [
    np.abs(ours[name] - theirs[name]).max() / np.abs(theirs[name]).max()
    for name in OUTPUTS
  ]
  return float(max(worst))


def write(folder: pathlib.Path) -> None:
  rng = np.random.default_rng(0)
  inputs = rng.normal(size=(50, D)).astype(np.float32)
  for kind in ('relu', 'topk', 'batchtopk', 'jumprelu', 'gated'):
    for centered in (True, False):
      config = concepts.SAEConfig(
          architecture=kind, d_in=D, d_sae=F, centered=centered,
          k=K if kind in ('topk', 'batchtopk') else None,
      )  # fmt: skip
      sae = concepts.make_sae(
        config,
        {
          name: jnp.asarray(rng.normal(size=shape), jnp.float32)
          for name, shape in config.shapes.items()
        },
      )
      to = folder / 'ours' / (kind if centered else f'{kind}-uncentred')
      concepts.save_sae(to, sae, metadata={'hook_name': HOOK})
      np.savez(to / 'outputs.npz', **outputs(sae, inputs))


def compare(folder: pathlib.Path, report: pathlib.Path) -> None:
  read, written = {}, {}
  for path in sorted((folder / 'theirs').iterdir()):
    theirs = np.load(path / 'outputs.npz')
    loaded = concepts.load_sae(path)
    raw = json.loads((path / 'cfg.json').read_text('utf-8'))
    read[path.name] = {
      'architecture': raw['architecture'],
      'difference': difference(outputs(loaded.sae, theirs['inputs']), theirs),
      'active': float((theirs['features'] > 0).sum(1).mean()),
      'tensors': sorted(load_file(path / 'sae_weights.safetensors')),
      'keys': sorted(raw),
      'assumed': list(loaded.assumed),
    }
  for path in sorted((folder / 'ours').iterdir()):
    theirs = np.load(path / 'read_by_them.npz')
    metadata = json.loads(
      (path / 'metadata_read_by_them.json').read_text('utf-8')
    )
    written[path.name] = {
      'difference': difference(np.load(path / 'outputs.npz'), theirs),
      'active': float((theirs['features'] > 0).sum(1).mean()),
      'hook_name_kept': metadata.get('hook_name') == HOOK,
    }
  packages = ('idesign', 'jax', 'numpy', 'safetensors')
  worst = max(r['difference'] for r in [*read.values(), *written.values()])
  record = {
    'theirs': json.loads((folder / 'theirs.json').read_text('utf-8')),
    'ours': {
      'python': platform.python_version(),
      'packages': {p: importlib.metadata.version(p) for p in packages},
    },
    'bound': BOUND,
    'largest_difference': worst,
    'passed': worst <= BOUND,
    'written_by_them_read_by_us': read,
    'written_by_us_read_by_them': written,
  }
  report.parent.mkdir(parents=True, exist_ok=True)
  temporary = report.with_name(report.name + '.tmp')
  temporary.write_text(json.dumps(record, indent=2) + '\n', encoding='utf-8')
  temporary.replace(report)
  for side, rows in (('theirs', read), ('ours', written)):
    for name, row in rows.items():
      print(f'{row["difference"]:.1e}  {side}/{name}')
  if worst > BOUND:
    sys.exit(f'{report}: the largest difference is {worst:.1e} > {BOUND:g}.')


if __name__ == '__main__':
  if sys.argv[1] == 'write':
    write(pathlib.Path(sys.argv[2]))
  else:
    compare(pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]))
