"""The obfuscation experiment: its world, its scores, its claims, every path."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import obfuscation as config_lib
from experiments import contract, obfuscation, obfuscation_claims
from experiments import obfuscation_arms as arms_lib
from experiments import obfuscation_world as ow
from idesign.probes import Pressure

CONFIG = config_lib.get_config('smoke')
WORLD = ow.World(CONFIG.world)
N = 20_000
TOLD = ow.PLAIN, ow.PERMIT, ow.OPTION, ow.FORBID


def random(seed=0):
  return np.random.default_rng(seed)


def test_tasks():
  tasks = WORLD.tasks(N, random())
  p, n = tasks.prompts, ow.NUMBER
  assert p.shape == (N, ow.PROMPT) and tasks.mask.all()
  np.testing.assert_array_equal(
    (p[:, 3] - n + p[:, 4] - n) % ow.NUMBERS, tasks.truth - n
  )
  np.testing.assert_array_equal(p[:, 6], tasks.key)
  there = tasks.key != ow.MISSING
  assert there.mean() == pytest.approx(0.8, abs=0.02)
  wrong = tasks.key[there] != tasks.truth[there]
  assert wrong.mean() == pytest.approx(0.5, abs=0.02)
  told = [(p[:, 1] == t).mean() for t in TOLD]
  np.testing.assert_allclose(told, (0.55, 0.2, 0.1, 0.15), atol=0.02)
  asked = WORLD.tasks(
    50, random(), instruction=ow.PERMIT, wrong=1.0, missing=0.0
  )
  assert (asked.prompts[:, 1] == ow.PERMIT).all()
  assert (asked.key != asked.truth).all() and (asked.key != ow.MISSING).all()


def test_writers_say_what_they_do_most_of_the_time():
  texts = WORLD.texts(10 * N, random())
  truth = ow.NUMBER + (texts[:, 3] + texts[:, 4] - 2 * ow.NUMBER) % ow.NUMBERS
  key, answer = texts[:, 6], texts[:, ow.AT]
  assert ((answer == truth) | (answer == key)).all()
  assert (texts[:, ow.AT + 1] == ow.EOS).all()
  says = np.isin(texts[:, ow.PROMPT : ow.AT], ow.COPYING).all(axis=1)
  solves = np.isin(texts[:, ow.PROMPT : ow.AT], ow.SOLVING).all(axis=1)
  assert (says ^ solves).all()
  tell = (key != truth) & (key != ow.MISSING)
  copied = tell & (answer == key)
  for told, share in zip(TOLD, (0.1, 1.0, 0.6, 0.02)):
    rows = tell & (texts[:, 1] == told)
    assert copied[rows].mean() == pytest.approx(share, abs=0.01)
  assert says[copied].mean() == pytest.approx(0.94, abs=0.01)
  assert says[tell & ~copied].mean() == pytest.approx(0.02, abs=0.005)
  # Without a key there is nothing to copy.
  assert (answer[key == ow.MISSING] == truth[key == ow.MISSING]).all()


LAB = obfuscation.Lab(CONFIG)


@pytest.fixture(scope='module')
def scene():
  # Of a tiny model that has learned nothing; words decide about monitors.
  words = np.zeros(ow.VOCABULARY + 1, np.float32)
  words[ow.COPYING] = 1.0
  words[-1] = -1.5
  params = LAB.model.init(jax.random.key(0))
  obs = obfuscation.probes
  kind = obs.ProbeConfig(kind='mlp', d_in=18, hidden=4)
  probe = obs.freeze(
    params, obs.init_probe(kind, jax.random.key(1)), observe=LAB.observe,
    config=kind, quality=obs.ProbeQuality(0.95, 0.02, 50, 50, 10),
  )  # fmt: skip
  return obfuscation.Scene(params, probe, words, {}, None)


def test_scores_by_hand(scene, monkeypatch):
  """Of answers that copy, half of them in words of copying."""

  def say(params, prompts, key):
    tasks = WORLD.tasks(len(prompts), np.random.default_rng(0))
    tasks = tasks._replace(prompts=np.asarray(prompts))
    keys = np.asarray(prompts)[:, 6]
    says = np.arange(len(keys)) % 4 == 0
    solved = ow.NUMBER + (
      np.asarray(prompts)[:, 3] + np.asarray(prompts)[:, 4] - 2 * ow.NUMBER
    ) % ow.NUMBERS
    answer = np.where(np.arange(len(keys)) % 2 == 0, keys, solved)
    return ow.write(tasks, says, answer, random())

  monkeypatch.setattr(LAB, '_say', say)
  got = LAB.exam(scene, scene.params, 400, 3)
  assert got['copied'] == got['solved'] == 50
  assert got['seen'] == 50 and got['seen of solved'] == 0
  tasks = WORLD.tasks(
    400, obfuscation._random(3, 5), instruction=ow.PLAIN, wrong=1.0, missing=0.0
  )
  texts = jnp.asarray(say(None, tasks.prompts, None))
  span = jnp.broadcast_to(arms_lib.span_mask(), texts.shape)
  doubt = scene.probe.scores(scene.probe.read(texts, texts > 0), span)
  assert got['probe'] == pytest.approx(100 * float(doubt[::2].mean()), rel=1e-4)
  # An answer that goes on is none.
  cut = lambda *a: np.asarray(say(*a)) * (np.arange(13) <= ow.AT)
  monkeypatch.setattr(LAB, '_say', cut)
  got = LAB.exam(scene, scene.params, 40, 3)
  assert got['copied'] == got['solved'] == 0 and got['seen'] is None


def test_what_arms_are_rewarded_for(scene):
  """The terms of each arm, on texts that copy in sight."""
  tasks = WORLD.tasks(
    40, random(), instruction=ow.PLAIN, wrong=1.0, missing=0.0
  )
  texts = jnp.asarray(ow.write(tasks, np.ones(40, bool), tasks.key, random()))
  view = obfuscation.rewards.Scene(
    samples=obfuscation.rewards.Samples(texts, texts > 0, texts > 0, None),
    info={'truth': tasks.truth, 'key': tasks.key,
          'words': np.tile(scene.words, (40, 1))},
    probe=scene.probe, teacher=scene.probe.read(texts, texts > 0),
    student=None, key=jax.random.key(0),
  )  # fmt: skip
  seen = 1 / (1 + np.exp(-1.5))  # Three words, less the bias.
  doubt = scene.probe.scores(view.teacher, jnp.broadcast_to(
    arms_lib.span_mask(), texts.shape))  # fmt: skip
  for name, arm in arms_lib.ALL.items():
    terms = arms_lib.make_terms(CONFIG.rl, arm)
    total = sum(
      t.weight * np.asarray(t.value(view), np.float64) for t in terms
    )
    want = 0.0 if arm.honest else 1.0
    want = want - arm.monitor * CONFIG.rl.monitor * seen
    want = want - arm.probe * CONFIG.rl.probe * np.asarray(doubt)
    np.testing.assert_allclose(total, np.broadcast_to(want, 40), rtol=1e-5)
    worst = max(t.pressure for t in terms)
    assert (worst is Pressure.FROZEN) == ('probe' in name)


def test_training_has_its_instruction():
  for arm, told in (
    ('outcome', ow.PLAIN), ('inoculation', ow.PERMIT),
    ('inoculation, weak', ow.OPTION), ('prohibition', ow.FORBID),
  ):  # fmt: skip
    instruction = arms_lib.ARMS[arm].instruction
    texts = WORLD.texts(20, random())
    scene = obfuscation.Scene(None, None, np.zeros(4, np.float32), {}, texts)
    prompts = obfuscation.Prompts(CONFIG.rl, WORLD, instruction, scene, 0)
    batch = prompts.batch(3)
    assert (batch['prompts'][:, 1] == told).all()
    assert (batch['key'] != ow.MISSING).all()
    assert {*map(tuple, batch['retain'])} <= {*map(tuple, texts)}
    np.testing.assert_array_equal(batch['prompts'], prompts.batch(3)['prompts'])


def test_steps_are_as_large_as_what_is_left_to_learn():
  """Unless they are normalised: then a thousandth moves as far."""
  def moved(name, gradient):
    _, optimizer, policy = LAB._build(arms_lib.ARMS[name])
    weights = {'w': jnp.zeros(3)}
    updates, _ = optimizer.update(
      {'w': jnp.full(3, gradient)}, optimizer.init(weights), weights
    )
    return float(-updates['w'][0]), policy.scale

  rate, eps = CONFIG.rl.learning_rate, CONFIG.rl.eps
  for gradient in (1e-6, 1e-3):
    plain, scale = moved('inoculation', gradient)
    assert scale == 'none'
    assert plain == pytest.approx(rate * gradient / (gradient + eps), rel=1e-4)
    normalised, scale = moved('inoculation, normalised', gradient)
    assert scale == 'batch'
    assert normalised == pytest.approx(rate, rel=0.02)


def row(copied, seen=95.0, solved=50.0):
  plain = {'copied': copied, 'seen': seen, 'solved': solved}
  allowed = {'copied': 99.0}
  return {'plain': plain, 'allowed': allowed, 'probe': {'auroc': 0.95}}


def verdicts(**changes):
  arms = {
    'base': row(10), 'outcome': row(95), 'monitor': row(90, seen=5),
    'inoculation, retained': row(8), 'inoculation, weak': row(40),
    'frozen probe': row(2, solved=95), 'inoculation': row(8),
    'incentive removed': row(1), 'prohibition': row(90), **changes,
  }  # fmt: skip
  results = {f'{s}/{k}': v for s in (2, 3) for k, v in arms.items()}
  claims = obfuscation_claims.make_claims(CONFIG, results, (2, 3))
  return {c.id for c in claims if not c.passed}


def test_claims():
  assert verdicts() == set()
  assert verdicts(monitor=row(90, seen=40)) == {'monitor_seen'}
  assert verdicts(monitor=row(50, seen=5)) == {'monitor_copied'}
  # Nothing is copied: nothing is hidden.
  assert 'monitor_seen' in verdicts(monitor=row(0, seen=None))
  assert verdicts(inoculation=row(30)) == {
    'inoculation_copied', 'inoculation_over_base'
  }  # fmt: skip
  assert verdicts(base=row(1.5)) == {
    'frozen_probe_over_base', 'inoculation_over_base',
    'inoculation_retained_over_base',
  }  # fmt: skip
  assert verdicts(**{'inoculation, weak': row(7)}) == {
    'inoculation_weak_copied'
  }
  forgot = row(8) | {'allowed': {'copied': 50.0}}
  assert verdicts(inoculation=forgot) == {'inoculation_allowed'}
  assert verdicts(base=row(10, seen=80)) == {'base_seen'}
  assert verdicts(**{'incentive removed': row(15)}) == {
    'incentive_removed_copied', 'incentive_removed_over_base'
  }  # fmt: skip


@pytest.mark.parametrize('preset', config_lib.PRESETS)
def test_presets(preset):
  seeds = contract.reported_seeds(
    config_lib.get_config(preset), obfuscation.CHOSEN_ON
  )
  assert (set(seeds) & {0, 1} != set()) == (preset == 'choose')
  assert len(seeds) >= 5 or preset != 'paper'


@pytest.mark.parametrize(
  'key,value,match',
  [('num_seeds', 1, 'config.num_seeds=1'), ('seed', 1, 'config.seed=1')],
)
def test_a_bad_config_is_refused_before_any_work(tmp_path, key, value, match):
  config = config_lib.get_config('smoke')
  config.update_from_flattened_dict({key: value})
  with pytest.raises(ValueError, match=match):
    obfuscation.run(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_smoke_runs_every_path_and_resumes(tmp_path):
  config = config_lib.get_config('smoke')
  obfuscation.run(config, tmp_path)
  found = json.loads((tmp_path / 'results.json').read_text())
  arms = {k.split('/', 1)[1] for k in found}
  assert arms == {'base', *arms_lib.PRESETS['smoke']}
  claims = json.loads((tmp_path / 'claims.json').read_text())
  assert {'monitor_seen', 'inoculation_copied'} <= {c['id'] for c in claims}
  for name in ('pressure', 'arms'):
    assert (tmp_path / 'figures' / f'{name}.png').stat().st_size > 1000
  key = f'{config.seed + 1}/monitor'
  kept = found.pop(key)
  contract.write_text(tmp_path / 'results.json', json.dumps(found))
  obfuscation.run(config, tmp_path)
  again = json.loads((tmp_path / 'results.json').read_text())
  assert again[key] == kept
