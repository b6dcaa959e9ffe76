"""Claims: a number, its interval, and whether the bound that hurts holds."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import json
import math
import pathlib
from typing import Literal

import numpy as np
import scipy.stats

from experiments.contract.workdir import write_text


@dataclasses.dataclass(frozen=True)
class Claim:
  """One row of `claims.json`; the fields are described in the README.

  Attributes:
    id: short name, unique in its experiment.
    statement: what is claimed, with units.
    value: mean over seeds (or over whatever was sampled).
    ci95: 95 % interval of `value`.
    seeds: the seeds, in order.
    comparator: `>=` or `<=`.
    target: what the interval's worse bound is compared with.
    passed: whether it holds.
    reference: the paper and table or figure this answers, or why the target.
  """

  id: str
  statement: str
  value: float
  ci95: tuple[float, float]
  seeds: tuple[int, ...]
  comparator: Literal['>=', '<=']
  target: float
  passed: bool
  reference: str


def interval(samples: Sequence[float]) -> tuple[float, float]:
  """95 % interval of the mean.

  Student's t below ten samples. From ten on the bias-corrected and accelerated
  bootstrap with 9,999 resamples from a fixed stream.

  Args:
    samples: independent values, at least two, all finite.

  Returns:
    `(low, high)`; both are the value if all samples agree.

  Raises:
    ValueError: for fewer than two samples, or one that is not finite.
  """
  values = np.asarray(samples, float)
  if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all():
    raise ValueError(
      f'An interval needs at least two finite samples; got {values.tolist()}. '
      'Run more seeds.'
    )
  if np.ptp(values) == 0:
    return float(values[0]), float(values[0])
  if len(values) < 10:
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values)
    return float(values.mean() - half), float(values.mean() + half)
  bounds = scipy.stats.bootstrap(
    (values,), np.mean, method='BCa', rng=np.random.default_rng(0)
  ).confidence_interval
  return float(bounds.low), float(bounds.high)


def claim(
  id: str,  # pylint: disable=redefined-builtin
  statement: str,
  samples: Sequence[float],
  comparator: Literal['>=', '<='],
  target: float,
  *,
  seeds: Sequence[int],
  reference: str,
) -> Claim:
  """Judges samples, one per seed: the interval's worse bound must hold."""
  if len(samples) != len(seeds):
    raise ValueError(
      f'Claim {id!r} has {len(samples)} samples for {len(seeds)} seeds.'
    )
  low, high = interval(samples)
  if comparator == '>=':
    passed = low >= target
  elif comparator == '<=':
    passed = high <= target
  else:
    raise ValueError(f"comparator is '>=' or '<=', not {comparator!r}.")
  return Claim(
    id=id,
    statement=statement,
    value=float(np.mean(samples)),
    ci95=(low, high),
    seeds=tuple(int(s) for s in seeds),
    comparator=comparator,
    target=float(target),
    passed=bool(passed),
    reference=reference,
  )


def save_claims(path: pathlib.Path, claims: Sequence[Claim]) -> None:
  """Writes `claims.json`, whole or not at all."""
  ids = [c.id for c in claims]
  if len(set(ids)) != len(ids):
    raise ValueError(f'Claims must have different ids: {ids}.')
  for c in claims:
    if not all(map(math.isfinite, (c.value, *c.ci95))):
      raise ValueError(f'Claim {c.id!r} is {c.value}, {c.ci95}: not finite.')
  rows = [dataclasses.asdict(c) for c in claims]
  write_text(path, json.dumps(rows, indent=2, allow_nan=False) + '\n')
