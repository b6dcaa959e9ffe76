"""What is claimed of decay along components of low curvature."""

from __future__ import annotations

from experiments import contract

OURS = {
  'kfac': 'decay sparing K-FAC curvature',
  'batch': 'decay sparing batch curvature',
  'added': 'more decay of what has little batch curvature',
}


def rows_of(results, seed, arm, strengths):
  """The networks of an arm, by strength."""
  return [results[f'{seed}/{arm}/{s:g}'] for s in strengths]


def lowest(rows, limit: float) -> float:
  """Least memorized among networks with at most some test loss."""
  return min([r['memorized'] for r in rows if r['test_loss'] <= limit])


def best_loss(plain) -> float:
  """Test loss of the plain network that is best on held-out images."""
  return min(plain, key=lambda r: r['held_out_loss'])['test_loss']


def half_loss(plain) -> float:
  """Least test loss at which a plain network has half of the labels or fewer.

  The largest of all where no network has so few.
  """
  losses = [r['test_loss'] for r in plain if r['memorized'] <= 50]
  return min(losses, default=max(r['test_loss'] for r in plain))


def make_claims(config, results, seeds) -> list[contract.Claim]:
  """Judges frontiers on the reported seeds.

  Where none of ours is as good on test images as what it is compared with, the
  limit is the least loss that ours reach, which is easier for both.
  """
  claims = []
  for arm, what in OURS.items():
    for limit_of, id_, at in (
      (best_loss, 'best', 'the best plain decay'),
      (half_loss, 'half', 'the plain decay that halves memorization'),
    ):
      samples = []
      for seed in seeds:
        plain, ours = (
          rows_of(results, seed, a, config.strengths[a]) for a in ('plain', arm)
        )
        limit = max(limit_of(plain), min(r['test_loss'] for r in ours))
        samples.append(lowest(ours, limit) - lowest(plain, limit))
      claims.append(
        contract.claim(
          f'decay_{arm}_{id_}', f'decay: memorized labels at most at the test '
          f'loss of {at}, {what} minus plain, points', samples, '<=', 0,
          seeds=seeds, reference='control: plain decay, as many strengths',
        )
      )  # fmt: skip
  return claims
