"""The problem that one environment wrote, read and answered in any of them."""

import importlib.metadata
import json
import pathlib
import platform
import subprocess
import sys

import numpy as np

# Name -> how many examples at once; None is all.
PROGRAMS = {'whole batch': None, 'microbatches of 8': 8}


def load(folder: pathlib.Path):
  """Tokens `[B, T + 1]`, and by path the directions' sides.

  Returns:
    The tokens and `{path: (in, out)}`, `[directions, layers, width]` each.
  """
  arrays = np.load(folder / 'problem.npz')
  paths = sorted({k.rsplit(' ', 1)[0] for k in arrays.files if ' ' in k})
  sides = lambda path: tuple(arrays[f'{path} {side}'] for side in ('in', 'out'))
  return arrays['tokens'], {path: sides(path) for path in paths}


def answer(run, packages) -> None:
  """The command line of `theirs.py`: `theirs.py FOLDER [PROGRAM]`.

  Without PROGRAM it runs itself once for each, in a process of its own, and
  writes `theirs.json`.

  Args:
    run: `run(folder, program)`, which leaves `PROGRAM.npy` and `PROGRAM.json`.
    packages: whose versions are recorded.
  """
  folder = pathlib.Path(sys.argv[1])
  if len(sys.argv) > 2:
    return run(folder, sys.argv[2])
  for name in PROGRAMS:
    subprocess.run([sys.executable, *sys.argv, name], check=True)
  read = lambda name: json.loads((folder / f'{name}.json').read_text('utf-8'))
  record = {
    'python': platform.python_version(),
    'packages': {name: importlib.metadata.version(name) for name in packages},
    'programs': {name: read(name) for name in PROGRAMS},
  }
  (folder / 'theirs.json').write_text(json.dumps(record), 'utf-8')
