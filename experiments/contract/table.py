"""The results of a run, by arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class Table:
  """What `results.json` holds of an arm, one entry per seed."""

  def __init__(self, results: Mapping[str, Any], seeds: Sequence[int]):
    self._results, self._seeds = results, seeds

  def arm(self, name: str) -> list[dict[str, Any]]:
    return [self._results[f'{s}/{name}'] for s in self._seeds]

  def has(self, name: str) -> bool:
    return f'{self._seeds[0]}/{name}' in self._results
