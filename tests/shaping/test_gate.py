"""Gates: exact against per-example gradients, safe against bad input."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import optax
from optax.experimental import aggregating
import pytest

from idesign import shaping, training

B, T, D, C = 8, 5, 6, 3
EPS = np.finfo(np.float32).eps


def init(key=jax.random.key(0)):
  a, b = jax.random.split(key)
  return {
    'in': jax.random.normal(a, (D, 7)),
    'out': {'w': jax.random.normal(b, (7,)), 'b': jnp.zeros(())},
  }


def losses(params, batch):
  z = jnp.tanh(batch['x'] @ params['in']) @ params['out']['w']
  return (z + params['out']['b'] - batch['y']) ** 2


def make_batch(seed=0, **changes):
  k = jax.random.split(jax.random.key(seed), 4)
  return {
    'x': jax.random.normal(k[0], (B, T, D)),
    'y': jax.random.normal(k[1], (B, T)),
    'mask': jax.random.bernoulli(k[2], 0.7, (B, T)),
    'attribution': 4 * jax.random.normal(k[3], (B, T, C)),
  } | changes


def start(optimizer):
  return training.init_state(init, optimizer, jax.random.key(1))


def run(optimizer, batches, **extra):
  step = shaping.make_gated_step(losses, optimizer)
  state = start(optimizer)
  for batch in batches:
    state, metrics = step(state, batch, **extra)
  return state, metrics, step


def gradient_of(optimizer, batch, gates):
  """What an optimizer hands on, with the learning rate 1."""
  before = start(optimizer).params
  state, metrics, _ = run(optimizer, [batch], gates=gates)
  return jax.tree.map(jnp.subtract, before, state.params), metrics


def assert_near(a, b, factor=64):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    scale = float(jnp.abs(y).max()) + 1
    np.testing.assert_allclose(x, y, rtol=0, atol=factor * EPS * scale)


GATED = lambda: optax.chain(shaping.gate_losses(), optax.sgd(1.0))
ONES = jnp.ones(C)


def test_gates_of_one_change_no_bit():
  batches = [make_batch(i) for i in range(3)]
  adam = lambda: optax.adamw(1e-2)
  plain, _, _ = run(adam(), batches)
  gated, metrics, _ = run(
    optax.chain(shaping.gate_losses(), adam()), batches, gates=ONES
  )
  jax.tree.map(np.testing.assert_array_equal, plain.params, gated.params)
  assert metrics['removed'] == 0 and metrics['effective'] == 1


@pytest.mark.parametrize('gates', [[0, 1, 1], [0.3, 0, 2.5], [0, 0, 0]])
def test_it_is_the_weighted_mean_of_per_token_gradients(gates):
  gates, batch = jnp.array(gates, jnp.float32), make_batch()
  found, metrics = gradient_of(GATED(), batch, gates)
  w = shaping.gate_weights(batch['attribution'], gates, threshold=1.0)
  w = w * batch['mask']
  params = start(optax.sgd(1.0)).params
  token = jax.jacobian(lambda p: losses(p, batch))(params)
  mean = lambda g: jnp.einsum('bt,bt...->...', w, g) / w.sum()
  assert_near(found, jax.tree.map(mean, token))
  near = dict(rtol=1e-5)
  whole = batch['mask'].sum()
  np.testing.assert_allclose(metrics['removed'], 1 - w.sum() / whole, **near)
  size = w.sum() ** 2 / (w**2).sum() / whole
  np.testing.assert_allclose(metrics['effective'], size, **near)


def test_what_is_gated_away_teaches_nothing():
  batch = make_batch()
  far = jnp.where(batch['attribution'][..., :1] > 0, 50.0, -50.0)
  batch['attribution'] = jnp.concatenate([far, jnp.zeros((B, T, 2))], -1)
  found, _ = gradient_of(GATED(), batch, jnp.array([0.0, 1, 1]))
  kept = batch | {'mask': batch['mask'] & (far[..., 0] < 0)}
  expected, _ = gradient_of(optax.sgd(1.0), kept, ONES)
  assert_near(found, expected)


def test_nothing_left_means_no_step():
  batch = make_batch(attribution=jnp.full((B, T, C), 1e4))
  found, metrics = gradient_of(GATED(), batch, jnp.zeros(C))
  assert all(not x.any() for x in jax.tree.leaves(found))
  assert metrics['removed'] == 1


@pytest.mark.parametrize(
  'gates,attribution',
  [
    ([0, jnp.nan, 1], None),
    ([0, jnp.inf, 1], None),
    ([0, -0.5, 1], None),
    ([0, 1, 1], jnp.nan),
    ([0, 1, 1], jnp.inf),
  ],
)
def test_unsound_gates_are_ones_and_counted(gates, attribution):
  batch = make_batch()
  if attribution is not None:
    first = tuple(np.argwhere(batch['mask'])[0])
    batch['attribution'] = batch['attribution'].at[first].set(attribution)
  found, metrics = gradient_of(GATED(), batch, jnp.array(gates, jnp.float32))
  expected, _ = gradient_of(GATED(), make_batch(), ONES)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  assert metrics['ignored'] == 1


def test_what_the_mask_leaves_out_may_be_anything():
  batch = make_batch()
  gates = jnp.array([0.0, 0.5, 2])
  expected, _ = gradient_of(GATED(), batch, gates)
  outside = jnp.where(batch['mask'][..., None], batch['attribution'], jnp.nan)
  found, metrics = gradient_of(GATED(), batch | {'attribution': outside}, gates)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  assert metrics['ignored'] == 0


def test_many_gates_do_not_overflow():
  """The product of 130 gates of 2 is no float32; its ratios are."""
  gates = jnp.full(130, 2.0)
  attribution = jnp.full((B, T, 130), 9.0).at[0, 0].set(-9.0)
  batch = make_batch(mask=jnp.ones((B, T)), attribution=attribution)
  found, metrics = gradient_of(GATED(), batch, gates)
  # All tokens but one weigh the same, and infinitely more than that one.
  but_one = batch | {'mask': batch['mask'].at[0, 0].set(0)}
  expected, _ = gradient_of(optax.sgd(1.0), but_one, ONES)
  assert_near(found, expected)
  assert metrics['ignored'] == 0
  assert np.isfinite(metrics['removed']) and metrics['removed'] < -1e30
  np.testing.assert_allclose(metrics['effective'], 1 - 1 / (B * T), rtol=1e-5)


def test_equal_weights_however_small_leave_the_sample_size():
  batch = make_batch(attribution=jnp.full((B, T, 60), 9.0))
  found, metrics = gradient_of(GATED(), batch, jnp.full(60, 0.5))
  expected, _ = gradient_of(optax.sgd(1.0), batch, ONES)
  assert_near(found, expected)
  np.testing.assert_allclose(metrics['effective'], 1, rtol=1e-5)


def test_each_concept_has_its_own_threshold():
  thresholds = jnp.array([-2.0, 0.0, 2.0])
  gates, batch = jnp.array([0.2, 0.5, 3]), make_batch()
  gated = optax.chain(
    shaping.gate_losses(threshold=thresholds), optax.sgd(1.0)
  )
  found, _ = gradient_of(gated, batch, gates)
  beyond = batch['attribution'] - thresholds[None, None]
  concerned = jax.nn.sigmoid(beyond / 0.25)
  weighted = jnp.prod(1 + (gates - 1)[None, None] * concerned, -1)
  weighted = weighted * batch['mask']
  expected, _ = gradient_of(optax.sgd(1.0), batch | {'mask': weighted}, ONES)
  assert_near(found, expected)


@pytest.mark.parametrize('dtype', [jnp.int32, jnp.bool_])
def test_a_fractional_mask_survives_attributions_that_are_counts(dtype):
  attribution = jnp.zeros((B, T, C), dtype)
  mask = jnp.linspace(0.1, 0.9, B * T).reshape(B, T)
  batch = make_batch(mask=mask, attribution=attribution)
  found, _ = gradient_of(GATED(), batch, ONES)
  expected, _ = gradient_of(optax.sgd(1.0), batch, ONES)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_mask_that_is_0_everywhere_teaches_nothing():
  batch = make_batch(mask=jnp.zeros((B, T)))
  found, metrics = gradient_of(GATED(), batch, jnp.array([0.0, 1, 2]))
  assert all(not x.any() for x in jax.tree.leaves(found))
  assert all(np.isfinite(v) for v in metrics.values())


def test_the_state_counts_steps_and_what_it_ignored():
  optimizer = optax.chain(shaping.gate_losses(), optax.sgd(1e-3))
  step = shaping.make_gated_step(losses, optimizer)
  state = start(optimizer)
  for gate in (1.0, -1.0, np.nan, 2.0):
    state, _ = step(state, make_batch(), gates=jnp.full(C, gate))
  assert state.opt_state[0].count == 4 and state.opt_state[0].ignored == 2


def test_shapes_that_do_not_fit_are_named():
  batch = make_batch()
  with pytest.raises(ValueError, match=r'\(4,\) gates for attributions'):
    run(GATED(), [batch], gates=jnp.ones(4))
  with pytest.raises(ValueError, match='one more axis'):
    run(GATED(), [batch | {'attribution': jnp.ones((B, C))}], gates=ONES)
  with pytest.raises(ValueError, match='the losses are'):
    run(GATED(), [batch | {'mask': jnp.ones(B)}], gates=ONES)
  with pytest.raises(TypeError, match='gates'):
    run(GATED(), [batch])
  with pytest.raises(ValueError, match='softness'):
    run(
      optax.chain(shaping.gate_losses(softness=0.0), optax.sgd(1.0)),
      [batch],
      gates=ONES,
    )


def test_new_gates_compile_nothing():
  optimizer = optax.chain(shaping.gate_losses(), optax.adam(1e-2))
  step = shaping.make_gated_step(losses, optimizer)
  state = start(optimizer)
  for i in range(3):
    state, _ = step(state, make_batch(i), gates=jnp.full(C, i / 2))
  assert step._cache_size() == 1


def test_the_ungated_gradient_is_never_computed():
  # Large enough that products, not activations, are what counts.
  wide = lambda key: {
    'in': jax.random.normal(key, (64, 256)),
    'out': {'w': jnp.ones(256), 'b': jnp.zeros(())},
  }
  k = jax.random.key(0)
  batch = {
    'x': jax.random.normal(k, (16, 32, 64)),
    'y': jnp.ones((16, 32)),
    'mask': jnp.ones((16, 32)),
    'attribution': jnp.ones((16, 32, C)),
  }

  def flops(optimizer, **extra):
    state = training.init_state(wide, optimizer, k)
    step = shaping.make_gated_step(losses, optimizer)
    return step.lower(state, batch, **extra).compile().cost_analysis()['flops']

  assert flops(GATED(), gates=ONES) < 1.02 * flops(optax.sgd(1.0))


def test_under_masked_only_its_part_is_gated():
  part = {'in': True, 'out': {'w': False, 'b': False}}
  masked = optax.chain(
    optax.masked(shaping.gate_losses(), part), optax.sgd(1.0)
  )
  gates, batch = jnp.array([0.0, 1, 1]), make_batch()
  found, _ = gradient_of(masked, batch, gates)
  gated, _ = gradient_of(GATED(), batch, gates)
  plain, _ = gradient_of(GATED(), batch, ONES)
  np.testing.assert_array_equal(found['in'], gated['in'])
  np.testing.assert_array_equal(found['out']['w'], plain['out']['w'])
  assert np.abs(gated['out']['w'] - plain['out']['w']).max() > 1e-3


def test_the_aggregator_agrees():
  batch, gates = make_batch(), jnp.array([0.0, 0.5, 2])
  by_example = lambda p, b: jnp.mean(losses(p, b), -1)
  attribution = batch['attribution'][:, 0]
  aggregator = aggregating.process(
    optax.with_extra_args_support(optax.identity()),
    shaping.gate_aggregator(),
    optax.with_extra_args_support(optax.sgd(1.0)),
  )
  params = init()
  grads = jax.jacobian(by_example)(params, batch)
  updates, state = aggregator.update(
    grads, aggregator.init(params), params, attribution=attribution, gates=gates
  )
  w = shaping.gate_weights(attribution, gates, threshold=1.0)
  expected = jax.grad(lambda p: jnp.sum(w * by_example(p, batch)) / w.sum())
  assert_near(jax.tree.map(jnp.negative, updates), expected(params))
  assert shaping.gate_metrics(state)['effective'] < 1
  with pytest.raises(ValueError, match='examples'):
    aggregator.update(
      grads, aggregator.init(params), attribution=attribution[:3], gates=gates
    )


def test_on_a_mesh_it_is_the_same():
  gates, batch = jnp.array([0.0, 0.5, 2]), make_batch()
  expected, _ = gradient_of(GATED(), batch, gates)
  mesh = jax.make_mesh(
    (8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  spread = NamedSharding(mesh, PartitionSpec('data'))
  found, _ = gradient_of(GATED(), jax.device_put(batch, spread), gates)
  assert_near(found, expected)


def test_a_checkpoint_in_between_changes_nothing(tmp_path):
  optimizer = optax.chain(shaping.gate_losses(), optax.adam(1e-2))
  step = shaping.make_gated_step(losses, optimizer)
  gates = jnp.array([0.0, 1, 2])
  state = start(optimizer)
  state, _ = step(state, make_batch(0), gates=gates)
  with training.Checkpointer(tmp_path, {}) as checkpointer:
    checkpointer.save(1, state, {})
    checkpointer.wait()
    restored, _ = checkpointer.restore(start(optimizer))
  for s in (state, restored):
    assert shaping.gate_metrics(s.opt_state)['removed'] != 0
  a, _ = step(state, make_batch(1), gates=gates)
  b, _ = step(restored, make_batch(1), gates=gates)
  jax.tree.map(np.testing.assert_array_equal, a.params, b.params)


def stays(params, batch):
  """An anchor: a loss of its own, of the same shape."""
  return (jnp.tanh(batch['x'] @ params['in']).sum(-1) - 1) ** 2


def anchored_gradient(batch, gates):
  before = start(optax.sgd(1.0)).params
  step = shaping.make_gated_step(losses, GATED(), anchor=stays)
  state, metrics = step(start(GATED()), batch, gates=jnp.asarray(gates))
  return jax.tree.map(jnp.subtract, before, state.params), metrics


def test_an_anchor_learns_nothing_where_nothing_is_gated():
  batches = [make_batch(i) for i in range(3)]
  plain, _, _ = run(GATED(), batches, gates=ONES)
  step = shaping.make_gated_step(losses, GATED(), anchor=stays)
  state = start(GATED())
  for batch in batches:
    state, _ = step(state, batch, gates=ONES)
  jax.tree.map(np.testing.assert_array_equal, plain.params, state.params)


@pytest.mark.parametrize('gates', [[0, 1, 1], [0.3, 0, 2.5], [0, 0, 0]])
def test_an_anchor_gets_what_gates_take_away(gates):
  batch = make_batch()
  got, _ = anchored_gradient(batch, gates)
  w = shaping.gate_weights(
    batch['attribution'], jnp.asarray(gates, jnp.float32), threshold=1.0
  )
  freed = jnp.maximum(1 - w, 0)
  mask = batch['mask'].astype(jnp.float32)

  def mixed(params):
    values = w * losses(params, batch) + freed * stays(params, batch)
    return (mask * values).sum() / (mask * (w + freed)).sum()

  assert_near(got, jax.grad(mixed)(start(optax.sgd(1.0)).params))


def test_gates_that_leave_nothing_leave_the_anchor():
  batch = make_batch(attribution=jnp.full((B, T, C), 1e4))
  got, metrics = anchored_gradient(batch, [0.0, 0.0, 0.0])
  mask = batch['mask'].astype(jnp.float32)
  alone = lambda p: (mask * stays(p, batch)).sum() / mask.sum()
  assert_near(got, jax.grad(alone)(start(optax.sgd(1.0)).params))
  assert metrics['removed'] == 1 and metrics['effective'] == 0


def test_unsound_gates_leave_the_anchor_out():
  batch = make_batch()
  got, metrics = anchored_gradient(batch, [jnp.nan, 0.0, 1.0])
  plain, _ = gradient_of(GATED(), batch, ONES)
  jax.tree.map(np.testing.assert_array_equal, got, plain)
  assert metrics['ignored'] == 1


def test_an_anchor_of_another_shape_raises():
  wrong = lambda params, batch: stays(params, batch)[:, :1]
  step = shaping.make_gated_step(losses, GATED(), anchor=wrong)
  with pytest.raises(ValueError, match=r"anchor's losses are \(8, 1\)"):
    step(start(GATED()), make_batch(), gates=ONES)
