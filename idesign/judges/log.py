"""The decision log: append-only lines, each carrying the hash of the last.

A row is `{"previous": sha256, "row": {...}, "sha256": sha256}`, the last being
that of the canonical JSON of the first two. So no row can be changed, taken
out or put in unnoticed without rewriting all that follow; only the hash of the
last row, kept elsewhere (`head`), tells whether rows were cut off at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any
import warnings

from idesign.judges.verdict import Evidence, Judge, Verdict

_START = '0' * 64


class LogError(ValueError):
  """A decision log that was altered, or does not hold what is asked for."""


class DecisionLog:
  """Rows on disk; opening an existing file verifies it and goes on with it.

  A last line that a killed run left half-written is dropped, with a warning.

  Attributes:
    path: the file.
    rows: everything logged so far.
    head: hash of the last row.
  """

  def __init__(self, path: str | os.PathLike[str]):
    """Opens or creates a log.

    Raises:
      LogError: naming the first line that does not follow from those before.
    """
    self.path = pathlib.Path(path)
    self.path.parent.mkdir(parents=True, exist_ok=True)
    whole = self.path.read_bytes() if self.path.exists() else b''
    kept = whole[: whole.rfind(b'\n') + 1]
    self.rows, self.head = _verify(self.path, kept)
    if len(kept) < len(whole):
      warnings.warn(
        f'{self.path}: the last line was half-written and is dropped.',
        stacklevel=2,
      )
      os.truncate(self.path, len(kept))

  def append(self, row: dict[str, Any]) -> None:
    """Adds a row of JSON values; it is on disk when this returns."""
    line = {'previous': self.head, 'row': row}
    self.head = _hash(line)
    text = json.dumps(line | {'sha256': self.head}, allow_nan=False)
    with self.path.open('a', encoding='utf-8') as file:
      file.write(text + '\n')
      file.flush()
      os.fsync(file.fileno())
    self.rows.append(json.loads(text)['row'])


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


def recorded(judge: Judge, log: DecisionLog) -> Judge:
  """The same judge, its verdicts written to a log."""

  def judged(step: int, evidence: Sequence[Evidence]) -> list[Verdict]:
    verdicts = judge(step, evidence)
    for v in verdicts:
      log.append({'step': step, 'verdict': dataclasses.asdict(v)})
    return verdicts

  return judged


class ReplayJudge:
  """Gives the verdicts of a log again: no model, no network.

  Where the log holds a concept twice at one step (a run that was interrupted
  and repeated the step), the later row counts.
  """

  def __init__(self, path: str | os.PathLike[str]):
    """Reads and verifies the log.

    Raises:
      LogError: if it was altered, or a row holds no valid verdict.
    """
    self._path = path
    self._verdicts: dict[tuple[int, int], Verdict] = {}
    for number, row in enumerate(read_log(path), 1):
      try:
        verdict = Verdict(**row['verdict'])
        self._verdicts[row['step'], verdict.concept] = verdict
      except (KeyError, TypeError, ValueError) as error:
        raise LogError(f'{path}, line {number}: no verdict: {error}') from error

  def __call__(self, step: int, evidence: Sequence[Evidence]) -> list[Verdict]:
    """The recorded verdicts.

    Raises:
      LogError: if the log has none for a concept at this step. A replay that
        went on without would train something else than the run it repeats.
    """
    found = []
    for e in evidence:
      if (step, e.concept) not in self._verdicts:
        raise LogError(
          f'{self._path} holds no verdict on concept {e.concept} at step '
          f'{step}: it is the log of a run with another config or data.'
        )
      found.append(self._verdicts[step, e.concept])
    return found
