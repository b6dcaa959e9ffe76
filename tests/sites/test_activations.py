"""Capture and edit against a model written out by hand."""

import functools

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import numpy as np
import pytest

from idesign import sites

B, D, L = 3, 4, 5
EPS = float(jnp.finfo(jnp.float32).eps)


def params():
  return jax.random.normal(jax.random.key(0), (L, D, D)) / D**0.5


X = jax.random.normal(jax.random.key(1), (B, D))


def block(h, w):
  h = checkpoint_name(h, 'pre')
  out = checkpoint_name(jnp.tanh(h @ w), 'out')
  return checkpoint_name(h + out, 'post')


def scanned(w, x, wrap=lambda f: f):
  step = wrap(lambda h, w: (block(h, w), h.sum()))
  h, sums = jax.lax.scan(step, x, w)
  return checkpoint_name(h, 'final'), sums


def looped(w, x):
  sums = []
  for i in range(L):
    sums.append(x.sum())
    x = block(x, w[i])
  return checkpoint_name(x, 'final'), jnp.stack(sums)


MODELS = {
  'loop': looped,
  'scan': scanned,
  'remat': functools.partial(scanned, wrap=jax.checkpoint),
  'jit': functools.partial(scanned, wrap=jax.jit),
  'jit of all': jax.jit(scanned),
}


def by_hand(w, x, change=lambda i, h: h):
  """All activations; `change` edits `post` of layer `i`."""
  pre, out, post = [], [], []
  for i in range(L):
    pre.append(x)
    out.append(jnp.tanh(x @ w[i]))
    x = change(i, x + out[-1])
    post.append(x)
  return {
      'pre': jnp.stack(pre), 'out': jnp.stack(out), 'post': jnp.stack(post),
      'final': x,
  }  # fmt: skip


def close(a, b):
  np.testing.assert_allclose(a, b, rtol=0, atol=32 * EPS * np.abs(b).max())


@pytest.mark.parametrize('model', MODELS)
def test_capture(model):
  f, expected = MODELS[model], by_hand(params(), X)
  got = jax.jit(sites.capture(f, ['pre', 'out', 'post[1:3]', 'final']))
  (result, _), values = got(params(), X)
  close(result, expected['final'])
  for name in ('pre', 'out', 'final'):
    assert values[name].shape == expected[name].shape
    close(values[name], expected[name])
  close(values['post[1:3]'], expected['post'][1:3])


@pytest.mark.parametrize('layers', [None, (2, 3), (0, 2), (-1, None)])
@pytest.mark.parametrize('model', MODELS)
def test_edit(model, layers):
  chosen = range(L)[slice(*layers)] if layers else range(L)
  change = lambda i, h: 2 * h + 1 if i in chosen else h
  expected = by_hand(params(), X, change)
  start, stop = layers or (None, None)
  name = f'post[{start}:{"" if stop is None else stop}]' if layers else 'post'
  edited = jax.jit(sites.edit(MODELS[model], {name: lambda h: 2 * h + 1}))
  result, sums = edited(params(), X)
  close(result, expected['final'])
  # What else the scan returns is stitched together in order.
  close(sums, expected['pre'].sum((1, 2)))


def test_edits_of_several_layers_at_once():
  edits = {f'post[{i}:{i + 1}]': lambda h, i=i: h * (i + 1) for i in (1, 2, 4)}
  scale = {1: 2, 2: 3, 4: 5}
  expected = by_hand(params(), X, lambda i, h: h * scale.get(i, 1))
  for model in (looped, scanned):
    close(sites.edit(model, edits)(params(), X)[0], expected['final'])


def test_edits_apply_in_the_order_given():
  edits = {'final': lambda h: h + 1, 'final[:]': lambda h: h * 2}
  expected = (by_hand(params(), X)['final'] + 1) * 2
  close(sites.edit(scanned, edits)(params(), X)[0], expected)


@pytest.mark.parametrize('model', MODELS)
def test_derivatives_in_both_modes(model):
  tangent = jax.random.normal(jax.random.key(5), (L, D, D))

  def mine(w):
    f = sites.edit(MODELS[model], {'post[1:3]': jnp.sin})
    (h, _), values = sites.capture(f, ['out'])(w, X)
    return h, values['out']

  def hand(w):
    change = lambda i, h: jnp.sin(h) if i in (1, 2) else h
    values = by_hand(w, X, change)
    return values['final'], values['out']

  for a, b in zip(*(jax.jvp(f, (params(),), (tangent,)) for f in (mine, hand))):
    jax.tree.map(close, a, b)
  (_, pull_mine), (_, pull_hand) = (jax.vjp(f, params()) for f in (mine, hand))
  cotangent = by_hand(params(), X)
  cotangent = cotangent['final'], cotangent['out']
  close(pull_mine(cotangent)[0], pull_hand(cotangent)[0])


def test_vmap_over_a_steering_vector():
  vectors = jax.random.normal(jax.random.key(3), (6, D))

  def steered(v):
    add = lambda h: h + v[None]
    return sites.edit(scanned, {'pre[2:3]': add})(params(), X)[0]

  expected = jnp.stack([steered(v) for v in vectors])
  close(jax.jit(jax.vmap(steered))(vectors), expected)
  assert float(jnp.abs(expected[0] - expected[1]).max()) > 0.1


def test_statistics_of_an_edited_model():
  """Weight sites are found in whatever `edit` returns."""

  def loss(w, x):
    edited = sites.edit(scanned, {'post[1:2]': jnp.ones_like})
    return jnp.sum(edited(w, x)[0], axis=1)

  g = sites.per_example_gradients(loss)(params(), X)
  (g,) = g.values()
  expected = sites.vmap_grad(loss, params(), X)
  close(g, expected)
  assert not np.any(np.asarray(g[:, :2])) and np.any(np.asarray(g[:, 2:]))


def test_list_activations():
  expected = {
      'pre': (L, B, D), 'out': (L, B, D), 'post': (L, B, D), 'final': (B, D)
  }  # fmt: skip
  assert sites.list_activations(scanned, params(), X) == expected
  assert sites.list_activations(looped, params(), X) == expected


def test_unknown_names_list_what_there_is():
  for wrap in (
    lambda: sites.capture(scanned, ['resid']),
    lambda: sites.edit(scanned, {'resid': lambda h: h}),
  ):
    with pytest.raises(
      sites.SelectionError, match="'resid'.*'final', 'out', 'post', 'pre'"
    ):
      wrap()(params(), X)
  with pytest.raises(sites.SelectionError, match='the stack has 5'):
    sites.capture(scanned, ['pre[5:7]'])(params(), X)


@pytest.mark.parametrize('primitive', ['while', 'cond'])
def test_names_out_of_reach_raise(primitive):
  def inside_while(x):
    named = lambda h: checkpoint_name(h * 2, 'h')
    return jax.lax.while_loop(lambda h: h.sum() < 9, named, x)

  def inside_cond(x):
    named = lambda: checkpoint_name(x * 2, 'h')
    return jax.lax.cond(x.sum() > 0, named, lambda: x)

  f = {'while': inside_while, 'cond': inside_cond}[primitive]
  with pytest.raises(sites.SelectionError, match=f'h \\(inside {primitive}'):
    sites.capture(f, ['h'])(X)


def test_an_edit_must_keep_shape_and_dtype():
  for bad in (lambda h: h[:1], lambda h: h.astype(jnp.bfloat16)):
    with pytest.raises(ValueError, match="edit of 'final' turned float32"):
      sites.edit(scanned, {'final': bad})(params(), X)


def test_shapes_that_cannot_be_stacked_raise():
  def f(x):
    return checkpoint_name(x, 'h').sum() + checkpoint_name(x[0], 'h').sum()

  with pytest.raises(ValueError, match='cannot be stacked'):
    sites.capture(f, ['h'])(X)
