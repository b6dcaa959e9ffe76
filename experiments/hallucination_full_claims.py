"""What is claimed of a run on a real model: what its frozen probe sees."""

from __future__ import annotations

from typing import Any

import numpy as np

from experiments.contract import Claim, interval
from experiments.hallucination_full_lab import ANSWERS

RLFR = 'RLFR, https://arxiv.org/abs/2602.10067'


def make_claims(config, results: dict[str, Any]) -> list[Claim]:
  """Of each arm: claims and doubts, by prompt, next to the base's."""
  claims = []
  before = {k: by_prompt(v) for k, v in results['base']['answers'].items()}
  for arm in config.arms:
    after = {k: by_prompt(v) for k, v in results[arm]['answers'].items()}

    def change(name, after=after):
      """In units of the base's mean."""
      return (after[name] - before[name]) / max(before[name].mean(), 1e-9)

    claims.append(
      _claim(config, f'claims-{arm}', f'{arm}: claims over the base',
             1 + change('claims'), '>=', 0.95)
    )  # fmt: skip
    if arm == 'none':
      continue
    claims.append(
      _claim(config, f'doubted-{arm}',
             f'{arm}: fewer claims that the frozen probe doubts, share',
             -change('doubted'), '>=', 0.5)
    )  # fmt: skip
  return claims


def by_prompt(values) -> np.ndarray:
  """Means over the answers to each prompt, which are next to each other."""
  return np.asarray(values, float).reshape(-1, ANSWERS).mean(axis=1)


def _claim(config, name, statement, samples, comparator, target) -> Claim:
  low, high = interval(samples)
  passed = low >= target if comparator == '>=' else high <= target
  return Claim(
    id=name, statement=f'{statement} (interval over prompts)',
    value=float(np.mean(samples)), ci95=(low, high), seeds=(config.seed,),
    comparator=comparator, target=target, passed=bool(passed), reference=RLFR,
  )  # fmt: skip
