"""The decision log: append-only lines, each carrying the hash of the last.

A row is `{"previous": sha256, "row": {...}, "sha256": sha256}`, the last being
that of the canonical JSON of the first two. So no row can be changed, taken
out or put in unnoticed without rewriting all that follow; only the hash of the
last row, kept elsewhere (`head`), tells whether rows were cut off at the end.

One process judges, and writes; any number may read. In a run of several
processes the first judges and tells the others its gates.
"""

from __future__ import annotations

from collections.abc import Sequence
import contextlib
import dataclasses
import errno
import fcntl
import gc
import hashlib
import json
import os
import pathlib
from typing import Any
import warnings
import weakref

from idesign.judges.objective import Objective
from idesign.judges.verdict import Evidence, Judge, Verdict

_START = '0' * 64


class LogError(ValueError):
  """A decision log that was altered, is in use, or lacks what is asked for."""


class DecisionLog:
  """Rows on disk; opening an existing file verifies it and goes on with it.

  A last line that a killed run left half-written is dropped, with a warning.

  The file is locked against other writers, in this process or another, until
  the log is closed, its `with` block ends, or nothing refers to it any more.
  Where the file system knows no locks, a warning says so.

  Attributes:
    path: the file.
    rows: everything logged so far.
    head: hash of the last row.
  """

  def __init__(self, path: str | os.PathLike[str]):
    """Opens or creates a log.

    Raises:
      LogError: naming the first line that does not follow from those before;
        or if another writer has the log open.
      OSError: if it cannot be opened.
    """
    self.path = pathlib.Path(path)
    self.path.parent.mkdir(parents=True, exist_ok=True)
    # A bare descriptor: a file object that is dropped open warns.
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
    self._descriptor = os.open(self.path, flags, 0o666)
    self._closed = weakref.finalize(
      self, _release, self._descriptor, os.getpid()
    )
    try:
      _lock(self._descriptor, self.path)
      whole = self.path.read_bytes()
      kept = whole[: whole.rfind(b'\n') + 1]
      self.rows, self.head = _verify(self.path, kept)
      self._size = len(kept)
      if len(kept) < len(whole):
        warnings.warn(
          f'{self.path}: the last line was half-written and is dropped.',
          stacklevel=2,
        )
        os.ftruncate(self._descriptor, self._size)
    except BaseException:
      self.close()
      raise

  def __enter__(self) -> DecisionLog:
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()

  def close(self) -> None:
    """Lets another writer open the file; does nothing the second time."""
    self._closed()

  def append(self, row: dict[str, Any]) -> None:
    """Adds a row of JSON values; it is on disk when this returns.

    If it raises, the row was not added, and the log is what it was before.

    Raises:
      LogError: if the row is not JSON, or the log is closed.
      OSError: if it cannot be written, such as on a full disk.
    """
    if not self._closed.alive:
      raise LogError(f'{self.path} was closed; open it again to append.')
    try:
      # What will be read is what is hashed: JSON turns every key into a text.
      row = json.loads(json.dumps(row, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
      raise LogError(
        f'{self.path}, line {len(self.rows) + 1}: a row must be JSON without '
        f'NaN or infinity, but {error}.'
      ) from error
    line = {'previous': self.head, 'row': row}
    head = _hash(line)
    data = (json.dumps(line | {'sha256': head}) + '\n').encode()
    try:
      written = 0
      while written < len(data):
        written += os.write(self._descriptor, data[written:])
      os.fsync(self._descriptor)
    except BaseException:
      try:
        os.ftruncate(self._descriptor, self._size)
      except OSError:
        self.close()  # Nothing may follow half a line; opening drops it.
      raise
    self._size += len(data)
    self.head = head
    self.rows.append(row)


def _lock(descriptor: int, path: pathlib.Path) -> None:
  flags = fcntl.LOCK_EX | fcntl.LOCK_NB
  try:
    try:
      fcntl.flock(descriptor, flags)
    except BlockingIOError:
      # Errors that a judge caught may keep its dropped log alive in a cycle.
      gc.collect()
      fcntl.flock(descriptor, flags)
  except BlockingIOError as error:
    raise LogError(
      f'{path} is open for another writer. Only one process judges: close that '
      'log, or give each writer a file of its own.'
    ) from error
  except OSError as error:
    if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
      raise
    warnings.warn(
      f'{path}: its file system has no locks ({error.strerror}); see to it '
      'that only one process judges.',
      stacklevel=3,
    )


def _release(descriptor: int, owner: int) -> None:
  # A forked process shares the lock: it may drop its copy, but not unlock.
  if os.getpid() == owner:
    with contextlib.suppress(OSError):
      fcntl.flock(descriptor, fcntl.LOCK_UN)
  os.close(descriptor)


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """The rows of a log, verified; changes nothing.

  Raises:
    LogError: as `DecisionLog`, and for a half-written last line.
    OSError: if it cannot be read.
  """
  return _verify(pathlib.Path(path), pathlib.Path(path).read_bytes())[0]


def _hash(line: dict[str, Any]) -> str:
  text = json.dumps(line, sort_keys=True, separators=(',', ':'))
  return hashlib.sha256(text.encode()).hexdigest()


def _verify(path: pathlib.Path, data: bytes) -> tuple[list[Any], str]:
  rows, head = [], _START
  for number, raw in enumerate(data.splitlines(), 1):
    try:
      line = json.loads(raw)
      claimed, previous = line.pop('sha256'), line['previous']
      sound = previous == head and claimed == _hash(line) and len(line) == 2
      row = line['row']
    except (ValueError, KeyError, TypeError, AttributeError):
      sound = False
    if not sound:
      raise LogError(
        f'{path}, line {number}: it is not what was written there, or a line '
        'before it is missing. Nothing after line '
        f'{number - 1} can be trusted.'
      )
    rows.append(row)
    head = claimed
  return rows, head


def recorded(
  judge: Judge, log: DecisionLog, *, objective: Objective | None = None
) -> Judge:
  """The same judge, its verdicts written to a log.

  Each row holds the hash of the evidence too, and that of the objective if it
  is given, so that a replay can tell that it is of the same run.
  """

  def judged(step: int, evidence: Sequence[Evidence]) -> list[Verdict]:
    verdicts = judge(step, evidence)
    of = {int(e.concept): e.sha256() for e in evidence}
    for v in verdicts:
      row = {'step': int(step), 'verdict': dataclasses.asdict(v)}
      row['verdict']['concept'] = concept = int(v.concept)
      if concept in of:
        row['evidence_sha256'] = of[concept]
      if objective is not None:
        row['objective_sha256'] = objective.sha256()
      log.append(row)
    return verdicts

  return judged


class ReplayJudge:
  """Gives the verdicts of a log again: no model, no network.

  Where the log holds a concept twice at one step (a run that was interrupted
  and repeated the step), the later row counts. Evidence and objective are
  compared where the row has their hashes; rows of older logs have none.
  """

  def __init__(
    self,
    path: str | os.PathLike[str],
    *,
    objective: Objective | None = None,
    same_evidence: bool = True,
  ):
    """Reads and verifies the log.

    Args:
      path: of the log.
      objective: what the verdicts must have been given by; any if None.
      same_evidence: whether the evidence must be what was judged: its texts,
        and its numbers to four digits. False repeats the decisions of a run
        whose numbers another machine rounds differently.

    Raises:
      LogError: if it was altered, or a row holds no valid verdict.
    """
    self._path, self._same_evidence = path, same_evidence
    self._objective = None if objective is None else objective.sha256()
    self._rows: dict[tuple[int, int], tuple[dict[str, Any], Verdict]] = {}
    for number, row in enumerate(read_log(path), 1):
      try:
        verdict = Verdict(**row['verdict'])
        self._rows[row['step'], verdict.concept] = row, verdict
      except (KeyError, TypeError, ValueError) as error:
        raise LogError(f'{path}, line {number}: no verdict: {error}') from error

  def __call__(self, step: int, evidence: Sequence[Evidence]) -> list[Verdict]:
    """The recorded verdicts.

    Raises:
      LogError: if the log has none for a concept at this step, or it was given
        for other evidence or by another objective. A replay that went on would
        train something else than the run it repeats.
    """
    found = []
    for e in evidence:
      place = int(step), int(e.concept)
      if place not in self._rows:
        raise LogError(
          f'{self._path} holds no verdict on concept {e.concept} at step '
          f'{step}: it is the log of a run with another config or data.'
        )
      row, verdict = self._rows[place]
      of, by = row.get('evidence_sha256'), row.get('objective_sha256')
      if self._same_evidence and of and of != e.sha256():
        raise LogError(
          f'{self._path}: the verdict on concept {e.concept} at step {step} '
          'was given for other evidence: it is the log of a run with another '
          'config or data. If only rounding differs, replay with '
          'same_evidence=False.'
        )
      if self._objective and by and by != self._objective:
        raise LogError(
          f'{self._path}: the verdict on concept {e.concept} at step {step} '
          f'was given by the objective {by:.12}, not by {self._objective:.12}; '
          'replay with that one, or judge anew.'
        )
      found.append(verdict)
    return found
