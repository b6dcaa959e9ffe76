"""Directions in parameter space, against dense gradients and vmap(grad)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idesign import concepts, models, sites

C, B, T = 4, 5, 6
MODEL = models.transformer(
  models.TransformerConfig(
    vocab_size=13,
    d_model=8,
    d_ff=16,
    n_heads=2,
    n_layers=2,
    max_len=T,
    gated=False,
    activation='gelu_tanh',
  )
)
PARAMS = MODEL.init(jax.random.key(0))
TOKENS = jax.random.randint(jax.random.key(1), (B, T), 0, 13)
READOUT = jax.random.normal(jax.random.key(2), (8, C))
UP, DOWN = 'blocks/mlp/up/kernel', 'blocks/mlp/down/kernel'
EPS = np.finfo(np.float32).eps
read = concepts.reader(MODEL.apply, 'resid_post[1:2]')


def loss(params, tokens):
  logp = jax.nn.log_softmax(MODEL.apply(params, tokens)[:, :-1])
  picked = jnp.take_along_axis(logp, tokens[:, 1:, None], -1)
  return -jnp.sum(picked[..., 0], axis=1)


def make(**options):
  return concepts.rank_one_directions(
    read, READOUT, PARAMS, TOKENS, [UP, DOWN], num_stack=1, **options
  )


def leaf(tree, path):
  return dict(zip(sites.leaf_paths(tree), jax.tree.leaves(tree)))[path]


def full(path):
  """The dense directions, concept by concept."""
  mean = lambda p: jnp.mean(read(p, TOKENS), (0, 1)) @ READOUT
  return leaf(jax.jacrev(mean)(PARAMS), path)


def test_they_are_the_best_of_rank_one():
  directions = make()
  for path in (UP, DOWN):
    d, dense = directions[path], full(path)
    left = jnp.sum((dense - concepts.dense(d)) ** 2, (-2, -1))
    s = jnp.linalg.svd(dense, compute_uv=False)
    scale = float((s**2).sum(-1).max())
    np.testing.assert_allclose(
      left, (s[..., 1:] ** 2).sum(-1), rtol=0, atol=200 * EPS * scale
    )
    share = s[..., 0] ** 2 / (s**2).sum(-1)
    np.testing.assert_allclose(d.kept, share, rtol=200 * EPS)


def test_what_writes_to_the_activation_has_rank_one():
  d = make()[DOWN]
  # The last layer's output is added to what is read; the first one's is not.
  np.testing.assert_allclose(d.kept[:, 1], 1, rtol=20 * EPS)
  assert d.kept[:, 0].max() < 0.999
  along = READOUT.T / jnp.linalg.norm(READOUT.T, axis=1, keepdims=True)
  cosine = jnp.abs(jnp.sum(along * d.w[:, 1], -1))
  np.testing.assert_allclose(cosine, 1, rtol=20 * EPS)


def test_scores_are_inner_products_with_per_example_gradients():
  directions = make()
  fast = jax.jit(concepts.concept_scores(loss, directions))(PARAMS, TOKENS)
  slow = concepts.jvp_scores(loss, PARAMS, TOKENS, directions)
  one = lambda tokens: jax.grad(lambda p: loss(p, tokens[None])[0])(PARAMS)
  grads = jax.vmap(one)(TOKENS)
  exact = sum(
    jnp.einsum('blio,clio->bc', leaf(grads, k), concepts.dense(d))
    for k, d in directions.items()
  )
  near = dict(rtol=0, atol=500 * EPS * float(jnp.abs(exact).max()))
  np.testing.assert_allclose(fast, exact, **near)
  np.testing.assert_allclose(slow, exact, **near)
  assert fast.shape == (B, C)


def test_by_position_they_add_up():
  directions = make()
  scores = concepts.concept_scores(loss, directions)(PARAMS, TOKENS)
  split = concepts.concept_scores(loss, directions, by_position=True)
  by_position = jax.jit(split)(PARAMS, TOKENS)
  assert by_position.shape == (B, T, C)
  near = dict(rtol=0, atol=100 * EPS * float(jnp.abs(by_position).max()))
  np.testing.assert_allclose(by_position.sum(1), scores, **near)


@pytest.mark.parametrize('by_position', [False, True])
def test_in_parts_they_are_the_same(by_position):
  make_scores = functools.partial(
    concepts.concept_scores, loss, make(), by_position=by_position
  )
  whole = jax.jit(make_scores())(PARAMS, TOKENS)
  parts = jax.jit(make_scores(microbatch=1))(PARAMS, TOKENS)
  near = dict(rtol=0, atol=100 * EPS * float(jnp.abs(whole).max()))
  np.testing.assert_allclose(parts, whole, **near)
  with pytest.raises(ValueError, match='microbatch=4 .* examples'):
    make_scores(microbatch=4)(PARAMS, TOKENS)


def test_masked_probes_do_not_count():
  mask = jnp.arange(T)[None] < jnp.full((B, 1), 3)
  changed = TOKENS.at[:, 3:].set(0)  # Causal: they cannot be seen either.
  a, b = make(mask=mask), concepts.rank_one_directions(
    read, READOUT, PARAMS, changed, [UP, DOWN], num_stack=1, mask=mask
  )  # fmt: skip
  np.testing.assert_allclose(
    concepts.dense(a[UP]), concepts.dense(b[UP]), atol=1e-6
  )
  assert np.abs(concepts.dense(a[UP]) - concepts.dense(make()[UP])).max() > 1e-3


def test_bad_input_is_named():
  with pytest.raises(ValueError, match='from width 9'):
    concepts.rank_one_directions(
      read, jnp.ones((9, C)), PARAMS, TOKENS, UP, num_stack=1
    )
  with pytest.raises(ValueError, match='no matrix'):
    concepts.rank_one_directions(read, READOUT, PARAMS, TOKENS, UP, num_stack=2)
  with pytest.raises(sites.SelectionError, match='nothing'):
    concepts.rank_one_directions(read, READOUT, PARAMS, TOKENS, 'nothing')
