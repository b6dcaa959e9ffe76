"""Edits: what they compute, and that they can be taken back exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idesign import curvature
from idesign import sites
from idesign.curvature import spectrum

L, D, F = 3, 6, 5


def params():
  keys = jax.random.split(jax.random.key(0), 3)
  return {
    'blocks': {
      'up': jax.random.normal(keys[0], (L, D, F)),
      'down': jax.random.normal(keys[1], (L, F, D)),
    },
    'head': {'kernel': jax.random.normal(keys[2], (D, 4))},
  }


def apply(p, x):
  body = lambda h, w: (h + jnp.tanh(h @ w['up']) @ w['down'], None)
  h, _ = jax.lax.scan(body, x, p['blocks'])
  return h @ p['head']['kernel']


X = jax.random.normal(jax.random.key(5), (9, D))


def setting():
  p = params()
  loss = lambda p, x: apply(p, x).sum(-1)
  at = sites.find_sites(loss, p, X).by_name
  factors = curvature.kfac_factors(apply, '.*')(p, X, key=jax.random.key(1))
  return p, at, curvature.spectra(factors)


def edits(at, bases, p, strength, **kwargs):
  parts = curvature.singular(p, at)
  return {
      'mass': curvature.keep_high_curvature(
          p, at, bases, mass=strength, **kwargs
      ),
      'share': curvature.keep_high_curvature(
          p, at, bases, share=strength, **kwargs
      ),
      'svd': curvature.keep_singular(p, at, parts, share=strength, **kwargs),
      'random': curvature.keep_random(
          p, at, bases, share=strength, seed=0, **kwargs
      ),
      'magnitude': curvature.keep_magnitude(p, at, share=strength, **kwargs),
      'salient': curvature.keep_salient(
          p, at, bases, share=strength, **kwargs
      ),
  }  # fmt: skip


KINDS = ('mass', 'share', 'svd', 'random', 'magnitude', 'salient')


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize('kind', KINDS)
def test_keeping_everything_changes_no_bit(kind):
  p, at, bases = setting()
  edit = edits(at, bases, p, 1.0)[kind]
  same(edit.apply(p), p)
  assert all(k == 1 for k in edit.kept.values())


@pytest.mark.parametrize('kind', KINDS)
def test_apply_and_revert_are_exact(kind):
  p, at, bases = setting()
  edit = edits(at, bases, p, 0.4)[kind]
  edited = edit.apply(p)
  assert not np.array_equal(edited['blocks']['up'], p['blocks']['up'])
  same(edit.revert(edited), p)
  same(edit.apply(edit.revert(edited)), edited)


@pytest.mark.parametrize('kind', KINDS)
def test_editing_twice_is_editing_once(kind):
  """Each edit is a projection, up to rounding in the parameters' dtype."""
  p, at, bases = setting()
  once = edits(at, bases, p, 0.4)[kind].apply(p)
  twice = edits(at, bases, once, 0.4)[kind].apply(once)
  eps = float(jnp.finfo(jnp.float32).eps)
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=32 * eps),
      twice, once,
  )  # fmt: skip


def test_kept_components_are_those_of_highest_curvature():
  p, at, bases = setting()
  edit = curvature.keep_high_curvature(p, at, bases, share=0.3)
  w, new = p['blocks']['up'], edit.apply(p)['blocks']['up']
  basis = bases['blocks/up']
  for layer in range(L):
    u, v = basis.input_basis[layer], basis.output_basis[layer]
    before, after = (u.T @ np.asarray(m[layer], float) @ v for m in (w, new))
    mass = basis.mass()[layer]
    kept = np.zeros(mass.size, bool)
    kept[np.argsort(-mass.reshape(-1), kind='stable')[: round(0.3 * D * F)]] = 1
    kept = kept.reshape(mass.shape)
    np.testing.assert_allclose(after[kept], before[kept], atol=1e-5)
    np.testing.assert_allclose(after[~kept], 0, atol=1e-5)
  assert edit.kept['blocks/up'] == pytest.approx(9 / 30)


def test_truncation_is_the_best_approximation_of_its_rank():
  p, at, _ = setting()
  edit = curvature.keep_singular(p, at, curvature.singular(p, at), share=0.4)
  new = np.asarray(edit.edited['blocks/up'], float)
  old = np.asarray(p['blocks']['up'], float)
  for layer in range(L):
    values = np.linalg.svd(old[layer], compute_uv=False)
    error = np.linalg.norm(new[layer] - old[layer])
    assert error == pytest.approx(np.sqrt((values[2:] ** 2).sum()), rel=1e-5)
    assert np.linalg.matrix_rank(new[layer], tol=1e-4) == 2


def test_a_random_edit_keeps_equally_many_and_depends_on_its_seed():
  p, at, bases = setting()
  share = 0.3
  ours = curvature.keep_high_curvature(p, at, bases, share=share)
  chance = [
    curvature.keep_random(p, at, bases, share=share, seed=s) for s in (0, 0, 1)
  ]
  assert chance[0].kept == pytest.approx(ours.kept)
  same(chance[0].edited, chance[1].edited)
  assert not np.array_equal(
    chance[0].edited['blocks/up'], chance[2].edited['blocks/up']
  )


@pytest.mark.parametrize('kind', KINDS)
def test_layers_that_are_not_chosen_keep_every_bit(kind):
  p, at, bases = setting()
  some = {k: at[k] for k in ('blocks/up', 'blocks/down')}
  edit = edits(some, bases, p, 0.4, layers={'blocks/up': [0, 2]})[kind]
  new = edit.apply(p)
  same(new['head'], p['head'])
  same(new['blocks']['up'][1], p['blocks']['up'][1])
  for changed in (
    (new['blocks']['up'][0], p['blocks']['up'][0]),
    (new['blocks']['up'][2], p['blocks']['up'][2]),
    (new['blocks']['down'][1], p['blocks']['down'][1]),
  ):
    assert not np.array_equal(*changed)


def test_sites_draw_their_components_independently():
  """Two weights of the same shape do not keep the same components."""
  p, at, _ = setting()
  (site,) = [at[k] for k in ('blocks/up',)]
  bases = {'blocks/up': None}
  masks = {}

  def record(params, at, bases, chosen, layers=None):
    masks.update(chosen)

  twins = {'a': site, 'b': site}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('idesign.curvature.baselines.keep_components', record)
    curvature.keep_random(p, twins, bases, share=0.5, seed=0)
  assert not np.array_equal(masks['a'], masks['b'])
  for mask in masks.values():
    share = mask.mean(axis=(-2, -1))
    np.testing.assert_allclose(share, share.flat[0])


def test_bits_are_compared_and_outlive_a_donation():
  p, at, _ = setting()
  p['head']['kernel'] = p['head']['kernel'].at[0, 0].set(0.0)
  edit = curvature.keep_singular(p, at, curvature.singular(p, at), share=0.5)
  halves = jax.tree.map(lambda a: a.astype(jnp.bfloat16), p)
  with pytest.raises(ValueError, match='Cannot apply'):
    edit.apply(halves)
  minus = {'kernel': p['head']['kernel'].at[0, 0].set(-0.0)}
  with pytest.raises(ValueError, match="Cannot apply.*'head/kernel'"):
    edit.apply(p | {'head': minus})
  again = jax.tree.map(jnp.array, p)
  jax.tree.map(lambda a: a.delete(), p)
  same(edit.revert(edit.apply(again)), again)


def test_an_edit_keeps_the_sharding():
  p, at, bases = setting()
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ('data',))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  p = jax.device_put(p, sharding)
  edited = curvature.keep_high_curvature(p, at, bases, share=0.4).apply(p)
  assert all(a.sharding == sharding for a in jax.tree.leaves(edited))


def test_an_edit_is_refused_where_it_does_not_belong():
  p, at, bases = setting()
  edit = curvature.keep_high_curvature(p, at, bases, share=0.4)
  edited = edit.apply(p)
  with pytest.raises(ValueError, match="Cannot apply.*'blocks/down'"):
    edit.apply(edited)
  with pytest.raises(ValueError, match="Cannot revert.*'blocks/down'"):
    edit.revert(p)
  with pytest.raises(ValueError, match='no parameter'):
    edit.apply({'other': p['head']})


def test_shared_weights_missing_spectra_and_bad_layers_raise():
  p, at, bases = setting()
  some = {'head/kernel': at['head/kernel']}
  with pytest.raises(ValueError, match="no spectrum for site 'head/kernel'"):
    curvature.keep_high_curvature(p, some, {}, share=0.5)
  with pytest.raises(ValueError, match='either mass or share'):
    curvature.keep_high_curvature(p, some, bases)
  with pytest.raises(ValueError, match=r'layers \[3\]'):
    curvature.keep_high_curvature(
      p, at, bases, share=0.5, layers={'blocks/up': [3]}
    )
  tied = lambda p, x: jnp.tanh(x @ p['w']) @ p['w'].T
  w = {'w': jax.random.normal(jax.random.key(0), (D, F))}
  found = sites.find_sites(lambda p, x: tied(p, x).sum(-1), w, X).sites
  with pytest.raises(ValueError, match="'w' is used more than once"):
    tied_at = {s.name: s for s in found}
    curvature.keep_singular(
      w, tied_at, curvature.singular(w, tied_at), share=0.5
    )


def test_factors_that_cannot_be_decomposed_raise():
  p, _, _ = setting()
  factors = curvature.kfac_factors(apply, '.*')(p, X, key=jax.random.key(1))
  with pytest.raises(ValueError, match='no example'):
    curvature.spectra(factors._replace(count=jnp.zeros(())))
  broken = factors.outputs | {
    'blocks/up': factors.outputs['blocks/up'] * jnp.nan
  }
  with pytest.raises(ValueError, match="output factor of 'blocks/up', layer 0"):
    curvature.spectra(factors._replace(outputs=broken))


def test_a_spectrum_rebuilds_its_factor():
  p, _, bases = setting()
  factors = curvature.kfac_factors(apply, '.*')(p, X, key=jax.random.key(1))
  basis = bases['blocks/down']
  rebuilt = np.einsum(
    'lij,lj,lkj->lik', basis.input_basis, basis.input_values, basis.input_basis
  )
  expected = np.asarray(factors.inputs['blocks/down']) / len(X)
  np.testing.assert_allclose(rebuilt, expected, atol=1e-6 * expected.max())
  assert (np.diff(basis.input_values) <= 0).all()


def test_a_tied_embedding_is_not_edited_behind_its_back():
  e = {'e': jax.random.normal(jax.random.key(0), (7, D))}
  loss = lambda p, t: jnp.sum(p['e'][t] @ p['e'].T, axis=(1, 2))
  tokens = jnp.arange(8).reshape(2, 4) % 7
  at = {s.name: s for s in sites.find_sites(loss, e, tokens).sites}
  with pytest.raises(ValueError, match="'e' is used more than once"):
    curvature.keep_singular(e, at, curvature.singular(e, at), share=0.5)


def test_layers_are_chosen_once():
  p, _, bases = setting()
  loss = lambda p, x: apply(p, x).sum(-1)
  found = sites.find_sites(loss, p, X, 'blocks/up[1:3]').sites
  at = {s.name: s for s in found}
  with pytest.raises(ValueError, match='layers .1, 3. already'):
    curvature.keep_high_curvature(
      p, at, bases, share=0.5, layers={'blocks/up': [1]}
    )


def test_magnitude_keeps_the_largest_weights():
  p, at, _ = setting()
  edited = curvature.keep_magnitude(p, at, share=0.4).apply(p)
  for old, new in zip(p['blocks']['up'], edited['blocks']['up']):
    order = np.argsort(-np.abs(np.asarray(old)).reshape(-1), kind='stable')
    expected = np.zeros(old.size)
    kept = order[: round(0.4 * old.size)]
    expected[kept] = np.asarray(old).reshape(-1)[kept]
    np.testing.assert_array_equal(np.asarray(new).reshape(-1), expected)


def test_salient_drops_what_raises_a_quadratic_loss_least():
  """`sum C^2 mass / 2` of what is dropped is least, of all sets as large."""
  p, at, bases = setting()
  name = 'head/kernel'
  edit = curvature.keep_salient(p, {name: at[name]}, bases, share=0.25)
  basis = bases[name]
  parts = lambda w: (
    basis.input_basis.T @ np.asarray(w, np.float64) @ basis.output_basis
  )
  before = parts(p['head']['kernel'])
  after = parts(edit.apply(p)['head']['kernel'])
  saliency = before**2 * basis.mass()
  dropped = np.abs(after) < 1e-5
  assert dropped.sum() == 18
  assert saliency[dropped].max() <= saliency[~dropped].min()
  # Not what curvature alone would drop.
  assert (dropped != ~curvature.curvature_masks(basis, share=0.25)).any()


def test_score_masks_of_masses_are_those_of_spectra():
  _, _, bases = setting()
  for basis in bases.values():
    for kept in ({'mass': 0.9}, {'share': 0.3}):
      np.testing.assert_array_equal(
        curvature.score_masks(basis.mass(), **kept),
        curvature.curvature_masks(basis, **kept),
      )


@pytest.mark.parametrize('share', [0.05, 0.5, 0.99])
def test_soft_masks_have_their_mean_and_the_order_of_scores(share):
  scores = 10.0 ** np.random.default_rng(0).uniform(-12, 3, (2, 8, 7))
  mask = curvature.soft_masks(scores, share=share)
  np.testing.assert_allclose(mask.mean((-2, -1)), share, rtol=1e-9)
  for layer, values in zip(mask, scores):
    order = np.argsort(values.reshape(-1))
    assert (np.diff(layer.reshape(-1)[order]) >= 0).all()
  assert (curvature.soft_masks(scores, share=1.0) == 1).all()
  with pytest.raises(ValueError, match='Only 0.5 of the scores'):
    curvature.soft_masks(np.array([[1.0, 0.0]]), share=0.6)


def test_soft_edits_scale_components():
  p, at, bases = setting()
  name = 'head/kernel'
  mask = curvature.soft_masks(bases[name].mass(), share=0.5)
  edit = curvature.keep_components(p, {name: at[name]}, bases, {name: mask})
  parts = lambda w: (
    bases[name].input_basis.T
    @ np.asarray(w, np.float64)
    @ bases[name].output_basis
  )
  close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)
  close(
    parts(edit.apply(p)['head']['kernel']), mask * parts(p['head']['kernel'])
  )
  assert edit.kept[name] == pytest.approx(0.5)


def test_a_union_keeps_what_each_domain_needs():
  """In the basis of both domains, as each of them would alone."""
  p, at, _ = setting()
  name = 'head/kernel'
  read = jax.jit(curvature.kfac_factors(apply, name))
  domains = [
    read(p, X * scale, key=jax.random.key(i))
    for i, scale in enumerate((1.0, jnp.array([[9.0, 0, 0, 0, 0, 0]])))
  ]
  bases = curvature.spectra(domains[0] + domains[1])
  masks = [
    curvature.score_masks(
      curvature.domain_mass(bases[name], d.inputs[name], d.outputs[name]),
      mass=0.9,
    )
    for d in domains
  ]
  both = curvature.union(*masks)
  np.testing.assert_array_equal(both, masks[0] | masks[1])
  assert (masks[0] != masks[1]).any()
  # A spectrum's own factors have its own mass along it.
  total = domains[0] + domains[1]
  own = curvature.domain_mass(
    bases[name], total.inputs[name], total.outputs[name]
  )
  scale = float(total.count) * float(total.positions[name])
  np.testing.assert_allclose(
    own / scale, bases[name].mass(), atol=1e-6 * bases[name].mass().max()
  )


@pytest.mark.parametrize('alone', [1, 5, 10_000])
@pytest.mark.parametrize('where', ['host', 'devices'])
def test_spectra_put_factors_together_again(where, alone, monkeypatch):
  monkeypatch.setattr(spectrum, '_ALONE', alone)
  p, _, _ = setting()
  factors = curvature.kfac_factors(apply, '.*')(p, X, key=jax.random.key(1))
  bound = 1e-13 if where == 'host' else 2e-5
  for name, s in curvature.spectra(factors, where=where).items():
    whole = (
      s.input_basis * s.input_values[..., None, :]
    ) @ s.input_basis.swapaxes(-1, -2)
    expected = np.asarray(factors.inputs[name], np.float64) / len(X)
    error = np.linalg.norm(whole - expected) / np.linalg.norm(expected)
    assert error <= bound
    assert s.input_residual.shape == expected.shape[:-2]
    assert s.input_residual.max() <= bound
    # Softmax gradients sum to zero, so that an eigenvalue is clamped, which in
    # float32 is a rounding below zero.
    eps = float(jnp.finfo(jnp.float32).eps)
    assert s.output_residual.max() <= max(bound, eps)
    assert (np.diff(s.input_values) <= 0).all() and s.input_values.min() >= 0


def test_small_factors_keep_their_spectrum_on_devices():
  """At interpolation squares of gradients leave the range of float32."""
  p, _, _ = setting()
  factors = curvature.kfac_factors(apply, '.*')(p, X, key=jax.random.key(1))
  small = factors._replace(
    outputs=jax.tree.map(lambda g: g * 1e-30, factors.outputs)
  )
  for name, s in curvature.spectra(small, where='devices').items():
    large = curvature.spectra(factors)[name].output_values * 1e-30
    np.testing.assert_allclose(
      s.output_values, large, atol=2e-5 * large.max(), rtol=0
    )


def test_work_is_spread_by_cost():
  costs = [5.0, 3.0, 3.0, 2.0, 2.0, 1.0]
  shares = curvature.spread(costs, 3)
  assert sorted(i for share in shares for i in share) == list(range(6))
  assert [sum(costs[i] for i in share) for share in shares] == [6.0, 5.0, 5.0]
  assert curvature.spread([], 2) == [[], []]
