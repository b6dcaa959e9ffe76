"""What is claimed of an edited pretrained model; samples are passages."""

from __future__ import annotations

import numpy as np

from experiments import contract

PAPER = 'Merullo et al. 2025, arXiv 2510.24256, Table 3'


def mean_perplexity(row) -> float:
  """The geometric mean over texts."""
  return float(np.exp(np.mean(np.log(list(row['perplexity'].values())))))


def each(row) -> list[int]:
  """Which passages are recited, of all files."""
  return [hit for part in row['recitation'].values() for hit in part['each']]


def best(results, arm: str, limit: float):
  """The row of an arm that recites least with a perplexity of at most `limit`.

  Where there is none, that of the unedited model.
  """
  rows = [v for k, v in results.items() if k.startswith(f'{arm}/')]
  good = [r for r in rows if mean_perplexity(r) <= limit]
  return min([*good, results['unedited']], key=lambda r: np.mean(each(r)))


def make_claims(config, results) -> list[contract.Claim]:
  """Claims of one model; `seeds` are the numbers of its passages.

  Every arm is taken where it recites least without more perplexity than
  `config.perplexity_limit` times that of the unedited model.
  """
  limit = config.perplexity_limit * mean_perplexity(results['unedited'])
  ours = each(best(results, 'kfac', limit))
  if len(ours) < 2:
    return []  # One passage has no interval.
  rows = [
    ('forgotten', 'passages recited after the edit, with at most '
     f'{config.perplexity_limit:g} times the perplexity, %',
     [100 * hit for hit in ours], '<=', 20,
     f'{PAPER}: 99.9 to 3.4, with 1.20 times'),
  ]  # fmt: skip
  for arm, what in (('svd', 'SVD'), ('random', 'random components')):
    control = each(best(results, arm, limit))
    rows.append(
      (f'below_{arm}', f'passages recited, ours minus {what}, points',
       [100 * (a - b) for a, b in zip(ours, control)], '<=', 0,
       f'{PAPER}: SVD 3.0, with 1.18 times')
    )  # fmt: skip
  return [
    contract.claim(
      f'{config.world}_{id_}', f'{config.world}: {text}', samples, comparator,
      target, seeds=range(len(samples)), reference=reference,
    )
    for id_, text, samples, comparator, target, reference in rows
  ]  # fmt: skip
