"""The problem that one environment wrote, read and answered in any of them."""

import pathlib

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
