"""Sampling: the right distribution, the right stops, one compilation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idesign.models import (
  RopeConfig,
  TransformerConfig,
  filter_logits,
  generate,
  init_cache,
  transformer,
)
from idesign.models.generate import inverse_cdf

CONFIG = TransformerConfig(
  vocab_size=7,
  d_model=8,
  n_layers=2,
  n_heads=2,
  n_kv_heads=1,
  d_ff=8,
  sliding_window=(None, 3),
  rope_local=RopeConfig(theta=5.0),
)
EPS = float(np.finfo(np.float32).eps)


@functools.cache
def build():
  model = transformer(CONFIG)
  rng = np.random.default_rng(0)
  return model, jax.tree.map(
    lambda a: jnp.asarray(0.6 * rng.normal(size=a.shape), a.dtype),
    jax.eval_shape(model.init, jax.random.key(0)),
  )


def sample(prompts, mask=None, *, new=1, seed=0, slots=None, **kwargs):
  model, params = build()
  prompts = jnp.asarray(prompts)
  batch, time = prompts.shape
  return generate(
    kwargs.pop('apply', model.apply),
    params,
    prompts,
    jnp.ones(prompts.shape, bool) if mask is None else jnp.asarray(mask),
    key=jax.random.key(seed),
    max_new_tokens=new,
    cache=init_cache(CONFIG, batch, slots or time + new),
    **kwargs,
  )


def filtered(logits, temperature, top_k, top_p):
  """The sampling distribution of one row, in plain numpy."""
  logits = np.asarray(logits, np.float64)
  if temperature == 0:
    return np.eye(len(logits))[np.argmax(logits)]
  probs = np.exp((logits - logits.max()) / temperature)
  order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
  order = order[:top_k]
  kept, total = [], probs[order].sum()
  for i in order:
    if top_p is not None and probs[kept].sum() / total >= top_p:
      break
    kept.append(i)
  out = np.zeros(len(logits))
  out[kept] = probs[kept] / probs[kept].sum()
  return out


SETTINGS = [
  (1.0, None, None),
  (0.7, None, None),
  (2.5, 3, None),
  (1.0, 1, None),
  (1.0, None, 0.6),
  (1.5, 4, 0.5),
  (1.0, None, 1e-6),
  (1.0, 20, 1.0),
  (0.0, None, None),
  (0.0, 3, 0.5),
]


@pytest.mark.parametrize('temperature,top_k,top_p', SETTINGS)
def test_filtered_logits_are_those_of_a_plain_filter(temperature, top_k, top_p):
  logits = np.random.default_rng(1).normal(size=(5, 11)).astype(np.float32) * 2
  logits[0, 3] = logits[0, 5] = logits[0].max()  # A tie.
  with jax.numpy_dtype_promotion('strict'):
    got = filter_logits(
      jnp.asarray(logits), temperature, top_k=top_k, top_p=top_p
    )
  expected = [filtered(row, temperature, top_k, top_p) for row in logits]
  np.testing.assert_allclose(
    jax.nn.softmax(got), expected, rtol=0, atol=8 * EPS
  )


@pytest.mark.parametrize('temperature,top_k,top_p', SETTINGS)
def test_frequencies_are_probabilities(temperature, top_k, top_p):
  model, params = build()
  prompt, rows = [[1, 4, 2]], 4000
  out = sample(prompt * rows, temperature=temperature, top_k=top_k, top_p=top_p)
  logits = jax.jit(model.apply)(params, jnp.asarray(prompt))[0, -1]
  probs = filtered(logits, temperature, top_k, top_p)
  tokens = np.asarray(out.tokens_BN[:, 0])
  counts = np.bincount(tokens, minlength=7)
  assert not counts[probs == 0].any()
  # Five standard deviations of a binomial, each token: a right sampler fails
  # once in 10^6 seeds, and the seed is fixed.
  spread = np.sqrt(rows * probs * (1 - probs))
  assert (np.abs(counts - rows * probs) <= 5 * spread + 1e-9).all()
  own = np.asarray(jax.nn.log_softmax(logits))[tokens]
  np.testing.assert_allclose(out.logprobs_BN[:, 0], own, atol=64 * EPS)
  np.testing.assert_allclose(
    out.sampling_logprobs_BN[:, 0], np.log(probs[tokens]), atol=64 * EPS
  )


@pytest.mark.parametrize('vocab', [3, 1000])
def test_the_draw_inverts_the_cumulative_distribution(vocab):
  random = np.random.default_rng(0)
  weights = random.exponential(size=vocab)
  weights[random.permutation(vocab)[: vocab // 3]] = 0
  weights[[0, -1]] = 0  # Where a uniform of 0 or of almost 1 would point.
  cdf = np.cumsum(weights) / weights.sum()
  below_one = np.nextafter(np.float32(1), np.float32(0))
  uniform = np.append(np.linspace(0, 1, 999, endpoint=False), below_one)
  logprobs = jnp.log(jnp.asarray(weights / weights.sum(), jnp.float32))
  tokens = np.asarray(
    inverse_cdf(
      jnp.asarray(uniform, jnp.float32),
      jnp.broadcast_to(logprobs, (len(uniform), vocab)),
    )
  )
  assert (weights[tokens] > 0).all()
  # The uniform is inside of the token's step, up to roundings of a sum.
  slack = 8 * EPS
  assert (uniform <= cdf[tokens] + slack).all()
  assert (uniform >= (cdf - weights / weights.sum())[tokens] - slack).all()


def test_roundings_of_sums_choose_nothing_that_has_no_probability():
  """Sums in another order step up, too, where nothing was added."""
  random = np.random.default_rng(0)
  weights = random.exponential(size=(200, 3001)).astype(np.float32)
  weights[random.random(weights.shape) < 0.3] = 0
  weights[100:, 1500:] = 0  # A step up in the end has nothing above.
  weights[:, 0] = 0
  logprobs = jnp.log(jnp.asarray(weights / weights.sum(axis=1, keepdims=True)))
  cdf = np.asarray(jnp.cumsum(jnp.exp(logprobs), axis=1))
  up = (np.diff(cdf, axis=1) > 0) & (weights[:, 1:] == 0)
  row, before = np.nonzero(up)
  assert len(row) > 100 and up[100:, 1500:].any()
  uniform = cdf[row, before] / cdf[row, -1]
  uniform = np.minimum(uniform, np.nextafter(np.float32(1), np.float32(0)))
  tokens = inverse_cdf(jnp.asarray(uniform), logprobs[row])
  assert (weights[row, tokens] > 0).all()


PROMPTS = [[3, 1, 4, 1], [5, 2], [6]]


def padded(side):
  tokens, mask = np.zeros((3, 4), int), np.zeros((3, 4), bool)
  for row, prompt in enumerate(PROMPTS):
    at = slice(4 - len(prompt), 4) if side == 'left' else slice(len(prompt))
    tokens[row, at], mask[row, at] = prompt, True
  return tokens, mask


@pytest.mark.parametrize('side', ['left', 'right'])
def test_prompts_that_are_repeated_are_read_once(side):
  tokens, mask = padded(side)
  once = sample(tokens, mask, new=6, repeats=4)
  each = sample(tokens.repeat(4, axis=0), mask.repeat(4, axis=0), new=6)
  assert np.array_equal(once.tokens_BN, each.tokens_BN)
  assert np.array_equal(once.lengths_B, each.lengths_B)
  np.testing.assert_allclose(
    once.logprobs_BN, each.logprobs_BN, rtol=0, atol=64 * EPS
  )
  assert len(np.unique(once.tokens_BN, axis=0)) > 3
  with pytest.raises(ValueError, match='repeats=0'):
    sample(tokens, mask, repeats=0)


@pytest.mark.parametrize('temperature', [0.0, 1.0])
@pytest.mark.parametrize('side', ['left', 'right'])
def test_a_ragged_batch_is_each_prompt_alone(side, temperature):
  together = sample(*padded(side), new=6, temperature=temperature)
  for row, prompt in enumerate(PROMPTS):
    # Rows draw with their number: the prompt keeps it.
    alone = sample([prompt] * 3, new=6, temperature=temperature)
    np.testing.assert_array_equal(together.tokens_BN[row], alone.tokens_BN[row])
    np.testing.assert_allclose(
      together.logprobs_BN[row], alone.logprobs_BN[row], atol=64 * EPS
    )


def test_logprobs_are_those_of_the_model_on_the_whole_sequence():
  model, params = build()
  tokens, mask = padded('left')
  out = sample(tokens, mask, new=5, temperature=1.7, top_k=4)
  whole = jnp.concatenate([jnp.asarray(tokens), out.tokens_BN], axis=1)
  mask = jnp.concatenate([jnp.asarray(mask), jnp.ones((3, 5), bool)], axis=1)
  logits = jax.jit(model.apply)(params, whole, mask_BT=mask)[:, 3:-1]
  logprobs = jnp.take_along_axis(
    jax.nn.log_softmax(logits), out.tokens_BN[..., None], axis=2
  )[..., 0]
  np.testing.assert_allclose(out.logprobs_BN, logprobs, atol=64 * EPS)


def test_rows_end_at_stop_tokens():
  free = sample([[1, 2]] * 16, new=12)
  stopped = sample([[1, 2]] * 16, new=12, stop_tokens=(3, 5), pad_token=6)
  tokens = np.asarray(free.tokens_BN)
  ends = [next((i for i, t in enumerate(r) if t in (3, 5)), 11) for r in tokens]
  assert len(set(ends)) > 2  # The case is not trivial.
  np.testing.assert_array_equal(stopped.lengths_B, np.array(ends) + 1)
  np.testing.assert_array_equal(free.lengths_B, 12)
  for row, end in enumerate(ends):
    np.testing.assert_array_equal(
      stopped.tokens_BN[row, : end + 1], tokens[row, : end + 1]
    )
    assert (stopped.tokens_BN[row, end + 1 :] == 6).all()
    assert not stopped.logprobs_BN[row, end + 1 :].any()
    assert not stopped.sampling_logprobs_BN[row, end + 1 :].any()
  np.testing.assert_array_equal(
    stopped.logprobs_BN[0, : ends[0] + 1], free.logprobs_BN[0, : ends[0] + 1]
  )


def test_the_loop_ends_when_all_rows_have():
  calls = []
  model, _ = build()

  def counted(params, tokens, **kwargs):
    jax.debug.callback(lambda: calls.append(1))
    return model.apply(params, tokens, **kwargs)

  sample([[1, 2]] * 2, new=9, stop_tokens=tuple(range(7)), apply=counted)
  jax.effects_barrier()
  assert len(calls) == 1  # The prompt; every token stops.
  sample([[1, 2]] * 2, new=9, apply=counted)
  jax.effects_barrier()
  assert len(calls) == 1 + 9  # No step is run for the last token.


def test_the_function_applied_may_be_wrapped():
  model, _ = build()

  def forced(params, tokens, **kwargs):
    logits, cache = model.apply(params, tokens, **kwargs)
    return logits.at[..., 5].add(100), cache

  out = sample([[1, 2], [3, 4]], new=3, apply=forced)
  assert (out.tokens_BN == 5).all()


def test_keys_matter_and_repeat():
  first, again, other = (sample([[1, 2]] * 4, new=6, seed=s) for s in (0, 0, 1))
  jax.tree.map(np.testing.assert_array_equal, first, again)
  assert (first.tokens_BN != other.tokens_BN).any()
  # Rows with one prompt differ: each has its own stream.
  assert (first.tokens_BN[0] != first.tokens_BN[1]).any()


def test_one_compilation_serves_prompts_keys_and_temperatures():
  model, _ = build()
  traces = []

  def traced(params, tokens, **kwargs):
    traces.append(tokens.shape)
    return model.apply(params, tokens, **kwargs)

  for seed, temperature, top_p, stop in (
    (0, 1.0, 0.9, 1),
    (1, 0.0, 0.1, 2),
    (2, 3, 1, 3),
  ):
    tokens, mask = padded('left' if seed else 'right')
    sample(
      tokens,
      mask,
      new=4,
      seed=seed,
      temperature=temperature,
      top_p=top_p,
      stop_tokens=(stop,),
      apply=traced,
    )
    if not seed:
      before = list(traces)
  assert traces == before and set(before) == {(3, 4), (3, 1)}


@pytest.mark.parametrize('closed_over', [True, False])
def test_generation_works_under_jit(closed_over):
  model, params = build()
  prompts = jnp.array([[1, 2, 3]])
  mask = jnp.ones_like(prompts, bool)

  @jax.jit
  def run(key, temperature):
    return generate(
      model.apply,
      params,
      prompts,
      mask if closed_over else jnp.ones_like(prompts, bool),
      key=key,
      max_new_tokens=4,
      cache=init_cache(CONFIG, 1, 6),
      temperature=temperature,
    )

  got = run(jax.random.key(0), 1.0)
  expected = sample(prompts, new=4)
  np.testing.assert_array_equal(got.tokens_BN, expected.tokens_BN)


@pytest.mark.parametrize(
  'kwargs,message',
  [
    (dict(new=0), 'max_new_tokens=0'),
    (dict(temperature=-1.0), 'temperature=-1.0'),
    (dict(temperature=float('nan')), 'temperature=nan'),
    (dict(top_k=0), 'top_k=0'),
    (dict(top_p=0.0), 'top_p=0.0'),
    (dict(top_p=1.5), 'top_p=1.5'),
    (dict(new=4, slots=4), '4 slots for 1 rows.* at least 5 for 1'),
    (dict(mask=np.zeros((1, 2), bool)), 'no real token'),
    (dict(mask=np.ones((2, 2), bool)), r'mask \(2, 2\)'),
  ],
)
def test_bad_arguments_raise(kwargs, message):
  with pytest.raises(ValueError, match=message):
    sample([[1, 2]], **kwargs)


def test_a_cache_that_is_in_use_raises():
  model, params = build()
  cache = init_cache(CONFIG, 1, 9)._replace(length=jnp.int32(2))
  prompts = jnp.ones((1, 2), jnp.int32)
  with pytest.raises(ValueError, match='holds 2 tokens'):
    generate(
      model.apply,
      params,
      prompts,
      prompts > 0,
      key=jax.random.key(0),
      max_new_tokens=2,
      cache=cache,
    )
