"""What choices are worth, who wins a vote, and sums that add up."""

import jax.numpy as jnp
import numpy as np
import pytest

from idesign import rewards
from idesign.rewards import CORRECT, MAINTAIN, MALFORMED, RETRACT, Counts


def test_rewards_by_hand():
  action = jnp.array([MAINTAIN, RETRACT, CORRECT, MALFORMED])
  got = rewards.intervention_reward(
    action, jnp.full(4, 0.75), jnp.full(4, 0.125)
  )
  np.testing.assert_allclose(got, [0.25, 0.4, 0.875, -0.2], rtol=1e-6)


@pytest.mark.parametrize(
  'doubt,new,best',
  [(0.1, 0.3, MAINTAIN), (0.9, 0.3, CORRECT), (0.9, 0.8, RETRACT)],
)
def test_what_pays(doubt, new, best):
  """A true claim that was flagged is worth keeping."""
  actions = jnp.array([MAINTAIN, RETRACT, CORRECT, MALFORMED])
  got = rewards.intervention_reward(
    actions, jnp.full(4, doubt), jnp.full(4, new)
  )
  assert actions[got.argmax()] == best


def test_best_of_n():
  actions = np.array([[0, 1, 1], [0, 1, 2], [2, 2, 0], [1, 1, 1]])
  scores = np.array([[0.9, 0.2, 0.3], [0.1, 0.3, 0.2], [0.5, 0.5, 0.9],
                     [0.1, 0.1, 0.1]])  # fmt: skip
  assert rewards.best_of_n(actions, scores).tolist() == [2, 1, 0, 0]


def test_reductions_add_up():
  random = np.random.default_rng(0)
  for _ in range(100):
    made, mistaken = random.integers(0, 50, 2)
    caught = random.integers(0, made + 1)
    fixed = random.integers(0, caught + 1)
    retracted = random.integers(0, caught - fixed + 1)
    kept = random.integers(0, mistaken + 1)
    counts = Counts(made, caught, fixed, retracted, mistaken, kept)
    got = rewards.reductions(60.0, float(random.integers(0, 60)), counts)
    np.testing.assert_allclose(
      got.policy + got.in_context + got.direct, got.overall, atol=1e-12
    )


def test_the_published_row():
  """RLFR, inline: 10.0, 34.7, 11.8 and 56.6 %, from rates like its own."""
  counts = Counts(
    made_up=55.3, caught=30, fixed=8, retracted=11, mistaken=10, kept=2.8
  )
  got = rewards.reductions(100.0, 90.0, counts)
  np.testing.assert_allclose(got, [0.10, 0.347, 0.118, 0.565], atol=1e-9)


@pytest.mark.parametrize(
  'counts,base,message',
  [
    (Counts(1, 2, 0, 0, 0, 0), 5, 'more is caught'),
    (Counts(3, 2, 2, 1, 0, 0), 5, 'more is caught'),
    (Counts(3, 2, 1, 1, 1, 2), 5, 'more is kept'),
    (Counts(3, 2, 1, 1, 1, 1), 0, 'nothing can be reduced'),
  ],
)
def test_counts_that_cannot_be(counts, base, message):
  with pytest.raises(ValueError, match=message):
    rewards.reductions(base, 1.0, counts)


def test_bad_votes():
  with pytest.raises(ValueError, match=r'\[B, N\]'):
    rewards.best_of_n(np.zeros((2, 3)), np.zeros((2, 2)))
  with pytest.raises(ValueError, match='not a number'):
    rewards.best_of_n(np.zeros((1, 1)), np.full((1, 1), np.nan))
  with pytest.raises(ValueError, match='retraction=2'):
    rewards.intervention_reward(
      jnp.array([0]), jnp.zeros(1), jnp.zeros(1), retraction=2
    )
