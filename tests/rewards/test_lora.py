"""Adapters: nothing at first, then a change of low rank where it was asked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idesign import models, rewards, sites

LM = models.transformer(
  models.TransformerConfig(
    vocab_size=11, d_model=8, d_ff=16, n_heads=2, n_layers=3, max_len=8
  )
)
PARAMS = LM.init(jax.random.key(0))
TOKENS = jnp.arange(10).reshape(2, 5)


def make(rank=2):
  return rewards.init_lora(
    PARAMS, 'blocks/.*/kernel', rank=rank, key=jax.random.key(1)
  )


def test_nothing_changes_at_first():
  merged = rewards.merge_lora(PARAMS, make())
  jax.tree.map(np.testing.assert_array_equal, merged, PARAMS)


def test_each_layer_has_its_own_change_of_low_rank():
  adapters = make()
  adapters = jax.tree.map(
    lambda x: jax.random.normal(jax.random.key(x.size), x.shape), adapters
  )
  merged = rewards.merge_lora(PARAMS, adapters, scale=0.5)
  change = jax.tree.map(jnp.subtract, merged, PARAMS)
  paths = dict(zip(sites.leaf_paths(change), jax.tree.leaves(change)))
  for path, d in paths.items():
    if path not in adapters:
      assert not np.asarray(d).any()
      continue
    assert len(d) == 3
    for layer, a, b in zip(d, adapters[path]['A'], adapters[path]['B']):
      np.testing.assert_allclose(layer, 0.5 * a @ b, rtol=1e-4, atol=1e-5)
      assert np.linalg.matrix_rank(layer, tol=1e-4) == 2


def test_only_adapters_learn():
  loss = lambda params, adapters: jnp.sum(
    LM.apply(rewards.merge_lora(params, adapters), TOKENS) ** 2
  )
  frozen, learned = jax.grad(loss, (0, 1))(PARAMS, make())
  assert not any(np.asarray(x).any() for x in jax.tree.leaves(frozen))
  # B starts at 0, so A has no gradient yet.
  assert all(np.asarray(a['B']).any() for a in learned.values())


@pytest.mark.parametrize(
  'call,error,message',
  [
    (lambda: make(0), ValueError, 'rank=0'),
    (
      lambda: rewards.init_lora(
        PARAMS, 'nothing', rank=1, key=jax.random.key(0)
      ),
      sites.SelectionError,
      'nothing',
    ),
    (
      lambda: rewards.init_lora(
        PARAMS, 'final_norm/scale', rank=1, key=jax.random.key(0)
      ),
      ValueError,
      'needs a matrix',
    ),
    (
      lambda: rewards.merge_lora({'w': jnp.zeros((2, 2))}, make()),
      ValueError,
      'no such parameter',
    ),
  ],
)
def test_bad_adapters(call, error, message):
  with pytest.raises(error, match=message):
    call()
