"""How every figure looks, and where it is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import pathlib
from typing import Any

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # pylint: disable=g-import-not-at-top

_STYLE = {
  'font.size': 9, 'axes.spines.top': False, 'axes.spines.right': False,
  'legend.frameon': False, 'savefig.dpi': 200,
  'figure.constrained_layout.use': True,
}  # fmt: skip


def save_figures(
  workdir: pathlib.Path, figures: Mapping[str, Callable[[], Any]]
) -> None:
  """Makes each figure and writes it to `workdir/figures/NAME.png`."""
  for name, make in figures.items():
    with plt.rc_context(_STYLE):
      figure = make()
      figure.savefig(workdir / 'figures' / f'{name}.png')
      plt.close(figure)
