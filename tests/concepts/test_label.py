"""Spans and promoted tokens are those that sorting everything would give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idesign import concepts, models
from tests.concepts.test_decompose import D, F, random_sae

V, T = 20, 7
PAD = 19


def small_model():
  config = models.TransformerConfig(
    vocab_size=V, d_model=D, d_ff=16, n_heads=2, n_layers=2, max_len=T
  )
  model = models.transformer(config)
  return model, model.init(jax.random.key(0))


def padded(sizes=(3, 2, 3), seed=0):
  """Batches of texts of random lengths; padding is token PAD."""
  rng = np.random.default_rng(seed)
  out = []
  for size in sizes:
    mask = np.arange(T) < rng.integers(2, T + 1, (size, 1))
    tokens = np.where(mask, rng.integers(0, PAD, (size, T)), PAD)
    out.append(({'tokens': tokens, 'mask': mask}, tokens, mask))
  return out


def read_of(model):
  apply = lambda p, b: model.apply(p, b['tokens'], mask_BT=b['mask'])
  return concepts.reader(apply, 'resid_post[1:2]')


def sorted_spans(values_NTF, mask_NT, k, per_text, concept):
  """All positions that count, sorted: (activation, text, position)."""
  found = []
  for n, mask_T in enumerate(mask_NT):
    mine = [
      (float(values_NTF[n, t, concept]), n, int(t))
      for t in np.flatnonzero(mask_T)
    ]
    found += sorted(mine, key=lambda x: -x[0])[:per_text]
  return sorted(found, key=lambda x: -x[0])[:k]


@pytest.mark.parametrize(
  'kind, per_text',
  [('topk', 1), ('relu', 1), ('relu', 2), ('directions', 1), ('relu', 100)],
)
def test_spans_are_the_most_active_positions_of_all_texts(kind, per_text):
  model, params = small_model()
  read, batches = read_of(model), padded()
  if kind == 'directions':
    columns = jnp.asarray(np.random.default_rng(1).normal(size=(D, F)), 'f4')
    read_concepts = lambda h: h @ columns
  else:
    columns = random_sae(architecture=kind)
    read_concepts = columns.encode
  k = 5
  spans = concepts.top_spans(
    read, params, columns, batches, k=k, width=2, per_text=per_text, pad=PAD
  )
  values = [np.asarray(read_concepts(read(params, b))) for b, *_ in batches]
  values = np.concatenate(values)
  mask = np.concatenate([m for *_, m in batches])
  tokens = np.concatenate([t for _, t, _ in batches])
  found = 0
  for c in range(F):
    counts = mask if kind == 'directions' else mask & (values[..., c] > 0)
    expected = sorted_spans(values, counts, k, per_text, c)
    mine = spans.of(c)
    np.testing.assert_allclose(
      [s.activation for s in mine], [x[0] for x in expected], rtol=1e-5
    )
    assert [(s.text, s.position) for s in mine] == [x[1:] for x in expected]
    for s in mine:
      real = tokens[s.text][mask[s.text]]
      low = max(s.position - 2, 0)
      assert s.tokens == tuple(real[low : s.position + 3])
      assert s.tokens[s.marked] == tokens[s.text, s.position]
    found += len(mine)
  assert found > F


def test_padding_neither_counts_nor_is_it_read():
  model, params = small_model()
  read, batches = read_of(model), padded()
  sae = random_sae(architecture='relu')
  options = {'k': 4, 'width': 1, 'pad': PAD}
  expected = concepts.top_spans(read, params, sae, batches, **options)

  def loud(params, batch):
    h = read(params, batch)
    return jnp.where(batch['mask'][..., None], h, jnp.nan)

  for a, b in zip(
    expected, concepts.top_spans(loud, params, sae, batches, **options)
  ):
    np.testing.assert_array_equal(a, b)


def test_equal_activations_come_in_the_order_of_reading():
  # Concept 0 is 1 everywhere, concept 1 grows with the token, concept 2 is
  # never active.
  read = lambda scale, x: scale * jnp.stack([x * 0 + 1, x, -1 - x], axis=-1)
  tokens = np.array([[1, 5, 5], [5, 2, 5], [4, 4, 4]])
  batches = [(tokens[:1] * 1.0, tokens[:1], None)]
  batches += [(tokens[1:] * 1.0, tokens[1:], None)]
  config = concepts.SAEConfig(architecture='relu', d_in=3, d_sae=3)
  zeros = {'b_enc': jnp.zeros(3), 'b_dec': jnp.zeros(3)}
  sae = concepts.make_sae(
    config, {'W_enc': jnp.eye(3), 'W_dec': jnp.eye(3), **zeros}
  )
  take = lambda **options: concepts.top_spans(
    read, 1.0, sae, batches, width=1, **options
  )
  place = lambda spans, c: [(s.text, s.position) for s in spans.of(c)]
  spans = take(k=2)
  assert place(spans, 0) == [(0, 0), (1, 0)]
  assert place(spans, 1) == [(0, 1), (1, 0)]
  assert spans.of(2) == [] and (spans.text_FK[2] == -1).all()
  spans = take(k=5, per_text=3)
  assert place(spans, 1) == [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0)]
  assert spans.of(1)[3] == concepts.Span(1, 2, 5.0, (2, 5), 1)
  assert spans.token_FKW[1, 3].tolist() == [2, 5, -1]
  with pytest.raises(ValueError, match='no concept -1'):
    spans.of(-1)


def test_a_batch_of_the_same_shape_is_not_compiled_again():
  traced = []

  def read(params, x):
    traced.append(x.shape)
    return params * x[..., None]

  x = np.ones((2, 3), np.float32)
  batches = [(x, x.astype(int), None)] * 3
  concepts.top_spans(read, 1.0, jnp.ones((1, 4)), batches, k=2, width=1)
  assert traced == [(2, 3)]


@pytest.mark.parametrize('block', [1, 5, F, 1000])
@pytest.mark.parametrize('gained', [False, True])
def test_promoted_tokens_are_those_of_all_logits(block, gained):
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  rows, unembedding = normal(F, D), normal(D, V)
  gain = np.exp(normal(D)) if gained else None
  logits = (rows if gain is None else rows * gain) @ unembedding
  expected = np.argsort(-logits, axis=1, kind='stable')[:, :4]
  arrays = jnp.asarray(rows), jnp.asarray(unembedding)
  gain = None if gain is None else jnp.asarray(gain)
  found = concepts.promoted_tokens(*arrays, k=4, gain_D=gain, block=block)
  np.testing.assert_array_equal(found, expected)


def test_equally_promoted_tokens_come_in_the_order_of_the_vocabulary():
  found = concepts.promoted_tokens(
    jnp.ones((9, 4)), jnp.ones((4, V)), k=3, block=4
  )
  np.testing.assert_array_equal(found, [[0, 1, 2]] * 9)


def test_labels_are_the_commonest_tokens():
  marked = [' arr', 'matey', 'lad', 'arr', 'matey ', 'ye', 'arr']
  assert concepts.label(marked, []) == 'arr, matey, lad'
  assert (
    concepts.label(marked, ['x', ' x', 'y'], words=2) == 'arr, matey → x, y'
  )
  assert concepts.label([], ['x']) == '→ x' and concepts.label([], []) == ''
  assert concepts.label(['\n', ' '], []) == "'\\n', ' '"
  assert concepts.label(['a\x1b[31m\u202eb'], []) == 'a [31m b'
  assert concepts.label(['=' * 50], []) == '=' * 20 + '…'


def test_a_span_is_rendered_with_its_token_marked():
  span = concepts.Span(0, 9, 1.0, (3, 4, 3), 2)
  decode = {3: ' {a}', 4: '%s'}.get
  assert concepts.render(span, decode) == ' {a}%s<< {a}>>'


def test_what_does_not_fit_is_refused():
  rows, unembedding = jnp.ones((F, D)), jnp.ones((D, V))
  promoted = concepts.promoted_tokens
  with pytest.raises(ValueError, match=r'gain \(3,\)'):
    promoted(rows, unembedding, k=2, gain_D=jnp.ones(3))
  with pytest.raises(ValueError, match='of one width D'):
    promoted(rows, unembedding.T, k=2)
  with pytest.raises(ValueError, match='k=21: the vocabulary has 20'):
    promoted(rows, unembedding, k=21)
  with pytest.raises(ValueError, match='concept 3 are not finite'):
    promoted(rows.at[3, 0].set(jnp.nan), unembedding, k=2)

  tokens = np.zeros((2, 3), int)
  read = lambda params, x: params * x
  sae = random_sae(architecture='relu')
  h = np.ones((2, 3, D), np.float32)

  def spans(*batches, k=1, width=1, **options):
    return concepts.top_spans(
      read, 1.0, sae, batches, k=k, width=width, **options
    )

  good = (h, tokens, None)
  for options in ({'k': 0}, {'width': -1}, {'per_text': 0}):
    with pytest.raises(ValueError, match='at least 1, width'):
      spans(good, **options)
  with pytest.raises(ValueError, match=r'batch 1 has tokens \(2, 2\)'):
    spans(good, (h, tokens[:, :2], None))
  with pytest.raises(ValueError, match=r'mask \(2, 1\)'):
    spans((h, tokens, np.ones((2, 1))))
  with pytest.raises(ValueError, match='a token -1, below 0'):
    spans((h, tokens - 1, None))
  with pytest.raises(ValueError, match='batch 1 is not finite'):
    spans(good, (h * np.nan, tokens, None))
  with pytest.raises(ValueError, match='of 2 texts no position counts'):
    spans((h, tokens, np.zeros((2, 3), bool)))
  with pytest.raises(ValueError, match='of 0 texts'):
    spans()
  with pytest.raises(ValueError, match='width 2 for an autoencoder of width'):
    spans((h[..., :2], tokens, None))
  with pytest.raises(ValueError, match='width 8 .* width 9'):
    concepts.top_spans(read, 1.0, jnp.ones((9, 2)), [good], k=1, width=1)
