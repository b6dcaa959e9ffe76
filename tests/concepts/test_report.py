"""A report says what its parts say, whatever the texts hold."""

import json
import re

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
import numpy as np
import pytest

from idesign import concepts
from tests.concepts.test_decompose import (
  B,
  F,
  T,
  adam_update,
  normal,
  random_sae,
  small_model,
)

HOSTILE = (
  'a | b\n| c | d',
  '\\| <<|>> \\',
  '<script>alert(1)</script> <<x>>',
  '![x](http://evil/p.png) `code` **b** _i_ ~~s~~ &lt;',
  '$\\frac{1}$ \u2028 \u202e \x1b[31m \r\n',
  '北<<京>>',
  '',
)


def hostile_report(shares=True):
  rng = np.random.default_rng(0)
  size = len(HOSTILE)
  changes = rng.normal(size=(12, size)) + np.linspace(-3, 2, size)
  described = [
    concepts.Description(t, (t, 'second') if t else (), (t, '\n'))
    for t in HOSTILE
  ]
  statistics = concepts.change_statistics(changes)
  split = concepts.Shares(
    jnp.asarray(rng.normal(size=size)), jnp.float32(0.25), jnp.zeros(size)
  )
  return concepts.make_report(
    statistics, shares=split if shares else None, descriptions=described
  )


def cells(line):
  """What a Markdown reader sees: cells, split at bars without a backslash."""
  parts = re.findall(r'((?:\\.|[^\\|])*)\|', line)
  return [re.sub(r'\\(.)', r'\1', part).strip() for part in parts[1:]]


def same(a, b):
  for name, x in vars(a).items():
    if isinstance(x, np.ndarray):
      np.testing.assert_array_equal(x, getattr(b, name))
      assert x.dtype == getattr(b, name).dtype
    else:
      assert x == getattr(b, name)


def test_the_report_of_an_update_is_put_together_from_its_parts():
  model, params, tokens = small_model()
  read = jax.jit(concepts.reader(model.apply, 'resid_post[1:2]'))
  sae = random_sae()
  params, update = adam_update(model, params, tokens[:B], 1e-3)
  probes, mask = tokens[B:], np.arange(T)[None] > np.arange(3 * B)[:, None] % 3
  described = [concepts.Description(f'label {c}') for c in range(F)]
  r = concepts.report(
    read, sae, params, update, probes, mask, descriptions=described
  )
  change = concepts.predicted_change(
    read, sae.params['W_enc'], params, update, probes, mask
  )
  np.testing.assert_allclose(r.score, change.mean(0), rtol=1e-4, atol=1e-7)
  statistics = concepts.change_statistics(change)
  for name in ('low', 'high', 'effect_size', 'sign_agreement'):
    np.testing.assert_allclose(
      getattr(r, name), getattr(statistics, name), rtol=1e-4, atol=1e-7
    )
  np.testing.assert_allclose(r.share.sum() + r.unexplained, 1, atol=1e-4)
  assert r.label[3] == 'label 3' and list(r.concept) == list(range(F))

  # The shares are those of the movement that really happens, to first order.
  tiny = 1e-2
  after = jax.tree.map(lambda p, u: p + tiny * u, params, update)
  h = read(params, probes)
  dh = (read(after, probes) - h) / tiny
  split = concepts.shares(sae, concepts.decompose(sae, h, dh), dh, mask)
  np.testing.assert_allclose(r.share, split.share_F, atol=5e-3)
  np.testing.assert_allclose(r.unexplained, split.unexplained, atol=5e-3)
  assert np.abs(r.share).max() > 0.05

  still = jax.tree.map(jnp.zeros_like, update)
  r = concepts.report(read, sae, params, still, probes, mask)
  assert r.share is None and r.unexplained is None and not r.score.any()


def test_rows_come_in_the_order_asked_for():
  r = hostile_report()
  score = np.abs(r.score)
  assert r.score[0] < 0 < r.score[-1]  # Both signs, the largest below 0.
  assert list(r.rows()) == sorted(range(len(score)), key=lambda i: -score[i])
  assert list(r.rows(2)) == list(r.rows())[:2] and r.rows(0).size == 0
  for by in ('effect_size', 'share', 'sign_agreement'):
    x = np.abs(getattr(r, by))[r.rows(by=by)]
    assert (np.diff(x) <= 0).all()
  assert list(r.rows(by='concept')) == list(r.concept)


def test_a_table_holds_whatever_the_texts_are():
  r = hostile_report()
  text = r.table(n=len(HOSTILE), by='concept')
  lines = text.splitlines()
  assert lines[1].count('|') == lines[0].count('|') == 10
  rows, rest = lines[2 : 2 + len(HOSTILE)], lines[2 + len(HOSTILE) :]
  assert rest == ['', 'Unexplained by any concept: 25.0%.']
  assert text.replace('\n', '').isprintable()
  for i, row in enumerate(rows):
    found = cells(row)
    assert len(found) == 9 and found[0] == str(i)
    assert found[4] == f'{r.score[i]:+.3g}'
    assert found[8] == f'{r.share[i]:+.1%}'
    plain = ' '.join(
      ''.join(c if c.isprintable() else ' ' for c in HOSTILE[i]).split()
    )
    assert found[1] == found[2] == plain
    assert not re.search(r'(?<!\\)[<>`*_\[\]]', row.split('|', 4)[2])
  first = cells(r.table(n=1).splitlines()[2])
  assert first[0] == str(np.argmax(np.abs(r.score)))
  bare = hostile_report(shares=False).table()
  assert 'Unexplained' not in bare and cells(bare.splitlines()[2])[8] == ''


def test_a_long_text_is_shown_around_its_active_token():
  text = 'start ' + 'x' * 200 + ' <<here>> ' + 'y' * 200
  described = [concepts.Description('l', (text,))]
  statistics = concepts.change_statistics(np.ones((4, 1)))
  r = concepts.make_report(statistics, descriptions=described)
  shown = cells(r.table().splitlines()[2])[2]
  assert len(shown) == 62 and shown[0] == shown[-1] == '…'
  assert 'x <<here>> y' in shown
  assert cells(r.table().splitlines()[2])[6] == '+inf'


def test_json_and_back():
  for r in (hostile_report(), hostile_report(shares=False)):
    same(r, concepts.ConceptReport.from_json(r.to_json()))
  infinite = concepts.change_statistics(np.array([[1.0, -1, 0]] * 4))
  r = concepts.make_report(infinite)
  assert list(r.effect_size) == [np.inf, -np.inf, 0]
  text = r.to_json()
  no_constant = lambda name: pytest.fail(f'{name} is not JSON')
  json.loads(text, parse_constant=no_constant)
  same(r, concepts.ConceptReport.from_json(text))
  for broken in ('', '[]', '{}', text[:-2], text.replace('"low"', '"lo"')):
    with pytest.raises(ValueError, match='no concept report'):
      concepts.ConceptReport.from_json(broken)
  with pytest.raises(ValueError, match='score of concept 0 is not finite'):
    concepts.ConceptReport.from_json(
      re.sub(r'"score": \[[^,]*', '"score": ["nan"', text)
    )


def test_a_drawing_holds_whatever_the_texts_are(tmp_path):
  r = hostile_report()
  path = tmp_path / 'report.png'
  r.draw(path)
  assert path.read_bytes().startswith(b'\x89PNG')
  # Intervals need not be symmetric.
  r = concepts.ConceptReport(**vars(r) | {'high': r.high + 1})
  axes = Figure().subplots()
  r.draw(axes, n=3)
  assert len(axes.patches) == 3
  order = r.rows(3)
  np.testing.assert_allclose(
    [p.get_width() for p in axes.patches], r.score[order]
  )
  (bars,) = axes.containers[0].lines[2]
  ends = np.array([s[:, 0] for s in bars.get_segments()])
  np.testing.assert_allclose(ends, np.stack([r.low, r.high], 1)[order])
  assert axes.get_yticklabels()[0].get_text().endswith(f'#{order[0]}')
  top, bottom = sorted(axes.get_ylim())
  assert axes.get_ylim() == (bottom, top)  # The first row is the highest.
  with pytest.raises(ValueError, match='[Ff]ormat'):
    r.draw(tmp_path / 'report.docx')
  assert [p.name for p in tmp_path.iterdir()] == ['report.png']


def test_describe_puts_spans_and_promoted_tokens_into_words():
  spans = concepts.Spans(
    activation_FK=np.array([[2.0, 1.0], [-np.inf] * 2], np.float32),
    text_FK=np.array([[4, 0], [-1, -1]]),
    position_FK=np.array([[0, 7], [-1, -1]]),
    token_FKW=np.array([[[-1, 1, 2], [2, 1, -1]], [[-1] * 3] * 2]),
  )
  words = [' no', ' arr', ' ye', ' lad']
  calls = []
  decode = lambda t: calls.append(t) or words[t]
  first, second = concepts.describe(spans, np.array([[3], [2]]), decode)
  assert first.label == 'arr → lad' and first.promoted == (' lad',)
  assert first.spans == ('<< arr>> ye', ' ye<< arr>>')
  assert second == concepts.Description('→ ye', (), (' ye',))
  assert sorted(calls) == [1, 2, 3]  # Each token once.
  bare = concepts.describe(spans, None, decode)
  assert bare[0].label == 'arr' and bare[1] == concepts.Description()
  with pytest.raises(ValueError, match='spans of 2 concepts .* 3'):
    concepts.describe(spans, np.zeros((3, 1), int), decode)


def test_what_does_not_fit_is_refused():
  statistics = concepts.change_statistics(normal(0, 6, 3))
  with pytest.raises(ValueError, match='label has 2 values for 3 concepts'):
    concepts.make_report(statistics, descriptions=[concepts.Description()] * 2)
  nothing = concepts.Shares(jnp.full(3, jnp.nan), jnp.nan, jnp.zeros(3))
  with pytest.raises(ValueError, match='share of concept 0 is not finite'):
    concepts.make_report(statistics, shares=nothing)
  with pytest.raises(ValueError, match='share has 2 values'):
    concepts.make_report(
      statistics, shares=concepts.Shares(jnp.ones(2), 0.0, jnp.ones(2))
    )
  r = concepts.make_report(statistics)
  with pytest.raises(ValueError, match="by='label', n=2: choose from"):
    r.table(2, by='label')
  with pytest.raises(ValueError, match='n=-1'):
    r.rows(-1)
  with pytest.raises(ValueError, match='no shares'):
    r.table(by='share')
  twice = {**vars(r), 'concept': np.array([0, 1, 1])}
  with pytest.raises(ValueError, match='twice'):
    concepts.ConceptReport(**twice)
