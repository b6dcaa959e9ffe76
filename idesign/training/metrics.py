"""Metrics as JSON lines: one object per step, each step once.

A line is `{"step": 12, "loss": 0.5, ...}`. JSON has no NaN, so values that are
not finite are the strings "NaN", "Infinity" and "-Infinity"; `read_metrics`
turns them back into floats. A process killed while it writes leaves at most
one line without its line end, which counts as not written.
"""

from __future__ import annotations

from collections.abc import Mapping
import contextlib
import json
import math
import os
import pathlib
from typing import Any

import jax
import numpy as np

_NOT_FINITE = {'NaN': math.nan, 'Infinity': math.inf, '-Infinity': -math.inf}


class MetricsWriter:
  """Appends metrics to a file, on process 0; elsewhere it does nothing.

  ```
  with MetricsWriter(workdir / 'metrics.jsonl') as writer:
    writer.resume(step)             # forget what came after the checkpoint
    writer.write(step + 1, {'loss': 0.5})
  ```

  Every line reaches the operating system before `write` returns, so it
  outlives the process; `sync` makes it outlive a loss of power.
  """

  def __init__(self, path: str | os.PathLike[str]):
    """Opens `path` for appending, creating it if there is none.

    Raises:
      FileNotFoundError: if the folder does not exist.
      ValueError: if the file is not one of metrics, naming the line.
    """
    self.path = pathlib.Path(path)
    self._file = None
    self._last = -1
    if jax.process_index() != 0:
      return
    if not self.path.parent.is_dir():
      raise FileNotFoundError(
        f'{self.path.parent} does not exist; create the folder before '
        f'writing {self.path.name}.'
      )
    records = _parse(self.path) if self.path.exists() else []
    self._open(records)

  def resume(self, step: int) -> None:
    """Drops the lines after `step`; the file is replaced in one rename."""
    if self._file is not None:
      self._file.close()
      self._open([r for r in _parse(self.path) if r['step'] <= step])

  def _open(self, records: list[dict[str, Any]]) -> None:
    # Also drops the half line that a killed process may have left.
    temporary = self.path.with_name(self.path.name + '.tmp')
    with open(temporary, 'w', encoding='utf-8') as file:
      file.writelines(_line(record) for record in records)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, self.path)
    self._file = open(self.path, 'a', encoding='utf-8', buffering=1)
    self._last = records[-1]['step'] if records else -1

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Appends one line.

    Args:
      step: greater than every step in the file.
      metrics: names to scalars: numbers or arrays of one element.

    Raises:
      ValueError: if the step is not new, or a value is no scalar.
    """
    if jax.process_index() != 0:
      return
    if self._file is None:
      raise ValueError(f'the writer of {self.path} is closed.')
    if step <= self._last:
      raise ValueError(
        f'{self.path} already holds step {self._last}, so step {step} cannot '
        f'be written; call resume({step - 1}) first to drop what follows.'
      )
    record = {'step': int(step)}
    for name, value in metrics.items():
      if name == 'step' or np.size(value) != 1:
        raise ValueError(
          f'metric {name!r} of step {step} must be a scalar with a name '
          f'other than "step"; got shape {np.shape(value)}.'
        )
      record[name] = _number(name, value)
    try:
      self._file.write(_line(record))
    except OSError as error:
      self._abandon()
      raise OSError(
        error.errno,
        f'{self.path} could not be extended by step {step} ({error.strerror})'
        '. The lines before are intact: make room and run the same command '
        'again',
      ) from error
    self._last = step

  def _abandon(self) -> None:
    """Closes without a last attempt to write what could not be written."""
    file, self._file = self._file, None
    with contextlib.suppress(OSError):
      file.close()

  def sync(self) -> None:
    """Returns when everything written is on the disk."""
    if self._file is not None:
      self._file.flush()
      os.fsync(self._file.fileno())

  def close(self) -> None:
    if self._file is not None:
      self._file.close()
      self._file = None

  def __enter__(self) -> MetricsWriter:
    return self

  def __exit__(self, *exc_info) -> None:
    self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """Reads a metrics file: a list of dicts, in the order written.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if a complete line is not a JSON object with a "step", naming
      the line; a last line without its end is ignored.
  """

  def restored(value):
    return _NOT_FINITE[value] if isinstance(value, str) else value

  return [
    {name: restored(value) for name, value in record.items()}
    for record in _parse(pathlib.Path(path))
  ]


def _parse(path: pathlib.Path) -> list[dict[str, Any]]:
  text = path.read_text(encoding='utf-8')
  records = []
  for number, line in enumerate(text.split('\n')[:-1], start=1):
    try:
      record = json.loads(line)
    except json.JSONDecodeError as error:
      raise ValueError(
        f'{path}, line {number}: not JSON ({error}); repair or remove it.'
      ) from error
    if not isinstance(record, dict) or not isinstance(record.get('step'), int):
      raise ValueError(
        f'{path}, line {number}: not an object with an integer "step"; is '
        'this a metrics file?'
      )
    records.append(record)
  return records


def _number(name: str, value: Any) -> bool | int | float:
  number = np.asarray(value).item()
  if not isinstance(number, (bool, int, float)):
    raise ValueError(f'metric {name!r} must be a number; got {value!r}.')
  return number


def _line(record: Mapping[str, Any]) -> str:
  valid = {name: _valid(value) for name, value in record.items()}
  return json.dumps(valid, allow_nan=False) + '\n'


def _valid(value: Any) -> Any:
  if isinstance(value, float) and not math.isfinite(value):
    if math.isnan(value):
      return 'NaN'
    return 'Infinity' if value > 0 else '-Infinity'
  return value
