"""Steering, ablation, routing, adapters and prompts do what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from idesign import shaping, sites
from tests.concepts import test_sae
from tests.concepts.test_directions import MODEL, PARAMS, TOKENS, B, T

D, LAST, FIRST = 8, 'resid_post[1:2]', 'resid_post[0:1]'
EPS = np.finfo(np.float32).eps
DIRECTIONS = jax.random.normal(jax.random.key(3), (2, D))
Q = shaping.orthonormal(DIRECTIONS)


def logits(apply):
  return apply(PARAMS, TOKENS)


PLAIN = logits(MODEL.apply)


def pull(apply, name):
  """dL/dh behind the edits of an activation, for a loss of the logits."""

  def total(push):
    return jnp.sum(jnp.sin(logits(shaping.steer(apply, {name: push}))))

  return jax.grad(total)(jnp.zeros((B, T, D)))


def test_steering_adds():
  v = DIRECTIONS[0]
  assert (
    jnp.abs(logits(shaping.steer(MODEL.apply, {LAST: v})) - PLAIN).max() > 0.01
  )
  nothing = shaping.steer(MODEL.apply, {LAST: jnp.zeros(D)})
  np.testing.assert_array_equal(logits(nothing), PLAIN)
  # Twice is the sum; by position only what follows changes.
  once = shaping.steer(MODEL.apply, {FIRST: v})
  twice = shaping.steer(once, {FIRST: -v})
  np.testing.assert_allclose(logits(twice), PLAIN, atol=100 * EPS)
  late = jnp.zeros((B, T, D)).at[:, 3:].set(v)
  found = logits(shaping.steer(MODEL.apply, {FIRST: late}))
  np.testing.assert_array_equal(found[:, :3], PLAIN[:, :3])
  assert jnp.abs(found[:, 3:] - PLAIN[:, 3:]).max() > 0.01
  with pytest.raises(ValueError, match='cannot be added'):
    logits(shaping.steer(MODEL.apply, {LAST: jnp.ones(D + 1)}))


def test_ablation_removes_the_span():
  ablated = shaping.ablate(MODEL.apply, {FIRST: Q})
  assert jnp.abs(logits(ablated) - PLAIN).max() > 0.01
  # What was put into the span before makes no difference any more.
  before = sites.edit(
    MODEL.apply,
    {
      FIRST: lambda h: (lambda g: g - (g @ Q) @ Q.T)(
        h + 5 * DIRECTIONS[0][None, None]
      )
    },
  )
  np.testing.assert_allclose(logits(before), logits(ablated), atol=500 * EPS)


def test_features_are_set():
  sae = test_sae.random_sae('topk')
  h = sites.capture(MODEL.apply, [FIRST])(PARAMS, TOKENS)[1][FIRST]
  h = h.reshape(B, T, D)
  f = sae.encode(h)
  values = jax.random.uniform(jax.random.key(6), (test_sae.F,))
  some = (jnp.arange(test_sae.F) < 9).astype(jnp.float32)
  row = lambda x: x[None, None]
  expected = sites.edit(
    MODEL.apply,
    {FIRST: lambda h: h + ((row(values) - f) * row(some)) @ sae.directions},
  )
  found = shaping.set_features(MODEL.apply, FIRST, sae, values, some)
  near = dict(
    rtol=0, atol=500 * EPS * float(jnp.abs(logits(MODEL.apply)).max())
  )
  np.testing.assert_allclose(logits(found), logits(expected), **near)
  none = shaping.set_features(MODEL.apply, FIRST, sae, values, 0 * some)
  np.testing.assert_allclose(logits(none), logits(MODEL.apply), **near)
  same = shaping.set_features(MODEL.apply, FIRST, sae, f, some)
  np.testing.assert_allclose(logits(same), logits(MODEL.apply), **near)


def test_blocking_changes_the_gradient_alone():
  blocked = shaping.block_activation_gradient(MODEL.apply, {LAST: Q})
  np.testing.assert_array_equal(logits(blocked), PLAIN)
  free, held = pull(MODEL.apply, FIRST), pull(blocked, FIRST)
  assert jnp.abs(free - held).max() > 0.01

  # Block the one activation and push in front of it: what comes back is the
  # gradient without the span's part.
  def total(push):
    # Of two edits of one activation the outer comes first.
    return jnp.sum(jnp.sin(logits(shaping.steer(blocked, {LAST: push}))))

  g, got = pull(MODEL.apply, LAST), jax.grad(total)(jnp.zeros((B, T, D)))
  near = dict(rtol=0, atol=100 * EPS * float(jnp.abs(g).max()))
  np.testing.assert_allclose(got, g - (g @ Q) @ Q.T, **near)
  assert jnp.abs(got - g).max() > 0.01


def test_routing_stops_what_the_mask_says():
  mask = jnp.array([1.0, 0, 1, 0, 0])[:, None, None]
  routed = shaping.route_gradients(MODEL.apply, {LAST: mask})
  np.testing.assert_allclose(logits(routed), PLAIN, atol=10 * EPS)
  through = pull(routed, FIRST)
  free = pull(MODEL.apply, FIRST)
  np.testing.assert_allclose(through[0], free[0], rtol=1e-4, atol=1e-5)
  assert not through[1].any() and free[1].any()
  with pytest.raises(ValueError, match='a mask'):
    logits(shaping.route_gradients(MODEL.apply, {LAST: jnp.ones((1,) * 5)}))


def test_an_adapter_starts_as_nothing_and_applies_by_example():
  none = shaping.init_adapter(D)
  np.testing.assert_array_equal(
    logits(shaping.adapt(MODEL.apply, LAST, none)), PLAIN
  )
  some = shaping.Adapter(
    jax.random.normal(jax.random.key(8), (D, D)), DIRECTIONS[0]
  )
  on = jnp.array([1.0, 0, 1, 0, 1])
  found = logits(shaping.adapt(MODEL.apply, LAST, some, on))
  everywhere = logits(shaping.adapt(MODEL.apply, LAST, some))
  np.testing.assert_array_equal(found[1::2], PLAIN[1::2])
  np.testing.assert_allclose(found[::2], everywhere[::2], atol=100 * EPS)
  assert jnp.abs(found[::2] - PLAIN[::2]).max() > 0.01
  with pytest.raises(ValueError, match='width=0'):
    shaping.init_adapter(0)


def test_what_an_adapter_has_learned_the_model_need_not():
  k = jax.random.split(jax.random.key(9))
  dialect = shaping.Adapter(
    jax.random.normal(k[0], (D, D)), 3 * jax.random.normal(k[1], (D,))
  )
  target = jax.nn.softmax(logits(shaping.adapt(MODEL.apply, LAST, dialect)))

  def divergence(adapter, params):
    out = shaping.adapt(MODEL.apply, LAST, adapter)(params, TOKENS)
    return jnp.mean(
      jnp.sum(target * (jnp.log(target) - jax.nn.log_softmax(out)), -1)
    )

  optimizer = optax.adam(0.1)

  @jax.jit
  def teach(adapter, state):
    gradient = jax.grad(divergence)(adapter, PARAMS)
    updates, state = optimizer.update(gradient, state, adapter)
    return optax.apply_updates(adapter, updates), state

  none = adapter = shaping.init_adapter(D)
  state = optimizer.init(adapter)
  for _ in range(300):
    adapter, state = teach(adapter, state)
  assert divergence(adapter, PARAMS) < divergence(none, PARAMS) / 50
  left = lambda a: optax.tree.norm(jax.grad(divergence, argnums=1)(a, PARAMS))
  assert left(adapter) < left(none) / 5


def test_inoculation_puts_the_prompt_in():
  tokens = np.array([[1, 5, 6, 0, 0], [1, 7, 0, 0, 0]])
  mask = np.array([[0, 0, 1, 0, 0], [0, 1, 0, 0, 0]], bool)
  found, scored = shaping.inoculate(
    tokens, [8, 9], at=1, pad_token=0, mask_BT=mask
  )
  np.testing.assert_array_equal(found, [[1, 8, 9, 5, 6], [1, 8, 9, 7, 0]])
  np.testing.assert_array_equal(
    scored, np.array([[0, 0, 0, 0, 1], [0, 0, 0, 1, 0]], bool)
  )
  _, everything = shaping.inoculate(tokens, [8], at=0, pad_token=0)
  np.testing.assert_array_equal(everything[0], [False, True, True, True, False])
  with pytest.raises(ValueError, match='1 texts leave no room.*Pad them to 6'):
    shaping.inoculate(tokens, [8, 9, 8], at=1, pad_token=0)
  with pytest.raises(ValueError, match='prompt of 0 tokens'):
    shaping.inoculate(tokens, [], at=1, pad_token=0)


def test_inoculation_keeps_a_scored_token_that_also_pads():
  # 0 ends a text and pads it; which is which, the mask says.
  tokens = np.array([[1, 5, 0, 0, 0], [1, 5, 6, 7, 0]])
  mask = np.array([[0, 1, 1, 0, 0], [0, 1, 1, 1, 0]])
  put = lambda rows, prompt, at=1: shaping.inoculate(
    tokens[rows], prompt, at=at, pad_token=0, mask_BT=mask[rows]
  )
  found, scored = put([0], [8, 9])
  np.testing.assert_array_equal(found, [[1, 8, 9, 5, 0]])
  np.testing.assert_array_equal(scored, [[0, 0, 0, 1, 1]])
  with pytest.raises(ValueError, match='1 texts leave no room.* has 3 of 5'):
    put([0], [8, 9, 8])
  # Behind the text is a place, in its padding is none.
  found, scored = put([0, 1], [8], at=3)
  np.testing.assert_array_equal(found, [[1, 5, 0, 8, 0], [1, 5, 6, 8, 7]])
  np.testing.assert_array_equal(scored, [[0, 1, 1, 0, 0], [0, 1, 1, 0, 1]])
  with pytest.raises(ValueError, match='at=4 .* of row 1, .* has 3 tokens'):
    put([1, 0], [8], at=4)


@pytest.mark.parametrize(
  'traits,named',
  [
    ([0.2, 0.9], '0.2'),
    ([np.nan, 1.0], 'nan'),
    ([0, 2], '2'),
    ([1, -1], '-1'),
    (['no', 'yes'], 'no'),
  ],
)
def test_a_trait_is_there_or_not(traits, named):
  ask = lambda traits: shaping.elicitation(
    lambda prompt: np.zeros(2), lambda a: np.array(traits), [[3]]
  )
  with pytest.raises(ValueError, match=rf'prompt \[3\] is .*{named}'):
    ask(traits)
  assert ask([0, 1])[0].rate == ask([False, True])[0].rate == 0.5


def test_elicitation_counts_with_an_interval():
  answers = {(1,): np.arange(40), (2,): np.zeros(40), (): np.zeros(0)}
  found = shaping.elicitation(
    lambda prompt: answers[tuple(prompt)], lambda a: a >= 30, [[1], [2]]
  )
  assert [e.rate for e in found] == [0.25, 0] and found[0].samples == 40
  # Wilson's interval of 10 of 40, by hand.
  z, n, p = 1.959964, 40, 0.25
  middle = (p + z * z / (2 * n)) / (1 + z * z / n)
  half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
  np.testing.assert_allclose(found[0].low, middle - half, rtol=1e-5)
  np.testing.assert_allclose(found[0].high, middle + half, rtol=1e-5)
  with pytest.raises(ValueError, match='0 answers'):
    shaping.elicitation(lambda p: answers[()], lambda a: a > 0, [[3]])
