"""Fitted probes: at the optimum, calibrated, and by no accident."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.linear_model
import sklearn.metrics

from idesign import probes

N, T, E = 400, 3, 4
KEY = jax.random.key(0)
ROW = np.arange(N)[:, None, None]


def make(seed=0, n=N, gap=1.5):
  """Spans of one to three tokens; the label moves one direction."""
  random = np.random.default_rng(seed)
  labels = random.integers(0, 2, n)
  h = 5 + 2 * random.normal(size=(n, T, E))
  h[..., 0] += gap * 2 * (labels[:, None] - 0.5)
  mask = np.arange(T)[None] < random.integers(1, T + 1, n)[:, None]
  # What stands outside of the span must not matter.
  h = np.where(mask[..., None], h, np.nan).astype(np.float32)
  return h, mask, labels


def auroc(config, params, data):
  logits = probes.probe_logits(config, params, *data[:2])[:, 0]
  return sklearn.metrics.roc_auc_score(data[2], np.asarray(logits))


@pytest.mark.parametrize(
  'kind,pool',
  [('logistic', 'mean'), ('logistic', 'last'), ('logistic', 'max'),
   ('mean_difference', 'mean'), ('mlp', 'mean'), ('attention', 'mean')],
)  # fmt: skip
def test_finds_what_is_there(kind, pool):
  config = probes.ProbeConfig(
    kind=kind, d_in=E, pool=pool, hidden=4, heads=2
  )
  fit = probes.FitConfig(steps=200, batch_size=128)
  params = probes.fit_probe(config, *make(), fit=fit, key=KEY)
  assert auroc(config, params, make(1)) > 0.8


def test_a_logistic_probe_is_at_the_optimum():
  h, mask, labels = make()
  config = probes.ProbeConfig(kind='logistic', d_in=E)
  params = probes.fit_probe(
    config, h, mask, labels, fit=probes.FitConfig(l2=0.1), key=KEY
  )

  def loss(learned):
    logits = probes.probe_logits(config, {**params, **learned}, h, mask)[:, 0]
    nll = jnp.mean(jnp.logaddexp(0, -logits * (2 * labels - 1)))
    return nll + 0.05 * jnp.sum(learned['weight'] ** 2)

  learned = {k: params[k] for k in ('weight', 'bias')}
  for g in jax.tree.leaves(jax.grad(loss)(learned)):
    np.testing.assert_allclose(g, np.zeros(g.shape), atol=1e-5)


def test_two_logits_are_one():
  h, mask, labels = make()
  one, two = (
    probes.ProbeConfig(kind='logistic', d_in=E, classes=c) for c in (1, 2)
  )
  a, b = (
    probes.probe_logits(
      c, probes.fit_probe(c, h, mask, labels, key=KEY), h, mask
    )
    for c in (one, two)
  )
  np.testing.assert_allclose(a[:, 0], b[:, 1] - b[:, 0], rtol=1e-5, atol=1e-5)


def test_a_mean_difference_points_from_mean_to_mean():
  h, mask, labels = make()
  config = probes.ProbeConfig(kind='mean_difference', d_in=E)
  params = probes.fit_probe(config, h, mask, labels, key=KEY)
  mean, scale = (np.asarray(params[k]) for k in ('mean', 'scale'))
  z = (np.nan_to_num(h) - mean) / scale
  z = (z * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
  want = z[labels == 1].mean(0) - z[labels == 0].mean(0)
  got = np.asarray(params['weight'])[:, 0]
  cosine = want @ got / np.linalg.norm(want) / np.linalg.norm(got)
  assert cosine > 1 - 1e-5


def test_a_feature_that_never_changed_says_nothing():
  h, mask, labels = make()
  h[..., 3] = 7.0
  config = probes.ProbeConfig(kind='logistic', d_in=E)
  params = probes.fit_probe(config, h, mask, labels, key=KEY)
  moved = h.copy()
  moved[..., 3] = -1e6
  f = lambda x: np.asarray(probes.probe_logits(config, params, x, mask))
  np.testing.assert_array_equal(f(h), f(moved))


def test_calibration_repairs_overconfidence_and_keeps_the_order():
  train, held, test = make(0), make(1, 4000), make(2, 4000)
  config = probes.ProbeConfig(kind='logistic', d_in=E)
  params = probes.fit_probe(config, *train, key=KEY)
  bold = {**params, 'weight': 6 * params['weight'], 'bias': params['bias'] + 3}
  logits = lambda p, d: np.asarray(probes.probe_logits(config, p, *d[:2]))[:, 0]
  repaired = probes.calibrate(bold, logits(bold, held), held[2])
  error = lambda p: probes.reliability(
    1 / (1 + np.exp(-logits(p, test))), test[2]
  ).error
  assert error(bold) > 0.1 and error(repaired) < 0.03
  assert auroc(config, bold, test) == auroc(config, repaired, test)


def test_calibration_refuses_a_probe_of_something_else():
  config = probes.ProbeConfig(kind='logistic', d_in=E)
  params = probes.fit_probe(config, *make(), key=KEY)
  with pytest.raises(ValueError, match='slope'):
    probes.calibrate(params, np.array([0.0, 1, 2, 3]), np.array([1, 1, 0, 0]))


def test_another_fit_of_the_same_shapes_compiles_nothing():
  from idesign.probes import fit as module

  config = probes.ProbeConfig(kind='mlp', d_in=E, hidden=3)
  fit = probes.FitConfig(steps=2, batch_size=8)
  sizes = []
  for seed in range(3):
    probes.fit_probe(config, *make(seed), fit=fit, key=jax.random.key(seed))
    sizes.append(module._fit_adam._cache_size())
  assert sizes[0] == sizes[1] == sizes[2]


def test_chance_is_a_half():
  config = probes.ProbeConfig(kind='logistic', d_in=E)
  null = probes.shuffled_null(config, make(0), make(1), repeats=10)
  real = auroc(config, probes.fit_probe(config, *make(0), key=KEY), make(1))
  assert abs(null.mean() - 0.5) < 0.15 and real > null.max()


def test_no_entity_is_in_two_parts():
  entities = np.repeat(np.arange(50), 7)
  parts = probes.split_entities(entities, (0.5, 0.3, 0.2), seed=0)
  assert (sum(p.astype(int) for p in parts) == 1).all()
  sets = [set(entities[p]) for p in parts]
  assert [len(s) for s in sets] == [25, 15, 10]
  assert not sets[0] & sets[1] and not sets[1] & sets[2]


@pytest.mark.parametrize(
  'change,message',
  [
    (lambda h, m, y: (h, m, 0 * y), r'labels are \[0\]'),
    (lambda h, m, y: (h, m, 2 * y), r'labels are \[0, 2\]'),
    (lambda h, m, y: (h[..., :3], m, y), r'\(400, 3, 3\)'),
    (lambda h, m, y: (h, m[:5], y), 'do not belong together'),
    (lambda h, m, y: (h, np.where(np.arange(N)[:, None] == 7, False, m), y),
     'example 7 has an empty span'),
    (lambda h, m, y: (np.where(ROW == 9, np.inf, h), m, y),
     'example 9 is not finite'),
  ],
)  # fmt: skip
def test_bad_data(change, message):
  config = probes.ProbeConfig(kind='logistic', d_in=E)
  with pytest.raises(ValueError, match=message):
    probes.fit_probe(config, *change(*make()), key=KEY)


def test_a_class_without_examples():
  h, mask, labels = make()
  config = probes.ProbeConfig(kind='logistic', d_in=E, classes=3)
  with pytest.raises(ValueError, match='classes=3'):
    probes.fit_probe(config, h, mask, labels, key=KEY)


@pytest.mark.parametrize('shares', [(0.5, 0.4), (1.0, 0.0), (0.999, 0.001)])
def test_splits_that_cannot_be(shares):
  with pytest.raises(ValueError, match='shares='):
    probes.split_entities(np.arange(10), shares, seed=0)
