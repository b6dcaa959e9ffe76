"""The same run on one device, on a 2 x 4 mesh, and on two processes."""

import functools

import jax
from jax.sharding import NamedSharding
import numpy as np
import pytest

from idesign.training import (
  batch_sharding,
  Checkpointer,
  init_state,
  initialize_distributed,
  make_mesh,
  process_rows,
  read_metrics,
  shard_batch,
)
from tests import processes
from tests.training import script

NUM_STEPS = 8
# Losses and norms are sums of at most 16 x 512 products whose order differs
# between meshes, fed back through 8 updates: eps times a random walk of about
# sqrt(8192) roundings, 90.
RTOL = 90 * float(np.finfo(np.float32).eps)


def mesh(name):
  data, model = map(int, name.split('x'))
  return make_mesh(data, model, devices=jax.devices()[: data * model])


@functools.cache
def trained(root, name):
  return script.run(root / name, mesh=mesh(name), num_steps=NUM_STEPS)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  return tmp_path_factory.mktemp('runs')


@pytest.fixture(scope='module')
def two_processes(tmp_path_factory):
  """Runs the script on two processes of four devices, on two meshes."""
  workdir = tmp_path_factory.mktemp('two')
  processes.run_two(
    'tests.training.script',
    str(workdir),
    f'--num_steps={NUM_STEPS}',
    '--meshes',
    '2x4',
    '1x8',
  )
  return workdir


def curve(workdir):
  records = read_metrics(workdir / 'metrics.jsonl')
  assert [r['step'] for r in records] == list(range(1, NUM_STEPS + 1))
  return np.array([[r['loss'], r['grad_norm']] for r in records])


@pytest.mark.parametrize('where', ['2x4', '8x1', 'two 2x4', 'two 1x8'])
def test_same_curve_as_one_device(where, root, request):
  trained(root, '1x1')
  expected = curve(root / '1x1')
  assert expected[0, 0] > 2 * expected[-1, 0], 'nothing was learnt'
  if where.startswith('two'):
    actual = curve(request.getfixturevalue('two_processes') / where[4:])
  else:
    trained(root, where)
    actual = curve(root / where)
  np.testing.assert_allclose(actual, expected, rtol=RTOL)


def config():
  return {'num_steps': NUM_STEPS, 'seed': 0, 'width': script.WIDTH}


@pytest.mark.parametrize('target', ['4x2', '1x8', '1x1'])
@pytest.mark.parametrize('source', ['2x4', '1x1'])
def test_restores_on_another_mesh(source, target, root):
  state = trained(root, source)
  assert_restores(root / source, target, state)


def assert_restores(workdir, target, expected=None):
  template = init_state(
    script.init,
    script.optimizer(),
    jax.random.key(9),
    mesh=mesh(target),
    rules=script.RULES,
  )
  with Checkpointer(workdir, config()) as checkpointer:
    state, _ = checkpointer.restore(template)
  for wanted, leaf in zip(jax.tree.leaves(template), jax.tree.leaves(state)):
    assert leaf.sharding == wanted.sharding
  if expected is not None:
    expected, state = map(raw, (expected, state))
    assert expected == state
  return state


def raw(state):
  state = state._replace(key=jax.random.key_data(state.key))
  return [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]


@pytest.mark.parametrize('source', ['2x4', '1x8'])
def test_two_processes_restore_on_one(source, two_processes):
  # `restore` itself compares the bits with those the two processes had.
  assert_restores(two_processes / source, '1x1')
  state = assert_restores(two_processes / source, '4x2')
  assert int(state.step) == NUM_STEPS


@pytest.mark.parametrize(
  'name, parts',
  [
    # The processes differ in `data`: each loads its half of the batch.
    ('2x4', (range(8), range(8, 16))),
    # They differ in `model` only: both need every example.
    ('1x8', (range(16), range(16))),
  ],
)
def test_processes_load_their_rows(name, parts, two_processes):
  for index, part in enumerate(parts):
    rows = np.load(two_processes / name / f'rows_{index}.npy')
    assert rows.tolist() == list(part)


def test_parameters_are_split(root):
  state = trained(root, '2x4')
  kernel = state.params['mlp']['up']['kernel']
  moments = [
    leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
    if jax.tree_util.keystr(path).endswith("['up']['kernel']")
  ]
  assert len(moments) == 2
  for leaf in (kernel, *moments):
    shapes = {shard.data.shape for shard in leaf.addressable_shards}
    assert shapes == {(script.WIDTH, script.HIDDEN // 4)}
    assert isinstance(leaf.sharding, NamedSharding)


def test_shard_batch_splits_examples():
  on = mesh('4x2')
  batch = shard_batch({'x': np.arange(24).reshape(8, 3)}, on)
  assert batch['x'].sharding == batch_sharding(on)
  np.testing.assert_array_equal(batch['x'], np.arange(24).reshape(8, 3))
  assert {s.data.shape for s in batch['x'].addressable_shards} == {(2, 3)}
  np.testing.assert_array_equal(process_rows(on, 8), np.arange(8))


@pytest.mark.parametrize(
  'arguments, environment, match',
  [
    ((None, 2, 0), {}, 'coordinator_address must be given'),
    (('a:1', None, None), {}, 'num_processes and process_id must be given'),
    (('a:1', 2, 2), {}, 'process_id=2 is not one of the 2'),
    (
      (None, None, None),
      {'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '0'},
      'JAX_COORDINATOR_ADDRESS',
    ),
  ],
)
def test_initialize_refuses(arguments, environment, match, monkeypatch):
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(ValueError, match=match):
    initialize_distributed(*arguments)


@pytest.mark.parametrize('arguments', [(), ('localhost:1', 1, 0)])
def test_initialize_alone_does_nothing(arguments):
  initialize_distributed(*arguments)
  assert not jax.distributed.is_initialized()
