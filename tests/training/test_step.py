"""The step against the formula it promises."""

import re

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from idesign.training import (
  init_state,
  make_mesh,
  make_train_step,
  mean_gradient,
  shard_batch,
  state_shardings,
)

SIZE, D_IN, D_OUT = 12, 5, 4


def init(key):
  return {
    'w': jax.random.normal(key, (D_IN, D_OUT)),
    'b': jnp.zeros(D_OUT),
  }


def loss(params, batch):
  y_BD = batch['x'] @ params['w'] + params['b'][None]
  return jnp.mean(jnp.square(y_BD - batch['y']), axis=-1)


def noisy_loss(params, batch):
  noise = jax.vmap(lambda key: jax.random.normal(key, (D_OUT,)))(batch['key'])
  return loss(params, {**batch, 'y': batch['y'] + noise})


def make_batch(seed=0, size=SIZE, weight='none'):
  rng = np.random.default_rng(seed)
  batch = {
    'x': rng.normal(size=(size, D_IN)).astype(np.float32),
    'y': rng.normal(size=(size, D_OUT)).astype(np.float32),
  }
  if weight == 'random':
    batch['weight'] = rng.uniform(0.1, 3, size).astype(np.float32)
  if weight == 'padding':
    # All in the last positions, so microbatches differ in valid examples.
    batch['weight'] = (np.arange(size) < 5).astype(np.float32)
  return batch


def assert_close(actual, expected, dtype=np.float32):
  """Within 32 roundings (sums of at most 36 terms) of the largest entry."""
  expected = np.asarray(expected, np.float64)
  tolerance = 32 * float(jnp.finfo(dtype).eps) * np.abs(expected).max()
  np.testing.assert_allclose(
    np.asarray(actual, np.float64), expected, rtol=0, atol=tolerance
  )


WEIGHTS = ['none', 'random', 'padding']


@pytest.mark.parametrize('accumulate', [1, 3, 12])
@pytest.mark.parametrize('weight', WEIGHTS)
def test_mean_gradient(weight, accumulate):
  params, batch = init(jax.random.key(0)), make_batch(weight=weight)
  weights = batch.get('weight', np.ones(SIZE, np.float32)).astype(np.float64)
  value_B = np.asarray(loss(params, batch), np.float64)
  gradient_B = jax.jacrev(loss)(params, batch)
  with jax.numpy_dtype_promotion('strict'):
    value, gradient = mean_gradient(loss, params, batch, accumulate=accumulate)
  assert_close(value, weights @ value_B / weights.sum())
  for name, grad in gradient.items():
    assert grad.dtype == params[name].dtype
    exact = np.tensordot(weights, np.asarray(gradient_B[name], np.float64), 1)
    assert_close(grad, exact / weights.sum())


def test_bfloat16_gradients_are_summed_in_float32():
  params = jax.tree.map(
    lambda x: x.astype(jnp.bfloat16), init(jax.random.key(0))
  )
  # 512 equal gradients: a bfloat16 sum of them stops growing at 2^8 of a term.
  batch = jax.tree.map(lambda x: np.tile(x[:1], (512, 1)), make_batch())
  cast = lambda p, b: loss(p, jax.tree.map(lambda x: x.astype(jnp.bfloat16), b))
  first = lambda p: cast(p, jax.tree.map(lambda x: x[:1], batch))[0]
  value, gradient = mean_gradient(
    lambda p, b: cast(p, {'x': b['x'], 'y': b['y']}),
    params,
    batch,
    accumulate=512,
  )
  assert value.dtype == jnp.float32
  expected = jax.grad(first)(params)
  for name, grad in gradient.items():
    assert grad.dtype == jnp.bfloat16
    exact = np.asarray(expected[name], np.float64)
    # The factor 1/512 is exact; what is left is the rounding to bfloat16.
    np.testing.assert_allclose(
      np.asarray(grad, np.float64),
      exact,
      rtol=2 * float(jnp.finfo(jnp.bfloat16).eps),
    )


@pytest.mark.parametrize('mesh', [None, (2, 4)])
@pytest.mark.parametrize('weight', WEIGHTS)
def test_accumulated_steps_equal_whole_ones(weight, mesh):
  """Noise included: each example keeps its own."""

  def train(accumulate):
    on = None if mesh is None else make_mesh(*mesh)
    rules = None if mesh is None else [('.*', P())]
    state = init_state(
      init, optax.sgd(0.1), jax.random.key(0), mesh=on, rules=rules
    )
    step = make_train_step(noisy_loss, optax.sgd(0.1), accumulate=accumulate)
    losses = []
    for seed in range(3):
      batch = make_batch(seed, 16, weight)
      if on is not None:
        batch = shard_batch(batch, on)
      state, metrics = step(state, batch)
      losses.append(float(metrics['loss']))
    return state.params, losses

  expected, actual = train(1), train(4)
  jax.tree.map(assert_close, actual, expected)
  assert len(set(expected[1])) == 3


def test_noise_depends_on_step_and_example_only():
  batch = jax.tree.map(lambda x: np.tile(x[:1], (4, 1)), make_batch())
  seen = []

  def spy(params, batch):
    jax.debug.callback(
      lambda data: seen.append(np.asarray(data)),
      jax.random.key_data(batch['key']),
    )
    return loss(params, batch)

  step = make_train_step(spy, optax.sgd(0.0))
  state = init_state(init, optax.sgd(0.0), jax.random.key(3))
  root = jax.random.clone(state.key)
  expected = [
    jax.random.key_data(jax.random.fold_in(jax.random.fold_in(root, n), i))
    for n in range(2)
    for i in range(4)
  ]
  for _ in range(2):
    state, _ = step(state, batch)
  jax.effects_barrier()
  np.testing.assert_array_equal(np.concatenate(seen), np.stack(expected))
  assert len(np.unique(np.concatenate(seen), axis=0)) == 8


def test_metrics():
  optimizer = optax.adam(0.1)
  state = init_state(init, optimizer, jax.random.key(0))
  batch = make_batch(weight='random')
  value, gradient = mean_gradient(loss, state.params, batch)
  updates, _ = optimizer.update(gradient, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  flat = lambda tree: np.concatenate(
    [np.ravel(x) for x in jax.tree.leaves(tree)]
  )
  expected = {
    'loss': value,
    'grad_norm': np.linalg.norm(flat(gradient)),
    'update_norm': np.linalg.norm(flat(updates)),
    'param_norm': np.linalg.norm(flat(params)),
  }
  state, metrics = make_train_step(loss, optimizer)(state, batch)
  assert int(state.step) == 1
  assert set(metrics) == set(expected)
  for name, metric in metrics.items():
    assert metric.dtype == jnp.float32
    assert_close(metric, expected[name])
  jax.tree.map(assert_close, state.params, params)


def scale_by(name):
  """An Optax part that multiplies updates by the extra argument `name`."""

  def update(updates, state, params=None, **extra):
    return jax.tree.map(lambda u: u * extra[name], updates), state

  return optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), update
  )


@pytest.mark.parametrize('accumulate', [1, 3])
def test_extra_arguments_reach_the_optimizer(accumulate):
  def moved(optimizer, **extra):
    state = init_state(init, optimizer, jax.random.key(0))
    before = np.asarray(state.params['w']).copy()
    step = make_train_step(loss, optimizer, accumulate=accumulate)
    state, metrics = step(state, make_batch(), **extra)
    return np.asarray(state.params['w']) - before, float(metrics['loss'])

  plain, value = moved(optax.sgd(0.5))
  gated = optax.chain(scale_by('gate'), optax.sgd(0.5))
  assert_close(moved(gated, gate=jnp.float32(0.25))[0], 0.25 * plain)
  # Optax's name for the loss needs no argument.
  valued = optax.chain(scale_by('value'), optax.sgd(0.5))
  assert_close(moved(valued)[0], value * plain)
  # A transformation that takes no extra arguments is not given any.
  halved = optax.GradientTransformation(
    lambda params: optax.EmptyState(),
    lambda updates, state, params: (
      jax.tree.map(lambda u: -0.5 * u, updates),
      state,
    ),
  )
  assert_close(moved(halved, gate=jnp.float32(3))[0], plain)


COMPILATIONS = []
jax.monitoring.register_event_duration_secs_listener(
  lambda name, duration, **_: (
    COMPILATIONS.append(name)
    if name.endswith('backend_compile_duration')
    else None
  )
)


@pytest.mark.parametrize('accumulate', [1, 2])
@pytest.mark.parametrize('mesh', [None, (2, 4)])
def test_compiles_once_and_donates(mesh, accumulate):
  optimizer = optax.adam(0.1)
  on, rules, shardings = None, None, None
  if mesh is not None:
    on, rules = make_mesh(*mesh), [('w', P(None, 'model')), ('b', P())]
  state = init_state(init, optimizer, jax.random.key(0), mesh=on, rules=rules)
  if mesh is not None:
    shardings = state_shardings(state, on, rules)
  step = make_train_step(
    noisy_loss, optimizer, accumulate=accumulate, shardings=shardings
  )
  batches = [make_batch(seed, 16) for seed in range(4)]
  if mesh is not None:
    batches = [shard_batch(batch, on) for batch in batches]
  counts = []
  for batch in batches:
    before = state
    start = len(COMPILATIONS)
    state, metrics = step(state, batch, gate=jnp.zeros(3))
    counts.append(len(COMPILATIONS) - start)
    jax.block_until_ready(metrics)
    assert all(x.is_deleted() for x in jax.tree.leaves(before))
    assert not any(x.is_deleted() for x in jax.tree.leaves(state))
  # The first counts whatever helpers JAX compiles besides the step itself.
  assert counts[0] >= 1 and counts[1:] == [0, 0, 0]


@pytest.mark.parametrize('size', [(4, 2), (8, 1)])
def test_microbatches_move_no_data_between_devices(size):
  """Each is spread over the shards as the batch was: nothing but sums."""
  mesh = make_mesh(*size)
  state = init_state(
    init, optax.sgd(0.1), jax.random.key(0), mesh=mesh, rules=[('.*', P())]
  )
  step = make_train_step(
    noisy_loss,
    optax.sgd(0.1),
    accumulate=2,
    shardings=state_shardings(state, mesh, [('.*', P())]),
  )
  program = step.lower(state, shard_batch(make_batch(size=16), mesh)).compile()
  moves = re.findall(r' (all-[a-z]+|collective-[a-z]+)\(', program.as_text())
  assert set(moves) == {'all-reduce'}


@pytest.mark.parametrize(
  'change, match',
  [
    (lambda b: {**b, 'y': b['y'][:5]}, 'x: 12, y: 5'),
    (lambda b: {**b, 'y': np.float32(1)}, 'y: None'),
    (lambda b: {}, 'no array'),
    (lambda b: {**b, 'weight': np.ones((12, 2))}, r'weight.*\(12, 2\)'),
    (lambda b: {**b, 'key': np.ones(12)}, 'added by the step'),
  ],
)
def test_bad_batches(change, match):
  state = init_state(init, optax.sgd(0.1), jax.random.key(0))
  with pytest.raises(ValueError, match=match):
    make_train_step(loss, optax.sgd(0.1))(state, change(make_batch()))


@pytest.mark.parametrize('accumulate', [0, 5, 24])
def test_accumulate_must_divide(accumulate):
  with pytest.raises(ValueError, match=f'accumulate={accumulate} .* 12 examp'):
    mean_gradient(
      loss, init(jax.random.key(0)), make_batch(), accumulate=accumulate
    )


@pytest.mark.parametrize('reduce', [jnp.mean, lambda x: x[:, None]])
def test_loss_must_be_per_example(reduce):
  bad = lambda params, batch: reduce(loss(params, batch))
  with pytest.raises(ValueError, match='one value per example'):
    mean_gradient(bad, init(jax.random.key(0)), make_batch())


def test_no_weight_at_all_is_nan():
  batch = {**make_batch(), 'weight': np.zeros(SIZE, np.float32)}
  value, gradient = mean_gradient(loss, init(jax.random.key(0)), batch)
  assert np.isnan(value) and np.isnan(gradient['w']).all()
