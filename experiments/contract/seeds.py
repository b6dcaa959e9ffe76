"""Which seeds a run reports."""

from __future__ import annotations

from collections.abc import Sequence


def reported_seeds(config, chosen_on: Sequence[int]) -> list[int]:
  """`config.num_seeds` seeds from `config.seed` on.

  Args:
    config: of an experiment; `preset='choose'` is for choosing on seeds.
    chosen_on: seeds that settings were chosen on.

  Raises:
    ValueError: naming the key, for too few seeds, or for one that was chosen
      on in a run that claims something.
  """
  if config.num_seeds < 2:
    raise ValueError(
      f'config.num_seeds={config.num_seeds}: an interval needs at least 2.'
    )
  seeds = list(range(config.seed, config.seed + config.num_seeds))
  spent = sorted(set(seeds) & set(chosen_on))
  if spent and config.preset != 'choose':
    raise ValueError(
      f'config.seed={config.seed}: settings were chosen on seeds '
      f'{tuple(chosen_on)}, so nothing can be claimed of {spent}. Start at '
      f'{max(chosen_on) + 1} or later.'
    )
  return seeds
