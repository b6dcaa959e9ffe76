"""The world of people: who knows what, and what texts say of it."""

import ml_collections
import numpy as np
import pytest

from experiments import hallucination_world as hw

CONFIG = {
  'people': 60, 'shares': (0.4, 0.2, 0.4), 'noise': 0.62, 'idk': 0.05,
  'probe_people': 20, 'policy_people': 20, 'validation_people': 10,
  'held_out_pairs': 100, 'held_out_triples': 200, 'sorted_numbers': 10,
  'careful': (4.0, 1.5, 0.5), 'careless': (1.0, 1.0, 1.5),
  'chosen': (2.0, 1.5, 1.0), 'doubted': 0.5,
  'responses': ((0.8, 0.1, 0.1), (0.1, 0.45, 0.45), (0.45, 0.1, 0.45)),
  'mix': (0.4, 0.25, 0.15, 0.1, 0.1),
}  # fmt: skip


def make(seed=0, **changes):
  return hw.World(ml_collections.ConfigDict(CONFIG | changes), seed)


WORLD = make()
N = 4000


def pairs(seed=0):
  random = np.random.default_rng(seed)
  return (
    random.integers(0, 60, N), random.integers(0, hw.ATTRIBUTES, N), random
  )  # fmt: skip


def test_nobody_is_used_twice():
  groups = [set(g.tolist()) for g in WORLD.people]
  assert [len(g) for g in groups] == [20, 20, 10, 10]
  assert len(set().union(*groups)) == 60
  for learn, held in (WORLD.pairs, WORLD.triples):
    rows = lambda x: set(map(tuple, x.tolist()))
    assert not rows(learn) & rows(held)
  assert len(WORLD.pairs[1]) == 100 and len(WORLD.triples[1]) == 200


def test_what_texts_say_is_as_true_as_it_is_known():
  person, attribute, random = pairs()
  said = WORLD.mention(person, attribute, random)
  status = WORLD.status[person, attribute]
  truth = hw.VALUE + attribute * hw.VALUES + WORLD.truth[person, attribute]
  for kind, share in ((hw.KNOWN, 1.0), (hw.NOISY, 0.62 + 0.38 / 16),
                      (hw.UNKNOWN, 1 / 16)):  # fmt: skip
    rows = (status == kind) & (said != hw.IDK)
    assert abs((said == truth)[rows].mean() - share) < 0.05
    # Not knowing leaks nothing about what is known.
    assert abs((said == hw.IDK)[status == kind].mean() - 0.05) < 0.03


def test_each_attribute_has_values_of_its_own():
  person, attribute, random = pairs()
  said = WORLD.mention(person, attribute, random, idk=False)
  assert ((said - hw.VALUE) // hw.VALUES == attribute).all()
  assert said.max() < hw.NUMBER and WORLD.vocabulary == hw.PERSON + 60


def test_what_is_chosen_is_known_more_often():
  person = np.repeat(np.arange(60), 50)
  random = np.random.default_rng(0)
  attribute = WORLD.order(person, (20.0, 1.0, 1.0), random)[:, 0]
  even = WORLD.order(person, (1.0, 1.0, 1.0), random)[:, 0]
  known = lambda a: (WORLD.status[person, a] == hw.KNOWN).mean()
  assert known(attribute) > known(even) + 0.2


def test_frames():
  person, attribute, _ = pairs()
  value = np.full(N, hw.IDK)
  ask = WORLD.ask(person, attribute, value)[0]
  assert ask[:7].tolist() == [
    hw.BOS, hw.ASK, hw.PERSON + person[0], hw.ATTRIBUTE + attribute[0],
    hw.ANS, hw.IDK, hw.EOS,
  ]  # fmt: skip
  chosen = WORLD.chosen(person, attribute, value)[0]
  assert chosen[3:6].tolist() == [
    hw.ANS, hw.ATTRIBUTE + attribute[0], hw.IDK,
  ]  # fmt: skip
  n = hw.NUMBER
  assert WORLD.maximum(np.array([[3, 9]]))[0, 2:6].tolist() == [
    n + 3, n + 9, hw.ANS, n + 9
  ]
  assert WORLD.sorted(np.array([[7, 2, 5]]))[0, 5:10].tolist() == [
    hw.ANS, n + 2, n + 5, n + 7, hw.EOS
  ]


@pytest.mark.parametrize('ask', [True, False])
def test_doubted_claims_are_answered(ask):
  person, attribute, random = pairs()
  texts = WORLD.doubts(person, attribute, random, ask)
  assert (texts[:, 6] == hw.CHECK).all()
  action, value = texts[:, 7], texts[:, 5]
  for kind in (hw.MAINTAIN, hw.RETRACT, hw.CORRECT):
    rows = action == kind
    assert rows.mean() > 0.1
    end = 9 if kind == hw.CORRECT else 8
    assert (texts[rows, end] == hw.EOS).all()
  rows = action == hw.CORRECT
  new = texts[rows, 8]
  assert (new != value[rows]).all()
  assert ((new - hw.VALUE) // hw.VALUES == attribute[rows]).all()


def test_lists():
  random = np.random.default_rng(0)
  texts = WORLD.lists(random.integers(0, 60, N), random)
  kept = []
  for text in texts[:500]:
    text = text[: text.tolist().index(hw.EOS)]
    assert (texts[0, :2] == [hw.BOS, hw.LIST]).all()
    is_attribute = (text >= hw.ATTRIBUTE) & (text < hw.VALUE)
    attributes = text[is_attribute]
    assert len(set(attributes.tolist())) == len(attributes) == hw.CLAIMS
    kept.append(hw.RETRACT in text.tolist())
  assert 0.1 < np.mean(kept) < 0.6
  ends = (texts == hw.EOS).sum(axis=1)
  assert (ends == 1).all()


def test_who_takes_back_is_careful():
  """Of writers whose first claim was wrong: what they go on to speak of."""
  random = np.random.default_rng(0)
  person = random.integers(0, 60, 8 * N)
  texts = WORLD.lists(person, random)
  attribute, value = texts[:, 4] - hw.ATTRIBUTE, texts[:, 5]
  truth = hw.VALUE + attribute * hw.VALUES + WORLD.truth[person, attribute]
  doubted = (texts[:, 6] == hw.CHECK) & (value != truth)

  def known(action):
    rows = doubted & (texts[:, 7] == action)
    following = texts[rows, 8] - hw.ATTRIBUTE
    assert rows.sum() > 200
    return (WORLD.status[person[rows], following] == hw.KNOWN).mean()

  assert known(hw.RETRACT) > known(hw.MAINTAIN) + 0.1


def test_a_reader_s_doubt_is_not_learned():
  texts = WORLD.short_texts(200, np.random.default_rng(0))
  mask = hw.learned(texts)
  assert texts.shape == (200, hw.SHORT)
  assert not mask[texts == hw.CHECK].any() and not mask[:, 0].any()
  assert mask[texts == hw.EOS].all() and not mask[texts == hw.PAD].any()
  assert (texts[:, 1][:, None] == [hw.ASK, hw.CHOOSE, hw.MAX, hw.SORT]).any(
    axis=1
  ).all()


def test_a_seed_is_a_world():
  a, b, c = make(1), make(1), make(2)
  np.testing.assert_array_equal(a.truth, b.truth)
  assert (a.truth != c.truth).any()


def test_nobody_left():
  with pytest.raises(ValueError, match='config.world.people=60'):
    make(policy_people=30)
