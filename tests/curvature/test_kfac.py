"""Factors against the exact Fisher information where equality must hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idesign import curvature
from idesign import models
from idesign import sites

D, H, C = 4, 5, 3
EPS = float(jnp.finfo(jnp.float32).eps)


def close(actual, expected, roundings=128):
  expected = np.asarray(expected, np.float64)
  scale = np.abs(expected).max()
  assert scale > 0
  error = np.abs(np.asarray(actual, np.float64) - expected).max()
  assert error <= roundings * EPS * scale


def network():
  net = models.mlp(models.MLPConfig(D, (H,), C))
  return net, net.init(jax.random.key(0))


def data(n):
  x = jax.random.normal(jax.random.key(1), (n, D))
  y = jax.random.randint(jax.random.key(2), (n,), 0, C)
  return x, y


KERNELS = r'layer_\d/kernel'


def gold(net, temperature=1.0, normalize='none'):
  fisher = curvature.Fisher(
    labels='gold', temperature=temperature, normalize=normalize
  )
  return jax.jit(curvature.kfac_factors(net.apply, KERNELS, fisher))


def test_one_example_gives_the_empirical_fisher_exactly():
  """With one example, `A (x) G` is the outer product of its gradient."""
  net, params = network()
  x, y = data(1)
  factors = gold(net)(params, x, labels=y)
  loss = lambda p: curvature.negative_log_likelihood(net.apply(p, x), y)[0]
  grads = jax.grad(loss)(params)
  for layer in ('layer_0', 'layer_1'):
    g = grads[layer]['kernel']
    a, s = (f[f'{layer}/kernel'] for f in (factors.inputs, factors.outputs))
    close(jnp.einsum('ij,op->iojp', a, s), jnp.einsum('io,jp->iojp', g, g))


def test_sampled_labels_converge_to_the_fisher():
  """`E G = sum_n J_n^T (diag p - p p^T) J_n`, the Gauss-Newton of the loss.

  For the last layer `J` is the identity, so the expectation is exact.
  """
  net, params = network()
  x, _ = data(6)
  samples = 4000
  fisher = curvature.Fisher(num_samples=samples)
  read = jax.jit(curvature.kfac_factors(net.apply, KERNELS, fisher))
  factors = read(params, x, key=jax.random.key(3))
  p = jax.nn.softmax(net.apply(params, x))
  covariance = jnp.einsum('nc,cd->ncd', p, jnp.eye(C))
  covariance = covariance - jnp.einsum('nc,nd->ncd', p, p)
  expected = covariance.sum(0)
  actual = factors.outputs['layer_1/kernel'] / samples
  # Five standard errors: entries of (e_y - p)(e_y - p)^T are at most 1.
  error = 5 * np.sqrt(len(x) / samples)
  assert float(jnp.abs(actual - expected).max()) < error
  assert float(jnp.abs(expected).max()) > 5 * error
  assert float(factors.count) == len(x) * samples


@pytest.mark.parametrize('labels', ['gold', 'model'])
def test_temperature_divides_logits_and_gradients(labels):
  net, params = network()
  x, y = data(8)
  temperature = 3.0
  hot = curvature.Fisher(labels=labels, temperature=temperature)
  plain = curvature.Fisher(labels=labels)
  drawn = {'labels': y} if labels == 'gold' else {'key': jax.random.key(4)}
  cooled = lambda p, x: net.apply(p, x) / temperature
  a = curvature.kfac_factors(net.apply, KERNELS, hot)(params, x, **drawn)
  b = curvature.kfac_factors(cooled, KERNELS, plain)(params, x, **drawn)
  jax.tree.map(close, a, b)


def test_normalized_examples_weigh_the_same():
  net, params = network()
  x, y = data(7)
  factors = gold(net, normalize='example')(params, x, labels=y)
  for moment in factors.outputs.values():
    close(jnp.trace(moment), 7.0)


def test_an_example_without_gradient_counts_as_zero():
  net, params = network()
  x, y = data(3)
  mask = jnp.array([True, False, True])
  fisher = curvature.Fisher(labels='gold', normalize='example')
  logits = lambda p, x: jnp.where(mask[:, None], net.apply(p, x), 0.0)
  factors = curvature.kfac_factors(logits, KERNELS, fisher)(params, x, labels=y)
  for moment in factors.outputs.values():
    close(jnp.trace(moment), 2.0)


@pytest.mark.parametrize('normalize', ['none', 'example'])
def test_batches_add_up(normalize):
  net, params = network()
  x, y = data(12)
  read = gold(net, normalize=normalize)
  whole = read(params, x, labels=y)
  parts = [read(params, x[i : i + 4], labels=y[i : i + 4]) for i in (0, 4, 8)]
  jax.tree.map(close, parts[0] + parts[1] + parts[2], whole)


def test_masked_positions_leave_both_factors():
  d, c = 4, 5
  w = jax.random.normal(jax.random.key(0), (d, c))
  x = jax.random.normal(jax.random.key(1), (3, 6, d))
  y = jax.random.randint(jax.random.key(2), (3, 6), 0, c)
  mask = jnp.arange(6)[None] < jnp.array([6, 2, 4])[:, None]
  logits = lambda p, x: x @ p['w']
  fisher = curvature.Fisher(labels='gold')
  factors = curvature.kfac_factors(logits, 'w', fisher)(
    {'w': w}, x, labels=y, mask=mask
  )
  kept = x[mask]
  g = jax.nn.softmax(kept @ w) - jax.nn.one_hot(y[mask], c)
  close(factors.inputs['w'], kept.T @ kept)
  close(factors.outputs['w'], g.T @ g)


@pytest.mark.parametrize(
  'arguments, message',
  [
    ({'labels': 'true'}, "'true'"),
    ({'normalize': 'token'}, "'token'"),
    ({'temperature': 0.0}, 'temperature must be positive'),
    ({'num_samples': 0}, 'num_samples is 0'),
    ({'labels': 'gold', 'num_samples': 2}, 'num_samples is 2'),
  ],
)
def test_bad_settings_raise(arguments, message):
  with pytest.raises(ValueError, match=message):
    curvature.Fisher(**arguments)


def test_missing_keys_and_labels_raise():
  net, params = network()
  x, y = data(2)
  with pytest.raises(ValueError, match='pass key'):
    curvature.kfac_factors(net.apply, KERNELS)(params, x, labels=y)
  with pytest.raises(ValueError, match='pass labels'):
    gold(net)(params, x)


def test_factors_of_a_scanned_stack():
  w = jax.random.normal(jax.random.key(0), (3, D, D)) / 2
  x, y = data(5)
  scanned = lambda p, x: jax.lax.scan(
    lambda h, w: (jnp.tanh(h @ w), None), x, p['w']
  )[0]
  looped = lambda p, x: jnp.tanh(
    jnp.tanh(jnp.tanh(x @ p['0']) @ p['1']) @ p['2']
  )
  fisher = curvature.Fisher(labels='gold')
  a = curvature.kfac_factors(scanned, 'w', fisher)({'w': w}, x, labels=y)
  layers = {str(i): w[i] for i in range(3)}
  b = curvature.kfac_factors(looped, '.*', fisher)(layers, x, labels=y)
  for i in range(3):
    close(a.inputs['w'][i], b.inputs[str(i)])
    close(a.outputs['w'][i], b.outputs[str(i)])


@pytest.mark.parametrize('scale', [1e-30, 1.0, 1e15])
def test_normalization_does_not_underflow(scale):
  net, params = network()
  x, y = data(5)

  def loss_scale(p, x):  # A gradient of any size, by the chain rule.
    logits = net.apply(p, x)
    return logits * scale + jax.lax.stop_gradient(logits * (1 - scale))

  fisher = curvature.Fisher(labels='gold', normalize='example')
  kernel = 'layer_1/kernel'
  read = curvature.kfac_factors(loss_scale, kernel, fisher)
  close(jnp.trace(read(params, x, labels=y).outputs[kernel]), 5.0)


def test_normalizing_a_weight_that_a_scan_shares_raises():
  w = jax.random.normal(jax.random.key(0), (D, D)) / 2
  x, y = data(3)

  def logits(p, x):
    step = lambda h, _: (jnp.tanh(h @ p['w']), None)
    return jax.lax.scan(step, x, None, length=3)[0]

  fisher = curvature.Fisher(labels='gold', normalize='example')
  with pytest.raises(sites.SharedWeightError):
    curvature.kfac_factors(logits, 'w', fisher)({'w': w}, x, labels=y)


def test_sampling_labels_does_not_hide_a_wrong_example_axis():
  """The key in the batch must not keep the loss from being traced again."""
  x = jax.random.normal(jax.random.key(0), (D, D, D))
  w = jax.random.normal(jax.random.key(1), (D, C))
  time_major = lambda p, x: jnp.swapaxes(jnp.swapaxes(x, 0, 1) @ p['w'], 0, 1)
  read = curvature.kfac_factors(time_major, 'w')
  with pytest.raises(sites.UnsupportedUseError, match='example_axis'):
    read({'w': w}, x, key=jax.random.key(2))


@pytest.mark.parametrize('label', [-1, -100, C])
def test_a_label_that_is_no_class_is_nan(label):
  w, (x, y) = jax.random.normal(jax.random.key(1), (D, C)), data(3)
  logits = lambda p, x: x @ p['w']
  read = curvature.kfac_factors(logits, 'w', curvature.Fisher(labels='gold'))
  wrong = y.at[0].set(label)
  nll = curvature.negative_log_likelihood(logits({'w': w}, x), wrong)
  assert jnp.isnan(nll[0]) and jnp.isfinite(nll[1:]).all()
  assert jnp.isnan(read({'w': w}, x, labels=wrong).outputs['w']).all()
  # Where it is masked it does not matter.
  h, both = jnp.stack([x, x], 1), jnp.stack([y, wrong], 1)
  mask = jnp.array([[True, False]] * len(y))
  first = read({'w': w}, h, labels=both, mask=mask).outputs['w']
  np.testing.assert_array_equal(
    first,
    read({'w': w}, h, labels=jnp.stack([y, y], 1), mask=mask).outputs['w'],
  )
  assert jnp.isfinite(first).all()


def of_positions(scale, positions):
  one = {'w': scale * np.eye(2)}
  return curvature.Factors(
    one, one, np.float32(7), {'w': np.float32(positions)}
  )


def test_a_mixture_weighs_moments_per_position():
  """Of twice the positions, sums that are twice as large count the same."""
  once = curvature.mixture(of_positions(1.0, 10), of_positions(3.0, 10), 0.5)
  twice = curvature.mixture(of_positions(1.0, 10), of_positions(6.0, 20), 0.5)
  np.testing.assert_allclose(once.inputs['w'], 2.5 * np.eye(2))
  np.testing.assert_allclose(once.outputs['w'], 2.5 * np.eye(2))
  jax.tree.map(np.testing.assert_allclose, once, twice)
  assert once.count == 7 and once.positions['w'] == 10


def test_a_mixture_refuses_other_sites_and_weights_below_zero():
  a = of_positions(1.0, 10)
  with pytest.raises(ValueError, match='not -0.5'):
    curvature.mixture(a, a, -0.5)
  with pytest.raises(ValueError, match=r"\['v', 'w'\]"):
    curvature.mixture(a, a._replace(positions={'v': 1}), 1.0)
