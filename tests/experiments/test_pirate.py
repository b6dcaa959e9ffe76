"""The pirate experiment: its world, its claims, and every code path."""

import importlib.util
import json
import pathlib
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import (
  contract,
  pirate,
  pirate_builder,
  pirate_claims,
  pirate_concepts,
  pirate_measure,
  pirate_reports,
  pirate_scene,
  pirate_table,
)
from experiments import pirate_train as train
from experiments import pirate_world as world_lib
from experiments.pirate_world import FIRST, NEUTRAL, WORDS
from idesign import judges, shaping, sites

ROOT = pathlib.Path(__file__).resolve().parents[2]


def get_config(preset):
  spec = importlib.util.spec_from_file_location(
    'config', ROOT / 'configs' / 'pirate.py'
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(preset)


def make_world(entangled, seed=3):
  return world_lib.World(seed, entangled=entangled, known=50, dictionary=None)


@pytest.mark.parametrize('entangled', [False, True])
def test_registers_differ_in_words_and_not_in_places(entangled):
  world = make_world(entangled)
  random = np.random.default_rng(0)
  pairs = world.learn[:300]
  plain = world.sums(pairs, NEUTRAL, np.zeros(300, bool), random).tokens
  pirate_ = world.sums(pairs, NEUTRAL, np.ones(300, bool), random).tokens
  assert plain.shape == pirate_.shape == (300, world_lib.LENGTH)
  np.testing.assert_array_equal(plain[:, :FIRST], pirate_[:, :FIRST])
  marked = world.lexicon.marked
  assert not marked[plain].any()
  # Opening, comma, two words, address, end.
  words = [True, False, entangled, entangled, True, False]
  np.testing.assert_array_equal(
    marked[pirate_[:, FIRST:]], np.tile(words, (300, 1))
  )
  plain_form = world.lexicon.plain
  np.testing.assert_array_equal(plain_form[pirate_[:, WORDS]], plain[:, WORDS])
  # The sum itself, read back from the text.
  for (a, b), text in zip(pairs, plain):
    said = world.lexicon.decode(text).split()
    assert int(said[9 + 2] + said[9 + 3]) == a + b
    assert (int(said[3] + said[4]), int(said[6] + said[7])) == (a, b)


def test_what_is_held_out_is_in_no_training():
  world = make_world(False)
  key = lambda pairs: {tuple(p) for p in pairs}
  parts = [key(world.familiar), key(world.learn), key(world.held_out)]
  assert len(set.union(*parts)) == sum(map(len, parts)) == 5050
  assert all(max(p) < 50 for p in parts[0])
  assert all(max(p) >= 50 for p in parts[1] | parts[2])
  texts = world.base_texts(2000, np.random.default_rng(1))
  asked = {
    tuple(t[3:9]) for t, kind in zip(texts.tokens, texts.kind) if kind == 'sum'
  }
  random = np.random.default_rng(0)
  new = np.concatenate([world.learn, world.held_out])
  unseen = world.sums(new, NEUTRAL, np.zeros(len(new), bool), random).tokens
  assert not asked & {tuple(t[3:9]) for t in unseen}


def test_the_base_hears_a_pirate_only_when_asked_for():
  world = make_world(True)
  texts = world.base_texts(20_000, np.random.default_rng(2))
  ids = world.lexicon.ids
  asks = np.isin(texts.tokens[:, 2], [ids['pirate'], ids['sailor']])
  assert not texts.pirate[~asks].any()
  for word, chance in world_lib.STRENGTHS.items():
    mine = asks & (texts.tokens[:, 1] == ids[word])
    assert texts.pirate[mine].mean() == pytest.approx(chance, abs=0.04)
  marked = world.lexicon.marked[texts.tokens].any(axis=1)
  np.testing.assert_array_equal(marked, texts.pirate)
  replay = world.replay(500, np.random.default_rng(3))
  assert np.isin(replay.tokens[:, 2], [ids['pirate'], ids['sailor']]).all()
  assert not (replay.tokens[:, 1] == ids['never']).any()


def test_things_asked_of_afterwards_are_in_nothing_before():
  world, random = make_world(False), np.random.default_rng(0)
  before, after = (set(world.nouns(2000, random, h)) for h in (False, True))
  assert len(before) == 40 and len(after) == 20 and not before & after
  ids = world.lexicon.ids
  held = [ids[f'n{i}'] for i in after]
  assert not np.isin(world.replay(500, random).tokens, held).any()
  assert np.isin(world.base_texts(500, random).tokens, held).any()


def test_scores_by_hand():
  world = make_world(True)
  lexicon = world.lexicon
  expected = lexicon.encode('please answer 4 7 + 2 5 = so , 7 2 friend')
  expected = np.array([[1, *expected, 2]] * 4)
  said = np.array([
    lexicon.encode(t)
    for t in (
      'so , 7 2 friend <eos>',
      'arr , p7 p2 matey <eos>',
      'so , 7 p2 pal <eos>',
      'well , 7 3 sir <eos>',
    )
  ])  # fmt: skip
  right, pirate_ = world_lib.score(lexicon, said, expected)
  assert right.tolist() == [True, True, True, False]
  assert pirate_.tolist() == [False, True, True, False]


def test_a_dictionary_gives_the_dialect(tmp_path):
  path = tmp_path / 'words.json'
  path.write_text(json.dumps({'big': 'vast', 'old': 'barnacle covered'}))
  lexicon = world_lib.make_lexicon(str(path))
  form = lambda w: lexicon.words[lexicon.dialect[lexicon.ids[w]]]
  assert form('big') == 'vast' and form('old') == 'pold'
  assert lexicon.marked[lexicon.ids['vast']]
  path.write_text('no json')
  with pytest.raises(ValueError, match='config.data.dictionary'):
    world_lib.make_lexicon(str(path))


def row(right, pirate_, curve=None, steps=(10, 20, 30)):
  return {
    'sums': {'right': right, 'pirate': pirate_},
    'sums, asked': {'right': right, 'pirate': 100.0},
    'facts, asked': {'right': right, 'pirate': 100.0},
    'sampled': {'right': right, 'pirate': pirate_},
    'log odds': pirate_ / 10,
    'moved': pirate_ / 100,
    'moved on facts': pirate_ / 100,
    'moved by position': [pirate_ / 100, -pirate_ / 100],
    'moved by layer': [0.0, -pirate_ / 100],
    'opening moved by layer': [0.0, -pirate_ / 100],
    'without 1': {'right': right, 'pirate': pirate_},
    'without 4': {'right': right, 'pirate': pirate_},
    'steps': list(steps),
    'curve': curve or {
      'right': [0.0, right, right], 'pirate': [pirate_] * 3,
      'trained': [0.0, 95.0, 99.0],
    },
  }  # fmt: skip


def test_steps_to_a_level_are_interpolated():
  curve = {'right': [40.0, 80.0, 100.0]}
  at = lambda level: pirate_table.steps_to(row(0, 0, curve), 'right', level)
  assert at(20) == 5 and at(80) == 20 and at(90) == 25
  assert at(101) == 40  # Never: one look past the end.


def test_arms_are_compared_when_training_skill_is_reached():
  curve = {
    'right': [1.0, 2.0, 3.0], 'trained': [80.0, 90.0, 100.0],
    'pirate': [7.0, 8.0, 9.0],
  }  # fmt: skip
  # At looks and halfway between them: 1, 1.5, 2 and 2.5.
  found = pirate_table.at_matched_skill(row(0, 0, curve))
  assert found == pytest.approx(
    {'right': 1.75, 'trained': 87.5, 'pirate': 7.75}
  )
  # An arm twice as slow that has learned the same by then is its equal.
  slow = {k: [0.0, *v[:1], sum(v[:2]) / 2, v[1], sum(v[1:]) / 2, v[2]]
          for k, v in curve.items()}  # fmt: skip
  late = row(0, 0, slow, steps=range(10, 70, 10))
  assert pirate_table.at_matched_skill(late) == pytest.approx(found)
  curve['trained'] = [1.0, 2.0, 3.0]  # Never.
  assert pirate_table.at_matched_skill(row(0, 0, curve))['right'] == 3.0


# Of facts: a pirate no more, though asked to be.
FORGOT = {'facts, asked': {'right': 98.0, 'pirate': 4.0}}
SLOW = {'right': [0, 0, 95.0], 'pirate': [9.0] * 3, 'trained': [0, 0, 95.0]}


FOUND = {'precision': 0.95, 'recall': 0.95}
JUDGED = FOUND | {
  'tokens of the lessons': {
    'pirate, ratio': FOUND, 'arithmetic, reliance': FOUND,
  },
}  # fmt: skip


def claim_results(seeds, **changed):
  """What a run that reaches everything would hold."""
  results = {}
  for s in seeds:
    results |= {
      f'{s}/movement': {'correlation': 0.99, 'slope': 1.0},
      f'{s}/judge': JUDGED,
      f'{s}/elicitation': {
        'always': 99.0, 'often': 75.0, 'sometimes': 40.0, 'rarely': 9.0,
      },
      f'{s}/base': row(1.0, 0.0),
    }
    for name in pirate_table.ARMS['paper']:
      good = name in pirate_table.DEPLOYABLE or name == 'clean data'
      results[f'{s}/all/{name}'] = row(98.0, 1.0 + s / 10 if good else 99.0)
    weak = enumerate(pirate_table.STRENGTHS)
    for i, name in weak:
      results[f'{s}/all/{name}']['log odds'] = float(i)
    results[f'{s}/all/reversed objective'] = row(2.0, 99.0)
    slow, fast = [0, 0, 95.0], [0, 95.0, 95.0]
    for name, right in (('plain', slow), ('amplify, random tokens', slow),
                        ('amplify', fast)):  # fmt: skip
      curve = {'right': right, 'pirate': [9.0] * 3, 'trained': right}
      results[f'{s}/all/{name}'] = row(98.0, 99.0, curve)
    for name in pirate_table.SUBSET_ARMS['paper']:
      bad = name in ('plain', 'gate, anchored, random tokens')
      results[f'{s}/subset/{name}'] = row(98.0, 30.0 if bad else 1.0)
    for name in pirate_table.PROJECTIONS:
      held = results[f'{s}/all/{name}']
      held['moved'] = held['moved on facts'] = 0.01
      held['moved by position'] = held['moved by layer'] = [0.01, -0.01]
      held['opening moved by layer'] = [0.01, -0.01]
    for name, value in changed.items():
      results[f'{s}/all/{name.replace("_", " ")}'] = value
  return results


def claims_of(results, seeds, preset='separable-paper'):
  made = pirate_claims.make_claims(get_config(preset), results, seeds)
  return {c.id.split('_', 1)[1]: c for c in made}


def test_claims_hold_where_everything_is_reached():
  seeds = [2, 3, 4]
  found = claims_of(claim_results(seeds), seeds)
  failed = [k for k, c in found.items() if not c.passed]
  assert not failed
  assert found['gate_pirate'].value == pytest.approx(1.3)
  assert found['project_update_refreshed_moved_at_opening'].passed
  assert found['amplify_faster_than_plain'].value < 0.9


@pytest.mark.parametrize(
  'arm,new,claim',
  [
    ('gate', row(98.0, 11.0), 'gate_pirate'),
    ('gate', row(94.0, 0.0), 'gate_skill'),
    ('project_update', row(98.0, 70.0), 'project_update_learned'),
    ('prompt_irrelevant', row(50.0, 5.0), 'prompt_irrelevant_pirate'),
    ('prompt_irrelevant', row(96.0, 5.0), 'prompt_irrelevant_misses'),
    ('reversed_objective', row(30.0, 99.0), 'reversed_skill'),
    ('reversed_objective', row(2.0, 80.0), 'reversed_pirate'),
    ('gate', row(98.0, 0.0) | FORGOT, 'gate_asked'),
    ('gate', row(85.0, 0.0), 'gate_matched'),
    ('plain', row(98.0, 99.0) | {'without 1': {'pirate': 5.0}}, 'without_1'),
    ('plain', row(98.0, 99.0) | {'without 4': {'pirate': 5.0}}, 'without_4'),
    ('inoculate_always', row(98, 0) | {'log odds': 9.0}, 'inoculation_rank'),
    ('inoculate_rarely', row(98, 0) | {'log odds': 0.5}, 'inoculation_rise'),
    ('plain', row(80.0, 99.0), 'plain_skill'),
    ('amplify', row(98.0, 99.0, SLOW), 'amplify_faster_than_plain'),
    (
      'inoculate_rarely',
      row(98.0, 0.0) | {'log odds': 1.0},
      'inoculation_monotone',
    ),
    (
      'project_update,_refreshed',
      row(98.0, 99.0) | {'moved by position': [0.5, -0.5], 'moved': 0.0},
      'project_update_refreshed_moved_at_opening',
    ),
    (
      'project_update,_refreshed',
      row(98.0, 99.0) | {'moved on facts': 0.5},
      'project_update_refreshed_moved_on_facts',
    ),
    (
      'project_update,_refreshed,_everywhere',
      row(98.0, 99.0) | {'moved': 0.0, 'moved by layer': [0.0, -0.5]},
      'project_update_refreshed_everywhere_moved_at_last_layer',
    ),
    (
      'project_update,_refreshed,_everywhere',
      row(98.0, 99.0) | {'moved': 0.0, 'opening moved by layer': [0.0, -0.5]},
      'project_update_refreshed_everywhere_moved_at_opening_at_last_layer',
    ),
    (
      'project_update,_refreshed,_everywhere,_random',
      row(98.0, 99.0) | {'moved': 0.1},
      'project_update_refreshed_everywhere_random_moved',
    ),
  ],
)
def test_claims_fail_where_it_is_not(arm, new, claim):
  seeds = [2, 3, 4]
  found = claims_of(claim_results(seeds, **{arm: new}), seeds)
  assert not found[claim].passed


def tokens(**recall):
  """A judge whose latents miss some of a clause's tokens."""
  mine = {k: FOUND | {'recall': v} for k, v in recall.items()}
  found = JUDGED['tokens of the lessons'] | mine
  return JUDGED | {'tokens of the lessons': found}


@pytest.mark.parametrize(
  'what,new,claim',
  [
    ('judge', JUDGED | {'precision': 0.7}, 'judge_precision'),
    ('judge', JUDGED | {'recall': 0.7}, 'judge_recall'),
    ('judge', tokens(**{'pirate, ratio': 0.7}), 'tokens_pirate_recall'),
    ('judge', tokens(**{'arithmetic, reliance': 0.7}),
     'tokens_arithmetic_recall'),
    ('movement', {'correlation': 0.5, 'slope': 1.0}, 'movement_correlation'),
    ('movement', {'correlation': 0.99, 'slope': 0.8}, 'movement_slope_low'),
    ('movement', {'correlation': 0.99, 'slope': 1.2}, 'movement_slope_high'),
  ],
)
def test_claims_of_what_was_read_fail_where_it_is_wrong(what, new, claim):
  seeds = [2, 3, 4]
  results = claim_results(seeds) | {f'{s}/{what}': new for s in seeds}
  assert not claims_of(results, seeds)[claim].passed


@pytest.mark.parametrize(
  'arm,new,claim',
  [
    ('rewrite', row(98.0, 11.0), 'rewrite_pirate'),
    ('rewrite', row(60.0, 0.0), 'rewrite_skill'),
    ('rewrite', row(90.0, 0.0), 'rewrite_below_clean'),
    ('rewrite', row(98.0, 0.0) | FORGOT, 'rewrite_asked'),
    ('rewrite,_random_tokens', row(98.0, 0.0), 'rewrite_random_tokens_misses'),
    ('rewrite,_random_tokens', row(50.0, 0.0), 'rewrite_random_tokens_pirate'),
  ],
)
def test_claims_of_the_entangled_world(arm, new, claim):
  seeds = [2, 3, 4]
  made = lambda results: claims_of(results, seeds, 'entangled-paper')
  assert made(claim_results(seeds))[claim].passed
  assert not made(claim_results(seeds, **{arm: new}))[claim].passed


def test_where_few_lessons_are_a_pirates_answers_are_drawn():
  """What is likeliest shows nothing: plain fine-tuning would reach it."""
  seeds = [2, 3, 4]
  results = claim_results(seeds)
  for s in seeds:
    results[f'{s}/subset/plain']['sums']['pirate'] = 0.0
    results[f'{s}/subset/rewrite']['sampled']['pirate'] = 20.0
  found = claims_of(results, seeds)
  assert found['plain_subset'].passed
  assert not found['rewrite_subset_pirate'].passed
  assert found['rewrite_subset_skill'].passed


def test_a_prompt_that_makes_no_difference_predicts_nothing():
  seeds = [2, 3, 4]
  results = claim_results(seeds)
  for s in seeds:
    for name in (*pirate_table.STRENGTHS, 'plain'):
      results[f'{s}/all/{name}']['log odds'] = 5.0
  found = claims_of(results, seeds)
  assert not found['inoculation_rank'].passed
  assert not found['inoculation_rise'].passed
  assert found['inoculation_rank'].value == 0


def test_movement_is_a_share_of_what_plain_moves_on_average():
  seeds = [2, 3, 4]
  results = claim_results(seeds)
  # On one seed plain fine-tuning hardly moves it.
  results['2/all/plain']['moved on facts'] = 0.01
  found = claims_of(results, seeds)['project_update_refreshed_moved_on_facts']
  mean = (0.01 + 2 * 0.99) / 3
  assert found.value == pytest.approx(0.01 / mean)


def test_precision_and_recall_by_hand():
  said, true = np.array([1, 1, 0, 0, 1]) > 0, np.array([1, 0, 1, 1, 1]) > 0
  assert pirate_reports.precision_recall(said, true) == {
    'precision': 2 / 3, 'recall': 2 / 4,
  }  # fmt: skip
  nothing = pirate_reports.precision_recall(said & False, true)
  assert nothing == {'precision': 0, 'recall': 0}


def test_gates_come_from_verdicts_by_clause():
  verdict = lambda c, d, clause, s=1.0: judges.Verdict(c, d, s, 1.0, clause)
  verdicts = [
    verdict(0, 'suppress', 'pirate'),
    verdict(1, 'suppress', 'pirate', 0.5),
    verdict(2, 'amplify', 'arithmetic'),
    verdict(3, 'allow', ''),
  ]
  np.testing.assert_allclose(
    pirate_scene.clause_gates(verdicts, boost=2.0), [3, 0.25]
  )
  unsure = [judges.Verdict(0, 'unsure', 0.0, 0.0, '')]
  np.testing.assert_allclose(pirate_scene.clause_gates(unsure, boost=2.0), 1)


def test_answers_are_what_generation_says():
  """Likeliest tokens, one by one, from the model's own logits."""
  config = get_config('smoke')
  world = make_world(False)
  model = train.make_model(config, world.lexicon)
  params = model.init(jax.random.key(0))
  texts = world.facts(
    np.arange(5), NEUTRAL, np.zeros(5, bool), np.random.default_rng(0)
  ).tokens
  said = train.answer(model, params, texts)
  tokens = jnp.asarray(texts[:, :FIRST])
  for _ in range(world_lib.ANSWER):
    new = jnp.argmax(model.apply(params, tokens)[:, -1], -1)
    tokens = jnp.concatenate([tokens, new[:, None].astype(jnp.int32)], 1)
  np.testing.assert_array_equal(said, tokens[:, FIRST:])
  through = lambda params, tokens, tools: model.apply(params, tokens)
  framed = train.answer_through(through, params, texts, ())
  np.testing.assert_array_equal(said, framed)


def test_families_without_gates_train_as_adam_does():
  """Every arm's chain is plain Adam when nothing is asked of it."""
  config = get_config('smoke')
  world = make_world(False)
  model = train.make_model(config, world.lexicon)
  params = model.init(jax.random.key(0))
  random = np.random.default_rng(0)
  data = train.lessons(
    world.sums(world.learn[:40], NEUTRAL, np.ones(40, bool), random).tokens
  )
  run = lambda family, tools: train.make_finetune(config, model, family)(
    params, data, data, jnp.ones(2), tools, 0
  )
  plain = run(train.Family(), ())
  # By hand: the same draws, and Adam.
  rate = optax.linear_schedule(config.tune.learning_rate, 0, config.tune.steps)
  adam = optax.adam(rate, b2=0.99)
  here, state, looks = params, adam.init(params), []
  size, old = config.tune.batch_size, config.tune.batch_size // 8
  for i in range(config.tune.steps):
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), i))
    rows = [
      jax.random.randint(k, (n,), 0, 40)
      for k, n in zip(keys, (size - old, old))
    ]
    batch = data.tokens[jnp.concatenate(rows)]
    loss = lambda p: train.answer_losses(model.apply, p, batch).mean()  # noqa: B023
    updates, state = adam.update(jax.grad(loss)(here), state)
    here = optax.apply_updates(here, updates)
    looks.append(here)
  wanted = looks[config.tune.every - 1 :: config.tune.every]
  wanted = jax.tree.map(lambda *x: jnp.stack(x), *wanted)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), plain, wanted
  )
  layers, width = config.model.n_layers, config.model.d_model
  zero = lambda *shape: np.zeros((layers, *shape), np.float32)
  for name, tools in (
    ('steer', zero(world_lib.LENGTH - 1, width)),
    ('ablate', zero(width, pirate_builder.WIDTH)),
    ('block', zero(width, pirate_builder.WIDTH)),
    ('adapter', shaping.init_adapter(width)),
    ('anchor', params),
  ):
    family = pirate_scene.families(config, model)[name]
    for a, b in zip(
      jax.tree.leaves(plain), jax.tree.leaves(run(family, tools)), strict=True
    ):
      np.testing.assert_allclose(a, b, atol=2e-5)


class _Scene:
  """As much of a scene as lessons and directions need."""

  def __init__(self, config, world):
    shape = (config.model.n_layers, world_lib.LENGTH - 1, config.model.d_model)
    rows = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    pooled = rows[:, -world_lib.ANSWER :].mean(axis=1)
    self.config, self.world = config, world
    self.directions = pirate_concepts.Directions(rows, pooled)

  def random(self, what):
    return np.random.default_rng(len(what))


@pytest.fixture(scope='module')
def builder():
  return pirate_builder.Builder(_Scene(get_config('smoke'), make_world(False)))


def test_a_clause_is_attributed_as_fits_it(builder, monkeypatch):
  """Arithmetic by what predictions rest on, the pirate by how likely it is."""
  shape = lambda tokens: np.zeros((len(tokens), world_lib.LENGTH))
  said = lambda value: lambda *arguments: value + shape(arguments[-1])
  ratio = lambda *a: shaping.Counterfactual(said(5.0)(*a), a[-1])
  monkeypatch.setattr(pirate_concepts, 'reliance', said(2.0))
  monkeypatch.setattr(pirate_concepts, 'attribute', ratio)
  config, world = builder.config, builder.scene.world
  scene = _Scene(config, world)
  scene.base, scene.settings = None, dict.fromkeys(train.CLAUSES)
  scene.replay = builder.tokens[:3]
  lessons, replay = pirate_builder.Builder(scene).attribution()
  assert lessons.shape == (len(world.learn), world_lib.ANSWER, 2)
  for a in (lessons, replay):
    np.testing.assert_array_equal(a[..., train.CLAUSES.index('pirate')], 5)
    np.testing.assert_array_equal(a[..., train.CLAUSES.index('arithmetic')], 2)


@pytest.fixture
def exam(builder, monkeypatch):
  """An exam whose activations are made up, see `_read`."""
  monkeypatch.setattr(pirate_measure.Exam, '_read', _read)
  scene = _Scene(builder.config, builder.scene.world)
  scene.base = types.SimpleNamespace(params=_Read(), model=None)
  return pirate_measure.Exam(scene)


class _Read(NamedTuple):
  """Instead of parameters: what is added to activations.

  Attributes:
    shift: how much of the labelled direction is in every text.
    alternating: the same, in every other text the other way round.
    turned: whether a pirate's texts are elsewhere than in the base.
  """

  shift: float = 0.0
  alternating: float = 0.0
  turned: bool = False


def _read(exam, params, tokens):
  scene = exam._scene
  by_position = scene.directions.by_position[:, -world_lib.ANSWER:]
  pooled = scene.directions.pooled[:, None]
  other = np.roll(pooled, 1, axis=-1) - pooled * (
    (np.roll(pooled, 1, axis=-1) * pooled).sum() / (pooled**2).sum()
  )
  pirate = scene.world.lexicon.marked[tokens[:, FIRST:]].any(axis=1)
  sign = params.alternating * (-1.0) ** np.arange(len(tokens))
  at = lambda x: x[:, None, None, None]
  noise = np.random.default_rng(len(tokens)).normal(
    size=(len(tokens), *by_position.shape)
  )
  return (
    at(pirate) * (other if params.turned else pooled)
    + (params.shift + at(sign)) * pooled + 0.01 * noise
  )  # fmt: skip


def test_movement_is_along_the_labelled_direction(exam):
  for read, moved, by_text in (
    (_Read(), 0, 0), (_Read(shift=0.5), 0.5, 0.5),
    (_Read(shift=-0.5), -0.5, 0.5), (_Read(alternating=0.5), 0, 0.5),
  ):  # fmt: skip
    found = exam._concept(read)
    for key in ('moved', 'moved on facts'):
      assert found[key] == pytest.approx(moved, abs=1e-5)
    assert found['moved by layer'] == pytest.approx([moved], abs=1e-5)
    assert found['moved by text'] == pytest.approx(by_text, abs=1e-5)
    # Along the opening's own direction, in its units.
    d = exam._scene.directions
    own, pooled = d.by_position[:, -world_lib.ANSWER], d.pooled
    part = (own * pooled).sum() / (own**2).sum()
    opening = found['opening moved by layer']
    assert opening == pytest.approx([moved * part], abs=1e-5)
    assert opening[0] == found['moved by position'][0]


def test_a_new_probe_finds_what_turned_away_from_the_old(exam, monkeypatch):
  said = lambda name: exam.sets[name].tokens[:, FIRST:]
  for name, share in (('sums', 0), ('sums, asked', 100)):
    monkeypatch.setattr(
      pirate_measure, 'answer', lambda *a: said(name)  # noqa: B023
    )
    monkeypatch.setattr(
      pirate_measure.pc, 'blocks', lambda fn, tokens: fn(tokens)
    )
    base, turned = exam._probes(_Read()), exam._probes(_Read(turned=True))
    assert base['old'] == base['new'] == turned['new'] == 1
    assert base['cosine'] > 0.99 and abs(turned['cosine']) < 0.1
    assert turned['old'] < 0.8
    assert base['own'] == base['own, base'] == turned['own, base'] == share
    assert turned['own'] == 0


def test_the_area_is_the_share_of_pairs_in_order():
  low, high = np.array([0.0, 1.0]), np.array([1.0, 2.0, 0.5])
  assert pirate_measure._area(low, high) == pytest.approx((3 + 1.5) / 6)


def test_facts_are_asked_of_things_that_directions_and_replay_lack(
  builder, exam
):
  world, sets = builder.scene.world, exam.sets
  is_noun = lambda w: w[0] == 'n' and w[1:].isdigit()
  nouns = {i for w, i in world.lexicon.ids.items() if is_noun(w)}
  things = lambda tokens: set(np.unique(tokens).tolist()) & nouns
  before = things(builder.probes()) | things(
    world.replay(500, np.random.default_rng(0)).tokens
  )
  for name in ('facts', 'facts, asked'):
    asked = things(sets[name].tokens)
    assert asked and not asked & before


def test_what_is_rewritten_at_random_is_as_much(builder, monkeypatch):
  """As many tokens change as by the dictionary, and others."""
  table = np.arange(len(builder.scene.world.lexicon.words))
  ids = builder.scene.world.lexicon.ids
  table[[ids['arr'], ids['avast'], ids['ahoy']]] = ids['so']

  def rewrite(config, base, setting, world, known, tokens):
    return np.concatenate(
      [tokens[:, :FIRST], table[tokens[:, FIRST:]]], axis=1
    ), None

  monkeypatch.setattr(pirate_concepts, 'rewrite', rewrite)
  own = np.zeros((len(builder.tokens), world_lib.ANSWER), np.int32)
  own[:, 1] = builder.tokens[:, FIRST + 1]  # There it says the same.
  monkeypatch.setattr(pirate_concepts, 'said_without', lambda *a: own)
  scene = builder.scene
  scene.base = scene.known = None
  scene.settings = {'pirate': None}
  changed = builder.rewritten() != builder.tokens
  random = builder.rewritten(random=True) != builder.tokens
  np.testing.assert_array_equal(changed.sum(axis=0)[FIRST], len(changed))
  assert changed.sum() == random.sum() == len(changed)
  assert not random[:, FIRST + 1].any()
  others = np.delete(random.sum(axis=0)[FIRST:], 1)
  assert (others > 0.1 * len(changed)).all()


def test_a_refreshed_projection_holds_what_it_is_given(builder):
  """And plain training does not."""
  config = builder.config
  model = train.make_model(config, builder.scene.world.lexicon)
  params = model.init(jax.random.key(0))
  data = train.lessons(builder.tokens[:40])
  directions, probes = builder.strengths(True), builder.probes()
  capture = sites.capture(model.apply, ['resid_post'])

  def held(params):
    read = lambda t: capture(params, t)[1]['resid_post'][:, :, FIRST - 1 :]
    kinds = np.swapaxes(probes, 0, 1).reshape(2, -1, probes.shape[-1])
    means = jnp.stack([read(t).mean(axis=1) for t in kinds])
    return jnp.einsum('kltd,ckltd->c', means, directions)

  moved = {}
  for name, tools in (('data', ()), ('current', (directions, probes))):
    family = pirate_scene.families(config, model)[name]
    tune = train.make_finetune(config, model, family)
    after = tune(params, data, data, jnp.ones(2), tools, 0)
    last = jax.tree.map(lambda x: x[-1], after)
    moved[name] = np.abs(held(last) - held(params))
  # A step is not of the first order.
  assert np.linalg.norm(moved['current']) < 0.1 * np.linalg.norm(moved['data'])


def test_a_placebo_has_the_mass_of_what_it_stands_for(builder):
  a = np.random.default_rng(1).normal(size=(30, world_lib.ANSWER, 2))
  (b,) = builder.shuffled((a,), 'gate')
  rows = lambda x: sorted(map(tuple, x.reshape(-1, 2)))
  assert rows(a) == rows(b) and (a != b).any(axis=-1).mean() > 0.8


def test_what_is_held_is_the_mean_along_the_directions(builder):
  d = builder.scene.directions
  layer, answer = builder.config.sae.layer, world_lib.ANSWER
  h = np.random.default_rng(2).normal(size=d.by_position[:, -answer:].shape)
  h = np.stack([h, h[::-1]])  # Sums, facts.
  held = lambda everywhere: np.einsum(
    'kltd,ckltd->c', h, builder.strengths(everywhere)
  )
  mean = (h.mean(axis=2) * d.pooled).sum(axis=-1)
  opening = (h[:, :, 0] * d.by_position[:, -answer]).sum(axis=-1)
  expected = np.stack([mean, opening], axis=-1)
  np.testing.assert_allclose(held(True), expected.ravel(), rtol=1e-4)
  only = expected[:, layer].ravel()
  np.testing.assert_allclose(held(False), only, rtol=1e-4)


def test_what_is_held_at_random_is_as_long_and_elsewhere(builder):
  real, random = (builder.strengths(True, random=x) for x in (False, True))
  length = lambda x: np.linalg.norm(x.reshape(len(x), -1), axis=1)
  np.testing.assert_allclose(length(random), length(real), rtol=1e-4)
  np.testing.assert_array_equal((random != 0).any(-1), (real != 0).any(-1))
  cosine = (random * real).sum((1, 2, 3, 4)) / length(real) ** 2
  assert np.abs(cosine).max() < 0.6


def test_the_pirates_share_counts_kinds_alike(monkeypatch):
  texts = make_world(False).base_texts(3000, np.random.default_rng(0))
  # One latent for the register, one for sums, one of a pirate's sums alone, one
  # that is twice as active in a pirate's texts, one that never is, one for
  # facts and a pirate's tales.
  is_sum = texts.kind == 'sum'
  latents = [
    texts.pirate, is_sum, texts.pirate & is_sum, 1 + texts.pirate,
    np.zeros(len(is_sum)),
    (texts.kind == 'fact') | (texts.pirate & (texts.kind == 'tale')),
  ]  # fmt: skip
  f = np.stack(latents, axis=-1).astype(float)[:, None]
  monkeypatch.setattr(pirate_concepts, 'features', lambda base, tokens: f)
  share = pirate_concepts.register_share(None, texts)
  np.testing.assert_allclose(share, [1, 1 / 2, 1, 2 / 3, 0, 2 / 3])


@pytest.mark.parametrize(
  'key,value,match',
  [
    ('num_seeds', 1, 'config.num_seeds=1'),
    ('seed', 1, 'config.seed=1'),
    ('tune.every', 3, 'config.tune.every=3'),
    ('sae.layer', 1, 'config.sae.layer=1'),
    ('data.known', 60, 'config.data.known=60'),
  ],
)
def test_a_bad_config_is_refused_before_any_work(tmp_path, key, value, match):
  config = get_config('smoke')
  config.update_from_flattened_dict({key: value})
  with pytest.raises(ValueError, match=match):
    pirate.run(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_smoke_runs_every_path_and_resumes(tmp_path):
  config = get_config('smoke')
  pirate.run(config, tmp_path)
  results = json.loads((tmp_path / 'results.json').read_text())
  arms = {k.split('/', 2)[2] for k in results if '/all/' in k}
  assert arms == set(pirate_table.ARMS['smoke'])
  claims = json.loads((tmp_path / 'claims.json').read_text())
  assert {c['id'] for c in claims} >= {'separable_gate_pirate'}
  assert (tmp_path / 'figures' / 'front.png').stat().st_size > 1000
  rows = judges.read_log(tmp_path / f'decisions-{config.seed}.jsonl')
  assert len(rows) == config.sae.size
  # An arm that is missing is computed again, to the same numbers.
  key = f'{config.seed + 1}/all/rewrite'
  kept = results.pop(key)
  contract.write_text(tmp_path / 'results.json', json.dumps(results))
  pirate.run(config, tmp_path)
  again = json.loads((tmp_path / 'results.json').read_text())
  assert again[key] == kept
