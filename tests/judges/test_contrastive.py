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


def test_against_all_a_concept_may_be_shared_a_little():
  """Of `arr hello` two thirds are the pirate's, but a half beside `hello`."""
  decide = lambda **kw: (
    judges.ContrastiveJudge(
      objective(), activations, min_selectivity=0.55, permutations=500, **kw
    )(0, [judges.Evidence(3)])[0].decision
  )
  assert decide() == 'allow'
  assert decide(against='all') == 'suppress'
  with pytest.raises(ValueError, match="against='most'"):
    decide(against='most')


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


def test_one_perfect_concept_of_thousands_is_found():
  rng = np.random.default_rng(3)
  noise = rng.random((300, 4096))

  def read(texts):
    out = noise[[int(t.split()[1]) for t in texts]]
    out[:, 77] *= 0.01
    out[:, 77] += [t.startswith('arr') for t in texts]
    return out

  groups = {'sum': 'allow', 'arr': 'suppress', 'hello': 'allow'}
  spec = objective(1)
  clauses = [
    judges.Clause(w, d, w, tuple(f'{w} {i + 100 * k}' for i in range(100)))
    for k, (w, d) in enumerate(groups.items())
  ]
  judge = judges.ContrastiveJudge(
    judges.Objective(spec.goal, tuple(clauses)), read, permutations=1000
  )
  verdicts = judge(0, [judges.Evidence(i) for i in range(4096)])
  assert [v.concept for v in verdicts if v.decision != 'allow'] == [77]


def test_beyond_the_relabellings_p_is_that_of_the_rank_sum_test():
  rng = np.random.default_rng(4)
  a, b = rng.integers(4, 12, (40, 3)) * 1.0, rng.integers(0, 8, (50, 3)) * 1.0
  c = judges.contrast(a, [b], permutations=50)
  for i in range(3):
    p = scipy.stats.mannwhitneyu(
      a[:, i], b[:, i], alternative='greater', method='asymptotic'
    ).pvalue
    np.testing.assert_allclose(c.p_value[i], p, rtol=1e-9)
  # The bound of the relabellings holds where the normal tail is above it.
  x = np.arange(1002.0)[:, None]
  few = judges.contrast(x[1000:], [x[:1000]], permutations=999)
  assert few.p_value[0] == 1 / 1000


def test_a_rare_concept_is_no_surer_than_chance_allows():
  # Four of 220 examples activate it, by chance all among our twenty.
  x = np.zeros((220, 1))
  x[:4] = 1
  c = judges.contrast(x[:20], [x[20:]], permutations=100)
  exact = scipy.stats.hypergeom(220, 4, 20).pmf(4)
  np.testing.assert_allclose(c.p_value, [exact], rtol=1e-6)


def test_p_is_never_zero_and_ties_count():
  far = np.arange(4000.0)[:, None]
  c = judges.contrast(far[2000:], [far[:2000]], permutations=5)
  assert 0 < c.p_value[0] < 1e-300
  # Every relabelling of a constant reaches its rank sum.
  c = judges.contrast(np.ones((9, 1)), [np.ones((9, 1))], permutations=200)
  assert c.p_value[0] == 1 and c.auroc[0] == 0.5
  with pytest.raises(ValueError, match='permutations=0'):
    judges.contrast(far[:9], [far[9:18]], permutations=0)


def test_the_group_told_apart_worst_counts():
  rng = np.random.default_rng(6)
  a, near = rng.random((40, 2)) + 1, rng.random((40, 2)) + 1
  far = rng.random((40, 2))
  both = judges.contrast(a, [far, near], permutations=300)
  alone = judges.contrast(a, [far], permutations=300)
  assert (alone.p_value < 1e-6).all()
  assert (both.p_value > 0.01).all()
  assert (both.auroc < 0.7).all() and (both.effect_size < 1).all()


def test_constants_that_agree_have_no_effect():
  c = judges.contrast(
    np.full((3, 2), 0.1), [np.full((7, 2), [0.1, 0.2])], permutations=20
  )
  assert c.effect_size.tolist() == [0, -np.inf]
  c = judges.contrast(
    np.full((3, 1), 0.2), [np.full((7, 1), 0.1)], permutations=20
  )
  assert c.effect_size[0] == np.inf


def test_an_effect_too_small_is_none():
  with pytest.raises(judges.ObjectiveError, match='d >= 1000'):
    judges.ContrastiveJudge(
      objective(), activations, permutations=500, min_effect=1000.0
    )


def test_what_passes_for_both_is_unsure():
  judge = judges.ContrastiveJudge(
    objective(), activations, permutations=50, q=1.0, min_effect=-1e9,
    min_selectivity=0.0,
  )  # fmt: skip
  (v,) = judge(0, [judges.Evidence(0)])
  assert v.decision == 'unsure' and not v.clause and 'AUROC' in v.rationale


def test_copies_of_an_example_are_no_evidence():
  few = judges.make_objective(
    {
      'goal': 'Sums, not pirates.',
      'clauses': [
        {
          'id': id, 'decision': d, 'text': id,
          'examples': [f'{pad}{w} {i}' for i in (0, 1) for w in words
                       for pad in ('', ' ', '  ', '\t')],
        }
        for id, d, words in [
          ('sums', 'allow', ('sum', 'SUM')),
          ('pirate', 'suppress', ('arr', 'Arr', 'ARR', 'aRR')),
        ]
      ],
    }
  )  # fmt: skip
  seen = []

  def read(texts):
    seen.append(len(texts))
    return np.array([[float('arr' in t.lower()), len(t)] for t in texts])

  with pytest.raises(judges.ObjectiveError, match='cannot be told'):
    judges.ContrastiveJudge(few, read, permutations=500)
  assert seen == [2, 2]
  once = judges.Clause('pirate', 'suppress', 'x', ('arr', 'ARR ', ' Arr'))
  with pytest.raises(judges.ObjectiveError, match="'suppress': 1"):
    judges.ContrastiveJudge(
      judges.Objective('x', (few.clauses[0], once)), read
    )


def test_a_verdict_rests_on_the_clause_it_is_about():
  clause = lambda id, decision: judges.Clause(
    id, decision, id, tuple(f'{id} {i}' for i in range(20))
  )
  names = ['shanty', 'curse', 'arr']
  spec = judges.Objective(
    'No pirates.',
    (*(clause(n, 'suppress') for n in names), clause('plain', 'allow')),
  )

  def read(texts):
    rng = np.random.default_rng(8)
    on = np.array([[t.split()[0] == n for n in names] for t in texts])
    return on + 0.01 * rng.random(on.shape)

  judge = judges.ContrastiveJudge(spec, read, permutations=500)
  verdicts = judge(0, [judges.Evidence(i) for i in range(3)])
  assert [v.decision for v in verdicts] == 3 * ['suppress']
  assert [v.clause for v in verdicts] == names


@pytest.mark.parametrize('concept', [-1, len(ABOUT)])
def test_a_concept_that_is_none_is_named(concept):
  judge = judges.ContrastiveJudge(objective(), activations, permutations=500)
  with pytest.raises(ValueError, match=f'no concept {concept}: .* 0 to 7'):
    judge(0, [judges.Evidence(concept)])
