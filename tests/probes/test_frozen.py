"""A frozen probe: the same score, no gradient, and no weak one by accident."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idesign import models, probes, sites

CONFIG = models.TransformerConfig(
  vocab_size=11, d_model=8, d_ff=16, n_heads=2, n_layers=2, max_len=8
)
LM = models.transformer(CONFIG)
NAMES = ['resid_post[1:2]', 'resid_post[0:1]']
OBSERVE = probes.observer(LM.apply, NAMES)
PROBE = probes.ProbeConfig(kind='mlp', d_in=16, hidden=4)
GOOD = probes.ProbeQuality(0.95, 0.02, 500, 500, 100)
TOKENS = jax.random.randint(jax.random.key(2), (3, 6), 0, 11)
MASK = jnp.ones((3, 6), bool).at[1, 4:].set(False)
SPANS = MASK & (jnp.arange(6)[None] >= 2)


def make(quality=GOOD, **kwargs):
  return probes.freeze(
    LM.init(jax.random.key(0)),
    probes.init_probe(PROBE, jax.random.key(1)),
    observe=OBSERVE,
    config=PROBE,
    quality=quality,
    **kwargs,
  )


def test_an_observation_is_one_pass_of_the_model():
  params = LM.init(jax.random.key(0))
  got = OBSERVE(params, TOKENS, MASK)
  np.testing.assert_array_equal(
    got.logits_BTV, LM.apply(params, TOKENS, mask_BT=MASK)
  )
  layers = sites.capture(
    lambda p, t: LM.apply(p, t, mask_BT=MASK), ['resid_post']
  )(params, TOKENS)[1]['resid_post']
  want = jnp.concatenate([layers[1], layers[0]], axis=-1)
  np.testing.assert_array_equal(got.h_BTE, want)


def test_several_layers_of_one_name():
  got = probes.observer(LM.apply, ['resid_post'])(
    LM.init(jax.random.key(0)), TOKENS, MASK
  )
  assert got.h_BTE.shape == (3, 6, 16)


def test_token_logprobs():
  logits = jax.random.normal(jax.random.key(0), (3, 6, 11))
  got = probes.token_logprobs(logits, TOKENS)
  assert not np.asarray(got[:, 0]).any()
  for b, t in np.ndindex(3, 5):
    want = jax.nn.log_softmax(logits[b, t])[TOKENS[b, t + 1]]
    np.testing.assert_allclose(got[b, t + 1], want, rtol=1e-6)


def test_texts_are_read_in_batches():
  params = LM.init(jax.random.key(0))
  whole = OBSERVE(params, TOKENS, MASK).h_BTE
  got = probes.read_spans(
    OBSERVE, params, np.asarray(TOKENS), np.asarray(MASK), batch_size=2
  )
  np.testing.assert_allclose(got, whole, rtol=1e-5, atol=1e-6)


def total(frozen, live, allow):
  seen = frozen.read(TOKENS, MASK)
  own = frozen.observe(live, TOKENS, MASK)
  return (
    frozen.scores(seen, SPANS).sum()
    + frozen.live_scores(own, SPANS, allow_gradient=allow).sum()
  )


def test_gradients_are_exactly_zero():
  """With respect to everything: model, probe, and the live model."""
  frozen, live = make(), LM.init(jax.random.key(5))
  grad = jax.jit(
    jax.grad(total, (0, 1), allow_int=True), static_argnums=2
  )
  for leaf in jax.tree.leaves(grad(frozen, live, False)):
    assert not np.asarray(leaf).any()
  own, other = grad(frozen, live, True)
  assert any(np.asarray(x).any() for x in jax.tree.leaves(other))
  assert not any(np.asarray(x).any() for x in jax.tree.leaves(own.params))


def test_both_readings_agree_where_the_models_do():
  frozen = make()
  own = frozen.observe(frozen.params, TOKENS, MASK)
  a = frozen.scores(frozen.read(TOKENS, MASK), SPANS)
  for allow in (False, True):
    b = frozen.live_scores(own, SPANS, allow_gradient=allow)
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('batch_size', [1, 2, 1024])
def test_scores_of_many_texts_are_those_of_each(batch_size):
  frozen = make()
  many = probes.score_spans(
    frozen, TOKENS, MASK, SPANS, batch_size=batch_size
  )
  want = frozen.scores(frozen.read(TOKENS, MASK), SPANS)
  np.testing.assert_allclose(many, want, rtol=1e-5)
  with pytest.raises(ValueError, match='mask'):
    probes.score_spans(frozen, TOKENS, MASK[:, 1:], SPANS)


def test_it_owns_its_parameters():
  """Donating the model that it was made from does not take them away."""
  params = LM.init(jax.random.key(0))
  frozen = probes.freeze(
    params, probes.init_probe(PROBE, jax.random.key(1)),
    observe=OBSERVE, config=PROBE, quality=GOOD,
  )  # fmt: skip
  before = frozen.scores(frozen.read(TOKENS, MASK), SPANS)
  jax.tree.map(lambda x: x.delete(), params)
  after = frozen.scores(frozen.read(TOKENS, MASK), SPANS)
  np.testing.assert_array_equal(before, after)


def test_weak_probes_are_refused_by_number():
  weak = GOOD._replace(auroc=0.872, entities=37)
  with pytest.raises(probes.WeakProbeError, match='0.872 on 37 unseen'):
    make(weak)
  assert make(weak, accept_weak_probe=True).quality == weak
  assert make(GOOD._replace(auroc=0.9)).quality.auroc == 0.9


def test_pressures_are_ordered():
  P = probes.Pressure
  assert P.NONE < P.FROZEN < P.LIVE < P.GRADIENT


def test_nothing_to_read():
  with pytest.raises(ValueError, match='no activation'):
    probes.observer(LM.apply, [])
  with pytest.raises(sites.SelectionError, match='mlp_in'):
    probes.observer(LM.apply, ['mlp_in'])(
      LM.init(jax.random.key(0)), TOKENS, MASK
    )


@pytest.mark.parametrize('at_most', list(probes.Pressure))
def test_a_probe_is_read_with_no_more_pressure_than_is_declared(at_most):
  frozen = make()
  seen = frozen.read(TOKENS, MASK)
  for needed, read in (
    ('FROZEN', lambda: frozen.scores(seen, SPANS)),
    ('LIVE', lambda: frozen.live_scores(seen, SPANS)),
    ('GRADIENT', lambda: frozen.live_scores(seen, SPANS, allow_gradient=True)),
  ):
    with probes.declared(at_most):
      if probes.Pressure[needed] <= at_most:
        read()
      else:
        message = f'declares pressure {at_most.name}: .*Pressure.{needed}'
        with pytest.raises(probes.PressureError, match=message):
          read()
    read()  # Outside of a reward nothing is declared.


def test_spans_of_other_texts_are_refused():
  frozen = make()
  seen = frozen.read(TOKENS, MASK)
  with pytest.raises(ValueError, match='spans have shape .*; one of each text'):
    frozen.scores(seen, SPANS[:1])
