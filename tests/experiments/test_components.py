"""Who needs which component: ranks, effects, removals and AUROCs, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import components
from experiments import components_claims
from idesign import curvature
from idesign import sites


def test_ranks_and_ranks_at_equal_curvature():
  assert components.ranks(np.array([[3.0, 1.0], [2.0, 9.0]])).tolist() == [
    [2 / 3, 0.0],
    [1 / 3, 1.0],
  ]
  random = np.random.default_rng(0)
  on = random.random(4000)
  follows = on + 1e-3 * random.random(4000)
  # What only follows curvature says nothing at equal curvature.
  got = components.matched(follows, on)
  assert abs(np.corrcoef(got, on)[0, 1]) < 0.1
  own = random.random(4000)
  got = components.matched(own, on)
  assert np.corrcoef(got, own)[0, 1] > 0.95
  assert got.min() == 0 and got.max() == 1


def test_cohens_d():
  a, b = np.array([1.0, 2.0, 3.0]), np.array([2.0, 3.0, 4.0, 5.0])
  pooled = (2 * 1.0 + 3 * 5 / 3) / 5
  assert components.cohen(a, b) == pytest.approx(-1.5 / np.sqrt(pooled))


def network():
  random = np.random.default_rng(1)
  params = {'up': jnp.asarray(random.normal(size=(5, 6)), jnp.float32)}

  def losses(params, batch):
    x, y = batch
    return curvature.negative_log_likelihood(x @ params['up'], y)

  x = jnp.asarray(random.normal(size=(7, 5)), jnp.float32)
  y = jnp.asarray(random.integers(0, 6, 7))
  return params, losses, (x, y)


def test_places_are_means_of_maps_under_squared_gradients():
  params, losses, batch = network()
  random = np.random.default_rng(2)
  u, v = (np.linalg.qr(random.normal(size=(d, d)))[0] for d in (5, 6))
  maps = random.random((3, 5, 6))
  read = components.placements(losses, 'up')
  bases = tuple(jnp.asarray(b, jnp.float32) for b in (u, v))
  got = read(params, batch, bases, jnp.asarray(maps, jnp.float32))
  g = sites.vmap_grad(losses, params, batch)['up']
  s = np.einsum('bio,ij,op->bjp', g, u, v) ** 2
  s = s / s.sum((1, 2), keepdims=True)
  np.testing.assert_allclose(got, np.einsum('bjp,mjp->bm', s, maps), rtol=1e-4)


def test_removals_take_one_component_away():
  params, losses, batch = network()
  site = sites.find_sites(losses, params, batch).sites[0]
  random = np.random.default_rng(3)
  u, v = (np.linalg.qr(random.normal(size=(d, d)))[0] for d in (5, 6))
  groups = {'memorized': batch, 'shared': jax.tree.map(lambda a: a[:2], batch)}
  read = components.removals(losses, site, groups)
  got = read(
    params, 0, jnp.asarray(u.T[[1, 4]], jnp.float32),
    jnp.asarray(v.T[[0, 5]], jnp.float32),
  )  # fmt: skip
  w = np.asarray(params['up'], np.float64)
  for k, (i, j) in enumerate(((1, 0), (4, 5))):
    new = w - (u[:, i] @ w @ v[:, j]) * np.outer(u[:, i], v[:, j])
    for name, part in groups.items():
      rise = (
        losses({'up': jnp.asarray(new, jnp.float32)}, part).mean()
        - losses(params, part).mean()
      )
      assert float(got[name][k]) == pytest.approx(float(rise), abs=1e-5)


def test_components_are_drawn_by_what_they_hold():
  parts = np.zeros((4, 5))
  parts[1, 2], parts[3, 0], parts[0, 4] = 5.0, 5.0, 1e-3
  drawn = components.draw_components(parts, 2, np.random.default_rng(0))
  assert {tuple(d) for d in drawn.tolist()} == {(1, 2), (3, 0)}


def test_classes_of_need():
  rises = {
    components.MEMORIZED: np.array([0.5, 0.5, 0.0, 0.001, 0.5]),
    components.SHARED_GROUP: np.array([0.0, 0.4, 0.3, 0.0, 0.04]),
  }
  alone, shared = components.classes(rises, needed=0.02, spared=0.1)
  # Needed by memorized ones alone; by both; by others; by nobody; and by
  # memorized ones with hardly anything for the others.
  assert alone.tolist() == [True, False, False, False, True]
  assert shared.tolist() == [False, True, True, False, False]


def test_aurocs_of_all_pairs_and_of_like_ones():
  alone = np.array([1] * 6 + [0] * 6, bool)
  shared = ~alone
  on = np.array([1.0] * 3 + [100.0] * 3 + [1.0] * 3 + [100.0] * 3)
  perfect = np.array([0.0] * 6 + [1.0] * 6)
  got = components.aurocs({'a': perfect, 'b': on}, alone, shared, on)
  assert got['a'] == {'auroc': 1.0, 'at equal curvature': 1.0}
  assert got['b'] == {'auroc': 0.5, 'at equal curvature': 0.5}
  assert got['memorization'] == 6 and got['shared'] == 6
  few = alone & (np.arange(12) < 4)
  assert components.aurocs({'a': perfect}, few, shared, on)['a'] == {
    'auroc': None, 'at equal curvature': None
  }  # fmt: skip


def test_claims_read_effects_of_every_layer():
  effect = lambda a, b: {'against shared': a, 'against never memorized': b}
  matched = 'participation, at equal curvature'
  null = 'participation of the null, at equal curvature'
  layer = {
    'curvature': effect(-2.0, -0.2), 'participation': effect(-1.0, 0.0),
    matched: effect(-0.8, -0.1), null: effect(-0.3, 0.0),
  }  # fmt: skip
  other = {**layer, 'curvature': effect(-1.0, 0.2)}
  analysis = {
    'effects': {'up': layer, 'down': other},
    # Six that memorized examples alone need, five that others need; of the
    # thirty pairs two are in the wrong order.
    'rises': {
      components.MEMORIZED: [0.5] * 6 + [0.0] * 5 + [0.0],
      components.SHARED_GROUP: [0.0] * 6 + [0.5] * 5 + [0.0],
    },
    'scores': {
      'curvature': [1, 2, 3, 4, 5, 9, 10, 11, 12, 8, 7, 6],
      # Of their product all pairs are in the right order, of neither alone.
      'K-FAC': [1, 1, 1, 1, 1, 4, 2, 2, 2, 2, 2, 1],
      'weight': [1, 1, 1, 1, 1, 1, 4, 4, 4, 4, 4, 1],
    },
  }
  rows = components_claims.rows([analysis, analysis], 'curvature')
  values = {row[0]: row[2] for row in rows}
  assert values['low_curvature'] == [-1.5, -1.5]
  assert values['low_curvature_unusual'] == [0.0, 0.0]
  assert values['few_share_null'] == pytest.approx([-0.5, -0.5])
  assert values['score'] == pytest.approx([28 / 30, 28 / 30])
  told = components.told_apart(analysis)
  assert told['saliency']['auroc'] == 1 and told['K-FAC']['auroc'] < 1
  analysis['rises'] = {g: [0.0] * 12 for g in analysis['rises']}
  rows = components_claims.rows([analysis, analysis], 'curvature')
  assert 'score' not in {row[0] for row in rows}
