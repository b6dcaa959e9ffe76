"""Advantages against tables worked out by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from idesign.rewards import advantages

EPS = np.finfo(np.float32).eps
# Two informative groups, one that says nothing.
REWARDS = jnp.array([[1.0, 0, 0, 3], [2, 2, 2, 2], [0, 0, 0, 1]])
# Means 1, 2, 1/4; sample standard deviations sqrt(2), 0, 1/2.
CENTRED = np.array([[0, -1, -1, 2], [0, 0, 0, 0], [-1, -1, -1, 3]])
CENTRED = CENTRED / np.array([[1], [1], [4]])
TABLE = {
  'rloo': (('leave_one_out', 'none'), CENTRED * 4 / 3),
  'grpo': (('mean', 'group'), CENTRED / np.array([[2**0.5], [1], [0.5]])),
  'dr_grpo': (('mean', 'none'), CENTRED),
  # Squares: 6 and 12 / 16, over the 8 samples of informative groups.
  'batch': (('mean', 'batch'), CENTRED / np.sqrt(6.75 / 7)),
}


@pytest.mark.parametrize('name', TABLE)
def test_table(name):
  (baseline, scale), want = TABLE[name]
  got = advantages(REWARDS, baseline=baseline, scale=scale, eps=0.0)
  values = np.nan_to_num(np.asarray(got.values_PG))  # 0 / 0 with eps = 0.
  np.testing.assert_allclose(values, want, rtol=8 * EPS, atol=8 * EPS)
  assert np.asarray(got.informative_P).tolist() == [True, False, True]


def test_leave_one_out_is_the_mean_of_the_siblings():
  got = advantages(REWARDS, baseline='leave_one_out', scale='none').values_PG
  r = np.asarray(REWARDS)
  for p, g in np.ndindex(r.shape):
    want = r[p, g] - np.delete(r[p], g).mean()
    np.testing.assert_allclose(got[p, g], want, rtol=8 * EPS, atol=8 * EPS)


def test_groups_that_say_nothing_do_not_change_the_scale_of_the_batch():
  padded = jnp.concatenate([REWARDS, jnp.full((5, 4), 0.1)])
  a, b = (
    advantages(r, baseline='mean', scale='batch') for r in (REWARDS, padded)
  )
  np.testing.assert_array_equal(a.values_PG, b.values_PG[:3])
  assert not np.asarray(b.values_PG[3:]).any()


def test_equal_rewards_give_zero_whatever_their_rounding():
  """The mean of equal numbers need not be one of them; division magnifies."""
  rewards = jnp.full((1, 7), 0.1)
  for scale in ('group', 'batch', 'none'):
    got = advantages(rewards, baseline='mean', scale=scale, eps=1e-12)
    assert not np.asarray(got.values_PG).any()


@pytest.mark.parametrize('shape', [(3,), (3, 1), (2, 2, 2)])
def test_shapes_that_cannot_be_compared(shape):
  with pytest.raises(ValueError, match='at least two samples'):
    advantages(jnp.zeros(shape), baseline='mean', scale='none')


def test_unknown_choice():
  with pytest.raises(ValueError, match="scale='std'"):
    advantages(REWARDS, baseline='mean', scale='std')
