"""Losses for which shapes and names alone would give wrong numbers."""

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import pytest

from idesign import sites

B = D = 4  # Coinciding sizes are the point here.
T, L = 5, 3


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def total(h):
  return jnp.sum(jnp.cos(h), axis=tuple(range(1, h.ndim)))


# Axis 0 of the layer input has the size of the batch but is not the examples.
NOT_EXAMPLES = {
  'mapped': lambda p, x: total(jax.lax.map(lambda row: row @ p['w'], x)),
  'time-major': lambda p, x: total(
    jnp.swapaxes(jnp.swapaxes(x, 0, 1) @ p['w'], 0, 1)
  ),
  'time-major rows': lambda p, x: total(
    jnp.swapaxes(
      (jnp.swapaxes(x, 0, 1).reshape(-1, D) @ p['w']).reshape(-1, len(x), D),
      0,
      1,
    )
  ),
  'positions': lambda p, x: total(x + (normal(8, B, D) @ p['w'])[None]),
  'of parameters': lambda p, x: total(x @ (jnp.tanh(p['v']) @ p['w'])),
}


@pytest.mark.parametrize('kind', NOT_EXAMPLES)
def test_an_axis_of_the_batch_size_is_not_taken_for_the_examples(kind):
  params, x = {'v': normal(0, D, D), 'w': normal(1, D, D)}, normal(2, B, B, D)
  with pytest.raises(sites.UnsupportedUseError, match="'w'.*example_axis"):
    sites.find_sites(NOT_EXAMPLES[kind], params, x, 'w')


def test_square_inputs_with_the_examples_first_are_fine():
  loss = lambda p, x: total(x @ p['w'])
  params, x = {'w': normal(1, D, D)}, normal(2, B, B, D)
  g = sites.per_example_gradients(loss)(params, x)['w']
  assert jnp.allclose(g, sites.vmap_grad(loss, params, x)['w'], atol=1e-5)


def test_a_loss_that_closes_over_its_batch_size_still_works():
  offsets = normal(3, B, 1)
  loss = lambda p, x: total(x @ p['w'] + offsets)
  sites.find_sites(loss, {'w': normal(1, D, 3)}, normal(2, B, D))


@pytest.mark.parametrize('insists', ['closes over', 'asserts'])
def test_what_cannot_be_checked_must_not_be_ambiguous(insists):
  weights = jnp.arange(1.0, B + 1)

  def loss(params, x):
    if insists == 'asserts':
      assert x.shape == (B, B, D)
      return total(jnp.swapaxes(jnp.swapaxes(x, 0, 1) @ params['w'], 0, 1))
    y = jnp.swapaxes(x, 0, 1) @ params['w']
    return total(jnp.swapaxes(y, 0, 1)) * weights

  params, x = {'w': normal(1, D, D)}, normal(2, B, B, D)
  with pytest.raises(sites.UnsupportedUseError, match='2 axes.*in the batch'):
    sites.find_sites(loss, params, x)


def test_assertions_of_a_loss_are_its_own():
  def loss(params, x):
    assert x.shape == (B, 2, D)
    return total(x @ params['w'])

  params, x = {'w': normal(1, D, D)}, normal(2, B, 2, D)
  assert len(sites.find_sites(loss, params, x).sites) == 1


def test_explicit_meshes_are_refused():
  axis = jax.sharding.AxisType.Explicit
  mesh = jax.make_mesh((8,), ('data',), axis_types=(axis,))
  spec = jax.sharding.PartitionSpec('data')
  x = jax.device_put(normal(2, 8, 2, D), jax.sharding.NamedSharding(mesh, spec))
  loss = lambda p, x: total(x @ p['w'])
  read = sites.collect(loss, {'a': sites.input_moment})
  for f in (read, jax.jit(read)):
    with pytest.raises(ValueError, match='explicit.*AxisType.Auto'):
      f({'w': normal(1, D, D)}, x)


def prefetched(params, x):
  """Each step uses the weight that the step before handed on."""

  def step(carry, w):
    h, previous = carry
    return (jnp.tanh(h @ previous), w), None

  (h, last), _ = jax.lax.scan(step, (x, jnp.eye(D)), params['w'])
  return total(h @ last)


def test_weights_handed_on_as_a_carry_raise():
  with pytest.raises(sites.UnsupportedUseError, match="'w' reaches 'scan'"):
    sites.find_sites(prefetched, {'w': normal(1, L, D, D)}, normal(2, B, D))


def test_a_cast_to_integers_is_not_a_view():
  def loss(params, x):
    quantized = params['w'].astype(jnp.int8).astype(jnp.float32)
    return total(x @ quantized)

  found = sites.find_sites(loss, {'w': normal(1, D, D)}, normal(2, B, D))
  assert not found.sites
  assert [u.primitive for u in found.unread] == ['convert_element_type']


@pytest.mark.parametrize(
  'cut', [lambda w: w[1:], lambda w: w[::-1], lambda w: w.transpose(0, 2, 1)]
)
def test_layers_of_a_stack_that_was_cut_cannot_be_counted(cut):
  def loss(params, x):
    step = lambda h, w: (jnp.tanh(h @ w), None)
    return total(jax.lax.scan(step, x, cut(params['w']))[0])

  params, x = {'w': normal(1, L, D, D)}, normal(2, B, D)
  with pytest.raises(sites.SelectionError, match='cannot be counted'):
    sites.find_sites(loss, params, x, 'w[0:1]')
  (site,) = sites.find_sites(loss, params, x, 'w').sites
  g = sites.per_example_gradients(loss)(params, x)['w']
  expected = sites.vmap_grad(loss, params, x)['w']
  assert site.stack and jnp.allclose(g, expected, atol=1e-5)


def test_a_mask_over_the_steps_of_a_scan_raises():
  def loss(params, x):
    step = lambda h, x_t: (jnp.tanh(h @ params['w'] + x_t), None)
    h, _ = jax.lax.scan(step, jnp.zeros((B, D)), jnp.swapaxes(x, 0, 1))
    return total(h)

  read = sites.collect(loss, {'a': sites.input_moment})
  params, x = {'w': normal(1, D, D)}, normal(2, B, T, D)
  read(params, x)
  with pytest.raises(ValueError, match='5 steps of a scan'):
    read(params, x, mask=jnp.ones((B, T), bool))


def test_layers_inside_nested_scans_are_ambiguous():
  def f(w, x):
    inner = lambda h, _: (checkpoint_name(h * 2, 'state'), None)
    outer = lambda h, w: (jax.lax.scan(inner, h @ w, None, length=T)[0], None)
    return jax.lax.scan(outer, x, w)[0]

  w, x = normal(1, L, D, D), normal(2, B, D)
  with pytest.raises(sites.SelectionError, match='nested scans'):
    sites.capture(f, ['state[0:1]'])(w, x)
  with pytest.raises(sites.SelectionError, match='nested scans'):
    sites.edit(f, {'state[0:1]': lambda h: h})(w, x)
  assert sites.list_activations(f, w, x) == {'state': (L, T, B, D)}


def test_colliding_paths_raise():
  params = {'a/b': normal(0, D, D), 'a': {'b': normal(1, D, D)}}
  with pytest.raises(ValueError, match='path a/b'):
    sites.leaf_paths(params)


def test_a_tied_embedding_knows_that_it_is_used_elsewhere():
  loss = lambda p, tokens: total(p['e'][tokens] @ p['e'].T)
  params, tokens = {'e': normal(0, 7, 6)}, jnp.arange(B * T).reshape(B, T) % 7
  (site,) = sites.find_sites(loss, params, tokens).sites
  assert site.used_elsewhere and not site.shared
