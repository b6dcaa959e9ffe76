"""Losses and gradients of tokens, by hand and against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idesign.rewards import cispo, clipped, divergence, mean_loss, reinforce

EPS = np.finfo(np.float32).eps
# Ratios 1/2, 1, 2, 8 of tokens with either sign of advantage.
LOG_RATIO = jnp.log(jnp.array([[0.5, 1, 2, 8], [0.5, 1, 2, 8]]))
ADVANTAGE = jnp.array([[1.0] * 4, [-1.0] * 4])
SAMPLED = jnp.full((2, 4), -1.0)
# d loss / d log pi, with bounds of 0.8 and 1.2, and of 4.
GRADIENT = {
  'reinforce': (reinforce(), [[-0.5, -1, -2, -8], [0.5, 1, 2, 8]]),
  'truncated': (reinforce(4), [[-0.5, -1, -2, -4], [0.5, 1, 2, 4]]),
  'clipped': (clipped(0.2), [[-0.5, -1, 0, 0], [0, 1, 2, 8]]),
  'clip higher': (clipped(0.2, 1.5), [[-0.5, -1, -2, 0], [0, 1, 2, 8]]),
  'cispo': (cispo(), [[-0.5, -1, -2, -4], [0.5, 1, 2, 4]]),
  'cispo, both': (
    cispo(0.2, 0.2), [[-0.8, -1, -1.2, -1.2], [0.8, 1, 1.2, 1.2]]
  ),
}


@pytest.mark.parametrize('name', GRADIENT)
def test_gradient_of_each_token(name):
  objective, want = GRADIENT[name]
  total = lambda x: objective(x, SAMPLED, ADVANTAGE).sum()
  got = jax.grad(total)(SAMPLED + LOG_RATIO)
  np.testing.assert_allclose(got, want, rtol=16 * EPS, atol=16 * EPS)


def test_clipped_loss_by_hand():
  got = clipped(0.2)(SAMPLED + LOG_RATIO, SAMPLED, ADVANTAGE)
  want = [[-0.5, -1, -1.2, -1.2], [0.8, 1, 2, 8]]
  np.testing.assert_allclose(got, want, rtol=16 * EPS)


@pytest.mark.parametrize('name', GRADIENT)
def test_on_policy_all_are_the_policy_gradient(name):
  objective = GRADIENT[name][0]
  total = lambda x: objective(x, SAMPLED, ADVANTAGE).sum()
  np.testing.assert_allclose(
    jax.grad(total)(SAMPLED), -ADVANTAGE, rtol=4 * EPS
  )


def test_averages():
  loss = jnp.array([[1.0, 2, 3, 4], [10, 99, 99, 99], [99, 99, 99, 99]])
  mask = jnp.array([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
  want = {'sequence': (2.5 + 10 + 0) / 3, 'token': 20 / 5, 'constant': 20 / 12}
  for average, value in want.items():
    got = mean_loss(loss, mask, average=average)
    np.testing.assert_allclose(got, value, rtol=4 * EPS)


def test_what_was_not_sampled_makes_no_difference():
  mask = jnp.array([[True, False]])
  for average in ('sequence', 'token', 'constant'):
    f = lambda x: mean_loss(x, mask, average=average)
    got = jax.grad(f)(jnp.array([[1.0, jnp.inf]]))
    assert np.isfinite(np.asarray(got)).all() and got[0, 1] == 0
    assert np.isfinite(f(jnp.array([[1.0, jnp.nan]])))


@pytest.mark.parametrize(
  'make,message',
  [
    (lambda: reinforce(0), 'cap=0'),
    (lambda: clipped(1.2), 'low=1.2'),
    (lambda: cispo(0.2, -1), 'high=-1'),
    (
      lambda: mean_loss(SAMPLED, SAMPLED > 0, average='sum'),
      "average='sum'",
    ),
    (
      lambda: mean_loss(SAMPLED, SAMPLED[:1] > 0, average='token'),
      r'losses \(2, 4\)',
    ),
  ],
)
def test_bad_settings(make, message):
  with pytest.raises(ValueError, match=message):
    make()


# Divergence.

LOGITS = jax.random.normal(jax.random.key(0), (5,))
REFERENCE = jax.random.normal(jax.random.key(1), (5,))
LOGPI, LOGREF = map(jax.nn.log_softmax, (LOGITS, REFERENCE))
PI = jnp.exp(LOGPI)


def test_exact_is_the_definition():
  want = sum(float(p * (a - b)) for p, a, b in zip(PI, LOGPI, LOGREF))
  got = divergence.exact(LOGITS, REFERENCE)
  np.testing.assert_allclose(got, want, rtol=32 * EPS)
  assert divergence.exact(LOGITS, LOGITS) == 0


@pytest.mark.parametrize('estimate', [divergence.k1, divergence.k3])
def test_estimators_are_unbiased(estimate):
  """Their mean over all tokens, weighed by the policy, is the divergence."""
  mean = (PI * estimate(LOGPI, LOGREF)).sum()
  want = divergence.exact(LOGITS, REFERENCE)
  np.testing.assert_allclose(mean, want, rtol=64 * EPS)


def test_k3_is_never_negative():
  assert (np.asarray(divergence.k3(LOGPI, LOGREF)) >= 0).all()


def test_gradients_of_the_estimators_are_those_that_are_said():
  fixed = jax.lax.stop_gradient(PI)
  score = lambda estimate: jax.grad(
    lambda x: (fixed * estimate(jax.nn.log_softmax(x), LOGREF)).sum()
  )(LOGITS)
  atol = 32 * EPS
  np.testing.assert_allclose(score(divergence.k1), jnp.zeros(5), atol=atol)
  reverse = jax.grad(lambda x: divergence.exact(REFERENCE, x))(LOGITS)
  np.testing.assert_allclose(score(divergence.k3), reverse, atol=atol)


def test_k3_with_its_ratio_has_the_gradient_of_the_divergence():
  """Whatever the tokens were sampled from."""
  atol = 64 * EPS
  for other in (LOGPI, jax.nn.log_softmax(jnp.arange(5.0) / 3)):
    mean = lambda x, other=other: jnp.sum(
      jnp.exp(other) * divergence.k3(jax.nn.log_softmax(x), LOGREF, other)
    )
    value, gradient = jax.value_and_grad(mean)(LOGITS)
    np.testing.assert_allclose(
      value, divergence.exact(LOGITS, REFERENCE), rtol=64 * EPS
    )
    want = jax.grad(divergence.exact)(LOGITS, REFERENCE)
    np.testing.assert_allclose(gradient, want, atol=atol)


def test_exact_with_tokens_of_no_probability():
  logits = LOGITS.at[2].set(-jnp.inf)
  value, gradient = jax.value_and_grad(divergence.exact)(logits, REFERENCE)
  assert np.isfinite(value) and np.isfinite(np.asarray(gradient)).all()
