"""Checkpoints: exact, owned by one config, and loud when damaged."""

import gc
import json
import shutil
import time

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np
import optax
import pytest

from idesign.training import (
  Checkpointer,
  CheckpointError,
  claim_workdir,
  init_state,
  make_mesh,
)
from idesign.training.checkpoint import _describe

CONFIG = {'model': {'width': 8, 'names': ['a']}, 'lr': 0.1, 'steps': 10}


def mixed_state():
  """Every dtype that training meets, none of them a round number."""
  keys = iter(jax.random.split(jax.random.key(7), 9))
  state = {
    name: jax.random.normal(next(keys), (5, 7)).astype(name)
    for name in ('float32', 'bfloat16', 'float16', 'float8_e4m3fn')
  }
  state |= {
    name: jax.random.randint(next(keys), (9,), 0, 100).astype(name)
    for name in ('int32', 'uint8', 'bool')
  }
  state['complex64'] = jnp.exp(1j * jnp.arange(6.0).reshape(2, 3))
  state['key'] = jax.random.key(5)
  state['big'] = jax.random.normal(next(keys), (300, 200))
  state['scalar'] = jnp.float32(jnp.nan)
  return state


def raw(tree):
  def one(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x = jax.random.key_data(x)
    return np.asarray(x).tobytes()

  return jax.tree.map(one, tree)


def save(workdir, *steps, config=CONFIG, keep=2, state=None):
  state = mixed_state() if state is None else state
  with Checkpointer(workdir, config, keep=keep) as checkpointer:
    for step in steps:
      checkpointer.save(step, state, {'epoch': step, 'index': 3})
  return state


def test_round_trip_is_exact_for_every_dtype(tmp_path):
  state = save(tmp_path, 4)
  with Checkpointer(tmp_path, CONFIG) as checkpointer:
    restored, position = checkpointer.restore(state)
  assert raw(restored) == raw(state)
  assert jax.tree.map(lambda x: x.dtype, restored) == jax.tree.map(
    lambda x: x.dtype, state
  )
  assert position == {'epoch': 4, 'index': 3}


@pytest.mark.parametrize(
  'optimizer',
  [
    optax.sgd(0.1),
    optax.chain(optax.clip(1.0), optax.adamw(0.1), optax.ema(0.9)),
    optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    optax.adafactor(0.1),
    optax.masked(optax.adam(0.1), {'w': True, 'b': False}),
  ],
  ids=['sgd', 'chain', 'injected', 'adafactor', 'masked'],
)
def test_train_states(tmp_path, optimizer):
  init = lambda key: {'w': jax.random.normal(key, (4, 4)), 'b': jnp.ones(4)}
  state = init_state(init, optimizer, jax.random.key(0))
  save(tmp_path, 1, state=state)
  template = init_state(init, optimizer, jax.random.key(1))
  with Checkpointer(tmp_path, CONFIG) as checkpointer:
    restored, _ = checkpointer.restore(template)
  assert type(restored) is type(state)
  assert raw(restored) == raw(state)


def test_keeps_the_latest(tmp_path):
  save(tmp_path, 1, 2, 3, keep=2)
  with Checkpointer(tmp_path, CONFIG) as checkpointer:
    assert checkpointer.steps == [2, 3]
    assert checkpointer.latest_step == 3
    _, position = checkpointer.restore(mixed_state(), step=2)
    assert position['epoch'] == 2
    with pytest.raises(CheckpointError, match=r'no step 1; it has \[2, 3\]'):
      checkpointer.restore(mixed_state(), step=1)
    with pytest.raises(ValueError, match='step 3 is not after'):
      checkpointer.save(3, mixed_state(), {})


def test_nothing_to_restore(tmp_path):
  with Checkpointer(tmp_path, CONFIG) as checkpointer:
    assert checkpointer.latest_step is None and checkpointer.steps == []
    with pytest.raises(CheckpointError, match='has no step None'):
      checkpointer.restore(mixed_state())


def test_a_folder_that_cannot_be_made_is_an_error_at_once(tmp_path):
  state = mixed_state()
  with pytest.raises(CheckpointError, match='could not be written under'):
    with Checkpointer(tmp_path, CONFIG) as checkpointer:
      checkpointer.directory.rmdir()
      checkpointer.directory.write_text('in the way')
      start = time.monotonic()
      checkpointer.save(1, state, {})
  assert time.monotonic() - start < 60


@pytest.mark.parametrize('leaf', [np.ones(2), 3, jnp.ones((0, 2))])
def test_leaves_that_cannot_be_saved(tmp_path, leaf):
  with Checkpointer(tmp_path, CONFIG) as checkpointer:
    with pytest.raises(ValueError, match="'a/b' is .* of shape"):
      checkpointer.save(1, {'a': {'b': leaf}}, {})
    assert checkpointer.latest_step is None


def test_the_state_may_be_deleted_after_save(tmp_path):
  state = mixed_state()
  expected = raw(state)
  with Checkpointer(tmp_path, CONFIG) as checkpointer:
    checkpointer.save(1, state, {})
    jax.tree.map(lambda x: x.delete(), state)
  with Checkpointer(tmp_path, CONFIG) as checkpointer:
    assert raw(checkpointer.restore(mixed_state())[0]) == expected


def test_only_inside_with(tmp_path):
  checkpointer = Checkpointer(tmp_path, CONFIG)
  with pytest.raises(ValueError, match='not open; use it inside'):
    checkpointer.save(1, mixed_state(), {})
  with checkpointer:
    checkpointer.save(1, mixed_state(), {})
  with pytest.raises(ValueError, match='not open'):
    _ = checkpointer.latest_step


def test_leftovers_are_removed_at_the_start(tmp_path):
  save(tmp_path, 1)
  leftover = tmp_path / 'checkpoints' / '7.orbax-checkpoint-tmp'
  shutil.copytree(tmp_path / 'checkpoints' / '1', leftover)
  with Checkpointer(tmp_path, CONFIG) as checkpointer:
    assert checkpointer.latest_step == 1
    checkpointer.save(2, mixed_state(), {})
    checkpointer.wait()
    assert not leftover.exists()
    assert checkpointer.steps == [1, 2]


# --- Owned by one config.


def listing(root):
  return {p: p.read_bytes() for p in root.rglob('*') if p.is_file()}


@pytest.mark.parametrize(
  'change, match',
  [
    ({'lr': 0.2}, 'lr: 0.1 -> 0.2'),
    ({'lr': None}, 'lr: 0.1 -> null'),
    ({'model': {'width': 9, 'names': ['a']}}, r'model.width: 8 -> 9'),
    ({'model': {'width': 8, 'names': []}}, r'model.names: \["a"\] -> \[\]'),
    ({'steps': 10.0}, r'steps: 10 -> 10\.0'),
    ({'new': 1, 'lr': 3}, r'lr: 0.1 -> 3; new: \(absent\) -> 1'),
  ],
)
def test_another_config_is_refused(tmp_path, change, match):
  save(tmp_path, 1)
  before = listing(tmp_path)
  with pytest.raises(ValueError, match=match) as error:
    Checkpointer(tmp_path, {**CONFIG, **change})
  assert str(tmp_path) in str(error.value)
  assert 'Choose another workdir' in str(error.value)
  assert listing(tmp_path) == before


def test_a_config_is_owned_before_the_first_checkpoint(tmp_path):
  claim_workdir(tmp_path / 'deep' / 'run', CONFIG)
  with pytest.raises(ValueError, match='another config'):
    Checkpointer(tmp_path / 'deep' / 'run', {**CONFIG, 'lr': 1})


def test_ignored_keys_may_differ(tmp_path):
  save(tmp_path, 1)
  changed = {**CONFIG, 'steps': 20, 'model': {'width': 1}}
  with pytest.raises(ValueError, match='model.names'):
    Checkpointer(tmp_path, changed, ignore=['steps', 'model.width'])
  with Checkpointer(
    tmp_path, changed, ignore=['steps', 'model']
  ) as checkpointer:
    checkpointer.restore(mixed_state())


def test_a_config_inside_the_step_is_compared_too(tmp_path):
  save(tmp_path, 1)
  path = tmp_path / 'config.json'
  path.write_text(json.dumps({**json.loads(path.read_text()), 'lr': 0.7}))
  with Checkpointer(tmp_path, {**CONFIG, 'lr': 0.7}) as checkpointer:
    with pytest.raises(ValueError, match='saved by another.*lr: 0.1 -> 0.7'):
      checkpointer.restore(mixed_state())


@pytest.mark.parametrize(
  'workdir, config, match',
  [
    ('gs://bucket/run', CONFIG, 'is a URL.*mount the bucket'),
    ('run', {'x': jnp.ones(2)}, 'JSON cannot'),
    ('run', {'x': float('nan')}, 'JSON cannot'),
  ],
)
def test_bad_workdirs_and_configs(
  tmp_path, monkeypatch, workdir, config, match
):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match=match):
    Checkpointer(workdir, config)
  assert not list(tmp_path.iterdir())


def test_a_damaged_config_file_is_not_overwritten(tmp_path):
  (tmp_path / 'config.json').write_text('{"lr": ')
  with pytest.raises(ValueError, match='config.json is not JSON'):
    Checkpointer(tmp_path, CONFIG)
  assert (tmp_path / 'config.json').read_text() == '{"lr": '


def test_keep_must_be_positive(tmp_path):
  with pytest.raises(ValueError, match='keep=0'):
    Checkpointer(tmp_path, CONFIG, keep=0)


# --- Templates that do not fit.


@pytest.mark.parametrize(
  'change, match',
  [
    (
      {'int32': jnp.ones(8, jnp.int32)},
      r"int32: \[\[9\], 'int32'\] -> \[\[8\]",
    ),
    ({'int32': jnp.ones(9)}, r"int32: .*'int32'\] -> \[\[9\], 'float32'\]"),
    ({'more': jnp.ones(2)}, r"more: \['absent'\] -> \[\[2\], 'float32'\]"),
  ],
)
def test_template_of_another_kind(tmp_path, change, match):
  state = save(tmp_path, 1)
  with Checkpointer(tmp_path, CONFIG) as checkpointer:
    with pytest.raises(ValueError, match=match):
      checkpointer.restore({**state, **change})
    del state['bool']
    with pytest.raises(ValueError, match=r"bool: \[\[9\], 'bool'\] -> "):
      checkpointer.restore(state)


# --- Damage. The latest step is never skipped silently.


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('saved')
  save(workdir, 1, 2)
  return workdir


def largest(folder):
  return max(
    (p for p in folder.rglob('*') if p.is_file()),
    key=lambda p: p.stat().st_size,
  )


def flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(bytes(data))


def halve(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
  'empty folder': lambda step: (shutil.rmtree(step), step.mkdir()),
  'no state': lambda step: shutil.rmtree(step / 'state'),
  'no meta': lambda step: shutil.rmtree(step / 'meta'),
  'no manifest': lambda step: (step / 'state' / 'manifest.ocdbt').unlink(),
  'manifest bit': lambda step: flip(step / 'state' / 'manifest.ocdbt'),
  'meta cut': lambda step: halve(step / 'meta' / 'metadata'),
  'meta emptied': lambda step: (step / 'meta' / 'metadata').write_text('{}'),
  'array gone': lambda step: largest(step).unlink(),
  'array cut': lambda step: halve(largest(step)),
  # One bit of one parameter, which Orbax itself does not notice.
  'array bit': lambda step: flip(largest(step)),
}


@pytest.mark.filterwarnings(
  # Orbax abandons the other reads of a step when one of them fails, and
  # Python reports those coroutines when it collects them.
  'ignore::pytest.PytestUnraisableExceptionWarning',
)
@pytest.mark.parametrize('kind', DAMAGE)
def test_damage_is_named(saved, tmp_path, kind):
  workdir = tmp_path / 'run'
  shutil.copytree(saved, workdir)
  DAMAGE[kind](workdir / 'checkpoints' / '2')
  with Checkpointer(workdir, CONFIG) as checkpointer:
    with pytest.raises(CheckpointError) as error:
      checkpointer.restore(mixed_state())
    message = str(error.value)
    assert str(workdir / 'checkpoints' / '2') in message
    assert 'damaged' in message and 'remove it to go on from step 1' in message
    # The remedy works.
    restored, position = checkpointer.restore(mixed_state(), step=1)
    assert position['epoch'] == 1 and raw(restored) == raw(mixed_state())
  del error
  gc.collect()  # So that they are reported here and not in a later test.


# --- The fingerprint.


def marks(tree):
  return {name: mark for name, (_, _, mark) in _describe(tree).items()}


@pytest.mark.parametrize('name', mixed_state())
def test_fingerprint_sees_every_bit(name):
  x = mixed_state()[name]
  if name == 'key':
    others = [jax.random.key(6)]
  elif name == 'bool':
    others = [x.at[i].set(~x[i]) for i in range(x.size)]
  else:
    data = np.asarray(x)
    others = []
    for bit in (0, 9, 8 * data.nbytes - 1):
      if bit < 8 * data.nbytes:
        changed = bytearray(data.tobytes())
        changed[bit // 8] ^= 1 << bit % 8
        changed = np.frombuffer(bytes(changed), data.dtype)
        others.append(jnp.asarray(changed.reshape(data.shape)))
  mark = marks({'x': x})
  assert mark == marks({'x': x})
  for other in others:
    assert marks({'x': other}) != mark


def test_fingerprint_sees_several_changes_at_once():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(10, 10)), jnp.float32)
  mark = marks({'x': x})
  for other in (
    x.at[:2, 0].multiply(-1),
    x.at[3].multiply(-1),
    -x,
    x[::-1],
    x.at[0].set(x[1]).at[1].set(x[0]),
  ):
    assert marks({'x': other}) != mark


def test_fingerprint_is_its_formula_on_any_mesh():
  x = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)

  def mix(h):
    h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
    h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
    return h ^ h >> 16

  bits = enumerate(x.view(np.uint32).ravel().tolist())
  expected = sum(mix(b ^ i * 0x9E3779B9 % 2**32) for i, b in bits) % 2**32
  for spec in (P(), P('data'), P('model'), P('model', 'data')):
    on = NamedSharding(make_mesh(2, 4), spec)
    assert marks({'x': jax.device_put(x, on)})['x'] == expected
