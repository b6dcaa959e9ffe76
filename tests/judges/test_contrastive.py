"""The contrastive judge against worlds whose answer is known."""

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import roc_auc_score

from idesign import judges


def objective(n=40):
  make = lambda id, decision, word: {
    'id': id,
    'decision': decision,
    'text': id,
    'examples': [f'{word} {i}' for i in range(n)],
  }
  return judges.make_objective(
    {
      'goal': 'Sums, not pirates.',
      'clauses': [
        make('sums', 'amplify', 'sum'),
        make('pirate', 'suppress', 'arr'),
        make('plain', 'allow', 'hello'),
      ],
    }
  )


# Concepts: what each is about.
ABOUT = ['arr', 'sum', 'hello', 'arr hello', 'sum hello', '', 'arr', 'always']


def activations(texts):
  rng = np.random.default_rng(5)
  noise = rng.uniform(0, 0.1, (len(texts), len(ABOUT)))
  on = np.array(
    [[t.split()[0] in a or a == 'always' for a in ABOUT] for t in texts]
  )
  some = rng.random(on.shape) < 0.7  # Features do not fire on all of them.
  return np.where(on & some, 1, 0) + noise


def test_it_finds_what_each_clause_owns():
  judge = judges.ContrastiveJudge(objective(), activations, permutations=2000)
  evidence = [judges.Evidence(i) for i in range(len(ABOUT))]
  decisions = [v.decision for v in judge(0, evidence)]
  # Concepts that two decisions share belong to neither.
  expected = ['suppress', 'amplify'] + 4 * ['allow'] + ['suppress', 'allow']
  assert decisions == expected
  clauses = [v.clause for v in judge(9, evidence)]
  assert clauses == ['pirate', 'sums', '', '', '', '', 'pirate', '']


def test_reversed_it_decides_the_opposite():
  judge = judges.ContrastiveJudge(
    objective().reversed(), activations, permutations=2000
  )
  decisions = [
    v.decision for v in judge(0, [judges.Evidence(i) for i in (0, 1)])
  ]
  assert decisions == ['amplify', 'suppress']


def test_statistics_are_the_textbook_ones():
  rng = np.random.default_rng(0)
  a, b = rng.integers(0, 4, (30, 6)).astype(float), rng.random((50, 6)) * 4
  c = judges.contrast(a, [b], permutations=5000)
  labels = np.r_[np.ones(30), np.zeros(50)]
  for i in range(6):
    both = np.r_[a[:, i], b[:, i]]
    np.testing.assert_allclose(c.auroc[i], roc_auc_score(labels, both))
    # The U test is the same test; its normal approximation is near at n = 80.
    p = scipy.stats.mannwhitneyu(
      a[:, i], b[:, i], alternative='greater', method='asymptotic'
    ).pvalue
    assert abs(c.p_value[i] - p) < 0.03
  d = (a.mean(0) - b.mean(0)) / np.sqrt(
    (a.var(0, ddof=1) + b.var(0, ddof=1)) / 2
  )
  np.testing.assert_allclose(c.effect_size, d)


def test_under_the_null_few_pass():
  rng = np.random.default_rng(1)
  x = rng.random((60, 2000))
  c = judges.contrast(x[:20], [x[20:40], x[40:]], permutations=2000)
  assert (c.q_value <= 0.05).mean() < 0.005
  assert np.mean(judges.contrast(x[:30], [x[30:]]).p_value <= 0.1) < 0.13


def test_examples_that_tell_nothing_apart_are_refused_with_the_statistic():
  noise = lambda texts: np.random.default_rng(2).random((len(texts), 8))
  with pytest.raises(
    judges.ObjectiveError, match=r'of 8 concepts .* AUROC 0\.'
  ):
    judges.ContrastiveJudge(objective(), noise, permutations=500)


def test_too_few_examples_are_refused():
  with pytest.raises(judges.ObjectiveError, match="'suppress': 1"):
    judges.ContrastiveJudge(objective(1), activations)


def test_wrong_activations_are_named():
  with pytest.raises(ValueError, match='40 texts'):
    judges.ContrastiveJudge(objective(), lambda t: activations(t)[:-1])
  with pytest.raises(ValueError, match='not finite'):
    judges.ContrastiveJudge(objective(), lambda t: np.full((len(t), 3), np.nan))
  with pytest.raises(ValueError, match='no other group'):
    judges.contrast(np.ones((3, 2)), [])
