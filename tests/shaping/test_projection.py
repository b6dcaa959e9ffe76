"""Boxes on movement against a general solver; projections leave nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

from idesign import concepts, shaping

EPS = np.finfo(np.float32).eps
C = 3


def make(seed=0, count=C):
  """Parameters, directions on two of their three leaves, an update."""
  k = iter(jax.random.split(jax.random.key(seed), 10))
  draw = lambda *shape: jax.random.normal(next(k), shape)
  params = {'a': draw(2, 4, 5), 'b': draw(3, 2, 6), 'c': draw(4)}
  ones = jnp.ones((count, 2))
  directions = {
    'a': concepts.RankOne(draw(count, 2, 4), draw(count, 2, 5), ones, 1),
    'b': concepts.RankOne(
      draw(count, 3, 2), draw(count, 6), jnp.ones(count), 0
    ),
  }
  update = {'a': draw(2, 4, 5), 'b': draw(3, 2, 6), 'c': draw(4)}
  return params, directions, update


def matrix(directions):
  """Directions as rows over all of `a` and `b`."""
  rows = [concepts.dense(directions[k]) for k in 'ab']
  return np.concatenate([r.reshape(len(r), -1) for r in rows], 1)


def flat(update):
  return np.concatenate([np.asarray(update[k]).ravel() for k in 'ab'])


def confine(directions, params, update, low, high, **options):
  transform = shaping.confine_movement(directions, **options)
  return jax.jit(transform.update)(
    update, transform.init(params), low=low, high=high
  )


def test_movement_is_the_inner_product():
  _, directions, update = make()
  expected = matrix(directions) @ flat(update)
  np.testing.assert_allclose(
    shaping.movement(update, directions), expected, rtol=1e-5, atol=1e-5
  )


@pytest.mark.parametrize(
  'low,high',
  [
    ([0, 0, 0], [0, 0, 0]),
    ([-1, -9, 0.5], [1, -2, 0.5]),
    ([-np.inf, -np.inf, 1], [0.1, np.inf, np.inf]),
  ],
)
def test_it_is_the_nearest_update_in_the_box(low, high):
  params, directions, update = make()
  low, high = jnp.array(low, jnp.float32), jnp.array(high, jnp.float32)
  found, state = confine(directions, params, update, low, high, sweeps=100)
  a, u = matrix(directions).astype(float), flat(update).astype(float)
  moved = a @ flat(found)
  assert (moved >= low - 1e-4).all() and (moved <= high + 1e-4).all()
  best = scipy.optimize.minimize(
    lambda x: 0.5 * np.sum((x - u) ** 2),
    u,
    jac=lambda x: x - u,
    constraints=scipy.optimize.LinearConstraint(a, low, high),
    method='trust-constr',
    options={'gtol': 1e-10, 'xtol': 1e-12},
  )
  np.testing.assert_allclose(flat(found), best.x, atol=2e-3)
  np.testing.assert_array_equal(found['c'], update['c'])
  assert state.residual < 1e-4 and state.count == 1
  np.testing.assert_allclose(
    flat(found) - flat(update), state.multiplier @ matrix(directions), atol=1e-5
  )


def test_an_update_inside_the_box_stays():
  params, directions, update = make()
  wide = jnp.full(C, 1e6)
  found, state = confine(directions, params, update, -wide, wide)
  jax.tree.map(np.testing.assert_array_equal, found, update)
  assert state.residual == 0 and not state.multiplier.any()


def test_the_residual_tells_too_few_sweeps():
  params, directions, update = make()
  a = directions['a']
  near = lambda x: x.at[1].set(x[0] + 1e-2 * x[1])
  directions = {
    'a': concepts.RankOne(near(a.u), near(a.w), a.kept, 1),
  }
  zero = jnp.zeros(C)
  few = confine(directions, params, update, zero, zero, sweeps=1)[1].residual
  many = confine(directions, params, update, zero, zero, sweeps=999)[1].residual
  assert many < few / 10


def test_a_direction_that_is_zero_is_free():
  params, directions, update = make()
  gone = {
    k: concepts.RankOne(d.u.at[1].set(0), d.w, d.kept, d.num_stack)
    for k, d in directions.items()
  }
  one = jnp.ones(C)
  found, state = confine(gone, params, update, one, one)
  assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((found, state)))
  np.testing.assert_allclose(
    shaping.movement(found, gone), [1, 0, 1], atol=1e-4
  )


@pytest.mark.parametrize(
  'where', ['update', 'low', 'high', 'empty', 'above', 'below']
)
def test_what_is_unsound_moves_nothing_and_is_counted(where):
  params, directions, update = make()
  low = high = jnp.zeros(C)
  if where == 'update':
    update['c'] = update['c'].at[0].set(jnp.nan)
  elif where == 'low':
    low = low.at[0].set(jnp.nan)
  elif where == 'high':
    high = high.at[0].set(jnp.nan)
  elif where == 'empty':
    low = low.at[0].set(1.0)
  elif where == 'above':
    low = high = high.at[0].set(jnp.inf)
  else:
    low = high = low.at[0].set(-jnp.inf)
  transform = shaping.confine_movement(directions)
  step = jax.jit(lambda s: transform.update(update, s, low=low, high=high))
  found, state = step(step(transform.init(params))[1])
  assert not any(x.any() for x in jax.tree.leaves(found))
  assert jnp.isfinite(state.residual)
  assert state.ignored == 2 and state.count == 2


def test_the_residual_is_of_what_was_applied():
  """Rounding to bfloat16 moves what was to stand still."""
  params, directions, update = make()
  low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), update)
  zero = jnp.zeros(C)
  found, state = confine(directions, params, low, zero, zero, sweeps=200)
  moved = jnp.abs(shaping.movement(found, directions)).max()
  assert moved > 1e-3
  np.testing.assert_allclose(state.residual, moved, rtol=0.01)
  assert state.ignored == 0


def two_concepts(params, part=0):
  del part
  return jnp.stack([jnp.sin(params['a']).sum(), (params['b'] ** 2).mean()])


def test_concepts_that_are_held_do_not_move():
  """To first order, at parameters where the concepts' gradients differ."""
  params, _, update = make()
  transform = shaping.hold_concepts(two_concepts)
  for shift in (0.0, 0.7):
    at = jax.tree.map(lambda x: x + shift, params)
    found, _ = jax.jit(transform.update)(update, transform.init(at), at)
    before = jax.jvp(two_concepts, (at,), (update,))[1]
    after = jax.jvp(two_concepts, (at,), (found,))[1]
    assert jnp.abs(before).min() > 0.01
    np.testing.assert_allclose(after, 0, atol=1e-4)
    np.testing.assert_array_equal(found['c'], update['c'])
  with pytest.raises(ValueError, match='needs update'):
    transform.update(update, transform.init(params))


def test_directions_are_those_of_the_moment():
  """Away from where it began: what is left of the update, and the way back."""
  params, _, update = make()
  transform = shaping.hold_concepts(two_concepts)
  at = jax.tree.map(lambda x: x + 0.01, params)
  found, _ = transform.update(update, transform.init(params), at)
  back = two_concepts(params) - two_concepts(at)
  moved = jax.jvp(two_concepts, (at,), (found,))[1]
  assert jnp.abs(back).min() > 1e-3
  np.testing.assert_allclose(moved, back, rtol=1e-3, atol=1e-5)


def test_what_steps_of_finite_length_leave_over_is_taken_back():
  """After many of them held concepts are where they were, not drifted off."""
  params, _, update = make()
  transform = shaping.hold_concepts(two_concepts)
  begun = transform.init(params)
  state, at, free = begun, params, params

  @jax.jit
  def step(state, at, wanted):
    found, state = transform.update(wanted, state, at)
    return state, optax.apply_updates(at, found)

  off = lambda at: float(jnp.abs(two_concepts(at) - begun.start[0]).max())
  drift = []
  for i in range(30):
    wanted = jax.tree.map(lambda x: 0.1 * jnp.roll(x, i), update)  # noqa: B023
    state, at = step(state, at, wanted)
    free = optax.apply_updates(free, wanted)
    drift.append(off(at))
  assert off(free) > 0.5
  assert jnp.abs(at['a'] - params['a']).max() > 0.1  # Others go on.
  # Bounded by what a single step leaves over, however many there are.
  assert max(drift) < 0.1 and drift[-1] < 2 * max(drift[:5])
  np.testing.assert_array_equal(state.start, begun.start)
  np.testing.assert_allclose(state.start[0], two_concepts(params), rtol=1e-6)


def test_the_way_back_is_no_longer_than_the_update():
  """A step of Newton's would be; `arctan` is what it diverges on."""
  read = lambda p, part: jnp.arctan(p['x'])
  transform = shaping.hold_concepts(read)
  state, at = transform.init({'x': jnp.zeros(1)}), {'x': jnp.full(1, 2.0)}
  still, _ = transform.update({'x': jnp.zeros(1)}, state, at)
  np.testing.assert_array_equal(still['x'], 0)
  for _ in range(60):
    found, state = transform.update({'x': jnp.full(1, 0.1)}, state, at)
    # What is wanted is removed, and as much at most taken back.
    assert -0.1001 < found['x'][0] < 1e-6
    at = optax.apply_updates(at, found)
  np.testing.assert_allclose(at['x'], 0, atol=1e-3)


def test_what_is_held_may_be_a_parameter_of_half_precision():
  params = {'x': jnp.ones(2, jnp.bfloat16), 'y': jnp.ones(3, jnp.bfloat16)}
  transform = shaping.hold_concepts(lambda p, part: p['x'])
  state = transform.init(params)
  update = jax.tree.map(lambda x: 0.5 * x, params)
  found, _ = transform.update(update, state, params)
  np.testing.assert_array_equal(found['x'].astype(jnp.float32), 0)
  np.testing.assert_array_equal(found['y'], update['y'])
  assert found['x'].dtype == jnp.bfloat16
  params['x'].delete()  # As a step does that donates.
  np.testing.assert_array_equal(state.start, 1)


def test_held_by_other_parameters_than_those_that_stay():
  params, _, update = make()
  stays = lambda p, part: two_concepts(
    p | {'b': jax.lax.stop_gradient(p['b'])}
  )
  transform = shaping.hold_concepts(stays)
  found, _ = transform.update(update, transform.init(params), params)
  np.testing.assert_array_equal(found['b'], update['b'])
  assert jnp.abs(found['a'] - update['a']).max() > 1e-3


def test_what_is_read_in_small_units_is_held_as_well():
  params, _, update = make()
  scale = jnp.array([1e-3, 1e3, 0.0])  # The last one is read nowhere.
  read = lambda p, part=0: scale * jnp.stack(
    [jnp.sin(p['a']).sum(), (p['b'] ** 2).mean(), p['c'].sum()]
  )
  transform = shaping.hold_concepts(read)
  found, _ = transform.update(update, transform.init(params), params)
  before = jax.jvp(read, (params,), (update,))[1]
  after = jax.jvp(read, (params,), (found,))[1]
  assert (jnp.abs(after[:2]) < 1e-3 * jnp.abs(before[:2])).all()
  np.testing.assert_array_equal(found['c'], update['c'])


def test_parts_of_the_probes_are_held_in_turn():
  """Each where it began, though a step looks at one of them."""
  params, _, update = make()
  probes = jax.random.normal(jax.random.key(5), (3, 2, *params['a'].shape))
  read = lambda p, part: jnp.einsum('cnij,nij->c', probes[part], p['a'])
  transform = shaping.hold_concepts(read, parts=3)
  state = transform.init(params)
  assert state.start.shape == (3, 2)
  for part in (0, 1, 2, 0):
    found, state = transform.update(update, state, params)
    moved = jnp.abs(jax.vmap(lambda x: read(found, x))(jnp.arange(3))).max(1)
    assert moved[part] < 1e-4 and (jnp.delete(moved, part) > 0.01).all()
  assert state.count == 4
  with pytest.raises(ValueError, match='parts=0'):
    shaping.hold_concepts(read, parts=0)


def test_after_adam_the_applied_update_is_bounded():
  params, directions, _ = make()
  optimizer = optax.chain(
    optax.adamw(0.1), shaping.confine_movement(directions, sweeps=100)
  )
  early = optax.chain(shaping.project_out(directions), optax.adamw(0.1))
  state, state_early = optimizer.init(params), early.init(params)
  zero, drift = jnp.zeros(C), 0.0
  step = jax.jit(lambda g, s, p: optimizer.update(g, s, p, low=zero, high=zero))
  for i in range(4):
    grads = make(i + 1)[2]
    updates, state = step(grads, state, params)
    moved = shaping.movement(updates, directions)
    assert jnp.abs(moved).max() < 1e-4
    before, state_early = early.update(grads, state_early, params)
    drift = max(drift, jnp.abs(shaping.movement(before, directions)).max())
  # Projecting before Adam promises nothing about what is applied.
  assert drift > 0.05


def test_project_out_leaves_no_movement():
  params, directions, update = make()
  twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), directions)
  for d in (directions, twice):
    transform = shaping.project_out(d)
    found, _ = transform.update(update, transform.init(params))
    np.testing.assert_allclose(shaping.movement(found, d), 0, atol=2e-4)
  a, u = matrix(directions), flat(update)
  nearest = u - a.T @ np.linalg.solve(a @ a.T, a @ u)
  np.testing.assert_allclose(flat(found), nearest, atol=1e-4)


def test_bad_directions_are_named():
  params, directions, update = make()
  other = {'a': directions['a'], 'b': make(count=2)[1]['b']}
  with pytest.raises(ValueError, match=r'same concepts, got \[2, 3\]'):
    shaping.confine_movement(other)
  with pytest.raises(ValueError, match='same concepts'):
    shaping.project_out({})
  lost = {'z': directions['a']}
  with pytest.raises(ValueError, match="for \\['z'\\]"):
    shaping.project_out(lost).init(params)
  with pytest.raises(ValueError, match='low'):
    confine(directions, params, update, jnp.zeros(2), jnp.zeros(C))
  wrong = {'b': directions['a']}
  with pytest.raises(ValueError, match='its directions are for'):
    confine(wrong, params, update, jnp.zeros(C), jnp.zeros(C))
  with pytest.raises(ValueError, match='not more than the width'):
    shaping.orthonormal(jnp.ones((5, 4)))
