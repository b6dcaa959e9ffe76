"""The experiment on autoencoders end to end at `smoke`, and its parts."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import autoencoders
from experiments import autoencoders_world as world
from experiments.autoencoders_claims import FORMATS
from idesign import concepts

ROOT = pathlib.Path(__file__).resolve().parents[2]
EPS = float(np.finfo(np.float32).eps)


def get_config(preset, **changes):
  spec = importlib.util.spec_from_file_location(
    'config', ROOT / 'configs' / 'autoencoders.py'
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config(preset).copy_and_resolve_references()
  with config.unlocked():
    config.update_from_flattened_dict(changes)
  return config


@pytest.fixture(scope='module')
def data():
  beside = ROOT.parent / 'shared/data'
  folder = pathlib.Path(os.environ.get('IDESIGN_DATA', beside))
  for name in (f'{world.MODEL}/config.json', world.DOCUMENTS):
    if not (folder / name).is_file():
      pytest.skip(f'{folder / name} is absent; set IDESIGN_DATA to the data')
  return str(folder)


@pytest.mark.parametrize('preset', ['smoke', 'cpu', 'paper'])
def test_every_arm_has_a_grid_of_the_same_size(preset):
  config = get_config(preset)
  assert len({len(config.strengths[arm]) for arm in config.arms}) == 1
  seeds = autoencoders.check(config)
  assert not set(seeds) & {0, 1}
  assert len(seeds) >= 5 or preset == 'smoke'
  assert set(config.arms) <= set(autoencoders.ARCHITECTURES)


def test_the_committed_claims_are_those_of_the_committed_results():
  path = ROOT / 'results' / 'autoencoders'
  config = json.loads((path / 'config.json').read_text())
  asked = json.loads(json.dumps(get_config('paper').to_dict()))
  for name in asked:
    if name != 'data_dir':
      assert config[name] == asked[name], name
  results = json.loads((path / 'results.json').read_text())
  seeds = range(config['seed'], config['seed'] + config['num_seeds'])
  claims = autoencoders.make_claims(config, results, seeds)
  rows = json.loads(json.dumps([dataclasses.asdict(c) for c in claims]))
  assert rows == json.loads((path / 'claims.json').read_text())


def test_claims_take_the_worst_file_and_compare_with_components():
  arm = lambda fvu, **files: {
    'fvu': fvu,
    'loss_recovered': 0.97,
    'round_trips': files,
  }
  results = {}
  for seed in (2, 3):
    results |= {
      f'{seed}/topk/16': arm(0.05, saelens=0.0, sparsify=0.0),
      f'{seed}/jumprelu/16': arm(0.2, saelens=3e-6, gemma_scope=2e-5),
      f'{seed}/pca/16': arm(0.4),
    }
  config = {
    'k': 16,
    'arms': ['topk', 'jumprelu', 'pca'],
    'strengths': {'topk': [16], 'jumprelu': [16], 'pca': [16]},
  }
  claims = autoencoders.make_claims(config, results, [2, 3])
  found = {c.id: (pytest.approx(c.value), c.passed) for c in claims}
  assert found == {
    'fvu': (5, True),
    'loss_recovered': (97, True),
    'below_pca': (-35, True),
    'round_trip_saelens': (3, True),
    'round_trip_gemma_scope': (20, False),
    'round_trip_sparsify': (0, True),
  }


def test_principal_components_are_the_best_that_many_directions():
  rng = np.random.default_rng(0)
  rows = rng.normal(size=(500, 6)) * [9, 5, 3, 1, 0.5, 0.1] + 7
  rows = (rows @ np.linalg.qr(rng.normal(size=(6, 6)))[0]).astype(np.float32)
  sae = autoencoders.principal_components(rows, 2)
  fit = concepts.evaluate_sae(sae, [jnp.asarray(rows)])
  values = np.linalg.svd(rows - rows.mean(0), compute_uv=False) ** 2
  expected = values[2:].sum() / values.sum()
  np.testing.assert_allclose(fit.fvu, expected, rtol=1e-3)
  assert fit.l0 == 2


def test_batches_are_whole_passes_in_different_orders():
  config = get_config('smoke', rows=4, steps=5)
  rows = np.arange(10)[:, None]
  out = list(autoencoders.batches(config, rows, seed=2))
  assert [len(b) for b in out] == [4] * 5
  for first in (0, 2):  # Two batches are a pass; two rows are left over.
    seen = np.concatenate(out[first : first + 2]).ravel().tolist()
    assert len(set(seen)) == 8
  assert not np.array_equal(out[0], out[2])
  again = autoencoders.batches(config, rows, seed=2)
  np.testing.assert_array_equal(np.stack(out), np.stack(list(again)))
  other = next(autoencoders.batches(config, rows, seed=3))
  assert not np.array_equal(out[0], other)


def test_what_the_model_and_the_documents_are(data):
  subject = world.load(get_config('smoke', data_dir=data))
  tokens, mask = subject.documents
  # 1,804 tokens are predicted, at 1.266 nats, as other implementations found.
  assert mask[:, 1:].sum() == 1804 and len(tokens) == 5
  loss = world.story_loss(subject)
  total = jax.jit(loss)(subject.params, subject.documents).sum()
  assert abs(float(total) / 1804 - 1.266) <= 0.01


def test_sampled_text_begins_and_ends_as_it_should(data):
  config = get_config(
    'smoke', **{'data_dir': data, 'text.sequences': 6, 'text.batch': 6}
  )
  subject = world.load(config)
  # So that many stories end, they end with the commonest token.
  common = np.bincount(subject.documents.tokens_BT[subject.documents.mask_BT])
  subject = subject._replace(stops=(1, int(common.argmax())))
  (text,) = world.sample_text(config, subject, seed=2)
  assert text.tokens_BT.shape == (6, config.text.length)
  assert (text.tokens_BT[:, 0] == 1).all() and text.mask_BT[:, 0].all()
  lengths = text.mask_BT.sum(1)
  assert (lengths < config.text.length).any()
  for tokens, mask, length in zip(*text, lengths):
    assert mask[:length].all()
    assert not np.isin(tokens[1:length], subject.stops).any()
    assert length == len(tokens) or tokens[length] in subject.stops
  (other,) = world.sample_text(config, subject, seed=3)
  assert not np.array_equal(other.tokens_BT, text.tokens_BT)

  # The activations are those of the text, in another order.
  with config.unlocked():
    config.rows = int(lengths.sum())
  rows = world.activations(config, subject, seed=2)
  read = np.asarray(subject.read(subject.params, text))[text.mask_BT]
  order = lambda a: a[np.argsort(a[:, 0])]
  near = 1e3 * EPS * np.abs(read).max()
  np.testing.assert_allclose(order(rows), order(read), rtol=0, atol=near)
  assert np.abs(rows - read).max() > 100 * near


def test_smoke_runs_and_resumes(data, tmp_path, monkeypatch):
  config = get_config('smoke', data_dir=data)
  autoencoders.run(config, tmp_path)
  figures = {p.name for p in (tmp_path / 'figures').iterdir()}
  assert figures == {'sparsity.png', 'training.png'}
  results = json.loads((tmp_path / 'results.json').read_text())
  claims = (tmp_path / 'claims.json').read_bytes()
  assert len(results) == 2 * len(config.arms)
  for name, row in results.items():
    _, arm, _ = name.split('/')
    assert set(row['round_trips']) == {
      f for f, arms in FORMATS.items() if arm in arms
    }
    for format, apart in row['round_trips'].items():
      # Folding b_dec rounds, which can take a feature across its threshold.
      assert apart == 0 or format == 'gemma_scope', (name, format)
    assert row['own_text']['rows'] > config.rows
    steps = [step for step, _ in row['curve']]
    assert steps == ([] if arm == 'pca' else [10, 20])
    if steps:
      assert row['curve'][-1][1] == row['fvu']

  # Lose one seed's arms: they come back the same.
  lost = {k: v for k, v in results.items() if not k.startswith('3/')}
  (tmp_path / 'results.json').write_text(json.dumps(lost))
  (tmp_path / 'claims.json').unlink()
  shutil.rmtree(tmp_path / 'figures')
  autoencoders.run(config, tmp_path)
  assert json.loads((tmp_path / 'results.json').read_text()) == results
  assert (tmp_path / 'claims.json').read_bytes() == claims

  # Nothing is sampled or trained for what is there.
  refuse = lambda *_: pytest.fail('a finished seed was sampled again')
  monkeypatch.setattr(autoencoders, 'activations', refuse)
  autoencoders.run(config, tmp_path)


@pytest.mark.parametrize(
  'change, message',
  [
    ({'num_seeds': 1}, 'num_seeds=1'),
    ({'seed': 1}, r'config.seed=1.*nothing can be claimed of \[1\]'),
    ({'arms': ('topk',)}, 'must hold pca at config.k=16'),
    ({'strengths.topk': (8,)}, 'must hold topk at config.k=16'),
    ({'arms': ('topk', 'pca', 'dense')}, "config.arms names 'dense'"),
    ({'strengths.jumprelu': (999,)}, 'config.strengths.jumprelu: k=999'),
    ({'prefixes': (64, 32, 128)}, 'config.strengths.matryoshka: prefixes'),
    ({'data_dir': 'nowhere'}, 'config.data_dir=nowhere.*is absent'),
  ],
)
def test_bad_configs_are_refused_before_work(change, message, tmp_path):
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    autoencoders.run(get_config('smoke', **change), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_an_activation_that_is_not_there_is_named(data, tmp_path):
  config = get_config('smoke', data_dir=data, activation='resid_post[2:4]')
  with pytest.raises(ValueError, match='config.activation=.*one layer'):
    autoencoders.run(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()
