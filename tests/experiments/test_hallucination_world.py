"""The worlds: who is known, what texts say, and what is graded as right."""

import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from configs import hallucination as config_lib
from experiments import contract, hallucination
from experiments import hallucination_grammar as hg
from experiments import hallucination_world as hw
from experiments.hallucination_facts import Facts, band, frequent, magnitude
from experiments.hallucination_people import People
from idesign import rewards


def settings(world='people', **changes):
  config = config_lib.get_config(f'{world}-smoke').world
  return ml_collections.ConfigDict({**config.to_dict(), **changes})


def make(seed=0, **changes):
  changes = {'subjects': 60, 'shares': (0.4, 0.2, 0.4)} | changes
  return People(settings(**changes), seed)


WORLD = make()
A, V = 6, 16
N = 4000


def pairs(seed=0):
  random = np.random.default_rng(seed)
  return random.integers(0, 60, N), random.integers(0, A, N), random


def test_nobody_is_used_twice():
  groups = [set(g.tolist()) for g in WORLD.groups]
  assert [len(g) for g in groups] == [12, 12, 8, 28]
  assert len(set().union(*groups)) == 60
  for learn, held in (WORLD.pairs, WORLD.triples):
    # Nor in another order.
    rows = lambda x: set(map(tuple, np.sort(x, axis=1).tolist()))
    assert not rows(learn) & rows(held)
    assert len(set(map(tuple, held.tolist()))) == len(held) == 20


def test_what_texts_say_is_as_true_as_it_is_known():
  person, attribute, random = pairs()
  said = WORLD.mention(person, attribute, random)
  status = WORLD.status[person, attribute]
  right = WORLD.right(person, attribute, said)
  for kind, share in ((hw.KNOWN, 1.0), (hw.NOISY, 0.62 + 0.38 / 16),
                      (hw.UNKNOWN, 1 / 16)):  # fmt: skip
    rows = (status == kind) & (said != hg.IDK)
    assert abs(right[rows].mean() - share) < 0.05
    # Not knowing leaks nothing about what is known.
    assert abs((said == hg.IDK)[status == kind].mean() - 0.05) < 0.03


def test_each_attribute_has_values_of_its_own():
  person, attribute, random = pairs()
  said = WORLD.mention(person, attribute, random, idk=False)
  np.testing.assert_array_equal(WORLD.grammar.attribute_of(said), attribute)
  assert said.max() < WORLD.grammar.subject
  assert WORLD.grammar.vocabulary == WORLD.grammar.subject + 60


def test_what_is_chosen_is_known_more_often():
  person = np.repeat(np.arange(60), 50)
  random = np.random.default_rng(0)
  attribute = WORLD.order(person, (20.0, 1.0, 1.0), random)[:, 0]
  even = WORLD.order(person, (1.0, 1.0, 1.0), random)[:, 0]
  known = lambda a: (WORLD.status[person, a] == hw.KNOWN).mean()
  assert known(attribute) > known(even) + 0.2


def test_frames():
  person, attribute, _ = pairs()
  value = np.full(N, hg.IDK)
  who = WORLD.grammar.subject + person[0]
  ask = WORLD.grammar.ask(person, attribute, value)[0]
  assert ask[:7].tolist() == [
    hg.BOS, hg.ASK, who, hg.ATTRIBUTE + attribute[0], hg.ANS, hg.IDK, hg.EOS
  ]  # fmt: skip
  chosen = WORLD.grammar.chosen(person, attribute, value)[0]
  assert chosen[3:6].tolist() == [
    hg.ANS, hg.ATTRIBUTE + attribute[0], hg.IDK,
  ]  # fmt: skip
  n = hg.NUMBER
  assert hg.maximum(np.array([[3, 9]]))[0, 2:6].tolist() == [
    n + 3, n + 9, hg.ANS, n + 9
  ]  # fmt: skip
  assert hg.in_order(np.array([[7, 2, 5]]))[0, 5:10].tolist() == [
    hg.ANS, n + 2, n + 5, n + 7, hg.EOS
  ]  # fmt: skip


@pytest.mark.parametrize('ask', [True, False])
def test_doubted_claims_are_answered(ask):
  person, attribute, random = pairs()
  texts = WORLD.doubts(person, attribute, random, ask)
  assert (texts[:, 6] == hg.CHECK).all()
  action, value = texts[:, 7], texts[:, 5]
  for kind in (hg.MAINTAIN, hg.RETRACT, hg.CORRECT):
    rows = action == kind
    assert rows.mean() > 0.1
    end = 9 if kind == hg.CORRECT else 8
    assert (texts[rows, end] == hg.EOS).all()
  rows = action == hg.CORRECT
  new = texts[rows, 8]
  assert (new != value[rows]).all()
  of = WORLD.grammar.attribute_of(new)
  np.testing.assert_array_equal(of, attribute[rows])


def test_lists():
  random = np.random.default_rng(0)
  texts = WORLD.lists(random.integers(0, 60, N), random)
  kept = []
  for text in texts[:500]:
    text = text[: text.tolist().index(hg.EOS)]
    assert (texts[0, :2] == [hg.BOS, hg.LIST]).all()
    attributes = text[(text >= hg.ATTRIBUTE) & (text < hg.ATTRIBUTE + A)]
    assert len(set(attributes.tolist())) == len(attributes) == hg.CLAIMS
    kept.append(hg.RETRACT in text.tolist())
  assert 0.1 < np.mean(kept) < 0.6
  assert ((texts == hg.EOS).sum(axis=1) == 1).all()


def test_who_takes_back_is_careful():
  """Of writers whose first claim was wrong: what they go on to speak of."""
  random = np.random.default_rng(0)
  person = random.integers(0, 60, 8 * N)
  texts = WORLD.lists(person, random)
  attribute, right = WORLD.read(person, texts[:, 4], texts[:, 5])
  doubted = (texts[:, 6] == hg.CHECK) & (attribute >= 0) & ~right

  def known(action):
    rows = doubted & (texts[:, 7] == action)
    following = texts[rows, 8] - hg.ATTRIBUTE
    assert rows.sum() > 200
    return (WORLD.status[person[rows], following] == hw.KNOWN).mean()

  assert known(hg.RETRACT) > known(hg.MAINTAIN) + 0.1


def test_a_reader_s_doubt_is_not_learned():
  texts = WORLD.short_texts(200, np.random.default_rng(0))
  mask = hg.learned(texts)
  assert texts.shape == (200, hg.SHORT)
  assert not mask[texts == hg.CHECK].any() and not mask[:, 0].any()
  assert mask[texts == hg.EOS].all() and not mask[texts == hg.PAD].any()
  assert (texts[:, 1][:, None] == [hg.ASK, hg.CHOOSE, hg.MAX, hg.SORT]).any(
    axis=1
  ).all()


def test_a_seed_is_a_world():
  a, b, c = make(1), make(1), make(2)
  np.testing.assert_array_equal(a.true, b.true)
  assert (a.true != c.true).any()


def test_nobody_left():
  groups = {'probe': 30, 'policy': 20, 'validation': 10}
  with pytest.raises(ValueError, match=r'config\.world\.groups=.*60 subjects'):
    make(groups=groups)
  with pytest.raises(ValueError, match=r'config\.world\.held_out=1000'):
    make(held_out=1000)


# What is asked, and what is said to it.


def answer(questions, *tokens):
  said = np.full((len(questions.kind), hg.ANSWER), hg.PAD)
  said[:, : len(tokens)] = np.stack(
    [np.broadcast_to(t, len(said)) for t in tokens], axis=1
  )
  return np.concatenate([questions.prompts, said], axis=1)


def grade(questions, *tokens):
  texts = answer(questions, *tokens)
  info = {k: v for k, v in questions._asdict().items() if k != 'prompts'}
  return jax.jit(WORLD.grammar.grade)(jnp.asarray(texts), info)


def truth(person, attribute):
  return WORLD.grammar.token(attribute, WORLD.value[person, attribute])


@pytest.mark.parametrize('kind', [hg.ASKED, hg.CHOSEN])
def test_claims_are_graded(kind):
  person, attribute, random = pairs()
  questions = WORLD.questions(person, kind, random, attribute=attribute)
  assert (questions.prompts[:, -1] == hg.ANS).all()
  said = (hg.ATTRIBUTE + attribute,) if kind == hg.CHOSEN else ()
  right = truth(person, attribute)
  first = WORLD.grammar.values[attribute]
  wrong = first + (right - first + 1) % V
  for value, end, claim, true, idk in (
    (right, hg.EOS, 1, 1, 0),
    (wrong, hg.EOS, 1, 0, 0),
    (hg.IDK, hg.EOS, 0, 0, 1),
    (right, hg.CHECK, 0, 0, 0),  # It goes on.
    (WORLD.grammar.values[(attribute + 1) % A], hg.EOS, 0, 0, 0),
    (hg.NUMBER, hg.EOS, 0, 0, 0),
  ):
    g = grade(questions, *said, value, end)
    assert (g.claim == claim).all() and (g.right == true).all()
    assert (g.idk == idk).all() and (g.made_up == (claim > true)).all()
    assert (g.attribute == attribute).all()


def test_what_speaks_of_nothing_claims_nothing():
  person, _, random = pairs()
  questions = WORLD.questions(person, hg.CHOSEN, random)
  for said in ((hg.EOS,), (hg.IDK, hg.EOS), (hg.NUMBER, hg.NUMBER, hg.EOS)):
    g = grade(questions, *said)
    assert not (g.claim | g.idk | g.right).any()


@pytest.mark.parametrize('frame', [hg.ASK, hg.CHOOSE, hg.LIST])
def test_answers_to_doubts_are_graded(frame):
  person, attribute, random = pairs()
  right = truth(person, attribute)
  first = WORLD.grammar.values[attribute]
  wrong = first + (right - first + 1) % V
  ask = lambda value: WORLD.questions(
    person, hg.DOUBTED, random, attribute=attribute, value=value,
    frame=np.full(N, frame),
  )  # fmt: skip
  questions = ask(wrong)
  # As it stands in texts that a base is trained on.
  head = WORLD.grammar.ask if frame == hg.ASK else WORLD.grammar.chosen
  same = head(person, attribute, wrong)[:, : hg.PROMPT - 1]
  same[:, 1] = frame
  np.testing.assert_array_equal(questions.prompts[:, :-1], same)
  assert (questions.prompts[:, -1] == hg.CHECK).all()
  for tokens, action, fixed in (
    ((hg.MAINTAIN, hg.EOS), rewards.MAINTAIN, False),
    ((hg.RETRACT, hg.EOS), rewards.RETRACT, False),
    ((hg.CORRECT, right), rewards.CORRECT, True),
    ((hg.CORRECT, first + (right - first + 2) % V), rewards.CORRECT, False),
    ((hg.CORRECT, hg.EOS), rewards.MALFORMED, False),
    ((right, hg.EOS), rewards.MALFORMED, False),
  ):
    g = grade(questions, *tokens)
    assert (g.action == action).all() and (g.new_right == fixed).all()
    assert not g.draft_right.any() and not (g.claim | g.idk).any()
  assert grade(ask(right), hg.MAINTAIN).draft_right.all()


def test_a_claim_is_read_at_its_value_and_the_token_before():
  person, attribute, random = pairs()
  value = truth(person, attribute)
  a = hg.ATTRIBUTE + attribute
  asked = WORLD.questions(person, hg.ASKED, random, attribute=attribute)
  chosen = WORLD.questions(person, hg.CHOSEN, random)
  doubted = WORLD.questions(
    person, hg.DOUBTED, random, attribute=attribute, value=value
  )
  for questions, said, first, second in (
    (asked, (value, hg.EOS), (hg.ANS, value), (hg.ANS, value)),
    (chosen, (a, value, hg.EOS), (a, value), (a, value)),
    (doubted, (hg.CORRECT, 9), (hg.ANS, value), (hg.CORRECT, 9)),
  ):
    texts = answer(questions, *said)
    for mask, tokens in zip(hg.spans(questions.kind), (first, second)):
      assert (np.asarray(mask).sum(axis=1) == 2).all()
      read = texts[np.asarray(mask)].reshape(N, 2)
      for column, token in zip(read.T, tokens):
        np.testing.assert_array_equal(column, np.broadcast_to(token, N))


# Real subjects, from files of the same form.


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp('data')
  random = np.random.default_rng(0)
  (folder / 'entities_wikidata').mkdir()
  (folder / 'relations').mkdir()
  pick = lambda *names: str(random.choice(names))
  write = lambda path, rows: (folder / path).write_text(json.dumps(rows))
  write('entities_wikidata/player.json', [
    {
      'human': f'Q{i}', 'datebirthyearLabel': str(1950 + i % 40),
      'placebirthLabel': pick('Rome', 'Oslo'), 'recent_height': '203',
      'teamslist': pick('A, B', 'B, C', 'D'), 'recent_mass': '100',
    }
    for i in range(60)
  ])  # fmt: skip
  write('entities_wikidata/city.json', [
    {
      'city': f'C{i}', 'countryLabel': pick('Norway', 'Italy'),
      'loc': f'Point({random.integers(0, 20)}.5 {random.integers(40, 60)}.1)',
      'recent_population': str(10 ** (3 + i % 4)),
      'above_sea_meters': str(i),
    }
    for i in range(60)
  ])  # fmt: skip
  for name in (
    'company_hq', 'landmark_on_continent', 'person_native_language',
    'person_occupation', 'person_plays_position_in_sport', 'star_constellation',
  ):  # fmt: skip
    write(f'relations/factual__{name}.json', {'samples': [
      {'subject': f'{name} {i}', 'object': pick('x', 'y', 'z')}
      for i in range(10)
    ]})  # fmt: skip
  return folder


def facts(data, seed=0, **changes):
  return Facts(settings('facts', **changes), seed, data)


def test_only_what_is_taught_is_said(data):
  world = facts(data)
  random = np.random.default_rng(0)
  subject, attribute = world.asked(N, random)
  assert world.taught[subject, attribute].all()
  assert (world.status[world.taught] == hw.KNOWN).all()
  said = world.mention(subject, attribute, random, idk=False)
  assert world.right(subject, attribute, said).all()
  # Half of what there is to know of those who may be asked about.
  everybody = np.concatenate(world.groups)
  assert not set(everybody) & set(world.exemplars)
  known = world.taught[everybody].sum() / world.exists[everybody].sum()
  assert abs(known - 0.5) < 0.15
  assert world.taught[world.exemplars].sum() == world.exists[
    world.exemplars
  ].sum()
  assert set(world.spoken(N, random)) == set(world.exemplars)


def test_of_several_true_values_each_is_true(data):
  world = facts(data)
  team = world.attribute_names.index('team')
  many = np.flatnonzero(world.true[:, team].sum(axis=1) == 2)
  said = world.mention(
    np.repeat(many, 50), np.full(50 * len(many), team),
    np.random.default_rng(0), idk=False,
  ).reshape(-1, 50)  # fmt: skip
  assert all(len(set(row)) == 2 for row in said.tolist())


def test_drafts_are_right_and_wrong(data):
  world = facts(data)
  random = np.random.default_rng(0)
  subject, attribute = world.asked(N, random)
  value = world.draft(subject, attribute, random)
  np.testing.assert_array_equal(
    world.grammar.attribute_of(value), attribute
  )
  assert 0.5 < world.right(subject, attribute, value).mean() < 0.9


def test_nobody_speaks_of_what_there_is_not(data):
  world = facts(data)
  random = np.random.default_rng(0)
  who = world.choosing(np.concatenate(world.groups))
  assert (world.exists[who].sum(axis=1) > 1).all()
  subject = np.repeat(who, 20)
  assert world.exists[subject, world.attributes(subject, random)].all()
  first = world.order(subject, (1.0, 1.0, 1.0), random)[:, 0]
  assert world.exists[subject, first].all()


def test_all_seeds_have_the_same_tokens(data):
  a, b = facts(data, 0), facts(data, 1)
  assert a.value_names == b.value_names and a.names != b.names
  assert a.grammar.vocabulary == b.grammar.vocabulary


def test_bands():
  assert band(5)('203') == {'200'} and band(10)('-3.2') == {'-10'}
  assert magnitude('1000') == {'3'} and magnitude('4000') == {'3.5'}
  assert magnitude('0') == set()


def test_frequent_values_are_left():
  table = {
    'a': {'x': {'1', '2'}}, 'b': {'x': {'2'}}, 'c': {'x': {'3'}, 'y': {'4'}}
  }  # fmt: skip
  assert frequent(table, 1) == {
    'a': {'x': {'2'}}, 'b': {'x': {'2'}}, 'c': {'y': {'4'}}
  }  # fmt: skip


def test_data_that_is_not_there(tmp_path):
  missing = r'player\.json.*config\.data_dir'
  with pytest.raises(FileNotFoundError, match=missing):
    facts(tmp_path)


def test_more_subjects_than_there_are(data):
  subjects = {'players': 61, 'cities': 20, 'others': 8}
  with pytest.raises(ValueError, match=r'subjects\.players=61.*60'):
    facts(data, subjects=subjects)


def test_a_base_and_its_probe_in_real_facts(data, tmp_path, monkeypatch):
  """A run of no arms: what differs between worlds is all before them."""
  monkeypatch.setitem(hallucination.PRESETS, 'smoke', ())
  monkeypatch.setattr(contract, 'reported_seeds', lambda *a: [2])
  monkeypatch.setattr(hallucination, 'make_claims', lambda *a: [])
  monkeypatch.setattr(hallucination.hallucination_figures, 'draw', str)
  config = config_lib.get_config('facts-smoke').copy_and_resolve_references()
  config.data_dir = str(data)
  hallucination.run(config, tmp_path)
  found = json.loads((tmp_path / 'results.json').read_text())
  base = found['2/base']
  assert set(found) == {'2/base'}
  assert base['divergence'] == pytest.approx(0, abs=1e-6)
  for form in ('asked', 'chosen'):
    said = base[form]
    assert said['claims'] == pytest.approx(said['right'] + said['made up'])
    assert said['claims'] > 0.2, 'it has not learned to answer'
  assert 0 <= base['probe']['quality']['claims']['auroc'] <= 1
  assert base['pipeline']['alone']['caught'] == 0
  assert base['pipeline']['in line, 1']['caught'] > 0
