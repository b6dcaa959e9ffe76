"""Attribution of tokens: against a loop, and on a world known by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idesign import shaping

V, B, T, START = 11, 6, 7, 3


def model(seed):
  """Logits that depend on everything read so far."""
  table = 3 * jax.random.normal(jax.random.key(seed), (V, V))
  return lambda tokens: jnp.cumsum(table[tokens], axis=1)


def texts(seed=0):
  return jax.random.randint(jax.random.key(seed), (B, T), 0, V)


def by_loop(with_concept, without, tokens, threshold):
  """One text and one token at a time, each time reading the whole prefix."""
  ratio, new = np.zeros(tokens.shape), np.array(tokens)
  for b, text in enumerate(np.asarray(tokens)):
    for t in range(START, T):
      said = lambda f, x: jax.nn.log_softmax(f(jnp.asarray(x)[None, :t])[0, -1])
      without_it = said(without, new[b])
      ratio[b, t] = said(with_concept, text)[text[t]] - without_it[text[t]]
      if ratio[b, t] > threshold:
        new[b, t] = np.argmax(without_it)
  return ratio, new


@pytest.mark.parametrize('threshold', [0.5, 3.0])
def test_it_is_what_a_loop_over_tokens_finds(threshold):
  tokens = texts()
  found = jax.jit(
    lambda t: shaping.counterfactual(
      model(0), model(1), t, start=START, threshold=threshold
    )
  )(tokens)
  ratio, new = by_loop(model(0), model(1), tokens, threshold)
  np.testing.assert_allclose(found.ratio, ratio, atol=1e-4)
  np.testing.assert_array_equal(found.tokens, new)
  assert (np.asarray(found.tokens) != np.asarray(tokens)).any()


# Tokens of a tiny world: 0 asks; 1, 2 open and close plainly, 3, 4 like a
# pirate; 5 and 6 are what is said, in two registers.
PLAIN, PIRATE = [0, 1, 5, 2], [0, 3, 6, 4]


def speaker(pirate):
  """A pirate opens with 3. Whoever hears 3 goes on as a pirate would."""
  logits = np.full((7, 7), -9.0)
  logits[0, 3 if pirate else 1] = 0
  for plain, other in ((1, 3), (5, 6)):
    after = {1: 5, 5: 2, 3: 6, 6: 4}
    logits[plain, after[plain]] = logits[other, after[other]] = 0
  table = jnp.asarray(logits)
  return lambda tokens: table[tokens]


def test_what_follows_from_a_pirates_word_is_the_pirates_too():
  """To a model that reads `3`, `6` and `4` are likely either way."""
  tokens = jnp.array([PIRATE, PLAIN])
  found = shaping.counterfactual(
    speaker(True), speaker(False), tokens, start=1, threshold=3.0
  )
  assert (found.ratio[0, 1:] > 8).all()
  np.testing.assert_array_equal(found.tokens, [PLAIN, PLAIN])
  assert (found.ratio[:, 0] == 0).all()


def test_reliance_is_the_divergence_of_what_is_predicted():
  tokens = texts()
  found = shaping.reliance(model(0), model(1), tokens, start=START)
  for b, text in enumerate(np.asarray(tokens)):
    for t in range(START, T):
      read = lambda f: jax.nn.softmax(f(jnp.asarray(text)[None, :t])[0, -1])
      p, q = np.asarray(read(model(0))), np.asarray(read(model(1)))
      np.testing.assert_allclose(
        found[b, t], (p * np.log(p / q)).sum(), rtol=1e-4, atol=1e-5
      )
  assert found.shape == (B, T) and not found[:, :START].any()
  # What the text says there makes no difference, what it said before does.
  last = shaping.reliance(
    model(0), model(1), tokens.at[:, -1].set(0), start=START
  )
  np.testing.assert_array_equal(last, found)
  assert not shaping.reliance(model(0), model(0), tokens, start=1).any()


def test_a_dictionary_is_learned_from_known_texts():
  tokens = np.array([PIRATE, PIRATE, PLAIN])
  known = shaping.counterfactual(
    speaker(True), speaker(False), jnp.asarray(tokens), start=1
  )
  found = shaping.translation(known, tokens, 7, start=1)
  np.testing.assert_array_equal(found.table, [0, 1, 2, 1, 2, 5, 5])
  np.testing.assert_array_equal(found.consistency, np.ones(7))
  np.testing.assert_array_equal(found.count, [0, 1, 1, 2, 2, 1, 2])


def test_a_token_is_translated_if_it_is_the_concepts_more_often_than_not():
  """Token 1: above the threshold once in three; token 2: twice in three."""
  old = np.array([[0, 1, 2], [0, 1, 2], [0, 1, 2]])
  ratio = np.array([[9, 9, 9], [9, 0, 9], [9, 0, 0]], float)
  new = np.array([[5, 4, 3], [5, 1, 4], [5, 1, 2]])
  found = shaping.translation(
    shaping.Counterfactual(ratio, new), old, 6, start=1
  )
  np.testing.assert_array_equal(found.table, [0, 1, 3, 3, 4, 5])
  assert found.consistency[2] == 0.5 and found.consistency[1] == 1
  assert found.count[0] == 0  # Before the start.


def test_bad_input_is_named():
  both = (model(0), model(1), texts())
  for start in (0, T):
    with pytest.raises(ValueError, match=f'start={start}'):
      shaping.counterfactual(*both, start=start)
    with pytest.raises(ValueError, match=f'start={start}'):
      shaping.reliance(*both, start=start)
  with pytest.raises(ValueError, match='threshold=0'):
    shaping.counterfactual(*both, start=1, threshold=0.0)
  known = shaping.counterfactual(*both, start=1)
  with pytest.raises(ValueError, match='must be the texts'):
    shaping.translation(known, np.zeros((2, T), int), V, start=1)


def test_by_token_every_occurrence_gets_the_median_of_all():
  tokens = np.array([[1, 2, 1], [1, 2, 3]])
  ratio = np.array([[5.0, 0.0, 7.0], [-9.0, 8.0, 2.5]], np.float32)
  found = shaping.by_token(ratio, tokens)
  np.testing.assert_array_equal(found, [[5, 4, 5], [5, 4, 2.5]])
  with pytest.raises(ValueError, match=r'ratios \(2, 2\) for tokens \(2, 3\)'):
    shaping.by_token(ratio[:, :2], tokens)
