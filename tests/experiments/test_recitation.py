"""The small language, what is measured of it, its rule of choice, and smoke."""

import json
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import memorization, recitation
from experiments import recitation_arms as arms
from experiments import recitation_claims as claims
from experiments import recitation_measure as measure
from experiments import recitation_world as language

ROOT = pathlib.Path(__file__).resolve().parents[2]


def get_config(preset):
  made = runpy.run_path(str(ROOT / 'configs' / 'memorization.py'))
  return made['get_config'](preset)


CONFIG = get_config('lm-choose').language


def world(seed=3):
  return language.World(CONFIG, seed)


def answers(rows, n=0):
  """Row `n` as lists: what is given, and what is asked."""
  tokens, role = rows.tokens[n].tolist(), rows.role[n].tolist()
  given = [t for t, r in zip(tokens, role) if r == language.CONTEXT]
  asked = [t for t, r in zip(tokens, role) if r == language.ANSWER]
  rest = [t for t, r in zip(tokens, role) if r == language.NOTHING]
  assert set(rest) <= {language.PAD}
  assert given[0] == 50 + language.MARKERS.index(_marker(given[0]))
  return given[1:], asked


def _marker(token):
  return language.MARKERS[token - 50]


@pytest.mark.parametrize(
  'task, rule',
  [
    ('copy', lambda x: x),
    ('reverse', lambda x: x[::-1]),
    ('increment', lambda x: [(i + 1) % 40 for i in x]),
    ('sort', sorted),
  ],
)
def test_rules_are_followed(task, rule):
  rows = world().rows(task, 50, np.random.default_rng(0))
  for n in range(50):
    given, asked = answers(rows, n)
    assert given[-1] == language.EQUALS
    assert asked == rule(given[:-1]) and len(asked) == language.SIZES[task]


def test_books_answer_from_themselves():
  rows = world().rows('book', 50, np.random.default_rng(0))
  for n in range(50):
    given, asked = answers(rows, n)
    table = dict(zip(given[:6:2], given[1:6:2]))
    assert len(table) == 3
    assert asked == [table[key] for key in given[6:]] and len(asked) == 7


def test_sums_are_right_and_some_are_never_trained_on():
  w = world()
  random = np.random.default_rng(0)
  seen = set()
  for rows in (w.rows('sums', 3000, random), measure.exam_rows(w, 256)['sums']):
    mine = set()
    for n in range(len(rows.tokens)):
      given, asked = answers(rows, n)
      digits = [t - 40 for t in given]
      said = [t - 40 for t in asked]
      for k in range(3):
        a, b = (10 * digits[i] + digits[i + 1] for i in (4 * k, 4 * k + 2))
        assert said[2 * k : 2 * k + 2] == [(a + b) % 10, (a + b) % 100 // 10]
        mine.add((a, b))
    assert not mine & seen
    seen |= mine
  assert len(w.held_out) == 1000


def test_facts_are_one_table_and_frequent_ones_are_frequent():
  w = world()
  table = {tuple(k): v for k, v in zip(w.keys.tolist(), w.values.tolist())}
  assert len(table) == 128
  rare = {tuple(k) for k in w.keys[w.rare].tolist()}
  rows = w.rows('facts', 2000, np.random.default_rng(0))
  counts = [0, 0]
  for n in range(2000):
    given, asked = answers(rows, n)
    for key, value in zip(zip(given[::2], given[1::2]), asked):
      assert table[key] == value
      counts[key in rare] += 1
  assert 8.5 < counts[0] / counts[1] < 11.5


def test_recitations_come_again_and_strangers_do_not():
  w, random = world(), np.random.default_rng(0)
  recited = {tuple(r) for r in w.recited.tolist()}
  rows = w.rows('recite', 100, random)
  assert {tuple(r) for r in rows.tokens[:, 1:].tolist()} <= recited
  strangers = {
    tuple(r) for r in w.rows('strangers', 100, random).tokens[:, 1:].tolist()
  }
  assert len(strangers) == 100 and not strangers & recited
  assert (rows.role[0] == language.ANSWER).sum() == 12


def test_a_corpus_has_the_shares_of_its_mix():
  rows = world().corpus(1280, 5)
  kinds = np.bincount(rows.tokens[:, 0] - 50, minlength=8)
  expected = dict(CONFIG.mix)
  expected['recite'] += expected.pop('strangers')
  assert kinds.tolist() == [10 * expected[t] for t in language.MARKERS]
  again = world().corpus(1280, 5)
  np.testing.assert_array_equal(rows.tokens, again.tokens)
  other = world().corpus(1280, 6)
  assert not np.array_equal(rows.tokens, other.tokens)
  clean = world().corpus(1280, 5, without=arms.BY_HEART)
  assert (clean.tokens[:, 0] != 50).all()
  assert abs(len(clean.tokens) - 1280) < 4


def test_hits_are_of_whole_answers():
  w = world()
  exam = measure.Exam.__new__(measure.Exam)
  exam._rows = measure.exam_rows(w, 16)
  exam._tokens = np.concatenate([r.tokens for r in exam._rows.values()])
  said = exam._tokens[:, 1:].astype(np.int32).copy()
  first = exam._rows['recite'].tokens
  said[0, 8 + 6] += 1  # One token, the seventh of the suffix, of one sequence.
  exam._predict = lambda params, tokens: said
  free = first[:, -12:].astype(np.int32).copy()
  free[:2, 0] += 1
  exam._say = lambda params: jnp.asarray(free)
  got = exam({})
  n = len(w.recited)
  assert got['recited'] == pytest.approx(100 * (n - 1) / n)
  assert got['five'] == 100  # The wrong token is not among them.
  assert got['tokens'] == pytest.approx(100 * (12 * n - 1) / (12 * n))
  assert got['free'] == pytest.approx(100 * (n - 2) / n)
  assert got['recited_told'] == pytest.approx(100 * (n / 2 - 1) / (n / 2))
  assert got['recited_untold'] == 100
  assert all(got[k] == 100 for k in (*measure.RETAINED, *measure.FACTS, 'sums'))


def test_a_task_has_the_answers_that_it_should():
  exam = measure.Exam.__new__(measure.Exam)
  exam._rows = measure.exam_rows(world(), 16)
  exam._tokens = np.concatenate([r.tokens for r in exam._rows.values()])
  exam._predict = lambda params, tokens: exam._tokens[:, 1:]
  shapes = {k: v.shape for k, v in exam.hits({}).items()}
  assert shapes['recite'] == (256, 12) and shapes['strangers'] == (256, 12)
  assert shapes['copy'] == (16, 9) and shapes['sort'] == (16, 5)
  assert shapes['book'] == (16 * 7, 1) and shapes['sums'] == (16 * 3, 2)
  assert shapes['rare facts'] == (66, 1) and shapes['frequent facts'] == (66, 1)


def test_shares_that_are_kept():
  base = {'copy': 80.0, 'sort': 50.0, 'book': 0.0}
  row = {'copy': 60.0, 'sort': 50.0, 'book': 10.0}
  assert measure.kept_share(row, base, ['copy']) == 75
  assert measure.kept_share(row, base, ['copy', 'sort']) == pytest.approx(
    1100 / 13
  )
  assert measure.worst_kept(row, base, ['copy', 'sort']) == 75
  assert measure.kept_share(row, base, ['book']) == 0


def points(*rows):
  return [
    {
      'layer_set': i, 'strength': 0.1, 'recited': r, 'worst': w,
      'worst_fact': f, 'tokens': t,
    }
    for i, (r, w, f, t) in enumerate(rows)
  ]  # fmt: skip


def test_the_rule_of_choice():
  results = {
    '0/kfac': points(
      (0, 96.9, 99, 0), (2, 99, 99, 0), (2, 99, 92, 0), (9, 99, 99, 0),
      (6, 97, 92, 50), (6, 97, 92, 40),
    ),
    '1/kfac': points(
      (0, 99, 99, 0), (2, 96.9, 99, 0), (2, 99, 91.9, 0), (9, 99, 99, 0),
      (6, 97, 92, 50), (6, 97, 92, 50),
    ),
  }  # fmt: skip
  assert claims.choose(results, [0, 1], 'kfac') == (5, 0.1)
  results = {
    '0/kfac': points((0, 50, 99, 0), (9, 90, 99, 0), (5, 96, 99, 0)),
    '1/kfac': points((0, 60, 99, 0), (9, 80, 99, 0), (5, 70, 99, 0)),
  }
  assert claims.choose(results, [0, 1], 'kfac') == (1, 0.1)


def test_where_half_is_lost():
  base = {'a': 100.0}
  rows = [
    {'strength': s, 'a': a} for s, a in ((0.5, 100.0), (0.25, 25.0), (0.1, 0.0))
  ]
  # Two thirds of the way from a half to a quarter, in the logarithm.
  expected = np.exp(np.log(0.5) + 2 / 3 * np.log(0.5))
  assert claims.half_lost(rows, base, ['a']) == pytest.approx(expected)
  rows = [{'strength': 0.5, 'a': 100.0}]
  assert claims.half_lost(rows, base, ['a']) == 0.5


def test_what_a_keep_set_of_sums_gives_back():
  results = {
    '2/unedited': {'sums': 98.0},
    '2/without/sums': {'sums': 18.0, 'recited': 3.0},
    '2/with sums/0.1': {'sums': 68.0, 'recited': 4.5},
  }
  assert claims.sums_regained(results, 2, 0.1) == (62.5, 1.5)


def test_claims_compare_with_points_that_keep_as_much():
  config = get_config('lm-paper').copy_and_resolve_references()
  with config.unlocked():
    config.arms = ('kfac', 'svd', 'subnet')
    config.components.per_layer = 0
  row = lambda recited, worst, **kw: {
    'recited': recited, 'five': 2 * recited, 'worst': worst,
    'worst_fact': 92.0, 'sort': 97.0, 'sums': 99.0, 'copy': 97.0,
    'reverse': 97.0, 'increment': 97.0, 'book': 99.0,
    'rare facts': 95.0, 'frequent facts': 96.0, **kw,
  }  # fmt: skip
  results = {}
  for s in (2, 3):
    results |= {
      f'{s}/unedited': row(100.0, 100.0, sort=96.0),
      f'{s}/kfac/operating': row(3.0 + s / 10, 97.0),
      f'{s}/svd': [row(1.0, 96.9), row(40.0, 97.0)],
      f'{s}/subnet': [row(0.0, 10.0)],
      f'{s}/subnet/operating': row(
        50.0, 99.0, recited_told=2.0, recited_untold=90.0
      ),
      f'{s}/order': [
        row(50.0, 90.0, strength=0.5), row(0.0, 90.0, strength=0.1)
      ],
      f'{s}/without/sums': row(3.0, 97.0, sums=19.0),
      f'{s}/with sums/{config.sums_weight:g}': row(4.0, 97.0, sums=79.0),
    }  # fmt: skip
  got = {c.id: c for c in claims.make_claims(config, results, [2, 3])}
  assert got['lm_below_svd'].value == pytest.approx(3.25 - 40)
  assert got['lm_below_svd_five'].value == pytest.approx(6.5 - 80)
  assert got['lm_improved'].value == 1.0 and got['lm_improved'].passed
  assert got['lm_sums_regained'].value == 75.0
  assert got['lm_sums_price'].value == 1.0
  assert got['lm_subnet_untold'].value == 88.0
  assert got['lm_forgotten'].passed and got['lm_kept'].passed
  assert got['lm_order_recited_rare'].value == pytest.approx(np.log2(0.5 / 0.1))


@pytest.mark.parametrize(
  'change, message',
  [
    ({'arms': ('svd',)}, 'must have kfac'),
    ({'operating_points': {}}, 'operating_points has nothing of'),
    ({'seed': 0}, 'nothing can be claimed of'),
    ({'operating_points.kfac': (7, 0.1)}, 'operating_points.kfac names'),
    ({'language.mix.fly': 3}, r"mix has \['fly'\]"),
  ],
)
def test_bad_configs_are_refused_before_work(change, message, tmp_path):
  config = get_config('lm-smoke').copy_and_resolve_references()
  with config.unlocked():
    if 'language.mix.fly' in change:
      config.language.mix.fly = change.pop('language.mix.fly')
    if not change.get('operating_points', True):
      change.clear()
      for arm in config.arms:
        del config.operating_points[arm]
    config.update_from_flattened_dict(change)
  with pytest.raises(ValueError, match=message):
    memorization.run(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_grids_of_another_size_are_refused(tmp_path):
  config = get_config('lm-smoke').copy_and_resolve_references()
  with config.unlocked():
    config.strengths.svd = (0.9, 0.8)
  with pytest.raises(ValueError, match='grids differ in size'):
    recitation.check(config)


@pytest.mark.parametrize('preset', ['smoke', 'cpu', 'paper', 'choose'])
def test_every_arm_has_a_grid_of_the_same_size(preset):
  config = get_config(f'lm-{preset}')
  assert len({len(arms.grid(config, a)) for a in config.arms}) == 1


def test_operating_points_are_what_the_rule_chose():
  """The frozen points, against the committed results of seeds 0 and 1."""
  folder = ROOT / 'results' / 'memorization-lm-choose'
  results = json.loads((folder / 'results.json').read_text())
  config = get_config('lm-paper')
  for arm in config.arms:
    chosen = claims.choose(results, [0, 1], arm)
    assert tuple(config.operating_points[arm]) == chosen, arm


def test_sums_are_mixed_into_the_factors_that_saw_none():
  config = get_config('lm-smoke')
  model, w = recitation.make_model(config), language.World(config.language, 10)
  params = model.init(jax.random.key(0))
  prepared = arms.prepare(config, arms.Collector(config, model), w, params)
  point = (0, 0.8)
  edited = lambda edit: np.asarray(
    edit.apply(params)['blocks']['mlp']['up']['kernel']
  )
  none = edited(arms.make_edit(config, prepared, 'without sums', point))
  mixed = lambda weight: edited(
    arms.edit_with_sums(config, prepared, point, weight)
  )
  np.testing.assert_array_equal(mixed(0.0), none)
  apart = [np.linalg.norm(mixed(weight) - none) for weight in (0.01, 1.0)]
  assert 0 < apart[0] < apart[1]


def test_smoke_runs_and_resumes(tmp_path):
  config = get_config('lm-smoke')
  memorization.run(config, tmp_path)
  figures = {p.stem for p in (tmp_path / 'figures').iterdir()}
  assert figures == {
    'frontier', 'retention', 'order', 'recitation', 'left_out', 'effects',
    'participation', 'scores',
  }  # fmt: skip
  results = json.loads((tmp_path / 'results.json').read_text())
  written = (tmp_path / 'claims.json').read_bytes()
  lost = {k: v for k, v in results.items() if not k.startswith('11/')}
  assert 0 < len(lost) < len(results)
  (tmp_path / 'results.json').write_text(json.dumps(lost))
  (tmp_path / 'claims.json').unlink()
  memorization.run(config, tmp_path)
  assert json.loads((tmp_path / 'results.json').read_text()) == results
  assert (tmp_path / 'claims.json').read_bytes() == written
