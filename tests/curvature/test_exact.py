"""Products, factors and traces against matrices formed whole, in float64."""

import functools

import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
import numpy as np
import pytest

from idesign import curvature

D, H, C, N = 3, 4, 3, 5
KERNELS = r'layer_\d/kernel'
TOLERANCE = 1e-10


@pytest.fixture(autouse=True)
def double():
  with jax.enable_x64(True):
    yield


class Net:
  """A perceptron in float64, with the paths of `models.mlp`."""

  def __init__(self, activation=jnp.tanh):
    self.activation = activation

  def apply(self, params, x):
    for i, layer in enumerate(params.values()):
      x = self.activation(x) if i else x
      x = x @ layer['kernel']
      if 'bias' in layer:
        x = x + jnp.broadcast_to(layer['bias'], x.shape)
    return x


def network(hidden=(H,), activation=jnp.tanh, bias=True):
  random = np.random.default_rng(0)
  sizes, params = (D, *hidden, C), {}
  for i, shape in enumerate(zip(sizes, sizes[1:])):
    params[f'layer_{i}'] = {'kernel': jnp.asarray(random.normal(size=shape))}
    if bias:
      params[f'layer_{i}']['bias'] = jnp.asarray(random.normal(size=shape[1]))
  return Net(activation), params


def data(n=N):
  random = np.random.default_rng(1)
  return jnp.asarray(random.normal(size=(n, D))), random.integers(0, C, n)


def vector_like(params, seed=2):
  random = np.random.default_rng(seed)
  return jax.tree.map(
    lambda p: jnp.asarray(random.normal(size=p.shape)), params
  )


def close(actual, expected, tolerance=TOLERANCE):
  expected = np.asarray(expected)
  assert np.abs(expected).max() > 0
  error = np.abs(np.asarray(actual) - expected).max()
  assert error <= tolerance * np.abs(expected).max()


def flat(tree):
  return ravel_pytree(tree)[0]


def nll(net):
  return lambda p, b: curvature.negative_log_likelihood(
    net.apply(p, b[0]), b[1]
  )


def test_hessian_product():
  net, params = network()
  loss, batch = nll(net), data()
  v = vector_like(params)
  matrix = curvature.hessian(loss, params, batch)
  product = jax.jit(curvature.hessian_product(loss))(params, batch, v)
  close(flat(product), matrix @ flat(v))


def test_curvature_of_every_example_along_a_direction():
  net, params = network()
  loss, (x, y) = nll(net), data()
  v = vector_like(params)
  got = jax.jit(curvature.directional_curvature(loss))(params, (x, y), v)
  for i in range(N):
    one = curvature.hessian(loss, params, (x[i : i + 1], y[i : i + 1]))
    close(got[i], flat(v) @ one @ flat(v))


def jacobian(net, params, x):
  """`[N, C, P]`."""
  start, unravel = ravel_pytree(params)
  return jax.jacobian(lambda p: net.apply(unravel(p), x))(start)


def gauss_newton(net, params, x, likelihood='categorical', temperature=1.0):
  z = net.apply(params, x) / temperature
  middle = jnp.broadcast_to(jnp.eye(C), (len(x), C, C))
  if likelihood == 'categorical':
    middle = jax.vmap(jax.hessian(jax.nn.logsumexp))(z)
  j = jacobian(net, params, x) / temperature
  return jnp.einsum('ncp,ncd,ndq->pq', j, middle, j)


@pytest.mark.parametrize('likelihood', ['categorical', 'normal'])
def test_gauss_newton_product(likelihood):
  net, params = network()
  x, _ = data()
  v = vector_like(params)
  product = jax.jit(curvature.gauss_newton_product(net.apply, likelihood))
  expected = gauss_newton(net, params, x, likelihood) @ flat(v)
  close(flat(product(params, x, v)), expected)


def test_gauss_newton_product_of_positions_that_count():
  net, params = network()
  x, _ = data(6)
  sequences = x.reshape(2, 3, D)
  mask = jnp.array([[True, False, True], [True, True, False]])
  v = vector_like(params)
  product = curvature.gauss_newton_product(net.apply)
  got = product(params, sequences, v, mask=mask)
  close(flat(got), gauss_newton(net, params, x[mask.reshape(-1)]) @ flat(v))


def test_product_with_the_empirical_fisher():
  net, params = network()
  batch = data()
  v = vector_like(params)
  fisher = curvature.Fisher(labels='gold')
  product = jax.jit(curvature.fisher_product(net.apply, fisher))
  _, unravel = ravel_pytree(params)
  g = jax.jacobian(lambda p: nll(net)(unravel(p), batch))(flat(params))
  got = product(params, batch[0], v, labels=batch[1])
  close(flat(got), g.T @ (g @ flat(v)))


def blocks(net, params, matrix):
  """Diagonal blocks of kernels, `[d_in, d_out, d_in, d_out]` by site."""
  index = ravel_pytree(params)[1](
    jnp.arange(matrix.shape[0], dtype=jnp.float64)
  )
  out = {}
  for layer, leaves in index.items():
    at = leaves['kernel'].astype(int)
    rows = at.reshape(-1)
    out[f'{layer}/kernel'] = matrix[rows][:, rows].reshape(at.shape * 2)
  return out


def kronecker(factors, name):
  """The K-FAC block, summed over examples."""
  scale = float(factors.positions[name])
  a, g = factors.inputs[name], factors.outputs[name]
  return jnp.einsum('ij,op->iojp', a, g) / scale


@pytest.mark.parametrize('likelihood', ['categorical', 'normal'])
@pytest.mark.parametrize('temperature', [1.0, 2.5])
def test_one_datum_has_the_gauss_newton_blocks(likelihood, temperature):
  net, params = network((H, H))
  x, _ = data(1)
  fisher = curvature.Fisher(
    labels='exact', likelihood=likelihood, temperature=temperature
  )
  factors = curvature.kfac_factors(net.apply, KERNELS, fisher)(params, x)
  matrix = gauss_newton(net, params, x, likelihood, temperature)
  for name, block in blocks(net, params, matrix).items():
    close(kronecker(factors, name), block)


def test_deep_linear_networks_have_the_gauss_newton_blocks():
  """Output gradients are those of every datum, so that the product is exact."""
  net, params = network((H, H), activation=lambda x: x, bias=False)
  x, _ = data()
  fisher = curvature.Fisher(labels='exact', likelihood='normal')
  factors = curvature.kfac_factors(net.apply, KERNELS, fisher)(params, x)
  matrix = gauss_newton(net, params, x, 'normal')
  for name, block in blocks(net, params, matrix).items():
    close(kronecker(factors, name), block)


def test_ekfac_eigenvalues_are_the_diagonal_in_the_eigenbasis():
  net, params = network()
  x, _ = data()
  fisher = curvature.Fisher(labels='exact')
  factors = curvature.kfac_factors(net.apply, KERNELS, fisher)(params, x)
  spectra = curvature.spectra(factors)
  bases = curvature.as_bases(spectra, jnp.float64)
  read = jax.jit(curvature.ekfac_eigenvalues(net.apply, KERNELS, fisher))
  values = read(params, x, bases).mean()
  for name, block in blocks(net, params, gauss_newton(net, params, x)).items():
    u, v = bases[name]
    diagonal = jnp.einsum('ia,ob,iojp,ja,pb->ab', u, v, block, u, v) / N
    close(values[name], diagonal)
    # With K-FAC exact in the mean only, the two differ, but not in their sum.
    mass = spectra[name].mass()
    assert np.abs(mass - values[name]).max() > 1e-3 * mass.max()


def test_absolute_curvature_of_sequences():
  """One example at one position, seen as a sequence or not: the same mass."""
  net, params = network()
  x, _ = data(6)
  fisher = curvature.Fisher(labels='exact')
  read = curvature.kfac_factors(net.apply, KERNELS, fisher)
  flat_mass = curvature.spectra(read(params, x))['layer_0/kernel'].mass()
  long = curvature.spectra(read(params, x.reshape(2, 3, D)))
  # Three positions to an example: three times the curvature.
  close(long['layer_0/kernel'].mass(), 3 * flat_mass)
  mask = jnp.array([[True] * 3, [False] * 3])
  half = curvature.spectra(read(params, x.reshape(2, 3, D), mask=mask))
  alone = curvature.spectra(read(params, x[:3]))['layer_0/kernel'].mass()
  # Of two examples, of which one has nothing to say.
  close(half['layer_0/kernel'].mass(), 3 * alone / 2)


@pytest.mark.parametrize('labels', ['exact', 'gold'])
@pytest.mark.parametrize('likelihood', ['categorical', 'normal'])
def test_what_is_masked_teaches_nothing_earlier(labels, likelihood):
  """Where positions see those before them, to mask the last is to drop it."""
  random = np.random.default_rng(4)
  params = {
    'up': jnp.asarray(random.normal(size=(D, H))),
    'down': jnp.asarray(random.normal(size=(H, C))),
  }
  causal = lambda p, x: jnp.tanh(jnp.cumsum(x @ p['up'], axis=1)) @ p['down']
  x = jnp.asarray(random.normal(size=(4, 3, D)))
  given = {}
  if labels == 'gold' and likelihood == 'normal':
    given['labels'] = jnp.asarray(random.normal(size=(4, 3, C)))
  elif labels == 'gold':
    given['labels'] = jnp.asarray(random.integers(0, C, (4, 3)))
  mask = jnp.ones((4, 3), bool).at[:, 2].set(False)
  fisher = curvature.Fisher(labels=labels, likelihood=likelihood)
  read = curvature.kfac_factors(causal, '.*', fisher)
  masked = read(params, x, mask=mask, **given)
  short = read(params, x[:, :2], **{k: v[:, :2] for k, v in given.items()})
  for a, b in zip(jax.tree.leaves(masked), jax.tree.leaves(short)):
    # Columns of the masked position are zero, and counted.
    close(a, b)
  v = vector_like(params)
  product = curvature.fisher_product(causal, fisher)
  close(
    flat(product(params, x, v, mask=mask, **given)),
    flat(
      product(params, x[:, :2], v, **{k: y[:, :2] for k, y in given.items()})
    ),
  )


def test_sampled_labels_converge_at_the_root_of_their_number():
  """Over 200 estimates each, four times the samples halve the error."""
  net, params = network()
  x, _ = data()
  exact = curvature.Fisher(labels='exact')
  expected = curvature.kfac_factors(net.apply, KERNELS, exact)(params, x)
  errors = {}
  for samples in (4, 16, 64):
    fisher = curvature.Fisher(num_samples=samples)
    read = curvature.kfac_factors(net.apply, KERNELS, fisher)
    outputs = lambda key: read(params, x, key=key).outputs
    got = jax.jit(jax.vmap(outputs))(
      jax.random.split(jax.random.key(samples), 200)
    )
    squares = [
      np.mean(
        np.sum((np.asarray(g) / samples - np.asarray(e)) ** 2, axis=(-2, -1))
      )
      for g, e in zip(got.values(), expected.outputs.values())
    ]
    errors[samples] = float(np.sqrt(sum(squares)))
  for few, many in ((4, 16), (16, 64)):
    assert 1.8 < errors[few] / errors[many] < 2.2


def random_matrix(n=24, rank=None, seed=5):
  random = np.random.default_rng(seed)
  q, _ = np.linalg.qr(random.normal(size=(n, n)))
  values = np.linspace(-1, 2, n) if rank is None else np.zeros(n)
  if rank is not None:
    values[:rank] = np.linspace(1, 3, rank)
  return jnp.asarray(q * values) @ q.T, values


def as_tree(x):
  return {'a': x[:10].reshape(2, 5), 'b': x[10:]}


def product_with(matrix):
  def product(tree):
    return as_tree(matrix @ jnp.concatenate([tree['a'].reshape(-1), tree['b']]))

  return product


def test_lanczos_of_all_steps_has_the_eigenvalues():
  matrix, values = random_matrix()
  start = as_tree(jnp.asarray(np.random.default_rng(6).normal(size=24)))
  run = jax.jit(
    functools.partial(curvature.lanczos, product_with(matrix), num_steps=24)
  )(start)
  assert int(run.rank) == 24
  found = np.linalg.eigvalsh(np.asarray(run.matrix()))
  close(found, np.sort(values))
  basis = np.concatenate(
    [run.basis['a'].reshape(24, -1), run.basis['b']], axis=1
  )
  assert np.abs(basis @ basis.T - np.eye(24)).max() < TOLERANCE


@pytest.mark.parametrize('rank', [1, 3])
def test_lanczos_stops_where_the_space_ends(rank):
  values = np.zeros(24)
  values[:rank] = np.linspace(1, 3, rank)
  start = as_tree(jnp.asarray(np.random.default_rng(6).normal(size=24)))
  matrix = jnp.diag(jnp.asarray(values))
  run = curvature.lanczos(product_with(matrix), start, 10)
  # The space of the start: `rank` eigenvectors, and its part in the kernel.
  assert int(run.rank) == rank + 1
  assert not np.asarray(run.diagonal[rank + 1 :]).any()
  assert all(
    not np.asarray(leaf[rank + 1 :]).any() for leaf in run.basis.values()
  )
  found = np.linalg.eigvalsh(np.asarray(run.matrix()))[-rank:]
  close(found, np.sort(values[:rank]))


def test_lanczos_of_a_large_matrix_does_not_stop_early():
  """The guard must not grow with the dimension: in float32, of 2^20."""
  with jax.enable_x64(False):
    n = 2**20
    values = jnp.linspace(0, 1, n, dtype=jnp.float32)
    start = jax.random.normal(jax.random.key(0), (n,))
    run = curvature.lanczos(lambda v: values * v, start, 12)
    assert int(run.rank) == 12


def test_density_has_the_moments_of_the_spectrum():
  matrix, values = random_matrix()
  like = as_tree(jnp.zeros(24))
  density = curvature.spectral_density(
    product_with(matrix), like, jax.random.key(0), num_steps=8, num_probes=200
  )
  np.testing.assert_allclose(np.sum(density.weights, axis=1), 1, atol=1e-12)
  # Five standard errors of 200 probes in 24 dimensions.
  for power in (1, 2):
    moment = np.mean(np.sum(density.weights * density.nodes**power, axis=1))
    spread = np.std(values**power) * np.sqrt(2 / 24 / 200)
    assert abs(moment - np.mean(values**power)) < 5 * spread
  spread = np.std(values) * np.sqrt(2 * 24 / 200)
  assert abs(density.trace() - values.sum()) < 5 * spread
  at = np.linspace(-4, 5, 2000)
  area = np.trapezoid(density(at, 0.1), at)
  assert area == pytest.approx(1, abs=1e-6)


def test_trace_is_exact_where_the_sketch_holds_the_matrix():
  matrix, values = random_matrix(rank=4)
  like = as_tree(jnp.zeros(24))
  trace = curvature.hutchpp_trace(
    product_with(matrix), like, jax.random.key(0), num_products=15
  )
  close(trace.value, values.sum())
  assert trace.standard_error < TOLERANCE


def test_trace_error_is_what_it_says():
  matrix, values = random_matrix()
  like = as_tree(jnp.zeros(24))
  estimate = jax.jit(
    lambda key: curvature.hutchpp_trace(
      product_with(matrix), like, key, num_products=24
    )
  )
  runs = [estimate(k) for k in jax.random.split(jax.random.key(1), 100)]
  z = [float((r.value - values.sum()) / r.standard_error) for r in runs]
  assert abs(np.mean(z)) < 0.5
  assert 0.7 < np.std(z) < 1.6
