"""Probes: what each computes, on one span."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idesign import probes

T, E = 5, 6
KINDS = ('logistic', 'mean_difference', 'mlp', 'attention')
POOLS = ('mean', 'max', 'last')
MASK = jnp.array([False, True, True, False, True])
RTOL = 64 * np.finfo(np.float32).eps


def make(kind, pool='mean', classes=1, seed=0):
  config = probes.ProbeConfig(
    kind=kind, d_in=E, pool=pool, classes=classes, hidden=3, heads=2
  )
  params = probes.init_probe(config, jax.random.key(seed))
  # Nothing left at zero or one, which might hide a mistake.
  keys = jax.random.split(jax.random.key(seed + 1), len(params))
  params = {
    k: x + 0.3 * jax.random.normal(key, x.shape)
    for key, (k, x) in zip(keys, sorted(params.items()))
  }
  return config, params


H = jax.random.normal(jax.random.key(9), (T, E))


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('pool', POOLS)
def test_outside_of_the_span_nothing_matters(kind, pool):
  config, params = make(kind, pool)
  f = lambda h: probes.apply_probe(config, params, h, MASK)[0]
  other = jnp.where(MASK[:, None], H, jnp.nan)
  assert f(H) == f(other)
  gradient = jax.grad(f)(other)
  assert np.isfinite(np.asarray(gradient)).all()
  assert not np.asarray(gradient)[~np.asarray(MASK)].any()


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('pool', POOLS)
def test_one_token_is_its_own_pool(kind, pool):
  config, params = make(kind, pool)
  got = probes.token_logits(config, params, H)
  for t in range(T):
    alone = probes.apply_probe(config, params, H, jnp.arange(T) == t)
    np.testing.assert_allclose(got[t], alone, rtol=RTOL, atol=RTOL)


def test_by_hand():
  """Each formula of the module, in NumPy."""
  z = lambda p: (np.asarray(H) - p['mean']) / p['scale']
  rows = np.flatnonzero(MASK)
  for kind in KINDS:
    for pool in POOLS:
      config, params = make(kind, pool, classes=1)
      p = {k: np.asarray(x) for k, x in params.items()}
      x = z(p)[rows]

      def head(x, p=p, kind=kind):
        if kind == 'mlp':
          x = np.asarray(jax.nn.gelu(x @ p['in_weight'] + p['in_bias']))
        return x @ p['weight'] + p['bias']

      if kind == 'attention':
        scores = (x @ p['key_weight']) @ p['query'].T / np.sqrt(3)
        share = np.exp(scores) / np.exp(scores).sum(0)
        pooled = (share.T @ (x @ p['value_weight'])).reshape(-1)
        want = pooled @ p['weight'] + p['bias']
      elif pool == 'mean':
        want = head(x.mean(0))
      elif pool == 'max':
        want = head(x).max(0)
      else:
        want = head(x[-1])
      got = probes.apply_probe(config, params, H, MASK)
      np.testing.assert_allclose(got, want, rtol=8 * RTOL, atol=8 * RTOL)


def test_filler_dilutes_a_mean_and_not_a_maximum():
  mask = jnp.ones(T, bool)
  loud = jnp.zeros((T, E)).at[0].set(10.0)
  for pool, diluted in (('mean', True), ('max', False)):
    config = probes.ProbeConfig(kind='logistic', d_in=E, pool=pool)
    params = probes.init_probe(config, jax.random.key(0))
    params['weight'] = jnp.ones((E, 1))
    score = lambda m: probes.apply_probe(config, params, loud, m)[0]
    assert (score(mask) < score(jnp.arange(T) == 0)) == diluted


@pytest.mark.parametrize('pool', POOLS)
def test_an_empty_span_has_finite_logits(pool):
  for kind in KINDS:
    config, params = make(kind, pool)
    got = probes.apply_probe(config, params, H, jnp.zeros(T, bool))
    assert np.isfinite(np.asarray(got)).all()


@pytest.mark.parametrize(
  'changes,message',
  [
    ({'kind': 'svm'}, "kind='svm'"),
    ({'pool': 'sum'}, "pool='sum'"),
    ({'d_in': 0}, 'd_in=0'),
    ({'kind': 'mean_difference', 'classes': 3}, 'classes=3'),
  ],
)
def test_bad_config(changes, message):
  with pytest.raises(ValueError, match=message):
    probes.ProbeConfig(**{'kind': 'mlp', 'd_in': 4} | changes)


def test_another_width():
  config, params = make('mlp')
  with pytest.raises(ValueError, match=r'\(5, 7\)'):
    probes.apply_probe(config, params, jnp.zeros((T, E + 1)), MASK)
