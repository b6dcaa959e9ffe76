"""Moments of components against per-example gradients, and their classes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idesign import curvature
from idesign import sites
from tests.curvature import script

NAME = 'blocks/mlp/up/kernel'
GOLD = curvature.Fisher(labels='gold')


def setting(n=12):
  params, numbered = script.setting()
  rows = [numbered.batch(i) for i in range(2)]
  x = np.concatenate([r['inputs'] for r in rows])[:n]
  mask = np.concatenate([r['mask'] for r in rows])[:n]
  bases = {}
  random = np.random.default_rng(4)
  for name, (i, o) in {NAME: (16, 32)}.items():
    q = lambda d: np.stack(
      [np.linalg.qr(random.normal(size=(d, d)))[0] for _ in range(3)]
    )
    bases[name] = (
      jnp.asarray(q(i), jnp.float32), jnp.asarray(q(o), jnp.float32)
    )  # fmt: skip
  return params, x, mask, bases


def by_hand(params, x, mask, bases, scale=1.0):
  """`s [N, stack, d_in, d_out]` from per-example gradients."""

  def loss(p, batch):
    x, mask = batch
    nll = curvature.negative_log_likelihood(script.MODEL.apply(p, x), x, mask)
    return nll * scale

  read = sites.collect(loss, {'g': sites.per_example_gradient}, NAME)
  g = read(params, (x, mask), mask=mask).values['g'][NAME]
  u, v = bases[NAME]
  s = np.einsum(
    'lnio,lia,lob->nlab',
    *(np.asarray(a, np.float64) for a in (g, u, v)),
  )
  return s


def moments(params, x, mask, bases, **kwargs):
  read = jax.jit(curvature.component_moments(script.MODEL.apply, NAME, GOLD))
  return read(params, x, bases, labels=x, mask=mask, **kwargs)


def close(actual, expected):
  expected = np.asarray(expected)
  eps = float(jnp.finfo(jnp.float32).eps)
  scale = np.abs(expected).max()
  assert scale > 0
  assert np.abs(np.asarray(actual) - expected).max() <= 256 * eps * scale


def test_moments_are_those_of_per_example_gradients():
  params, x, mask, bases = setting()
  s = by_hand(params, x, mask, bases)
  m = moments(params, x, mask, bases)
  close(m.curvature()[NAME], (s**2).mean(0))
  close(m.batch_curvature()[NAME], s.mean(0) ** 2)
  close(m.coherence()[NAME], s.mean(0) ** 2 / (s**2).mean(0))
  expected = (s**2).sum(0) ** 2 / (len(x) * (s**4).sum(0))
  close(m.participation()[NAME], expected)
  close(m.largest[NAME], np.abs(s).max(0))
  assert expected.min() >= 1 / len(x) and expected.max() <= 1


def test_batches_add_up_whatever_their_size():
  params, x, mask, bases = setting()
  whole = moments(params, x, mask, bases)
  parts = [
    moments(params, x[i : i + 4], mask[i : i + 4], bases) for i in (0, 4, 8)
  ]
  total = parts[0] + parts[1] + parts[2]
  for a, b in zip(jax.tree.leaves(total), jax.tree.leaves(whole)):
    close(a, b)
  close(total.participation()[NAME], whole.participation()[NAME])


def test_small_gradients_keep_their_participation():
  """Squares and fourth powers leave the range of float32; shares do not."""
  params, x, mask, bases = setting()
  m = moments(params, x, mask, bases)
  small = m._replace(
    first=jax.tree.map(lambda a: a * 1e-12, m.first),
    second=jax.tree.map(lambda a: a * 1e-24, m.second),
    largest=jax.tree.map(lambda a: a * 1e-12, m.largest),
  )
  close(small.participation()[NAME], m.participation()[NAME])
  close((small + small).coherence()[NAME], m.coherence()[NAME])
  unused = jax.tree.map(jnp.zeros_like, m)._replace(count=m.count)
  assert np.isnan(unused.participation()[NAME]).all()
  assert np.isnan(unused.coherence()[NAME]).all()
  close((unused + m).participation()[NAME], m.participation()[NAME] / 2)


def test_the_null_pairs_whole_examples():
  """Over slots that count, `s_n = sum_t (u . x_{order n, t}) (v . dy_nt)`."""
  params, x, mask, bases = setting()
  key = jax.random.key(7)
  null = moments(params, x, mask, bases, shuffle=key)
  order = np.asarray(jax.random.permutation(key, len(x)))
  assert (order != np.arange(len(x))).any()

  def keep(x, dy):  # Both, of every example, as one array.
    return jnp.concatenate([x, dy], axis=-1)

  loss = lambda p, b: curvature.negative_log_likelihood(
    script.MODEL.apply(p, b[0]), b[0], b[1]
  )
  statistic = sites.Statistic(keep, additive=False)
  read = sites.collect(loss, {'both': statistic}, NAME)
  both = np.asarray(read(params, (x, mask), mask=mask).values['both'][NAME])
  a, dy = both[..., :16].astype(np.float64), both[..., 16:].astype(np.float64)
  s = np.zeros((len(x), 3, 16, 32))
  for n in range(len(x)):
    here, there = np.flatnonzero(mask[n]), np.flatnonzero(mask[order[n]])
    for t, r in zip(here, there):
      for layer in range(3):
        u, v = (np.asarray(b[layer], np.float64) for b in bases[NAME])
        s[n, layer] += np.outer(a[layer, order[n], r] @ u, dy[layer, n, t] @ v)
  close(null.second[NAME], (s**2).sum(0))


def test_moments_take_one_gradient_of_an_example():
  for fisher in (
    curvature.Fisher(labels='exact'), curvature.Fisher(num_samples=2)
  ):  # fmt: skip
    with pytest.raises(ValueError, match='one gradient for each example'):
      curvature.component_moments(script.MODEL.apply, NAME, fisher)


def test_band_shares():
  scores = np.array([[4.0, 1.0], [3.0, 2.0]])
  values = np.array([[1.0, 8.0], [2.0, 5.0]])
  np.testing.assert_allclose(
    curvature.band_shares(scores, values, (0.25, 0.75)), [1 / 16, 7 / 16, 0.5]
  )
  with pytest.raises(ValueError, match='ascend within'):
    curvature.band_shares(scores, values, (0.75, 0.25))


def fake(first, n=40):
  """Moments whose curvature is given, of one component each."""
  zeros = {'w': np.zeros_like(first)}
  return curvature.Moments(
    zeros, {'w': first * n}, zeros, zeros, np.float32(n)
  )  # fmt: skip


def test_classes_follow_their_intervals():
  random = np.random.default_rng(0)
  true = np.array([[0.1, 1.0, 10.0]])
  groups = [fake(true * np.exp(0.1 * random.normal(size=3))) for _ in range(8)]
  edges = {'w': (np.array(0.5), np.array(2.0))}
  got = curvature.classify(groups, curvature.Moments.curvature, edges)['w']
  np.testing.assert_array_equal(got.classes, [[-1, 0, 1]])
  assert (got.low < got.scores).all() and (got.scores < got.high).all()
  fractions = got.fractions()
  assert sum(f.item() for f in fractions.values()) == pytest.approx(1)
  assert fractions['shared'] == pytest.approx(1 / 3)
  # Noise as large as the distance to the edges leaves nothing to tell.
  near = np.array([[0.48, 1.0, 1.9]])
  wild = [fake(near * np.exp(0.5 * random.normal(size=3))) for _ in range(8)]
  got = curvature.classify(wild, curvature.Moments.curvature, edges)['w']
  assert not got.classes.any()


def test_intervals_cover_as_often_as_they_say():
  random = np.random.default_rng(1)
  edges = {'w': (np.array(0.0), np.array(0.0))}
  true = np.ones((100, 20))
  groups = [
    fake(true + 0.3 * random.normal(size=true.shape)) for _ in range(10)
  ]
  got = curvature.classify(groups, curvature.Moments.curvature, edges)['w']
  covered = ((got.low <= 1) & (got.high >= 1)).mean()
  assert abs(covered - 0.95) < 4 * np.sqrt(0.95 * 0.05 / true.size)


def test_edges_of_a_null_hold_its_middle():
  null = fake(np.arange(1.0, 1001.0).reshape(20, 50))
  low, high = curvature.null_edges(null, curvature.Moments.curvature)['w']
  assert low == pytest.approx(25.975) and high == pytest.approx(975.025)
  low, high = curvature.kept_edges({'w': np.arange(100.0)[None]}, share=0.25)[
    'w'
  ]
  assert low == high and (np.arange(100.0) > low).mean() == 0.25


def test_weights_have_the_scores_of_their_components():
  random = np.random.default_rng(0)
  u, v = (np.linalg.qr(random.normal(size=(d, d)))[0] for d in (4, 3))
  zero = np.zeros(())
  spectrum = curvature.Spectrum(np.ones(4), u, np.ones(3), v, zero, zero)
  scores = random.random((4, 3))
  got = curvature.weight_scores(scores, spectrum)
  expected = np.einsum('ai,bj,ij->ab', u**2, v**2, scores)
  np.testing.assert_allclose(got, expected)
  np.testing.assert_allclose(got.sum(), scores.sum())


@pytest.mark.parametrize('groups', [0, 2])
def test_few_groups_raise(groups):
  with pytest.raises(ValueError, match='at least 3 groups'):
    curvature.classify([fake(np.ones((1, 1)))] * groups, None, {})
