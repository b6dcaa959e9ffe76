"""The decoder against a plain numpy one, and its guarantees."""

import dataclasses
import math
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idesign.models import (
  DTypePolicy,
  LinearScaling,
  RopeConfig,
  TransformerConfig,
  init_cache,
  transformer,
)

EPS = float(np.finfo(np.float32).eps)
# Relative to the largest value: sums of tens of float32 terms, three layers.
TOLERANCE = 64 * EPS

BASE = TransformerConfig(
  vocab_size=13,
  d_model=12,
  n_layers=3,
  n_heads=4,
  n_kv_heads=2,
  head_dim=6,
  d_ff=10,
  max_len=16,
)
VARIANTS = {
  'plain': {},
  'post-parallel': dict(norm_position='post', parallel_residual=True),
  'layer-norm-gated': dict(norm='layer', mlp_bias=True, activation='gelu'),
  'learned': dict(rope=None, gated=False, activation='relu', qkv_bias=True),
  'softcaps': dict(attn_softcap=0.5, logit_softcap=0.7),
  'windows': dict(sliding_window=(2, None, 4), qk_norm='head'),
  'partial': dict(rope=RopeConfig(theta=50.0, fraction=0.67)),
  'wide-norm': dict(qk_norm='width', attn_out_bias=True, norm_eps=1e-2),
  'tied-multi-query': dict(
    tie_embeddings=True, n_kv_heads=1, activation='gelu_tanh', gated=False
  ),
  'both-norms': dict(
    norm_position='both',
    norm_unit_offset=True,
    scale_embeddings=True,
    tie_embeddings=True,
    attn_scale=0.9,
    qk_norm='head',
    sliding_window=(3, None, 2),
    rope=RopeConfig(theta=50.0, scaling=LinearScaling(3.0)),
    rope_local=RopeConfig(theta=7.0),
  ),
  'unit-offset-layer-norm': dict(
    norm='layer', norm_unit_offset=True, scale_embeddings=True, rope=None
  ),
}


@functools.cache
def build(name):
  """Model, and parameters with nothing at its initial zero or one."""
  model = transformer(dataclasses.replace(BASE, **VARIANTS[name]))
  rng = np.random.default_rng(2)
  return model, jax.tree.map(
    lambda a: jnp.asarray(0.4 * rng.normal(size=a.shape), a.dtype),
    jax.eval_shape(model.init, jax.random.key(0)),
  )


@functools.cache
def compiled(name):
  """One compiled `apply(params, tokens, mask)`."""
  model, _ = build(name)
  return jax.jit(lambda p, t, m: model.apply(p, t, mask_BT=m))


def inputs(batch=3, time=9):
  tokens = jax.random.randint(jax.random.key(3), (batch, time), 0, 13)
  mask = np.ones((batch, time), bool)
  mask[1, :4] = mask[2, -3:] = False
  return tokens, jnp.asarray(mask)


def plain_decoder(config, params, tokens, mask):
  """One sequence in float64, with loops where the library has none."""
  from scipy.special import erf

  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  act = {
    'silu': lambda h: h / (1 + np.exp(-h)),
    'relu': lambda h: np.maximum(h, 0),
    'gelu': lambda h: h * (1 + erf(h / np.sqrt(2))) / 2,
    'gelu_tanh': lambda h: (
      h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3))) / 2
    ),
  }[config.activation]

  def norm(x, w, kind=config.norm):
    if kind == 'layer':
      x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps)
    gain = config.norm_unit_offset + w['scale']
    return x * gain + w.get('bias', 0)

  def project(x, w):
    return x @ w['kernel'] + w.get('bias', 0)

  def rotate(x, position, rope):
    width = int(config.head_dim * rope.fraction)
    y = x.copy()
    for i in range(width // 2):
      angle = position * rope.theta ** (-2 * i / width)
      if rope.scaling is not None:
        angle = angle / rope.scaling.factor
      a, b = x[..., i], x[..., i + width // 2]
      y[..., i] = a * np.cos(angle) - b * np.sin(angle)
      y[..., i + width // 2] = b * np.cos(angle) + a * np.sin(angle)
    return y

  def attention(x, w, window):
    q, k, v = (project(x, w[part]) for part in 'qkv')
    if config.qk_norm == 'width':
      q, k = norm(q, w['q_norm'], 'rms'), norm(k, w['k_norm'], 'rms')
    q, k, v = (a.reshape(len(x), -1, config.head_dim) for a in (q, k, v))
    if config.qk_norm == 'head':
      q, k = norm(q, w['q_norm'], 'rms'), norm(k, w['k_norm'], 'rms')
    rope = config.rope
    if window is not None and config.rope_local is not None:
      rope = config.rope_local
    if rope is not None:
      q = np.stack([rotate(a, i, rope) for i, a in zip(positions, q)])
      k = np.stack([rotate(a, i, rope) for i, a in zip(positions, k)])
    out = np.zeros_like(q)
    for t in range(len(x)):
      seen = [
        s
        for s in range(t + 1)
        if mask[s] and (window is None or positions[t] - positions[s] < window)
      ]
      for head in range(config.n_heads if seen else 0):
        shared = head * config.n_kv_heads // config.n_heads
        scores = k[seen, shared] @ q[t, head]
        scores = scores * (config.attn_scale or config.head_dim**-0.5)
        if config.attn_softcap:
          scores = config.attn_softcap * np.tanh(scores / config.attn_softcap)
        weights = np.exp(scores - scores.max())
        out[t, head] = weights / weights.sum() @ v[seen, shared]
    return project(out.reshape(len(x), -1), w['o'])

  def mlp(x, w):
    gate = project(x, w['gate']) if config.gated else None
    up = project(x, w['up'])
    return project(act(up) if gate is None else act(gate) * up, w['down'])

  positions = np.maximum(np.cumsum(mask) - 1, 0)
  x = p['embed']['embedding'][tokens]
  if config.scale_embeddings:
    x = x * np.sqrt(config.d_model)
  if config.rope is None:
    x = x + p['positions']['embedding'][positions]
  for layer in range(config.n_layers):
    w = jax.tree.map(lambda a: a[layer], p['blocks'])
    same = lambda h, _: h
    pre = same if config.norm_position == 'post' else norm
    post = same if config.norm_position == 'pre' else norm
    window = config.sliding_window and config.sliding_window[layer]
    h = attention(pre(x, w.get('pre_attn_norm')), w['attn'], window)
    attn = post(h, w.get('post_attn_norm'))
    m = x if config.parallel_residual else x + attn
    h = mlp(pre(m, w.get('pre_mlp_norm')), w['mlp'])
    x = x + attn + post(h, w.get('post_mlp_norm'))
  x = norm(x, p['final_norm'])
  tied = config.tie_embeddings
  logits = x @ (p['embed']['embedding'].T if tied else p['lm_head']['kernel'])
  cap = config.logit_softcap
  return cap * np.tanh(logits / cap) if cap else logits


@pytest.mark.parametrize('name', VARIANTS)
def test_logits_are_those_of_a_plain_decoder(name):
  model, params = build(name)
  tokens, mask = inputs()
  got = compiled(name)(params, tokens, mask)
  for row in range(len(tokens)):
    expected = plain_decoder(
      model.config, params, np.asarray(tokens[row]), np.asarray(mask[row])
    )
    # At padding too: there it sees the tokens before it, or gets zeros.
    np.testing.assert_allclose(
      got[row],
      expected,
      rtol=0,
      atol=TOLERANCE * np.abs(expected).max(),
    )


@pytest.mark.parametrize('name', ['plain', 'learned', 'windows', 'both-norms'])
def test_a_cache_changes_nothing(name):
  model, params = build(name)
  tokens, mask = inputs()
  whole = compiled(name)(params, tokens, mask)
  apply = jax.jit(model.apply)
  cache, parts = init_cache(model.config, 3, 11), []
  for start, stop in ((0, 3), (3, 6), (6, 9)):
    logits, cache = apply(
      params,
      tokens[:, start:stop],
      mask_BT=mask[:, start:stop],
      cache=cache,
    )
    parts.append(logits)
  assert int(cache.length) == 9
  np.testing.assert_allclose(
    jnp.concatenate(parts, axis=1)[mask],
    whole[mask],
    rtol=0,
    atol=TOLERANCE * float(jnp.abs(whole).max()),
  )


@pytest.mark.parametrize('name', ['plain', 'learned', 'windows', 'both-norms'])
def test_padding_is_never_seen(name):
  _, params = build(name)
  apply = compiled(name)
  tokens, mask = inputs()
  logits = apply(params, tokens, mask)
  other = jnp.where(mask, tokens, (tokens + 5) % 13)
  np.testing.assert_array_equal(apply(params, other, mask)[mask], logits[mask])
  # Nor is what comes later.
  later = tokens.at[:, 5:].set(0)
  np.testing.assert_array_equal(
    apply(params, later, mask)[:, :5][mask[:, :5]],
    logits[:, :5][mask[:, :5]],
  )


@pytest.mark.parametrize('name', ['learned', 'windows'])
def test_rows_without_tokens_are_finite_in_value_and_gradient(name):
  model, params = build(name)
  tokens, mask = inputs()
  mask = mask.at[0].set(False)

  @jax.jit
  def loss(params):
    logits = model.apply(params, tokens, mask_BT=mask)
    return jnp.sum(jnp.square(logits)), logits

  gradient, logits = jax.grad(loss, has_aux=True)(params)
  assert jnp.isfinite(logits).all()
  assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_rematerialisation_changes_no_gradient():
  model, params = build('plain')
  again = transformer(dataclasses.replace(model.config, remat=True))
  tokens, _ = inputs()
  gradient = [
    jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(m.apply(p, tokens)))))(params)
    for m in (model, again)
  ]
  largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient[0]))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=0, atol=TOLERANCE * largest
    ),
    *gradient,
  )
  text = str(jax.make_jaxpr(again.apply)(params, tokens))
  assert 'remat' in text or 'checkpoint' in text


def equations(jaxpr):
  """Every equation, those of inner jaxprs included."""
  for eqn in jaxpr.eqns:
    yield eqn
    for param in eqn.params.values():
      inner = getattr(param, 'jaxpr', param)
      if hasattr(inner, 'eqns'):
        yield from equations(inner)


@pytest.mark.parametrize('activation', ['silu', 'gelu', 'gelu_tanh'])
def test_the_mlp_keeps_only_what_its_products_read(activation):
  config = dataclasses.replace(BASE, activation=activation)
  model = transformer(config)
  params = jax.eval_shape(model.init, jax.random.key(0))
  tokens = jax.ShapeDtypeStruct((2, 7), jnp.int32)
  _, pull = jax.eval_shape(
    lambda p, x: jax.vjp(lambda p: model.apply(p, x), p), params, tokens
  )
  kept = [a.shape for a in jax.tree.leaves(pull)]
  wide = [s for s in kept if s[-1] == 10 and math.prod(s[1:-1]) == 2 * 7]
  # What gate and up gave, and what down takes.
  assert len(wide) == 3


@pytest.mark.parametrize('name', VARIANTS)
def test_every_projection_is_one_product_and_every_activation_is_named(name):
  model, params = build(name)
  tokens, _ = inputs()
  jaxpr = jax.make_jaxpr(model.apply)(params, tokens).jaxpr
  eqns = list(equations(jaxpr))
  assert sum(e.primitive.name == 'scan' for e in eqns) == 1
  names = [e.params['name'] for e in eqns if e.primitive.name == 'name']
  assert names == ['resid_pre', 'attn_out', 'mlp_out', 'resid_post']
  # q, k, v, o, up, down, maybe gate; scores and mixing; the head.
  products = [e for e in eqns if e.primitive.name == 'dot_general']
  assert len(products) == 6 + model.config.gated + 2 + 1
  batched = [e for e in products if e.params['dimension_numbers'][1][0]]
  assert len(batched) == 2


@pytest.mark.parametrize('compute', [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize('name', ['plain', 'learned', 'softcaps', 'both-norms'])
def test_dtypes_are_those_of_the_policy(name, compute):
  dtypes = DTypePolicy(param=jnp.bfloat16, compute=compute)
  config = dataclasses.replace(BASE, **VARIANTS[name], dtypes=dtypes)
  model = transformer(config)
  tokens, mask = inputs()
  with jax.numpy_dtype_promotion('strict'):
    params = jax.eval_shape(model.init, jax.random.key(0))
    cache = init_cache(config, 3, 9)
    logits, cache = jax.eval_shape(
      lambda p, c: model.apply(p, tokens, mask_BT=mask, cache=c),
      params,
      cache,
    )
  assert all(a.dtype == jnp.bfloat16 for a in jax.tree.leaves(params))
  assert cache.k_LBKSH.dtype == compute
  assert logits.dtype == jnp.float32


def test_initial_scale_is_even_across_depth():
  config = dataclasses.replace(BASE, d_model=64, d_ff=128, n_layers=6)
  model = transformer(config)
  params = jax.jit(model.init)(jax.random.key(0))
  # Each draw is independent by layer.
  q = params['blocks']['attn']['q']['kernel']
  assert len({float(layer[0, 0]) for layer in q}) == 6
  # The deviation of n draws has relative error 1 / sqrt(2 n); five of them.
  np.testing.assert_allclose(
    q.std(axis=(1, 2)), 64**-0.5, rtol=5 / (2 * 64 * 64) ** 0.5
  )
  down = params['blocks']['mlp']['down']['kernel']
  np.testing.assert_allclose(
    down.std(axis=(1, 2)),
    (128 * 2 * 6) ** -0.5,
    rtol=5 / (2 * 128 * 64) ** 0.5,
  )
  logits = jax.jit(model.apply)(params, jnp.arange(13)[None])
  assert 0.5 < float(logits.std()) < 2


@pytest.mark.parametrize('norm', ['rms', 'layer'])
def test_norms_start_without_a_scale(norm):
  tokens, _ = inputs()
  logits = []
  for unit_offset in (False, True):
    config = dataclasses.replace(
      BASE, norm=norm, norm_unit_offset=unit_offset, qk_norm='head'
    )
    model = transformer(config)
    params = jax.jit(model.init)(jax.random.key(0))
    logits.append(jax.jit(model.apply)(params, tokens))
    for part in (params['final_norm'], params['blocks']['attn']['q_norm']):
      assert (part['scale'] == 1 - unit_offset).all()
  np.testing.assert_array_equal(*logits)


def test_equal_models_have_equal_configs():
  windows = dataclasses.replace(BASE, sliding_window=2)
  assert windows == dataclasses.replace(windows, sliding_window=(2, 2, 2))
  assert windows == dataclasses.replace(windows, rope_local=windows.rope)
  assert windows == dataclasses.replace(windows, attn_scale=6**-0.5)


def test_models_can_be_mapped_over():
  model, params = build('plain')
  keys = jax.random.split(jax.random.key(0), 2)
  shapes = jax.eval_shape(jax.vmap(model.init), keys)
  pair = jax.tree.map(lambda a: jnp.stack([a, 0.5 * a]), params)
  assert jax.tree.map(jnp.shape, pair) == jax.tree.map(jnp.shape, shapes)
  tokens, mask = inputs()
  mapped = jax.jit(jax.vmap(model.apply, in_axes=(0, None)))(pair, tokens)
  half = jax.tree.map(lambda a: 0.5 * a, params)
  alone = compiled('plain')(half, tokens, jnp.ones_like(mask))
  np.testing.assert_allclose(
    mapped[1], alone, rtol=0, atol=TOLERANCE * float(jnp.abs(alone).max())
  )


def test_what_cannot_be_embedded_is_nan():
  _, params = build('plain')
  tokens, mask = inputs()
  logits = compiled('plain')(params, tokens.at[1, 6].set(13), mask)
  assert jnp.isnan(logits[1, 6:]).all() and jnp.isfinite(logits[0]).all()
  logits = compiled('plain')(params, tokens.at[1, 6].set(-1), mask)
  assert jnp.isnan(logits[1, 6:]).all() and jnp.isfinite(logits[0]).all()
  # Padding is nobody's index, whatever it holds.
  padded = compiled('plain')(params, tokens, mask.at[1, 6].set(False))
  for anything in (-1, 13):
    logits = compiled('plain')(
      params, tokens.at[1, 6].set(anything), mask.at[1, 6].set(False)
    )
    rows = np.arange(9) != 6
    np.testing.assert_array_equal(logits[1, rows], padded[1, rows])
  model, params = build('learned')
  late = jnp.full((3, 9), 16)
  logits = jax.jit(model.apply)(params, tokens, positions_BT=late)
  assert jnp.isnan(logits).all()


def test_a_cache_is_no_longer_than_learned_positions():
  model, _ = build('learned')
  init_cache(model.config, 2, 16)
  with pytest.raises(ValueError, match='17 slots.*max_len=16'):
    init_cache(model.config, 2, 17)


def test_an_overfull_cache_is_an_error_or_nan():
  model, params = build('plain')
  tokens, _ = inputs()
  with pytest.raises(ValueError, match='9 more tokens .* 8 slots'):
    model.apply(params, tokens, cache=init_cache(model.config, 3, 8))
  cache = init_cache(model.config, 3, 9)._replace(length=jnp.int32(9))
  with pytest.raises(ValueError, match='9 slots of which 9 are taken'):
    model.apply(params, tokens[:, :1], cache=cache)
  logits, _ = jax.jit(model.apply)(params, tokens[:, :1], cache=cache)
  assert jnp.isnan(logits).all()


@pytest.mark.parametrize(
  'kwargs,message',
  [
    (dict(mask_BT=np.ones((3, 8), bool)), r'mask_BT is \(3, 8\)'),
    (dict(positions_BT=np.ones((1, 9), int)), r'positions_BT is \(1, 9\)'),
    (dict(cache=init_cache(BASE, 2, 16)), 'holds 2 sequences, tokens 3'),
  ],
)
def test_inputs_that_do_not_fit_raise(kwargs, message):
  model, params = build('plain')
  with pytest.raises(ValueError, match=message):
    model.apply(params, inputs()[0], **kwargs)


def test_sequences_longer_than_learned_positions_raise():
  model, params = build('learned')
  with pytest.raises(ValueError, match='17 tokens.*max_len=16'):
    model.apply(params, jnp.zeros((1, 17), int))
  with pytest.raises(ValueError, match=r'\[batch, time\]'):
    model.apply(params, jnp.zeros((5,), int))


@pytest.mark.parametrize(
  'change,message',
  [
    (dict(n_kv_heads=3), 'n_heads=4.*n_kv_heads=3'),
    (dict(head_dim=3), 'head_dim=3'),
    (dict(n_layers=0), 'n_layers=0'),
    (dict(activation='tanh'), "'tanh'"),
    (dict(norm='batch'), "'batch'"),
    (dict(norm_position='around'), "'around'"),
    (dict(qk_norm='all'), "'all'"),
    (dict(sliding_window=0), 'sliding_window'),
    (dict(sliding_window=(1, 2)), '2 entries for n_layers=3'),
    (dict(attn_softcap=-1.0), 'attn_softcap=-1.0'),
    (dict(logit_softcap=0.0), 'logit_softcap=0.0'),
    (dict(attn_scale=0.0), 'attn_scale=0.0'),
    (dict(rope_local=RopeConfig(theta=5.0)), 'of which there are none'),
    (
      dict(sliding_window=2, rope=None, rope_local=RopeConfig()),
      'rope_local without rope',
    ),
    (
      dict(sliding_window=2, rope_local=RopeConfig(fraction=0.67)),
      'rope rotates 6 features and rope_local 4',
    ),
    (dict(d_model=13, head_dim=None), 'd_model=13.*n_heads=4'),
  ],
)
def test_bad_settings_raise(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(BASE, **change)
  with pytest.raises(ValueError, match='fraction=1.5'):
    RopeConfig(fraction=1.5)
  with pytest.raises(ValueError, match='factor=0'):
    LinearScaling(0)
