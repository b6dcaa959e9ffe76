"""What one pass says of texts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idesign import models, probes

CONFIG = models.TransformerConfig(
  vocab_size=11, d_model=8, d_ff=16, n_heads=2, n_layers=2, max_len=8
)
LM = models.transformer(CONFIG)
PARAMS = LM.init(jax.random.key(0))
TOKENS = np.random.default_rng(0).integers(1, 11, (5, 6))
MASK = np.ones_like(TOKENS, bool)
NAMES = ['resid_post[0:1]']


def test_confidence_is_of_the_prediction_of_each_token():
  plain = probes.observer(LM.apply, NAMES)(PARAMS, TOKENS, MASK)
  sure = probes.observer(LM.apply, NAMES, confidence=True)(PARAMS, TOKENS, MASK)
  np.testing.assert_array_equal(sure.h_BTE[..., :8], plain.h_BTE)
  logits = np.asarray(LM.apply(PARAMS, TOKENS, mask_BT=MASK), np.float64)
  share = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
  assert sure.h_BTE.shape == (5, 6, 10)
  np.testing.assert_array_equal(sure.h_BTE[:, 0, 8:], 0)
  for b in range(5):
    for t in range(1, 6):
      before = share[b, t - 1]
      want = [np.log(before[TOKENS[b, t]]), -(before * np.log(before)).sum()]
      np.testing.assert_allclose(sure.h_BTE[b, t, 8:], want, rtol=1e-4)


@pytest.mark.parametrize('count', [1, 3, 4, 5])
def test_batches_are_filled_up_and_cut(count):
  observe = probes.observer(LM.apply, NAMES)
  tokens, mask = TOKENS[:count], MASK[:count]
  h = probes.read_spans(observe, PARAMS, tokens, mask, batch_size=4)
  want = observe(PARAMS, jnp.asarray(tokens), jnp.asarray(mask)).h_BTE
  assert h.shape == (count, 6, 8)
  np.testing.assert_allclose(h, want, atol=1e-5)
