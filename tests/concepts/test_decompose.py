"""Parts add up to the whole, and predictions come true."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from idesign import concepts, models

D, F, K, B, T = 8, 24, 3, 6, 5
EPS = float(np.finfo(np.float32).eps)


def random_sae(seed=0, architecture='topk', d_in=D):
  k = K if architecture == 'topk' else None
  config = concepts.SAEConfig(
    architecture=architecture, d_in=d_in, d_sae=F, k=k
  )
  rng = np.random.default_rng(seed)
  params = {
    name: jnp.asarray(rng.normal(size=shape), jnp.float32)
    for name, shape in config.shapes.items()
  }
  return concepts.make_sae(config, params)


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), 'float32')


def test_parts_and_residual_are_the_vector():
  sae, h, v = random_sae(), normal(1, B, T, D), normal(2, B, T, D)
  parts = concepts.decompose(sae, h, v)
  rows = np.asarray(sae.directions, np.float64)
  worst = 0.0
  for b in range(B):
    for t in range(T):
      f = np.asarray(sae.encode(h[b, t]), np.float64)
      active = np.flatnonzero(f)
      place = {int(i): k for k, i in enumerate(parts.index[b, t])}
      expected, *_ = np.linalg.lstsq(
        rows[active].T, np.asarray(v[b, t], np.float64), rcond=None
      )
      for c, alpha in zip(active, expected):
        k = place[int(c)]
        np.testing.assert_allclose(
          parts.coefficient[b, t, k], alpha, rtol=2e-3, atol=1e-5
        )
        score = f[c] * (rows[c] @ np.asarray(v[b, t], np.float64))
        np.testing.assert_allclose(
          parts.score[b, t, k], score, rtol=1e-4, atol=1e-5
        )
      whole = parts.residual[b, t] + sum(
        parts.coefficient[b, t, k] * rows[parts.index[b, t, k]]
        for k in range(K)
      )
      worst = max(worst, float(jnp.abs(whole - v[b, t]).max()))
  assert worst < 64 * EPS * float(jnp.abs(v).max())
  assert not bool(parts.dropped.any())


def test_shares_add_up_and_leave_masked_positions_out():
  sae, h, v = random_sae(), normal(1, B, T, D), normal(2, B, T, D)
  mask = np.random.default_rng(3).random((B, T)) < 0.6
  total = concepts.shares(sae, concepts.decompose(sae, h, v), v, mask)
  assert 0.1 < float(total.unexplained) < 0.9
  np.testing.assert_allclose(
    total.share_F.sum() + total.unexplained, 1, atol=256 * EPS
  )
  other = jnp.where(mask[..., None], v, 7.0)
  again = concepts.shares(sae, concepts.decompose(sae, h, other), other, mask)
  for a, b in zip(total, again):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_shares_of_nothing_and_of_next_to_nothing_are_numbers():
  sae, h, v = random_sae(), normal(1, B, T, D), normal(2, B, T, D)
  measure = lambda v, mask=None: concepts.shares(
    sae, concepts.decompose(sae, h, v), v, mask
  )
  for nothing in (measure(0 * v), measure(v, np.zeros((B, T), bool))):
    assert not nothing.share_F.any() and not nothing.score_F.any()
    assert float(nothing.unexplained) == 1
  # Whose square is less than any number.
  for a, b in zip(measure(v)[:2], measure(1e-30 * v)[:2]):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
  # What is not finite is not made to look as if it were.
  broken = measure(v.at[0, 0, 0].set(jnp.nan))
  assert np.isnan(broken.unexplained)


def test_features_that_agree_share_what_scores_count_twice():
  # Rows 0 and 1 are the same direction, and both are active.
  params = {
    'W_enc': jnp.array([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]),
    'W_dec': jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]),
    'b_enc': jnp.zeros(3),
    'b_dec': jnp.zeros(2),
  }
  config = concepts.SAEConfig(architecture='relu', d_in=2, d_sae=3)
  sae = concepts.make_sae(config, params)
  h, v = jnp.array([[[2.0, -1.0]]]), jnp.array([[[3.0, 4.0]]])
  parts = concepts.decompose(sae, h, v, k=3)
  total = concepts.shares(sae, parts, v)
  np.testing.assert_allclose(total.score_F, [6, 6, 0], rtol=1e-5)
  # 9 of |v|^2 = 25 lie along them; feature 2 is not active.
  np.testing.assert_allclose(total.share_F, [0.18, 0.18, 0], rtol=1e-4)
  np.testing.assert_allclose(total.unexplained, 0.64, rtol=1e-4)
  assert int(concepts.decompose(sae, h, v, k=1).dropped[0, 0]) == 1


def small_model():
  config = models.TransformerConfig(
    vocab_size=20, d_model=D, d_ff=16, n_heads=2, n_layers=3, max_len=T
  )
  model = models.transformer(config)
  params = model.init(jax.random.key(0))
  tokens = jax.random.randint(jax.random.key(1), (4 * B, T), 0, 20)
  return model, params, tokens


def adam_update(model, params, tokens, rate):
  """Of the second of two steps: clipping, momentum and decay all act."""

  def loss(p):
    logp = jax.nn.log_softmax(model.apply(p, tokens)[:, :-1])
    return -jnp.mean(jnp.take_along_axis(logp, tokens[:, 1:, None], 2))

  tx = optax.chain(
    optax.clip_by_global_norm(0.5), optax.adamw(rate, weight_decay=0.1)
  )
  state = tx.init(params)
  updates, state = tx.update(jax.grad(loss)(params), state, params)
  params = optax.apply_updates(params, updates)
  return params, tx.update(jax.grad(loss)(params), state, params)[0]


def test_the_predicted_change_comes_true():
  model, params, tokens = small_model()
  read = concepts.reader(model.apply, 'resid_post[1:2]')
  readout = random_sae().params['W_enc']
  params, update = adam_update(model, params, tokens[:B], 1e-4)
  probes, mask = tokens[B:], np.arange(T)[None] > np.arange(3 * B)[:, None] % 3
  args = (read, readout, params, update, probes, mask)
  predicted = concepts.predicted_change(*args).mean(0)
  realised = concepts.realised_change(*args).mean(0)
  slope = float(predicted @ realised / (predicted @ predicted))
  assert np.corrcoef(predicted, realised)[0, 1] > 0.99
  assert 0.97 < slope < 1.03
  # The other sign, and the update of another step, do not.
  assert float(jnp.abs(predicted).max()) > 1e-4
  wrong = jax.tree.map(jnp.negative, update)
  wrong = concepts.predicted_change(read, readout, params, wrong, probes, mask)
  np.testing.assert_allclose(wrong.mean(0), -predicted, rtol=1e-4, atol=1e-8)


def test_the_prediction_is_the_derivative():
  rng = np.random.default_rng(0)
  with jax.enable_x64(True):
    array = lambda *shape: jnp.asarray(rng.normal(size=shape))
    params, direction = (
      {'in': array(4, D), 'out': array(D, D)} for _ in range(2)
    )
    probes, readout = array(B, T, 4), array(D, F)
    read = lambda p, x: jnp.tanh(x @ p['in']) @ p['out']
    gaps = []
    for size in (1e-2, 1e-3, 1e-4):
      update = jax.tree.map(lambda x: size * x, direction)
      args = (read, readout, params, update, probes)
      predicted = concepts.predicted_change(*args)
      gap = jnp.abs(predicted - concepts.realised_change(*args)).max()
      gaps.append(float(gap / jnp.abs(predicted).max()))
  # The error is of second order: relative to the change, of first.
  np.testing.assert_allclose(gaps[0] / gaps[1], 10, rtol=0.2)
  np.testing.assert_allclose(gaps[1] / gaps[2], 10, rtol=0.02)
  assert gaps[2] < 1e-3


def test_the_mean_over_positions_counts_those_of_the_mask():
  h = normal(5, 3, T, D)
  mask = np.array([[1, 0, 0, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], bool)
  expected = [(h[0, 0] + h[0, 3]) / 2, h[1].mean(0), np.zeros(D)]
  out = concepts.token_mean(h, mask)
  np.testing.assert_allclose(out, np.stack(expected), atol=16 * EPS)
  hole = jnp.where(mask[..., None], h, jnp.nan)
  for same in (mask, jnp.asarray(mask, jnp.float32)):
    np.testing.assert_array_equal(concepts.token_mean(hole, same), out)


def test_statistics_tell_change_from_noise():
  rng = np.random.default_rng(0)
  noise = rng.normal(size=(40, 200))
  there = rng.normal(size=(40, 200)) + 1.0
  x = np.concatenate([noise, there, np.zeros((40, 1)), np.ones((40, 1))], 1)
  s = concepts.change_statistics(x)
  np.testing.assert_allclose(s.mean, x.mean(0))
  np.testing.assert_allclose(s.effect_size[200:400].mean(), 1.0, atol=0.05)
  covered = (s.low < 0) & (s.high > 0)
  assert 0.9 < covered[:200].mean() <= 0.99 and covered[200:400].mean() < 0.02
  assert s.sign_agreement[200:400].min() > 0.95
  assert 0.4 < s.sign_agreement[:200].mean() < 0.6
  assert s.effect_size[400] == 0 and s.effect_size[401] == np.inf
  assert s.sign_agreement[400] == 0.5 and s.sign_agreement[401] == 1
  with pytest.raises(ValueError, match='concept 3 is not finite'):
    concepts.change_statistics(np.where(np.arange(5) == 3, np.nan, x[:, :5]))
  with pytest.raises(ValueError, match='at least four'):
    concepts.change_statistics(x[:3])


def test_the_interval_is_that_of_student():
  s = concepts.change_statistics(np.array([[1.0], [2], [3], [6]]))
  # Mean 3, squares about it 4 + 1 + 0 + 9; 97.5 % of t with 3 degrees of
  # freedom lie below 3.182446, from a printed table.
  half = 3.182446 * np.sqrt(14 / 3) / np.sqrt(4)
  np.testing.assert_allclose(s.low, 3 - half, rtol=1e-6)
  np.testing.assert_allclose(s.high, 3 + half, rtol=1e-6)


def test_equal_changes_have_no_spread_whatever_their_mean_is_rounded_to():
  values = np.array([0.1, -0.1, 0.7, -1e-300, 1e100])
  for size in (5, 10, 41):
    s = concepts.change_statistics(np.tile(values, (size, 1)))
    np.testing.assert_array_equal(s.effect_size, np.sign(values) * np.inf)
    np.testing.assert_array_equal(s.low, s.high)
    assert (s.sign_agreement == 1).all()
  # A spread that is small but there is no rounding.
  near = 0.1 + 1e-12 * np.arange(10)[:, None]
  assert 1e9 < concepts.change_statistics(near).effect_size[0] < 1e12


def test_two_halves_that_are_zero_agree_half():
  x = np.zeros((8, 2))
  x[0, 1] = 1.0  # One half is zero and the other is not: no agreement.
  s = concepts.change_statistics(x)
  assert s.sign_agreement.tolist() == [0.5, 0]


def test_what_does_not_fit_is_refused():
  model, params, tokens = small_model()
  sae, h = random_sae(architecture='relu'), normal(1, B, T, D)
  with pytest.raises(ValueError, match='say how many active features'):
    concepts.decompose(sae, h, h)
  with pytest.raises(ValueError, match=r'v is \(6, 4, 8\)'):
    concepts.decompose(sae, h, h[:, :4])
  with pytest.raises(ValueError, match='one layer'):
    concepts.reader(model.apply, 'resid_post')(params, tokens)
  read = concepts.reader(model.apply, 'resid_post[0:1]')
  wide = random_sae(d_in=D + 1).params['W_enc']
  with pytest.raises(ValueError, match='width 8 .* width 9'):
    concepts.predicted_change(read, wide, params, params, tokens)
  readout = sae.params['W_enc']
  with pytest.raises(ValueError, match='the mask is'):
    concepts.predicted_change(
      read, readout, params, params, tokens, jnp.ones((2, T))
    )


def test_a_stream_hands_out_every_row_once_and_mixes_them():
  number = lambda i: np.arange(i * 40, i * 40 + 40, dtype=np.float32)
  read = lambda params, x: (params * x).reshape(4, 10, 1)
  masks = [None, np.arange(40).reshape(4, 10) % 4 > 0] * 10
  batches = [(number(i), m) for i, m in enumerate(masks)]
  out = list(concepts.stream(read, 1.0, batches, rows=16, buffer=200))
  assert all(x.shape == (16, 1) for x in out)
  seen = np.concatenate(out)[:, 0]
  kept = [
    number(i)[slice(None) if m is None else m.ravel()]
    for i, m in enumerate(masks)
  ]
  kept = np.concatenate(kept)
  assert len(set(seen)) == len(seen) == len(kept) // 16 * 16
  assert set(seen) <= set(kept)
  assert np.mean([np.ptp(x) for x in out]) > 150
  with pytest.raises(ValueError, match='fewer than one batch'):
    list(concepts.stream(read, 1.0, batches[:1], rows=64, buffer=200))
  with pytest.raises(ValueError, match='batch 1 is not finite'):
    bad = [batches[0], (number(1) * np.nan, None)]
    list(concepts.stream(read, 1.0, bad, rows=8, buffer=200))
  with pytest.raises(ValueError, match='at least two batches'):
    next(concepts.stream(read, 1.0, batches, rows=8, buffer=8))


def test_a_stream_mixes_what_it_held_with_what_comes():
  read = lambda params, x: x.reshape(4, 10, 1)
  batches = [
    (np.arange(i * 40, i * 40 + 40, dtype=np.float32), None) for i in range(10)
  ]
  out = list(concepts.stream(read, None, batches, rows=20, buffer=200))
  seen = np.concatenate(out)[:, 0]
  # Of the first 200 rows half are handed out, and half wait for later ones.
  assert (seen[:100] < 200).all() and (seen[100:] < 200).sum() == 100
  assert any((x < 200).any() and (x >= 200).any() for x in out)


def test_a_mask_of_integers_is_one_of_booleans():
  x = np.arange(60, dtype=np.float32)
  read = lambda params, x: x.reshape(3, 20, 1)
  mask = (np.arange(60) % 3 > 0).reshape(3, 20)
  seen = lambda mask: np.concatenate(
    list(concepts.stream(read, None, [(x, mask)], rows=4, buffer=100))
  )
  np.testing.assert_array_equal(seen(mask.astype(np.int32)), seen(mask))
  np.testing.assert_array_equal(seen(mask.astype(np.float32)), seen(mask))
  assert sorted(seen(mask)[:, 0]) == x[mask.ravel()].tolist()
