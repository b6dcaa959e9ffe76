"""What a network has by heart, removed by the curvature of its loss.

Worlds: `mlp`, `vit` (scikit-learn's digits), `mnist-mlp`, `mnist-vit`: networks
that fit wrong labels (`experiments/memorization_images.py`); `decay`: one that
is kept from it while it trains (`experiments/memorization_decay.py`); `lm`: a
small language model that recites (`experiments/recitation.py`); `pretrained`:
any Hugging Face folder (`experiments/recitation_pretrained.py`).

Run: see `configs/memorization.py`.
"""

from __future__ import annotations

import pathlib

from experiments import (
  contract, memorization_decay, memorization_images, recitation,
  recitation_pretrained,
)  # fmt: skip

RUNNERS = {
  'decay': memorization_decay.run,
  'lm': recitation.run,
  'pretrained': recitation_pretrained.run,
}


def run(config, folder: pathlib.Path) -> None:
  """Runs the experiment that has the config's world."""
  RUNNERS.get(config.world, memorization_images.run)(config, folder)


if __name__ == '__main__':
  contract.main(run)
