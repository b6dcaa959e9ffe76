"""Decay while training: what is compared, and a run of every path."""

import json

import pytest

from configs import memorization as config_lib
from experiments import memorization, memorization_decay
from experiments import memorization_decay_claims as claims_lib


def network(memorized, test_loss, held_out_loss=1.0):
  return {
    'memorized': memorized, 'test_loss': test_loss,
    'held_out_loss': held_out_loss,
  }  # fmt: skip


PLAIN = [network(90, 0.5, 0.4), network(40, 0.6, 0.5), network(20, 0.7, 0.6)]


def test_where_both_are_compared():
  # The plain network best on held-out images, and the one that has half.
  assert claims_lib.best_loss(PLAIN) == 0.5
  assert claims_lib.half_loss(PLAIN) == 0.6
  assert claims_lib.half_loss(PLAIN[:1]) == 0.5
  assert claims_lib.lowest(PLAIN, 0.6) == 40


def test_claims():
  config = config_lib.get_config('decay-smoke').copy_and_resolve_references()
  with config.unlocked():
    for arm in config.strengths:
      config.strengths[arm] = (0.0, 3.0, 6.0)
  ours = {
    'kfac': [network(60, 0.45), network(10, 0.6), network(2, 0.7)],
    'batch': [network(95, 0.5), network(45, 0.6), network(0, 0.9)],
    # Never as good as the best plain one: plain may be worse as well.
    'added': [network(30, 0.65)] * 3,
  }
  results = {}
  for seed in (10, 11):
    for arm, rows in {'plain': PLAIN, **ours}.items():
      for strength, row in zip(config.strengths[arm], rows, strict=True):
        results[f'{seed}/{arm}/{strength:g}'] = row
  claims = claims_lib.make_claims(config, results, [10, 11])
  values = {c.id.removeprefix('decay_'): c.value for c in claims}
  assert values == {
    'kfac_best': -30, 'kfac_half': -30, 'batch_best': 5, 'batch_half': 5,
    'added_best': -10, 'added_half': -10,
  }  # fmt: skip


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('decay')
  memorization.run(config_lib.get_config('decay-smoke'), folder)
  return folder


def test_every_path(folder):
  results = json.loads((folder / 'results.json').read_text())
  config = config_lib.get_config('decay-smoke')
  assert len(results) == 2 * 4 * len(config.strengths.plain)
  for seed in (20, 21):
    plain, kfac, batch, added = (
      claims_lib.rows_of(results, seed, arm, config.strengths[arm])
      for arm in memorization_decay.ARMS
    )
    # Without decay the arms are the same network, bit for bit; `added` has its
    # floor, which is as much as plain decay has here.
    assert plain[0] == kfac[0] == batch[0] != added[0]
    assert {**plain[1], 'strength': 0} == pytest.approx(added[0], rel=1e-3)
    losses = [r[1]['test_loss'] for r in (plain, kfac, batch, added)]
    assert len(set(losses)) == 4
  assert {p.stem for p in (folder / 'figures').glob('*.png')} == {'frontier'}
  assert len(json.loads((folder / 'claims.json').read_text())) == 6


def test_a_run_goes_on(folder, monkeypatch):
  results = json.loads((folder / 'results.json').read_text())
  lost = {k: v for k, v in results.items() if k != '21/batch/3'}
  (folder / 'results.json').write_text(json.dumps(lost))
  trained = []
  train = memorization_decay.Trainer.__call__

  def watched(self, world, seed, arm, strength):
    trained.append((seed, arm, strength))
    return train(self, world, seed, arm, strength)

  monkeypatch.setattr(memorization_decay.Trainer, '__call__', watched)
  memorization.run(config_lib.get_config('decay-smoke'), folder)
  assert trained == [(21, 'batch', 3.0)]
  assert json.loads((folder / 'results.json').read_text()) == results
