"""What judges are shown is what the report says."""

import jax.numpy as jnp
import numpy as np
import pytest

from idesign import concepts, judges
from tests.judges.server import ask, serve, verdict
from tests.judges.test_language_model import OBJECTIVE

F = 4


def make_report(shares=True):
  changes = np.random.default_rng(0).normal(size=(8, F))
  split = concepts.Shares(jnp.arange(F) / 10, 0.4, jnp.zeros(F))
  described = [
    concepts.Description(f'label {c}', (f'span <<{c}>>',), (f'token {c}',))
    for c in range(F)
  ]
  return concepts.make_report(
    concepts.change_statistics(changes),
    shares=split if shares else None,
    descriptions=described,
  )


def test_evidence_is_the_rows_of_the_report():
  r = make_report()
  first, second = judges.evidence(r, np.array([3, 1]))
  assert (first.concept, second.concept) == (3, 1)
  for e in (first, second):
    c = e.concept
    assert e == judges.Evidence(
      concept=c,
      label=f'label {c}',
      spans=(f'span <<{c}>>',),
      promoted=(f'token {c}',),
      score=float(r.score[c]),
      low=float(r.low[c]),
      high=float(r.high[c]),
      share=float(r.share[c]),
      sign_agreement=float(r.sign_agreement[c]),
    )
    assert all(type(x) is float for x in (e.score, e.low, e.high, e.share))
  assert judges.evidence(make_report(shares=False), [0])[0].share is None
  assert judges.evidence(r, []) == []


def test_concepts_are_found_by_index_not_by_place():
  fields = vars(make_report()) | {'concept': np.array([9, 7, 5, 3])}
  (e,) = judges.evidence(concepts.ConceptReport(**fields), [5])
  assert e.concept == 5 and e.label == 'label 2'
  with pytest.raises(ValueError, match='concept 2 is not in the report'):
    judges.evidence(concepts.ConceptReport(**fields), [9, 2])
  with pytest.raises(ValueError, match='concept 9 is asked for twice'):
    judges.evidence(concepts.ConceptReport(**fields), [9, 9])


def make_inspector(shown=F):
  """Features are the two numbers of a position and what they lack to 1."""
  config = concepts.SAEConfig(architecture='relu', d_in=2, d_sae=F)
  rows = jnp.array([[2.0, 0], [0, 1], [3, 3], [0, 0]])
  encoder = jnp.array([[1.0, 0, -1, 0], [0, 1, 0, 0]])
  bias = jnp.array([0.0, 0, 1, 0])
  sae = concepts.make_sae(
    config,
    {'W_enc': encoder, 'b_enc': bias, 'W_dec': rows, 'b_dec': jnp.zeros(2)},
  )
  described = [
    concepts.Description(f'label {c}', ('a', 'b', 'c')) for c in range(F)
  ]

  def encode(text):
    size = 8
    x = np.full((1, size, 2), 100.0, np.float32)  # Padding is loud.
    text = text[:size]
    x[0, : len(text), 0] = [c == 'a' for c in text]
    x[0, : len(text), 1] = [ord(c) - ord('a') for c in text]
    return x, np.arange(size)[None] < len(text)

  return judges.ConceptInspector(
    lambda params, x: params * x, 1.0, sae, encode, described[:shown]
  )


def test_an_inspector_looks_concepts_up():
  inspector = make_inspector()
  assert inspector.spans(0, 2) == ('a', 'b') and len(inspector.spans(0, 9)) == 3
  near = inspector.neighbours(0, 5)
  assert [label for _, label in near] == ['label 2', 'label 1', 'label 3']
  np.testing.assert_allclose([c for c, _ in near], [2**-0.5, 0, 0], atol=1e-6)
  assert inspector.neighbours(2, 1)[0][1] == 'label 0'
  assert inspector.activation(1, 'cab') == 2
  assert inspector.activation(0, 'cab') == 1
  assert inspector.activation(0, 'xyz') == 0
  assert (
    inspector.activation(2, 'aaa') == 0 and inspector.activation(1, '') == 0
  )
  for wrong in (-1, F):
    with pytest.raises(ValueError, match=f'no concept {wrong}'):
      inspector.activation(wrong, 'a')
  with pytest.raises(ValueError, match='3 descriptions of 4 features'):
    make_inspector(shown=3)


def test_a_language_model_judge_asks_it(tmp_path):
  steps = [ask('spans'), ask('neighbours'), ask('activation', 'abc')]
  with serve(*steps, verdict()) as server:
    endpoint = judges.ChatEndpoint('tiny', base_url=server.url, api_key='none')
    judge = judges.LanguageModelJudge(
      OBJECTIVE,
      endpoint,
      model='tiny',
      log=judges.DecisionLog(tmp_path / 'log.jsonl'),
      inspector=make_inspector(),
    )
    (v,) = judge(0, judges.evidence(make_report(), [1]))
  assert v.concept == 1 and v.decision == 'suppress' and not judge.failures
  told = [m['content'] for m in server.requests[-1]['messages'][2:]]
  assert told[1] == '{"spans": ["a", "b", "c"]}'
  assert '"label": "label 2"' in told[3]
  assert told[5] == '{"activation": 2.0}'
