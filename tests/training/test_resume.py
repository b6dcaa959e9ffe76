"""A run killed with `kill -9` resumes to the same bits."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np

from idesign.training import Checkpointer, read_metrics

ROOT = pathlib.Path(__file__).resolve().parents[2]
NUM_STEPS = 40
TEMPORARY = '*.orbax-checkpoint-tmp'


def command(workdir, *extra):
  return [
    sys.executable,
    '-m',
    'tests.training.script',
    str(workdir),
    f'--num_steps={NUM_STEPS}',
    '--save_every=3',
    *extra,
  ]


def environment(devices=1):
  flags = f'--xla_force_host_platform_device_count={devices}'
  return {
    **os.environ,
    'PYTHONPATH': str(ROOT),
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': flags,
  }


def start(workdir):
  return subprocess.Popen(
    command(workdir),
    cwd=ROOT,
    env=environment(),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
  )


def finish(workdir):
  done = subprocess.run(
    command(workdir), cwd=ROOT, env=environment(), capture_output=True
  )
  assert done.returncode == 0, done.stderr.decode()[-3000:]


def kill_when(workdir, condition):
  process = start(workdir)
  while not condition():
    if process.poll() is not None:
      raise AssertionError(process.stdout.read().decode()[-3000:])
    time.sleep(0.0005)
  process.send_signal(signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL
  process.stdout.close()


def metrics_file(workdir):
  return workdir / '1x1' / 'metrics.jsonl'


def written(workdir):
  # A run that resumes may replace the file with an empty one at any moment,
  # so what was read decides, not what the file's size was just before.
  records = read_metrics(metrics_file(workdir))
  return records[-1]['step'] if records else 0


def at_step(workdir, step):
  def condition():
    path = metrics_file(workdir)
    return path.exists() and written(workdir) >= step

  return condition


def in_save(workdir):
  """True when a temporary folder appears that was not there before."""
  folder = workdir / '1x1' / 'checkpoints'
  before = {p.stat().st_ino for p in folder.glob(TEMPORARY)}

  def condition():
    for path in folder.glob(TEMPORARY):
      try:
        if path.stat().st_ino not in before:
          return True
      except FileNotFoundError:  # It was renamed just now.
        pass
    return False

  return condition


def test_killed_run_ends_at_the_same_bits(tmp_path):
  rng = random.Random(0)
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  finish(whole)
  leftovers = []
  for kind in ('save', 'step', 'save', 'step'):
    done = written(killed) if metrics_file(killed).exists() else 0
    if kind == 'save':
      kill_when(killed, in_save(killed))
    else:
      kill_when(killed, at_step(killed, done + rng.randint(1, 8)))
    assert written(killed) < NUM_STEPS, 'it was not interrupted'
    leftovers.append(len(list(killed.glob(f'1x1/checkpoints/{TEMPORARY}'))))
  assert max(leftovers) > 0, 'no kill came in the middle of a save'
  finish(killed)

  expected = np.load(whole / '1x1' / 'final.npz')
  actual = np.load(killed / '1x1' / 'final.npz')
  assert expected.files == actual.files and len(expected.files) > 10
  for name in expected.files:
    assert expected[name].tobytes() == actual[name].tobytes(), name
  records = read_metrics(metrics_file(killed))
  assert [r['step'] for r in records] == list(range(1, NUM_STEPS + 1))
  assert records == read_metrics(metrics_file(whole))
  assert not list(killed.glob(f'1x1/checkpoints/{TEMPORARY}'))


FULL_DISK = """
import resource, signal, sys
import jax, jax.numpy as jnp
from idesign.training import Checkpointer, CheckpointError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
state = {'w': jax.random.normal(jax.random.key(0), (300, 300))}
try:
  with Checkpointer(sys.argv[1], {'a': 1}) as checkpointer:
    checkpointer.save(1, state, {'at': 1})
    checkpointer.wait()
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    checkpointer.save(2, state, {'at': 2})
except CheckpointError as error:
  print('REFUSED', error)
"""


def test_full_disk(tmp_path):
  done = subprocess.run(
    [sys.executable, '-c', FULL_DISK, str(tmp_path)],
    cwd=ROOT,
    env=environment(),
    capture_output=True,
    text=True,
  )
  refusal = done.stdout[done.stdout.find('REFUSED') :]
  assert refusal, done.stderr[-2000:]
  assert str(tmp_path / 'checkpoints') in refusal and '[1]' in refusal
  assert 'intact' in refusal and 'Make room' in refusal
  template = {'w': jax.ShapeDtypeStruct((300, 300), np.float32)}
  with Checkpointer(tmp_path, {'a': 1}) as checkpointer:
    assert checkpointer.steps == [1]
    state, position = checkpointer.restore(template)
    assert position == {'at': 1}
    checkpointer.save(2, state, {'at': 2})
    checkpointer.wait()
    assert checkpointer.steps == [1, 2]
    assert not list(checkpointer.directory.glob(TEMPORARY))


AT_EXIT = """
import sys
import jax
from idesign.training import Checkpointer
state = {'w': jax.random.normal(jax.random.key(0), (1000, 1000))}
with Checkpointer(sys.argv[1], {}) as checkpointer:
  checkpointer.save(1, state, {})
  sys.exit(3)
"""


def test_a_running_save_is_waited_for_at_exit(tmp_path):
  done = subprocess.run(
    [sys.executable, '-c', AT_EXIT, str(tmp_path)],
    cwd=ROOT,
    env=environment(),
    capture_output=True,
    text=True,
  )
  assert done.returncode == 3, done.stderr[-2000:]
  with Checkpointer(tmp_path, {}) as checkpointer:
    assert checkpointer.latest_step == 1
