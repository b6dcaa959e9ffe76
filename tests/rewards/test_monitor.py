"""Parts of a reward, and a probe that is watched while a model changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idesign import models, probes, rewards

CONFIG = models.TransformerConfig(
  vocab_size=12, d_model=16, d_ff=32, n_heads=2, n_layers=2, max_len=8
)
LM = models.transformer(CONFIG)
OBSERVE = probes.observer(LM.apply, ['resid_post[0:1]'])
PROBE = probes.ProbeConfig(kind='logistic', d_in=16)
PARAMS = LM.init(jax.random.key(0))


def texts(n=240):
  """The label is the parity of the token that stands in the span."""
  random = np.random.default_rng(0)
  tokens = random.integers(0, 12, (n, 4))
  spans = np.zeros((n, 4), bool)
  spans[:, 2] = True
  return rewards.Texts(
    tokens, np.ones((n, 4), bool), spans, tokens[:, 2] % 2 == 0,
    np.arange(n) // 4,
  )  # fmt: skip


def make():
  t = texts()
  h = probes.read_spans(OBSERVE, PARAMS, t.tokens, t.mask)
  fitted = probes.fit_probe(PROBE, h, t.spans, t.labels, key=jax.random.key(1))
  return probes.freeze(
    PARAMS, fitted, observe=OBSERVE, config=PROBE,
    quality=probes.ProbeQuality(0.95, 0.02, 5, 5, 5),
  )  # fmt: skip


def test_parts_add_up():
  random = np.random.default_rng(0)
  task, frozen, live = random.random((3, 50))
  parts = rewards.reward_parts(task, frozen, live, weight=3.0)
  np.testing.assert_allclose(parts.total, task.mean() - 3 * live.mean())
  np.testing.assert_allclose(parts.penalty, 3 * frozen.mean())
  assert rewards.reward_parts(task, frozen, frozen).change == 0
  with pytest.raises(ValueError, match=r'\(50,\)'):
    rewards.reward_parts(task, frozen[:3], live)


def test_activations_that_move_are_seen_and_can_be_read_anew():
  """The embedding is turned: what the probe read now lies elsewhere."""
  monitor = rewards.make_monitor(make(), texts())
  before = monitor(PARAMS)
  assert before['auroc'] > 0.95
  turn = np.linalg.qr(np.random.default_rng(1).normal(size=(16, 16)))[0]
  moved = jax.tree.map(lambda x: x, PARAMS)
  moved['embed']['embedding'] = moved['embed']['embedding'] @ jnp.asarray(
    turn, jnp.float32
  )
  after = monitor(moved)
  assert after['auroc'] < 0.8
  assert after['refitted_auroc'] > 0.9
  assert abs(before['refitted_auroc'] - after['refitted_auroc']) < 0.1
  assert before['score/true'] - before['score/false'] > 0.5


def test_it_is_a_function_of_the_parameters():
  monitor = rewards.make_monitor(make(), texts())
  assert monitor(PARAMS) == monitor(PARAMS)


def test_one_label_is_not_enough():
  t = texts()
  t = t._replace(labels=np.ones(len(t.labels), bool))
  with pytest.raises(ValueError, match='label more texts'):
    rewards.make_monitor(make(), t)


def test_by_label():
  got = rewards.by_label(
    np.array([1.0, 2, 3]),
    {'a': np.array([1, 1, 0]), 'b': np.array([0, 0, 0])},
  )
  assert got['a'] == 1.5 and np.isnan(got['b'])
  with pytest.raises(ValueError, match='a: '):
    rewards.by_label(np.zeros(3), {'a': np.zeros(2)})
