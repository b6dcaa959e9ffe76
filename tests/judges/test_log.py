"""The log when disks, writers and replays go wrong."""

import errno
import gc
import os
import subprocess
import sys

import numpy as np
import pytest

from idesign import judges
from idesign.judges import Verdict
from idesign.judges import log as log_lib
from tests.judges.test_objective import SPEC, always

ROW = {'step': 0, 'verdict': {'concept': 0, 'decision': 'allow'}}


def full(*args):
  raise OSError(errno.ENOSPC, 'no space left on device')


def half(descriptor, data):
  """Writes a little, then finds the disk full."""
  if len(data) < 40:
    full()
  return WRITE(descriptor, data[:30])


WRITE = os.write


@pytest.mark.parametrize('call,fails', [('write', half), ('fsync', full)])
def test_a_row_that_cannot_be_written_is_not_there(
  call, fails, tmp_path, monkeypatch
):
  path = tmp_path / 'log.jsonl'
  log = judges.DecisionLog(path)
  log.append(ROW)
  before, head = path.read_bytes(), log.head
  with monkeypatch.context() as m:
    m.setattr(log_lib.os, call, fails)
    with pytest.raises(OSError, match='no space'):
      log.append(ROW)
  assert path.read_bytes() == before
  assert log.head == head and len(log.rows) == 1
  log.append(ROW)
  assert judges.read_log(path) == [ROW, ROW] == log.rows


def test_where_nothing_can_be_taken_back_nothing_follows(tmp_path, monkeypatch):
  path = tmp_path / 'log.jsonl'
  log = judges.DecisionLog(path)
  log.append(ROW)
  with monkeypatch.context() as m:
    m.setattr(log_lib.os, 'write', half)
    m.setattr(log_lib.os, 'ftruncate', full)
    with pytest.raises(OSError):
      log.append(ROW)
  with pytest.raises(judges.LogError, match='closed'):
    log.append(ROW)
  with pytest.warns(UserWarning, match='half-written'):
    again = judges.DecisionLog(path)
  assert again.rows == [ROW]


@pytest.mark.parametrize(
  'value', [float('nan'), float('inf'), np.int64(1), object(), {(1, 2): 3}]
)
def test_a_row_that_is_no_json_changes_nothing(value, tmp_path):
  log = judges.DecisionLog(tmp_path / 'log.jsonl')
  log.append(ROW)
  with pytest.raises(judges.LogError, match='log.jsonl, line 2: .* be JSON'):
    log.append({'value': value})
  log.append(ROW)
  assert judges.read_log(log.path) == [ROW, ROW]


def test_what_is_hashed_is_what_is_read(tmp_path):
  log = judges.DecisionLog(tmp_path / 'log.jsonl')
  log.append({'counts': {9: 'a', 10: ('b',)}})
  assert judges.read_log(log.path) == [{'counts': {'9': 'a', '10': ['b']}}]


def test_a_second_writer_is_refused_by_name(tmp_path):
  path = tmp_path / 'log.jsonl'
  log = judges.DecisionLog(path)
  log.append(ROW)
  with pytest.raises(judges.LogError, match='log.jsonl is open for another'):
    judges.DecisionLog(path)
  code = f'import fcntl; fcntl.flock(open({str(path)!r}), 6)'  # Without wait.
  other = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True
  )
  assert 'BlockingIOError' in other.stderr
  assert judges.read_log(path) == [ROW]  # Reading is free.
  judges.ReplayJudge(path)
  log.append(ROW)


def test_the_lock_ends_with_the_log(tmp_path):
  path = tmp_path / 'log.jsonl'
  judge = judges.recorded(always('allow'), judges.DecisionLog(path))
  judge(0, [judges.Evidence(0)])
  del judge
  gc.collect()
  with judges.DecisionLog(path) as log:
    log.append(ROW)
  log.close()
  with pytest.raises(judges.LogError, match='was closed'):
    log.append(ROW)
  assert len(judges.DecisionLog(path).rows) == 2


def test_a_dropped_log_in_a_cycle_holds_no_lock(tmp_path):
  log = judges.DecisionLog(tmp_path / 'log.jsonl')
  cycle = [log]
  cycle.append(cycle)
  gc.disable()
  try:
    del log, cycle
    judges.DecisionLog(tmp_path / 'log.jsonl')
  finally:
    gc.enable()


def test_a_log_that_is_not_sound_is_not_kept_locked(tmp_path):
  path = tmp_path / 'log.jsonl'
  path.write_text('hello\n')
  caught = []
  for _ in range(2):
    with pytest.raises(judges.LogError, match='line 1') as error:
      judges.DecisionLog(path)
    caught.append(error)  # Holds the traceback, and so the log.


# Replays.


def test_a_replay_is_of_the_same_evidence(tmp_path):
  path = tmp_path / 'log.jsonl'
  e = judges.Evidence(np.int64(3), 'arr', ('a', 'b'), ('c',), 0.25, 0.2, 0.3)
  with judges.DecisionLog(path) as log:
    (v,) = judges.recorded(always('suppress'), log)(np.int64(5), [e])
  replay = judges.ReplayJudge(path)
  fields = vars(e)
  assert replay(5, [e]) == [v]
  assert replay(5, [judges.Evidence(**fields | {'score': 0.2500001})]) == [v]
  for change in ({'score': -0.25}, {'spans': ('a',)}, {'label': 'b'}):
    other = judges.Evidence(**fields | change)
    with pytest.raises(judges.LogError, match='concept 3 at step 5 .* other'):
      replay(5, [other])
    assert judges.ReplayJudge(path, same_evidence=False)(5, [other]) == [v]


def test_a_replay_is_of_the_same_objective(tmp_path):
  path = tmp_path / 'log.jsonl'
  objective, e = judges.make_objective(SPEC), judges.Evidence(0)
  with judges.DecisionLog(path) as log:
    judges.recorded(always('allow'), log, objective=objective)(0, [e])
  assert judges.ReplayJudge(path, objective=objective)(0, [e])
  other = judges.ReplayJudge(path, objective=objective.reversed())
  with pytest.raises(judges.LogError, match='by the objective'):
    other(0, [e])


def test_logs_of_before_are_read(tmp_path):
  path = tmp_path / 'log.jsonl'
  with judges.DecisionLog(path) as log:
    log.append(ROW)  # It says nothing of the evidence.
  replay = judges.ReplayJudge(path, objective=judges.make_objective(SPEC))
  assert replay(0, [judges.Evidence(0, 'anything')]) == [Verdict(0, 'allow')]


def test_the_later_of_two_rows_counts(tmp_path):
  path = tmp_path / 'log.jsonl'
  with judges.DecisionLog(path) as log:
    for decision in ('suppress', 'amplify'):
      judges.recorded(always(decision), log)(4, [judges.Evidence(0)])
  (v,) = judges.ReplayJudge(path)(4, [judges.Evidence(0)])
  assert v.decision == 'amplify'
