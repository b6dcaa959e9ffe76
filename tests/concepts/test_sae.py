"""What autoencoders compute, learn and report, against a numpy reference."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from idesign import concepts, models
from idesign.concepts.sae_train import jump

D, F, K = 8, 24, 3
WIDE = 24  # Of the activations that are trained on.
EPS = float(np.finfo(np.float32).eps)
ARCHITECTURES = ('relu', 'topk', 'batchtopk', 'jumprelu', 'gated')


def config(architecture, **changes):
  k = K if architecture in ('topk', 'batchtopk', 'jumprelu') else None
  kwargs = dict(architecture=architecture, d_in=D, d_sae=F, k=k) | changes
  return concepts.SAEConfig(**kwargs)


def random_sae(architecture, seed=0, **changes):
  cfg = config(architecture, **changes)
  rng = np.random.default_rng(seed)
  params = {
    name: jnp.asarray(rng.normal(size=shape), jnp.float32)
    for name, shape in cfg.shapes.items()
  }
  return concepts.make_sae(cfg, params)


def expected_features(sae, h):
  p = {name: np.asarray(a, np.float64) for name, a in sae.params.items()}
  x = h - p['b_dec'] if sae.config.centered else h
  z = x @ p['W_enc']
  kind = sae.config.architecture
  if kind == 'gated':
    magnitude = z * np.exp(p['r_mag']) + p['b_mag']
    return (z + p['b_gate'] > 0) * np.maximum(magnitude, 0)
  z = z + p['b_enc']
  f = np.maximum(z, 0)
  if kind == 'topk':
    for row, order in zip(f, np.argsort(-z, axis=1)):
      row[order[K:]] = 0
  if 'threshold' in p:
    f[z <= p['threshold'][None].repeat(len(z), 0)] = 0
  return f


@pytest.mark.parametrize('centered', [True, False])
@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_features_and_reconstruction(architecture, centered):
  sae = random_sae(architecture, centered=centered)
  h = np.random.default_rng(1).normal(size=(40, D)).astype(np.float32)
  f = expected_features(sae, h.astype(np.float64))
  assert 0.02 < (f > 0).mean() < 0.98
  # A sum of D products and as many again of the next layer.
  bound = 4 * D * EPS * np.abs(f).max()
  np.testing.assert_allclose(sae.encode(h), f, rtol=0, atol=bound)
  p = sae.params
  out = f @ np.asarray(p['W_dec'], np.float64) + np.asarray(p['b_dec'])
  bound = 4 * (D + F) * EPS * np.abs(out).max()
  np.testing.assert_allclose(sae(h), out, rtol=0, atol=bound)
  by_token = sae.encode(h.reshape(5, 8, D)).reshape(-1, F)
  np.testing.assert_allclose(by_token, sae.encode(h), rtol=0, atol=bound)
  z = sae.preactivations(h)
  np.testing.assert_array_equal(sae.activate(z), sae.encode(h))
  # A feature that is active has a pre-activation above what cuts it off.
  assert bool(jnp.all((sae.encode(h) == 0) | (z > z.min())))


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_features_split_over_devices_are_the_same(architecture):
  mesh = jax.make_mesh(
    (2, 4), ('data', 'model'), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  sae = random_sae(architecture)
  where = concepts.sae_shardings(sae.config, mesh)
  split = concepts.SAE(jax.device_put(sae.params, where), sae.config)
  assert split.params['W_dec'].addressable_shards[0].data.shape == (F // 4, D)
  h = jax.random.normal(jax.random.key(0), (16, D))
  run = jax.jit(lambda sae, h: (sae.encode(h), sae(h)))
  for one, many in zip(run(sae, h), run(split, h)):
    scale = float(jnp.abs(one).max())
    np.testing.assert_allclose(one, many, rtol=0, atol=8 * F * EPS * scale)


def superposition(rows, seed=0, features=32, active=2):
  """Rows that are sparse sums of `features` unit directions, and those."""
  rng = np.random.default_rng(seed)
  truth = np.random.default_rng(9).normal(size=(features, WIDE))
  truth /= np.linalg.norm(truth, axis=1, keepdims=True)
  chosen = rng.random((rows, features)).argsort(1)[:, :active]
  codes = np.zeros((rows, features))
  np.put_along_axis(codes, chosen, rng.uniform(1, 2, chosen.shape), 1)
  # In other units and about another mean than training works in.
  return jnp.asarray(5 * codes @ truth + 30, jnp.float32), truth


def trained(architecture, steps=800, **changes):
  cfg = config(architecture, d_in=WIDE, d_sae=48, **changes)
  data, truth = superposition(4096)
  optimizer = optax.adam(4e-3)
  state = concepts.init_sae(cfg, optimizer, jax.random.key(0), data[:1024])
  sparsity = 3.0 if architecture in ('relu', 'gated') else 1.0
  step = concepts.make_sae_step(
    cfg, optimizer, sparsity=sparsity, dead_after=5000
  )
  rng = np.random.default_rng(0)
  for _ in range(steps):
    state, metrics = step(state, data[rng.integers(0, len(data), 256)])
  assert step._cache_size() == 1
  return concepts.finished(cfg, state), metrics, truth


@pytest.mark.parametrize(
  'architecture,changes',
  [
    ('topk', dict(k=2)),
    ('batchtopk', dict(k=2)),
    ('batchtopk', dict(k=2, prefixes=(16, 48))),
    ('jumprelu', dict(k=2)),
    ('gated', {}),
    ('relu', {}),
  ],
)
def test_training_finds_what_made_the_data(architecture, changes):
  sae, metrics, truth = trained(architecture, **changes)
  held_out, _ = superposition(2048, seed=5)
  fit = concepts.evaluate_sae(sae, [held_out[:1000], held_out[1000:]])
  assert fit.fvu < 0.2
  assert fit.l0 < 8  # Of 48; two made each row.
  norms = np.linalg.norm(sae.directions, axis=1)
  np.testing.assert_allclose(norms, 1, atol=8 * EPS)
  # Training and inference are two paths to one autoencoder.
  assert abs(fit.fvu - float(metrics['fvu'])) < 0.1
  if architecture == 'topk':
    found = np.abs(np.asarray(sae.directions) @ truth.T).max(axis=0)
    assert (found > 0.95).mean() >= 0.75


def test_the_window_estimates_how_a_threshold_moves_the_expectation():
  # Of z uniform on [0, 1]: E[step] = 1 - t and E[z step] = (1 - t^2) / 2, with
  # derivatives -1 and -t; the grid and the window are symmetric about t.
  z = jnp.linspace(0, 1, 2001)[:, None]
  threshold = jnp.array([[0.5]])
  slope = jax.grad(lambda t: jnp.mean(jump(z, t)))(threshold)
  np.testing.assert_allclose(slope, -1, atol=1 / 100)
  slope = jax.grad(lambda t: jnp.mean(z * jump(z, t)))(threshold)
  np.testing.assert_allclose(slope, -0.5, atol=1 / 100)
  np.testing.assert_array_equal(jump(z, threshold), z > 0.5)


def test_dead_features_are_revived_by_the_auxiliary_loss():
  cfg = config('topk', d_in=WIDE, d_sae=32, k=2)
  data, _ = superposition(4096)
  moved = {}
  for weight in (0.0, 1 / 32):
    optimizer = optax.sgd(0.1)
    state = concepts.init_sae(cfg, optimizer, jax.random.key(0), data[:1024])
    # Half of the features are never among the largest.
    shrunk = state.params['W_enc'].at[:, :16].multiply(0.01)
    state = state._replace(params={**state.params, 'W_enc': shrunk})
    step = concepts.make_sae_step(
      cfg, optimizer, dead_after=1000, aux_weight=weight
    )
    before = np.asarray(state.params['W_dec'])[:16].copy()
    for i in range(20):
      state, metrics = step(state, data[256 * (i % 16) :][:256])
    after = np.asarray(state.params['W_dec'])[:16]
    assert weight or float(metrics['dead']) == 0.5
    moved[weight] = np.abs(after - before).max()
  assert moved[0.0] <= 8 * EPS and moved[1 / 32] > 5e-5


def watched(config, h, seed=0):
  """A state, and an optimizer that holds still and keeps the gradient."""
  optimizer = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, state, params: (jax.tree.map(jnp.zeros_like, grads), grads),
  )
  key = jax.random.key(seed)
  return concepts.init_sae(config, optimizer, key, h), optimizer


def test_the_gradient_along_decoder_rows_is_removed():
  cfg = config('relu')
  h = jax.random.normal(jax.random.key(1), (200, D))
  state, optimizer = watched(cfg, h)
  rows = np.asarray(state.params['W_dec'], np.float64)
  state, _ = concepts.make_sae_step(cfg, optimizer)(state, h)
  gradient = np.asarray(state.opt_state['W_dec'], np.float64)
  lengths = np.linalg.norm(gradient, axis=1)
  assert lengths.min() > 0
  # Two roundings of D products, and of rows of norm 1.
  along = np.abs((gradient * rows).sum(1))
  assert (along / lengths).max() < 1e-4


def test_the_loss_is_the_mean_over_prefixes():
  cfg = config('relu', prefixes=(4, 10, F))
  h = jax.random.normal(jax.random.key(1), (200, D))
  state, optimizer = watched(cfg, h)
  p = {n: np.asarray(a, np.float64) for n, a in state.params.items()}
  x = np.asarray(h, np.float64) * float(state.scale)
  step = concepts.make_sae_step(cfg, optimizer, sparsity=0.0)
  _, metrics = step(state, h)
  f = np.maximum((x - p['b_dec']) @ p['W_enc'] + p['b_enc'], 0)
  total = ((x - x.mean(0)) ** 2).sum()
  fvus = [
    ((x - f[:, :n] @ p['W_dec'][:n] - p['b_dec']) ** 2).sum() / total
    for n in cfg.prefixes
  ]
  assert np.ptp(fvus) > 0.1
  np.testing.assert_allclose(metrics['loss'], np.mean(fvus), rtol=1e-4)
  np.testing.assert_allclose(metrics['fvu'], fvus[-1], rtol=1e-4)


def test_the_threshold_is_a_moving_average_of_the_least_active_feature():
  cfg = config('batchtopk')
  h = jax.random.normal(jax.random.key(1), (200, D))
  state, optimizer = watched(cfg, h)
  p = {n: np.asarray(a, np.float64) for n, a in state.params.items()}
  scale, least = float(state.scale), []
  step = concepts.make_sae_step(cfg, optimizer)
  for batch in (h, 3 * h, 3 * h):
    x = np.asarray(batch, np.float64) * scale
    z = (x - p['b_dec']) @ p['W_enc'] + p['b_enc']
    least.append(np.sort(z.ravel())[-K * len(x)])
    state, _ = step(state, batch)
  assert least[1] > 2 * least[0] > 0
  # The first one as it is, not averaged with the 0 before it.
  expected = 0.99 * (0.99 * least[0] + 0.01 * least[1]) + 0.01 * least[2]
  np.testing.assert_allclose(state.threshold, expected, rtol=1e-5)


def test_a_feature_stays_dead_however_long_it_is():
  cfg = config('relu')
  h = jax.random.normal(jax.random.key(1), (200, D))
  state, optimizer = watched(cfg, h)
  never = state.params['b_enc'].at[:6].set(-1e6)
  state = state._replace(
    params={**state.params, 'b_enc': never},
    idle_F=jnp.full((F,), 2**31 - 150, jnp.int32),
  )
  step = concepts.make_sae_step(cfg, optimizer, dead_after=1000)
  state, _ = step(state, h)
  state, metrics = step(state, h)
  assert float(metrics['dead']) == 6 / F
  np.testing.assert_array_equal(state.idle_F, [1000] * 6 + [0] * (F - 6))
  # Whatever the limit, the count is exact below it.
  step = concepts.make_sae_step(cfg, optimizer, dead_after=2**31 - 1)
  state, metrics = step(state, h)
  np.testing.assert_array_equal(state.idle_F[:6], 1200)
  assert not float(metrics['dead'])


def test_metrics_know_a_constant_offset():
  sae = random_sae('relu')
  h = np.random.default_rng(1).normal(size=(500, D)).astype(np.float32)
  e = h - np.asarray(sae(h))
  variance = ((h - h.mean(0)) ** 2).sum()
  fit = concepts.evaluate_sae(sae, [h])
  assert fit.rows == 500
  np.testing.assert_allclose(fit.fvu, (e**2).sum() / variance, rtol=1e-4)
  centred = e - e.mean(0)
  expected = 1 - (centred**2).sum() / variance
  np.testing.assert_allclose(fit.explained_variance, expected, rtol=1e-4)
  f = np.asarray(sae.encode(h))
  np.testing.assert_allclose(fit.l0, (f > 0).sum(1).mean(), rtol=1e-6)
  np.testing.assert_allclose(fit.fired_F, (f > 0).mean(0), rtol=1e-6)
  never = dict(sae.params, b_enc=sae.params['b_enc'].at[:6].set(-1e6))
  some = concepts.evaluate_sae(concepts.SAE(never, sae.config), [h])
  assert fit.dead == 0 and some.dead == 6 / F
  shifted = dict(sae.params, b_dec=sae.params['b_dec'] + 100)
  # The encoder must not see the shift.
  apart = concepts.SAE(shifted, config('relu', centered=False))
  plain = concepts.SAE(sae.params, config('relu', centered=False))
  a, b = (concepts.evaluate_sae(s, [h]) for s in (plain, apart))
  assert abs(a.explained_variance - b.explained_variance) < 1e-4 * abs(
    a.explained_variance
  )
  assert b.fvu > 10 * a.fvu


def test_metrics_of_activations_far_from_zero_keep_their_digits():
  rng = np.random.default_rng(1)
  h = (rng.normal(size=(500, D)) + 1e4).astype(np.float32)
  sae = random_sae('relu')
  # It reconstructs a constant that is not the mean.
  still = dict(sae.params, W_dec=jnp.zeros((F, D)), b_dec=jnp.full(D, 1e4 + 1))
  fit = concepts.evaluate_sae(concepts.SAE(still, sae.config), [h])
  wide = h.astype(np.float64)
  variance = ((wide - wide.mean(0)) ** 2).sum()
  expected = ((wide - 1e4 - 1) ** 2).sum() / variance
  np.testing.assert_allclose(fit.fvu, expected, rtol=1e-3)
  assert abs(fit.explained_variance) < 1e-3


@pytest.mark.parametrize('garbage', [1e5, np.nan, np.inf])
def test_what_masked_rows_hold_changes_no_number(garbage):
  sae = random_sae('topk')
  h = np.random.default_rng(1).normal(size=(6, 5, D)).astype(np.float32)
  mask = np.arange(5)[None] < np.array([0, 0, 1, 3, 4, 5])[:, None]
  other = np.where(mask[..., None], h, garbage).astype(np.float32)
  # The first batch has no row that counts.
  measure = lambda h: concepts.evaluate_sae(
    sae, [(h[i : i + 2], mask[i : i + 2]) for i in (0, 2, 4)]
  )
  for a, b in zip(measure(h), measure(other)):
    np.testing.assert_array_equal(a, b)
  np.testing.assert_allclose(
    measure(other).fvu, concepts.evaluate_sae(sae, [h[mask]]).fvu, rtol=1e-5
  )
  with pytest.raises(ValueError, match='no activations'):
    concepts.evaluate_sae(sae, [(other[:2], mask[:2])])


def test_masked_rows_do_not_count():
  sae = random_sae('topk')
  h = np.random.default_rng(1).normal(size=(6, 5, D)).astype(np.float32)
  mask = np.ones((6, 5), bool)
  mask[2:, 3:] = False
  other = np.where(mask[..., None], h, 100.0).astype(np.float32)
  a = concepts.evaluate_sae(sae, [(h, mask)])
  b = concepts.evaluate_sae(sae, [(other, mask)])
  c = concepts.evaluate_sae(sae, [h[mask]])
  for x, y in ((a, b), (a, c)):
    np.testing.assert_allclose(x.fvu, y.fvu, rtol=1e-3)
    assert x.l0 == y.l0 and x.rows == y.rows == mask.sum()


def test_loss_recovered_is_one_for_the_identity_and_zero_for_nothing():
  lm = models.transformer(
    models.TransformerConfig(
      vocab_size=11, d_model=D, d_ff=16, n_heads=2, n_layers=3
    )
  )
  params = lm.init(jax.random.key(0))
  tokens = jax.random.randint(jax.random.key(1), (4, 7), 0, 11)

  def loss(params, tokens):
    logprobs = jax.nn.log_softmax(lm.apply(params, tokens)[:, :-1])
    return -jnp.take_along_axis(logprobs, tokens[:, 1:, None], 2).sum((1, 2))

  eye = jnp.eye(D)
  both_signs = concepts.make_sae(
    concepts.SAEConfig(architecture='relu', d_in=D, d_sae=2 * D),
    {
      'W_enc': jnp.concatenate([eye, -eye], 1),
      'W_dec': jnp.concatenate([eye, -eye], 0),
      'b_enc': jnp.zeros(2 * D),
      'b_dec': jnp.zeros(D),
    },
  )
  nothing = concepts.SAE(
    dict(both_signs.params, W_dec=jnp.zeros((2 * D, D))), both_signs.config
  )
  measure = lambda sae, name='resid_post[1:2]': concepts.loss_recovered(
    loss, params, [tokens, tokens[:2]], sae, name
  )
  whole, none = measure(both_signs), measure(nothing)
  np.testing.assert_allclose(whole.share, 1, atol=1e-4)
  assert none.share == 0
  direct = float(loss(params, tokens).sum() + loss(params, tokens[:2]).sum())
  np.testing.assert_allclose(whole.original, direct / 6, rtol=1e-5)
  assert whole.zeros != whole.original
  # The first leaf of a batch need not have a row per example.
  again = concepts.loss_recovered(
    lambda params, batch: loss(params, batch['tokens']),
    params,
    [{'names': jnp.zeros((5, 2)), 'tokens': t} for t in (tokens, tokens[:2])],
    both_signs,
    'resid_post[1:2]',
  )
  np.testing.assert_allclose(again, whole, rtol=1e-6)
  with pytest.raises(ValueError, match='No activation is named'):
    measure(both_signs, 'resid')
  with pytest.raises(ValueError, match='another layer or model'):
    measure(random_sae('topk', d_in=D + 1))


@pytest.mark.parametrize(
  'changes,message',
  [
    (dict(architecture='sparse'), "architecture='sparse'"),
    (dict(architecture='topk', k=None), 'needs k'),
    (dict(k=F + 1), f'k={F + 1} must be in'),
    (dict(k=0), 'k=0'),
    (dict(d_in=0), 'd_in=0'),
    (dict(prefixes=(8, 8, F)), 'prefixes'),
    (dict(prefixes=(8,)), 'prefixes'),
  ],
)
def test_bad_configs_raise(changes, message):
  with pytest.raises(ValueError, match=message):
    config(**(dict(architecture='relu') | changes))


@pytest.mark.parametrize(
  'change,message',
  [
    (lambda p: p.pop('b_enc'), 'b_enc is missing'),
    (lambda p: p.update(b_gate=p['b_enc']), 'b_gate is not known'),
    (lambda p: p.update(W_dec=p['W_enc']), r'W_dec has shape \(8, 24\)'),
    (lambda p: p.update(b_dec=p['b_dec'].at[0].set(jnp.nan)), 'b_dec .*NaN'),
  ],
)
def test_bad_arrays_raise(change, message):
  params = dict(random_sae('relu').params)
  change(params)
  with pytest.raises(ValueError, match=message):
    concepts.make_sae(config('relu'), params)


def test_bad_samples_raise():
  start = lambda sample: concepts.init_sae(
    config('relu'), optax.sgd(1.0), jax.random.key(0), sample
  )
  with pytest.raises(ValueError, match=r'must be \[tokens, 8\]'):
    start(jnp.ones((5, D + 1)))
  with pytest.raises(ValueError, match='all its rows are equal'):
    start(jnp.ones((5, D)))
  with pytest.raises(ValueError, match='not finite'):
    start(jnp.full((5, D), jnp.nan))
  with pytest.raises(ValueError, match='needs k'):
    concepts.make_sae_step(config('jumprelu', k=None), optax.sgd(1.0))
  with pytest.raises(ValueError, match='no activations'):
    concepts.evaluate_sae(random_sae('relu'), [])
  with pytest.raises(ValueError, match='all equal'):
    concepts.evaluate_sae(random_sae('relu'), [jnp.ones((5, D))])


def test_finding_the_largest_is_no_full_sort():
  sae = random_sae('topk')
  program = jax.jit(sae.encode).lower(jnp.zeros((50, D))).compile()
  assert ' sort(' not in program.as_text()
