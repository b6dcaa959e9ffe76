"""Naming weights and layers of a model in a config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from idesign import sites
from idesign.sites import selection


def layer_set(at: Mapping[str, sites.Site], patterns: Sequence[str]):
  """The sites and layers that patterns such as `up/kernel[0:1]` name.

  Args:
    at: site name -> site, found whole.
    patterns: names with layer ranges; several ranges of one site add up.

  Returns:
    The chosen sites, and site name -> layers where not all are chosen, as
    edits take them.
  """
  chosen: dict[str, sites.Site] = {}
  layers: dict[str, list[int]] = {}
  for text in patterns:
    pattern = selection.parse(text)
    site = chosen[pattern.name] = at[pattern.name]
    if pattern.layers is not None:
      layers.setdefault(pattern.name, []).extend(
        range(*pattern.steps(site.stack[0]))
      )
  return chosen, layers


def layer_paths(layer_sets: Sequence[Sequence[str]]) -> list[str]:
  """Every parameter that some set names, sorted."""
  return sorted({selection.parse(p).name for s in layer_sets for p in s})


def check_operating_points(config) -> None:
  """Whether every arm of the config has a point, and its layer set exists.

  Raises:
    ValueError: naming the arms without one, or the point.
  """
  missing = sorted(set(config.arms) - set(config.operating_points))
  if missing:
    raise ValueError(
      f'config.operating_points has nothing of {missing}: run the preset '
      f'{config.world}-choose, which prints them, and set them.'
    )
  for arm in config.arms:
    index, _ = config.operating_points[arm]
    if not 0 <= index < len(config.layer_sets):
      raise ValueError(
        f'config.operating_points.{arm} names layer set {index}; there are '
        f'{len(config.layer_sets)}.'
      )
