"""Claims, workdirs, the command line and the page."""

import dataclasses
import errno
import json
import pathlib
import runpy
import subprocess
import sys

import ml_collections
import numpy as np
import pytest

from experiments import (
  contract, hallucination_claims, memorization_claims, obfuscation_claims,
  pirate_claims, recitation_claims,
)  # fmt: skip
from experiments.contract import page

ROOT = pathlib.Path(__file__).resolve().parents[2]


def make(samples, comparator, target, name='c'):
  return contract.claim(
      name, 'a number', samples, comparator, target,
      seeds=range(len(samples)), reference='none',
  )  # fmt: skip


def test_student_interval_below_ten_samples():
  """By hand: mean 3, standard error sqrt(2.5 / 5), t(0.975, 4) = 2.776."""
  low, high = contract.interval([1, 2, 3, 4, 5])
  half = 2.7764451 * (2.5 / 5) ** 0.5
  assert (low, high) == pytest.approx((3 - half, 3 + half), rel=1e-6)


def test_bootstrap_interval_from_ten_samples():
  samples = np.random.default_rng(0).normal(5, 1, 40)
  low, high = contract.interval(samples)
  error = samples.std(ddof=1) / 40**0.5
  assert low == pytest.approx(samples.mean() - 1.96 * error, abs=0.3 * error)
  assert high == pytest.approx(samples.mean() + 1.96 * error, abs=0.3 * error)
  assert contract.interval(samples) == (low, high)


@pytest.mark.parametrize('count', [4, 12])
def test_equal_samples_have_no_width(count):
  assert contract.interval([7.0] * count) == (7.0, 7.0)


@pytest.mark.parametrize('samples', [[], [1.0], [1.0, float('nan')]])
def test_too_few_or_broken_samples_raise(samples):
  with pytest.raises(ValueError, match='at least two finite samples'):
    contract.interval(samples)


def test_the_bound_that_hurts_decides():
  samples = [1, 2, 3, 4, 5]  # Interval [1.04, 4.96].
  assert make(samples, '<=', 5.0).passed
  assert not make(samples, '<=', 4.9).passed  # Though the mean is 3.
  assert make(samples, '>=', 1.0).passed
  assert not make(samples, '>=', 1.1).passed
  with pytest.raises(ValueError, match="'>'"):
    make(samples, '>', 1.0)
  with pytest.raises(ValueError, match='2 samples for 3 seeds'):
    contract.claim('c', '', [1, 2], '<=', 1, seeds=[1, 2, 3], reference='')


def test_claims_are_saved_whole_and_once(tmp_path):
  path = tmp_path / 'claims.json'
  contract.save_claims(path, [make([1, 2], '<=', 9)])
  with pytest.raises(ValueError, match='different ids'):
    contract.save_claims(path, [make([1, 2], '<=', 9)] * 2)
  (row,) = json.loads(path.read_text())
  assert list(row) == [
      'id', 'statement', 'value', 'ci95', 'seeds', 'comparator', 'target',
      'passed', 'reference',
  ]  # fmt: skip
  assert not list(tmp_path.glob('*.tmp'))


def config(**values):
  return ml_collections.ConfigDict({'lr': 0.1, 'preset': 'smoke'} | values)


def test_an_arm_is_computed_once(tmp_path):
  calls = []

  def compute():
    calls.append(1)
    return {'accuracy': 0.5}

  first = contract.Workdir(tmp_path, config(), 'hash')
  assert first.arm('0/a', compute) == {'accuracy': 0.5}
  again = contract.Workdir(tmp_path, config(), 'hash')
  assert again.arm('0/a', compute) == {'accuracy': 0.5}
  assert calls == [1]


def test_an_arm_that_fails_leaves_the_others(tmp_path):
  workdir = contract.Workdir(tmp_path, config(), 'hash')
  workdir.arm('0/a', lambda: 1)
  with pytest.raises(ValueError):
    workdir.arm('0/b', lambda: float('nan'))
  assert json.loads((tmp_path / 'results.json').read_text()) == {'0/a': 1}


def full(*args, **kwargs):
  raise OSError(errno.ENOSPC, 'No space left on device')


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
  workdir = contract.Workdir(tmp_path, config(), 'hash')
  workdir.arm('0/a', lambda: 1)
  before = (tmp_path / 'results.json').read_bytes()
  with monkeypatch.context() as patch:
    patch.setattr(pathlib.Path, 'write_bytes', full)
    with pytest.raises(OSError, match='results.json.*No space.*make room'):
      workdir.arm('0/b', lambda: 2)
  assert (tmp_path / 'results.json').read_bytes() == before
  assert not list(tmp_path.glob('*.tmp'))
  again = contract.Workdir(tmp_path, config(), 'hash')
  assert again.arm('0/b', lambda: 2) == 2 and again.results['0/a'] == 1


def test_results_of_other_code_are_told(tmp_path, recwarn):
  contract.Workdir(tmp_path, config(), 'hash').arm('0/a', lambda: 1)
  contract.Workdir(tmp_path, config(), 'hash')
  assert not recwarn.list
  file = tmp_path / 'config.json'
  made = json.loads(file.read_text())
  made['environment']['commit'] = 'f' * 40
  file.write_text(json.dumps(made))
  with pytest.warns(UserWarning, match='ffffffffffff.*another workdir'):
    contract.Workdir(tmp_path, config(), 'hash')


@pytest.mark.parametrize('other, key', [({'lr': 0.2}, 'lr'), ({'wd': 1}, 'wd')])
def test_a_workdir_of_another_config_is_refused(tmp_path, other, key):
  contract.Workdir(tmp_path, config(), 'hash').arm('0/a', lambda: 1)
  before = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
  with pytest.raises(ValueError, match=f'another config.*{key}'):
    contract.Workdir(tmp_path, config(**other), 'hash')
  with pytest.raises(ValueError, match='another config.*data_sha256'):
    contract.Workdir(tmp_path, config(), 'other')
  assert before == {
    p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()
  }


def test_provenance_is_recorded(tmp_path):
  contract.Workdir(tmp_path, config(), 'hash')
  saved = json.loads((tmp_path / 'config.json').read_text())
  assert saved['data_sha256'] == 'hash'
  packages = saved['environment']['packages']
  assert {'jax', 'flax', 'optax', 'numpy'} <= packages.keys()


def test_fingerprints_see_shape_dtype_and_values():
  a = np.arange(6)
  others = [a[:5], a.reshape(2, 3), a.astype(np.float64), a + 1]
  marks = {contract.fingerprint(x) for x in [a, *others]}
  assert len(marks) == 5
  assert contract.fingerprint(a.copy()) == contract.fingerprint(a)


def test_the_page_shows_every_claim_and_figure(tmp_path):
  workdir = contract.Workdir(tmp_path / 'runs' / 'demo', config(), 'hash')
  claims = [make([1, 2, 3], '<=', 9, 'a'), make([1, 2, 3], '>=', 9, 'b')]
  contract.save_claims(workdir.path / 'claims.json', claims)
  (workdir.path / 'figures' / 'curve.png').write_bytes(b'picture')
  text = page.write_page(tmp_path).read_text()
  assert text.count('<tr><td class="holds">') == 1
  assert text.count('<tr><td class="fails">') == 1
  assert 'alt="curve"' in text and 'demo' in text
  with pytest.raises(FileNotFoundError, match='run an experiment first'):
    page.write_page(tmp_path / 'empty')


def command(*arguments):
  return subprocess.run(
      [sys.executable, '-m', 'experiments.memorization', *arguments],
      cwd=ROOT, capture_output=True, text=True, timeout=120,
  )  # fmt: skip


@pytest.mark.parametrize(
  'argument, message',
  [
    (['--config=configs/memorization.py:huge'], "Unknown preset 'huge'"),
    (['--config=configs/memorization.py:sea-cpu'], "Unknown preset 'sea-cpu'"),
    (['--config=configs/memorization.py:smoke', '--config.epoch=3'], 'epoch'),
    (
      ['--config=configs/memorization.py:smoke', '--config.bogus=3'],
      'Unknown config key: bogus. A key is set',
    ),
    (['--config=configs/memorization.py:smoke', 'extra'], 'extra'),
  ],
)
def test_bad_commands_are_refused_before_work(tmp_path, argument, message):
  run = command(*argument, f'--workdir={tmp_path / "run"}')
  assert run.returncode != 0
  assert message in run.stderr + run.stdout
  assert not (tmp_path / 'run').exists()


def test_the_readme_shows_the_committed_claims():
  """Its numbers are those of `results/`, not typed in."""
  text = (ROOT / 'README.md').read_text('utf-8')
  results = [p.parent for p in (ROOT / 'results').glob('*/claims.json')]
  tables = [page.markdown(p) for p in results if 'choose' not in p.name]
  assert tables
  for table in tables:
    assert table in text


@pytest.mark.parametrize(
  'folder,make_claims,config',
  [
    ('memorization', memorization_claims.make_claims, 'mlp-paper'),
    ('memorization-lm', recitation_claims.make_claims, 'lm-paper'),
    ('hallucination', hallucination_claims.make_claims, 'paper'),
    (
      'hallucination-facts', hallucination_claims.make_claims, 'facts-paper',
    ),
    ('pirate', pirate_claims.make_claims, 'separable-paper'),
    ('pirate-entangled', pirate_claims.make_claims, 'entangled-paper'),
    ('obfuscation', obfuscation_claims.make_claims, 'paper'),
  ],
)
def test_committed_claims_are_those_of_the_committed_results(
  folder, make_claims, config
):
  path = ROOT / 'results' / folder
  results = json.loads((path / 'results.json').read_text('utf-8'))
  name = folder.split('-')[0]
  made = runpy.run_path(str(ROOT / 'configs' / f'{name}.py'))
  config = made['get_config'](config)
  seeds = range(config.seed, config.seed + config.num_seeds)
  claims = make_claims(config, results, seeds)
  rows = json.loads(json.dumps([dataclasses.asdict(c) for c in claims]))
  assert rows == json.loads((path / 'claims.json').read_text('utf-8'))
