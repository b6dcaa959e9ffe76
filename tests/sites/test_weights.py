"""Statistics, shared weights, layers, masks, and what must be refused."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idesign import sites

B, T, D, F, L = 3, 5, 6, 7, 4
EPS = float(jnp.finfo(jnp.float32).eps)
BF16 = jnp.bfloat16


def close(actual, expected, roundings=64):
  expected = np.asarray(expected, np.float64)
  scale = np.abs(expected).max()
  assert scale > 0
  np.testing.assert_allclose(
      np.asarray(actual, np.float64), expected, rtol=0,
      atol=roundings * EPS * scale,
  )  # fmt: skip


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def stack_params():
  return {
    'first': normal(0, D, D) / D**0.5,
    'blocks': {
      'up': normal(1, L, D, F) / D**0.5,
      'down': normal(2, L, F, D) / F**0.5,
    },
  }


def stack_loss(params, x):
  def body(h, w):
    return h + jnp.tanh(h @ w['up']) @ w['down'], None

  h, _ = jax.lax.scan(body, x @ params['first'], params['blocks'])
  return jnp.sum(jnp.cos(h), axis=(1, 2))


X = normal(3, B, T, D)


def by_hand(params, x):
  """`x` and `dy` at every site of `stack_loss`, layers written out."""
  shapes = jax.eval_shape(lambda: (jnp.zeros((B, T, F)), jnp.zeros((B, T, D))))
  zeros = jax.tree.map(lambda s: jnp.zeros((L, *s.shape)), shapes)

  def forward(zeros):
    inputs = []
    h = x @ params['first']
    for i in range(L):
      z = jnp.tanh(h @ params['blocks']['up'][i] + zeros[0][i])
      inputs.append((h, z))
      h = h + z @ params['blocks']['down'][i] + zeros[1][i]
    return jnp.sum(jnp.cos(h)), inputs

  grads, inputs = jax.grad(forward, has_aux=True)(zeros)
  ups, downs = (jnp.stack(a) for a in zip(*inputs))
  return {
      'blocks/up': (ups, grads[0]), 'blocks/down': (downs, grads[1])
  }  # fmt: skip


def expected_statistic(name, x, dy, inputs):
  g = np.einsum('lbti,lbto->lbio', x, dy)
  if name == 'input_moment':
    return np.einsum('lbti,lbtj->lij', x, x)
  if name == 'output_moment':
    return np.einsum('lbto,lbtp->lop', dy, dy)
  if name == 'per_example_gradient':
    return g
  if name == 'per_example_squared_norm':
    return (g**2).sum((2, 3))
  if name == 'direction_product':
    return np.einsum('lbio,lci,lco->lbc', g, *inputs)
  if name == 'rotated_square':
    u, w = inputs
    return (np.einsum('lbio,lij,lop->lbjp', g, u, w) ** 2).sum(1)


STATISTICS = (
    'input_moment', 'output_moment', 'per_example_gradient',
    'per_example_squared_norm', 'direction_product', 'rotated_square',
)  # fmt: skip


def statistic_inputs(name, site):
  i, o = {'blocks/up': (D, F), 'blocks/down': (F, D)}[site]
  if name == 'direction_product':
    return normal(8, L, 3, i), normal(9, L, 3, o)
  if name == 'rotated_square':
    return normal(8, L, i, i), normal(9, L, o, o)


def test_every_statistic_in_one_backward_pass():
  params = stack_params()
  names = ['blocks/up', 'blocks/down']
  inputs = {
    s: {n: statistic_inputs(s, n) for n in names}
    for s in ('direction_product', 'rotated_square')
  }
  statistics = {s: getattr(sites, s) for s in STATISTICS}
  read = jax.jit(sites.collect(stack_loss, statistics, 'blocks/.*'))
  values = read(params, X, inputs=inputs).values
  truth = by_hand(params, X)
  for s, site in itertools.product(STATISTICS, names):
    x, dy = (np.asarray(a, np.float64) for a in truth[site])
    here = statistic_inputs(s, site)
    here = here and [np.asarray(a, np.float64) for a in here]
    close(values[s][site], expected_statistic(s, x, dy, here), 512)


@pytest.mark.parametrize('positions', [2, 40])
def test_ghost_and_direct_norms_agree_with_the_reference(positions):
  """Short sequences use the ghost identity, long ones form the gradient."""
  x = normal(4, B, positions, D)
  loss = lambda p, x: jnp.sum(jnp.sin(x @ p['w']), axis=(1, 2))
  params = {'w': normal(5, D, F)}
  ghost = positions * (D + F) < D * F
  assert ghost == (positions == 2)
  read = sites.collect(loss, {'n': sites.per_example_squared_norm})
  g = sites.vmap_grad(loss, params, x)['w']
  close(read(params, x).values['n']['w'], jnp.sum(g**2, (1, 2)))


def test_losses_and_gradients_are_those_of_the_loss():
  params = stack_params()
  read = sites.collect(
    stack_loss, {'a': sites.input_moment}, 'blocks/up', with_grads=True
  )
  out = jax.jit(read)(params, X)
  close(out.losses, stack_loss(params, X))
  expected = jax.grad(lambda p: stack_loss(p, X).sum())(params)
  jax.tree.map(close, out.grads, expected)
  without = sites.collect(stack_loss, {'a': sites.input_moment}, 'blocks/up')
  assert without(params, X).grads is None


# Layers of a scanned stack.


@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('layers', ['1:3', '0:1', '3:4', ':', '-2:'])
def test_layers_of_a_stack(layers, reverse):
  params = stack_params()

  def loss(params, x):
    body = lambda h, w: (h + jnp.tanh(h @ w['up']) @ w['down'], h.sum())
    h, ys = jax.lax.scan(body, x, params['blocks'], reverse=reverse)
    return jnp.sum(jnp.cos(h), axis=(1, 2)) + 0 * ys.sum()

  full = sites.vmap_grad(loss, params, X)['blocks']['up']
  read = sites.collect(
    loss, {'g': sites.per_example_gradient}, f'blocks/up[{layers}]'
  )
  actual = jax.jit(read)(params, X).values['g']['blocks/up']
  start, stop = (int(s) if s else None for s in layers.split(':'))
  close(actual, jnp.moveaxis(full, 1, 0)[start:stop])
  close(read(params, X).losses, loss(params, X))


def test_sites_with_different_layers_share_a_scan():
  params = stack_params()
  select = ['blocks/up[1:3]', 'blocks/down[2:4]']
  read = sites.collect(stack_loss, {'g': sites.per_example_gradient}, select)
  values = jax.jit(read)(params, X).values['g']
  full = sites.vmap_grad(stack_loss, params, X)['blocks']
  close(values['blocks/up'], jnp.moveaxis(full['up'], 1, 0)[1:3])
  close(values['blocks/down'], jnp.moveaxis(full['down'], 1, 0)[2:4])


def test_layers_need_a_stack():
  with pytest.raises(sites.SelectionError, match='sliced by 0 scans'):
    sites.find_sites(stack_loss, stack_params(), X, 'first[0:1]')
  with pytest.raises(sites.SelectionError, match='the stack has 4'):
    sites.find_sites(stack_loss, stack_params(), X, 'blocks/up[4:9]')


# Shared weights.


def recurrent_loss(params, x):
  """A weight that is constant across a scan over time."""

  def step(h, x_t):
    return jnp.tanh(h @ params['w'] + x_t), None

  h, _ = jax.lax.scan(step, jnp.zeros((B, D)), jnp.moveaxis(x, 1, 0))
  return jnp.sum(h, axis=1)


def tied_loss(params, x):
  return jnp.sum(jnp.cos(jnp.tanh(x @ params['w']) @ params['w'].T), (1, 2))


def sliced_loss(params, x):
  return jnp.sum(jnp.cos(x @ params['w'][:, :2]), (1, 2)) + jnp.sum(
    jnp.sin(x @ params['w'][:, 2:]), (1, 2)
  )


def split_loss(params, x):
  parts = jnp.split(params['w'], [1, 3], axis=1)
  waves = jnp.cos, jnp.sin, jnp.tanh
  return sum(jnp.sum(f(x @ w), (1, 2)) for f, w in zip(waves, parts))


def unstacked_loss(params, x):
  columns = jnp.unstack(params['w'], axis=1)
  return sum(jnp.sum(jnp.cos(i + x @ w), 1) for i, w in enumerate(columns))


SHARED = {
    'recurrent': recurrent_loss, 'tied': tied_loss, 'sliced': sliced_loss,
    'split': split_loss, 'unstacked': unstacked_loss,
}  # fmt: skip


def moment_of(seen):
  """`sum x x^T`, and which passes it was evaluated in."""

  def fn(x, dy):
    seen.add('forward' if dy is None else 'backward')
    x = x.reshape(-1, x.shape[2])
    return x.T @ x

  return fn


def reversed_loss(params, x):
  body = lambda h, w: (h + jnp.tanh(h @ w['up']) @ w['down'], None)
  h, _ = jax.lax.scan(body, x, params['blocks'], reverse=True)
  return jnp.sum(jnp.cos(h), axis=(1, 2))


def remat_loss(params, x):
  body = lambda h, w: (h + jnp.tanh(h @ w['up']) @ w['down'], None)
  h, _ = jax.lax.scan(jax.checkpoint(body), x, params['blocks'])
  return jnp.sum(jnp.cos(h), axis=(1, 2))


@pytest.mark.parametrize(
  'loss,select,where',
  [
    (stack_loss, '.*', 'forward'),
    (stack_loss, ('blocks/up[1:3]', 'blocks/down[2:]'), 'forward'),
    (reversed_loss, 'blocks/up[1:]', 'forward'),
    (remat_loss, 'blocks/.*', 'forward'),
    # Its steps are added up, which the backward pass does.
    (recurrent_loss, '.*', 'backward'),
    (tied_loss, '.*', 'forward'),
  ],
)
@pytest.mark.parametrize('with_grads', [False, True])
def test_statistics_of_inputs_alone_are_read_early(
  loss, select, where, with_grads
):
  shared = loss in (recurrent_loss, tied_loss)
  params = {'w': normal(1, D, D) / 2} if shared else stack_params()
  if loss in (reversed_loss, remat_loss):
    del params['first']
  early, late = set(), set()
  moments = {
    'early': sites.Statistic(moment_of(early), additive=True, of_input=True),
    'late': sites.Statistic(moment_of(late), additive=True),
  }
  read = sites.collect(loss, moments, select, with_grads=with_grads)
  out = jax.jit(read)(params, X)
  values = out.values
  # Shapes are found with a gradient at hand.
  assert where in early and late == {'backward'}
  if where == 'backward':
    assert early == {'backward'}
  assert values['early'].keys() == values['late'].keys()
  for name, value in values['early'].items():
    close(value, values['late'][name])
  if with_grads:
    expected = jax.grad(lambda p: loss(p, X).sum())(params)
    jax.tree.map(close, out.grads, expected)


def test_one_input_of_several_projections_is_read_once():
  def loss(params, x):
    outs = [x @ params[n] for n in sorted(params)]
    return sum(jnp.sum(jnp.cos(y), (1, 2)) for y in outs)

  def flops(names):
    params = {n: normal(i, D, 1) for i, n in enumerate(names)}
    read = sites.collect(loss, {'m': sites.input_moment})
    cost = jax.jit(read).lower(params, X).compile().cost_analysis()
    return cost['flops']

  product = 2 * B * T * D * D
  assert flops('ab') - flops('a') < product / 2
  assert flops('a') > product


@pytest.mark.parametrize('kind', SHARED)
def test_norms_of_shared_weights(kind):
  loss, params = SHARED[kind], {'w': normal(1, D, D) / 2}
  g = sites.vmap_grad(loss, params, X)['w']
  read = sites.collect(loss, {'n': sites.per_example_squared_norm})
  close(read(params, X).values['n']['w'], jnp.sum(g**2, (1, 2)))
  close(sites.per_example_gradients(loss)(params, X)['w'], g)


def test_adding_up_norms_would_be_wrong():
  """What the declaration `additive=False` protects from."""
  params = {'w': normal(1, D, D) / 2}
  naive = sites.Statistic(sites.per_example_squared_norm.fn, additive=True)
  read = sites.collect(recurrent_loss, {'n': naive})
  g = sites.vmap_grad(recurrent_loss, params, X)['w']
  ratio = read(params, X).values['n']['w'] / jnp.sum(g**2, (1, 2))
  assert float(jnp.abs(ratio - 1).max()) > 0.1


@pytest.mark.parametrize('kind', SHARED)
def test_statistics_that_do_not_add_up_raise(kind):
  read = sites.collect(SHARED[kind], {'second': sites.rotated_square})
  with pytest.raises(sites.SharedWeightError, match="'second'.*'w'"):
    read({'w': normal(1, D, D)}, X)


def test_a_stack_of_no_layers_has_statistics_of_none():
  params = jax.tree.map(lambda a: a, stack_params())
  params['blocks'] = jax.tree.map(lambda a: a[:0], params['blocks'])
  read = sites.collect(stack_loss, {'a': sites.input_moment}, 'blocks/.*')
  values = read(params, X).values['a']
  assert {k: v.shape for k, v in values.items()} == {
    'blocks/up': (0, D, D),
    'blocks/down': (0, F, F),
  }


# Masks, example axes, inputs.


def test_a_mask_removes_positions_from_every_statistic():
  params = {'w': normal(1, D, F)}
  mask = jnp.arange(T)[None, :] < jnp.array([5, 3, 1])[:, None]

  def loss(params, x):
    return jnp.sum(jnp.cos(x @ params['w']), axis=(1, 2))

  def masked_loss(params, x):
    kept = jnp.where(mask[:, :, None], jnp.cos(x @ params['w']), 0.0)
    return jnp.sum(kept, axis=(1, 2))

  statistics = {'g': sites.per_example_gradient, 'a': sites.input_moment}
  values = sites.collect(loss, statistics)(params, X, mask=mask).values
  close(values['g']['w'], jax.jacrev(masked_loss)(params, X)['w'])
  kept = X[mask]
  close(values['a']['w'], kept.T @ kept)
  with pytest.raises(ValueError, match='mask has shape'):
    sites.collect(loss, statistics)(params, X, mask=mask[:, :3])


def test_the_example_axis_can_be_stated():
  params = {'w': normal(1, D, F)}
  time_major = lambda p, x: jnp.sum(jnp.cos(x @ p['w']), axis=(0, 2))
  x = jnp.moveaxis(X, 1, 0)
  read = sites.collect(
    time_major, {'g': sites.per_example_gradient}, example_axis=1
  )
  expected = jax.jacrev(time_major)(params, x)['w']
  close(read(params, x).values['g']['w'], expected)
  with pytest.raises(sites.UnsupportedUseError, match='not the 3 examples'):
    sites.find_sites(time_major, params, x)


def _rows_left(w, x):
  y = jnp.einsum('df,nd->fn', w, x.reshape(-1, x.shape[-1]))
  return jnp.moveaxis(y.reshape(-1, *x.shape[:-1]), 0, -1)


FLAT = {
  'rows': lambda w, x: (x.reshape(-1, D) @ w).reshape(*x.shape[:-1], -1),
  'inside a call': lambda w, x: jax.jit(jnp.matmul, inline=False)(
    x.reshape(-1, D), w
  ).reshape(*x.shape[:-1], -1),
  'weight first': _rows_left,
  'heads': lambda w, x: jnp.einsum(
    'nhk,hkf->nf', x.reshape(-1, 2, D // 2), w.reshape(2, D // 2, -1)
  ).reshape(*x.shape[:-1], -1),
}


@pytest.mark.parametrize('example_axis', [0, 1])
@pytest.mark.parametrize('ndim', [3, 4])
@pytest.mark.parametrize('form', FLAT)
def test_rows_of_all_examples_as_one_axis(form, ndim, example_axis):
  x = X if ndim == 3 else jnp.stack([X, 2 * X[..., ::-1]], axis=2)
  x = jnp.moveaxis(x, 0, example_axis)
  params = {'w': normal(1, D, F)}

  def loss(p, x):
    y = FLAT[form](p['w'], x)
    return jnp.moveaxis(jnp.cos(y), example_axis, 0).reshape(len(X), -1).sum(1)

  statistics = {
    'g': sites.per_example_gradient,
    'n': sites.per_example_squared_norm,
  }
  read = sites.collect(loss, statistics, example_axis=example_axis)
  values = read(params, x).values
  expected = jax.jacrev(loss)(params, x)['w']
  close(values['g']['w'], expected)
  close(values['n']['w'], jnp.sum(expected**2, axis=(1, 2)))
  (site,) = sites.find_sites(loss, params, x, example_axis=example_axis).sites
  assert site.num_positions == x.size // len(X) // D


def test_inputs_of_a_statistic_are_checked():
  read = sites.collect(stack_loss, {'p': sites.direction_product}, 'blocks/up')
  with pytest.raises(ValueError, match="nothing for site 'blocks/up'"):
    read(stack_params(), X, inputs={'p': {'other': ()}})
  with pytest.raises(ValueError, match='leading axes must be the stack'):
    inputs = {'p': {'blocks/up': (normal(1, 3, D), normal(2, 3, F))}}
    read(stack_params(), X, inputs=inputs)


def test_a_loss_must_not_average():
  averaged = lambda p, x: stack_loss(p, x).mean()
  with pytest.raises(ValueError, match='one value per example'):
    sites.find_sites(averaged, stack_params(), X)


# Uses that are no site, and primitives that are refused.


def embedding_loss(params, tokens):
  h = params['e'][tokens] * params['scale'] + params['bias'][None, None]
  h = h * jnp.dot(params['a'], params['b']).sum()
  return jnp.sum(jnp.cos(h @ params['e'].T), axis=(1, 2))


def embedding_params():
  return {
      'e': normal(0, 9, D), 'scale': jnp.ones(()), 'bias': normal(1, D),
      'a': normal(2, D, 2), 'b': normal(3, 2, D),
  }  # fmt: skip


def test_every_other_use_is_reported():
  tokens = jnp.arange(B * T).reshape(B, T) % 9
  found = sites.find_sites(embedding_loss, embedding_params(), tokens)
  assert [s.name for s in found.sites] == ['e']
  uses = {(u.path, u.primitive) for u in found.unread}
  assert uses == {
      ('e', 'gather'), ('scale', 'mul'), ('bias', 'add'),
      ('a', 'dot_general of two parameters'),
      ('b', 'dot_general of two parameters'),
  }  # fmt: skip
  read = sites.collect(embedding_loss, {'a': sites.input_moment}, 'e')
  with pytest.raises(sites.UnreadUseError, match='e in gather'):
    read(embedding_params(), tokens)
  reporting = sites.collect(
    embedding_loss, {'a': sites.input_moment}, 'e', unread='report'
  )
  out = jax.jit(reporting)(embedding_params(), tokens)
  assert [(u.path, u.primitive) for u in out.unread] == [('e', 'gather')]


def test_convolutions_and_regularisers_are_reported():
  def loss(params, x):
    h = jax.lax.conv(x[:, None], params['kernel'][None, None], (1,), 'SAME')
    return jnp.sum(h, axis=(1, 2)) + jnp.sum(params['kernel'] ** 2)

  found = sites.find_sites(loss, {'kernel': normal(1, 3)}, X[:, :, 0])
  primitives = {u.primitive for u in found.unread}
  assert not found.sites
  assert 'conv_general_dilated' in primitives and len(primitives) == 2


@jax.custom_vjp
def custom_product(x, w):
  return x @ w


custom_product.defvjp(
  lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g)
)


@jax.custom_jvp
def custom_tangent(x, w):
  return x @ w


custom_tangent.defjvp(lambda p, t: (p[0] @ p[1], t[0] @ p[1] + p[0] @ t[1]))


def _shard_map(p, x):
  mesh = jax.make_mesh((1,), ('i',), axis_types=(jax.sharding.AxisType.Auto,))
  f = jax.shard_map(
    lambda w, x: x @ w, mesh=mesh, in_specs=jax.P(), out_specs=jax.P()
  )
  return f(p['w'], x)


REFUSED = {
  'cond': lambda p, x: jax.lax.cond(x.sum() > 0, lambda: x @ p['w'], lambda: x),
  'while': lambda p, x: jax.lax.while_loop(
    lambda h: h.sum() < 0, lambda h: h @ p['w'], x
  ),
  'custom_vjp_call': lambda p, x: custom_product(x, p['w']),
  'custom_jvp_call': lambda p, x: custom_tangent(x, p['w']),
  'shard_map': _shard_map,
  'scan': lambda p, x: jax.lax.scan(
    lambda w, _: (w * 2, x @ w), p['w'], None, length=2
  )[1][0],
  'dot_general': lambda p, x: jnp.einsum(
    'bi,bio->bo', x, p['w'].reshape(B, -1, D)
  ),
}


@pytest.mark.parametrize('primitive', REFUSED)
def test_unsupported_primitives_are_named(primitive):
  loss = lambda p, x: jnp.sum(REFUSED[primitive](p, x), axis=1)
  width = 2 if primitive == 'dot_general' else D
  params = {'w': normal(1, B * width if width == 2 else D, D)}
  x = normal(2, B, width)
  with pytest.raises(
    sites.UnsupportedUseError, match=rf"'w' reaches '{primitive}'.*vmap_grad"
  ):
    sites.find_sites(loss, params, x)


def test_the_named_way_out_works_where_sites_do_not():
  loss = lambda p, x: jnp.sum(custom_product(x, p['w']), axis=1)
  params, x = {'w': normal(1, D, D)}, normal(2, B, D)
  g = sites.vmap_grad(loss, params, x)['w']
  close(g, jnp.einsum('bi,o->bio', x, jnp.ones(D)))


def test_unselected_parameters_may_reach_anything():
  def loss(params, x):
    h = custom_product(x.reshape(-1, D), params['v']).reshape(x.shape)
    return jnp.sum(jnp.cos(h @ params['w']), axis=(1, 2))

  params = {'v': normal(1, D, D), 'w': normal(2, D, F)}
  g = sites.per_example_gradients(loss, 'w')(params, X)['w']
  close(g, sites.vmap_grad(loss, params, X)['w'])


def test_patterns_match_whole_paths():
  with pytest.raises(sites.SelectionError, match='blocks/up.*first'):
    sites.find_sites(stack_loss, stack_params(), X, 'up')


# Matrices and the parameter they are views of.


@pytest.mark.parametrize(
    'use, shape',
    [
        (lambda w, x: x @ w.T, (F, D)),
        (lambda w, x: jnp.einsum('btd,dhk->bthk', x, w), (D, 2, 3)),
        (lambda w, x: x @ w[1], (2, D, F)),
        (lambda w, x: x @ jnp.unstack(w)[1], (2, D, F)),
        (lambda w, x: x @ jnp.split(w, [2], axis=1)[1], (D, F)),
        (lambda w, x: x.astype(BF16) @ w.astype(BF16).reshape(D, -1),
         (2, 3, F)),
        (lambda w, x: jax.lax.scan(lambda h, u: (h @ u, None), x, w)[0],
         (L, D, D)),
    ],
)  # fmt: skip
def test_matrix_and_back_is_exact(use, shape):
  loss = lambda p, x: jnp.sum(use(p['w'], x).reshape(len(x), -1), axis=1)
  w = normal(1, *shape)
  (site,) = sites.find_sites(loss, {'w': w}, X).sites
  matrix = site.matrix(w)
  assert matrix.shape == (*site.stack, site.d_in, site.d_out)
  np.testing.assert_array_equal(site.with_matrix(w, matrix), w)
  changed = site.with_matrix(w, matrix + 1)
  np.testing.assert_array_equal(site.matrix(changed), matrix + 1)
  untouched = np.asarray(changed == w).sum()
  assert untouched == w.size - matrix.size
  gradient = sites.per_example_gradients(loss)({'w': w}, X)['w']
  rounding = float(jnp.finfo(BF16).eps) / EPS
  close(gradient, sites.vmap_grad(loss, {'w': w}, X)['w'], 2 * rounding)


# Compilation, sharding.


def test_reading_again_does_not_compile_again():
  traces = []

  def loss(params, x):
    traces.append(1)
    return stack_loss(params, x)

  read = jax.jit(sites.collect(loss, {'a': sites.input_moment}, 'blocks/.*'))
  read(stack_params(), X)
  first = len(traces)
  read(stack_params(), X + 1)
  assert len(traces) == first > 0


def test_the_same_on_a_mesh_of_eight_devices():
  mesh = jax.make_mesh(
    (4, 2), ('data', 'model'), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  put = lambda x, *spec: jax.device_put(
    x, jax.sharding.NamedSharding(mesh, jax.P(*spec))
  )
  params = stack_params() | {'blocks': {
      'up': normal(1, L, D, 8), 'down': normal(2, L, 8, D) / 3,
  }}  # fmt: skip
  sharded = {
    'first': put(params['first']),
    'blocks': {
      'up': put(params['blocks']['up'], None, None, 'model'),
      'down': put(params['blocks']['down'], None, 'model'),
    },
  }
  statistics = {
      'g': sites.per_example_gradient, 'n': sites.per_example_squared_norm,
      'a': sites.input_moment, 's': sites.output_moment,
  }  # fmt: skip
  read = jax.jit(sites.collect(stack_loss, statistics))
  x = normal(3, 8, T, D)
  alone, spread = read(params, x).values, read(sharded, put(x, 'data')).values
  g = spread['g']['blocks/up']
  assert len(g.sharding.device_set) == 8
  assert g.addressable_shards[0].data.size < g.size
  jax.tree.map(lambda a, b: close(a, b, 256), spread, alone)


def test_inputs_and_outputs_of_different_dtypes():
  """A bfloat16 product that accumulates in float32 has a float32 cotangent."""

  def loss(params, x):
    logits = jnp.einsum(
      'btd,df->btf',
      x.astype(BF16),
      params['w'].astype(BF16),
      preferred_element_type=jnp.float32,
    )
    return jnp.sum(jnp.cos(logits), axis=(1, 2))

  params = {'w': normal(1, D, F)}
  g = sites.per_example_gradients(loss)(params, X)['w']
  rounded = X.astype(BF16).astype(jnp.float32)
  w = params['w'].astype(BF16).astype(jnp.float32)
  close(g, jnp.einsum('bti,bto->bio', rounded, -jnp.sin(rounded @ w)))
