"""Parts of a reward, their bounds, and rates that are held."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idesign import rewards
from idesign.probes import Pressure

SAMPLES = rewards.Samples(
  tokens_BT=jnp.arange(8).reshape(2, 4),
  mask_BT=jnp.array([[1, 1, 1, 0], [0, 1, 1, 1]], bool),
  sampled_BT=jnp.array([[0, 1, 1, 0], [0, 0, 0, 0]], bool),
  logprobs_BT=jnp.zeros((2, 4)),
)
SCENE = rewards.Scene(SAMPLES, {}, None, None, None, jax.random.key(0))


def term(value, **kwargs):
  return rewards.Term(
    **{'name': 'a', 'value': lambda scene: jnp.asarray(value)} | kwargs
  )


def test_a_text_s_value_stands_at_its_last_sampled_token():
  got = rewards.evaluate([term([5.0, 7.0])], SCENE)['a']
  # Nothing was sampled of the second: at its last token.
  np.testing.assert_array_equal(got, [[0, 0, 5, 0], [0, 0, 0, 7]])


def test_tokens_keep_theirs():
  value = jnp.arange(8.0).reshape(2, 4)
  got = rewards.evaluate([term(value, weight=2.0)], SCENE)['a']
  np.testing.assert_array_equal(got, 2 * value)


def test_bounds_come_before_weights():
  got = rewards.evaluate(
    [term([-5.0, 7.0], weight=-2.0, low=-1.0, high=3.0)], SCENE
  )['a']
  assert got.sum(axis=1).tolist() == [2, -6]


def test_bounds_do_not_hide_what_is_not_a_number():
  got = rewards.evaluate([term([jnp.nan, 1.0], low=0.0, high=1.0)], SCENE)['a']
  assert np.isnan(got.sum(axis=1)).tolist() == [True, False]


@pytest.mark.parametrize(
  'make,message',
  [
    (lambda: [term([1.0, 2.0]), term([1.0, 2.0])], 'its own name'),
    (lambda: [], 'at least one'),
    (lambda: [term([1.0, 2.0, 3.0])], r"'a' has shape \(3,\)"),
    (lambda: [term([1.0, 2.0], low=2.0, high=1.0)], 'low=2.0'),
    (lambda: [term([1.0, 2.0], name='a/b')], "name='a/b'"),
  ],
)
def test_bad_terms(make, message):
  with pytest.raises(ValueError, match=message):
    rewards.evaluate(make(), SCENE)


def test_pressure_is_that_of_the_worst_term():
  terms = [term([0.0]), term([0.0], pressure=Pressure.LIVE)]
  assert rewards.pressure(terms) is Pressure.LIVE
  assert rewards.pressure([]) is Pressure.NONE


def constraint(event, among=None, **kwargs):
  array = lambda x: None if x is None else (lambda scene: jnp.array(x))
  return rewards.RateConstraint(
    **{'name': 'c', 'event': array(event), 'among': array(among), 'target': 0.5,
       'gain': 0.2} | kwargs
  )  # fmt: skip


def test_a_multiplier_follows_the_rate():
  c = constraint([True, True], target=0.4)
  new, added, rate = c.update(jnp.asarray(0.3), SCENE)
  np.testing.assert_allclose(new, 0.3 + 0.2 * 0.6, rtol=1e-6)
  np.testing.assert_allclose(added, [-0.3, -0.3], rtol=1e-6)
  assert rate == 1


def test_only_where_it_could_happen():
  c = constraint([True, False], [True, False])
  _, added, rate = c.update(jnp.asarray(0.5), SCENE)
  assert rate == 1 and added.tolist() == [-0.5, 0]
  c = constraint([True, True], [False, False])
  new, added, _ = c.update(jnp.asarray(0.5), SCENE)
  assert new == 0.5 and not np.asarray(added).any()


def test_multipliers_are_bounded():
  always = constraint([True, True], target=0.0, gain=9.0)
  assert always.update(jnp.asarray(0.9), SCENE)[0] == 1
  never = constraint([False, False], target=1.0, gain=9.0)
  assert never.update(jnp.asarray(0.0), SCENE)[0] == -1


def test_it_holds_a_rate():
  """A policy that answers to its reward settles at the target."""
  multiplier, random = jnp.zeros(()), np.random.default_rng(0)
  texts = jax.tree.map(lambda x: jnp.repeat(x, 32, axis=0), SAMPLES)
  scene = SCENE._replace(samples=texts)
  rates = []
  for _ in range(400):
    chance = 1 / (1 + np.exp(-(1 - 4 * float(multiplier))))
    event = jnp.asarray(random.random(64) < chance)

    multiplier, _, rate = rewards.RateConstraint(
      name='c', event=lambda s, e=event: e, target=0.3, gain=0.05
    ).update(multiplier, scene)
    rates.append(float(rate))
  assert abs(np.mean(rates[200:]) - 0.3) < 0.03


@pytest.mark.parametrize(
  'kwargs,message',
  [({'target': 1.5}, 'target=1.5'), ({'gain': 0}, 'gain=0'),
   ({'low': 1, 'high': 1}, 'low=1')],
)  # fmt: skip
def test_bad_constraints(kwargs, message):
  with pytest.raises(ValueError, match=message):
    constraint([True], **kwargs)


@pytest.mark.parametrize(
  'event,message',
  [([1.0, 0.5], r"event of the constraint 'c' is float32\[2\]"),
   ([[True], [False]], r'bool\[2, 1\].*bool\[2\]'),
   ([True], r'bool\[1\].*bool\[2\]')],
)  # fmt: skip
def test_what_is_no_event(event, message):
  with pytest.raises(ValueError, match=message):
    constraint(event).update(jnp.zeros(()), SCENE)
