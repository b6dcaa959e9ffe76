"""The folder of a run: config, provenance, results arm by arm, figures."""

from __future__ import annotations

from collections.abc import Callable
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from typing import Any
import warnings

import jax
import ml_collections
import numpy as np

from idesign import training

_ROOT = pathlib.Path(__file__).resolve().parents[2]


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a file, whole or not at all, on process 0 of a run alone."""
  write_bytes(path, text.encode('utf-8'))


def write_bytes(path: pathlib.Path, content: bytes) -> None:
  """The same of bytes."""
  if jax.process_index() != 0:
    return
  temporary = path.with_name(path.name + '.tmp')
  try:
    temporary.write_bytes(content)
    os.replace(temporary, path)
  except OSError as error:
    temporary.unlink(missing_ok=True)
    raise OSError(
      error.errno,
      f'{path} could not be written ({error.strerror}). What was there is '
      'intact: make room, or fix the permissions, and run the same command '
      'again',
    ) from error


def fingerprint(*arrays: np.ndarray) -> str:
  """SHA-256 over shapes, dtypes and bytes, to tell whether data changed."""
  digest = hashlib.sha256()
  for a in arrays:
    a = np.ascontiguousarray(a)
    digest.update(f'{a.dtype.str}{a.shape}'.encode())
    digest.update(a.tobytes())
  return digest.hexdigest()


def environment() -> dict[str, Any]:
  """Versions of every installed package, of Python, and the commit."""

  def git(*arguments):
    run = subprocess.run(
      ['git', *arguments], cwd=_ROOT, capture_output=True, text=True
    )
    return run.stdout.strip()

  packages = {
    d.metadata['Name']: d.version for d in importlib.metadata.distributions()
  }
  return {
    'commit': git('rev-parse', 'HEAD') or 'unknown',
    'uncommitted_changes': bool(git('status', '--porcelain')),
    'python': platform.python_version(),
    'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
    'packages': dict(sorted(packages.items(), key=lambda p: p[0].lower())),
  }


class Workdir:
  """A run's folder; rerunning the same command goes on where it stopped.

  Attributes:
    path: the folder.
    results: what is in `results.json`.
  """

  def __init__(
      self, path: str | os.PathLike[str], config: ml_collections.ConfigDict,
      data: str,
  ):  # fmt: skip
    """Claims the folder.

    Args:
      path: created if there is none.
      config: the resolved config.
      data: fingerprint of the data.

    Raises:
      ValueError: the folder was made by another config or from other data,
        listing what differs; nothing there is changed.
    """
    now = environment()
    self.config = config.to_dict() | {'data_sha256': data}
    self.path = training.claim_workdir(
      path,
      self.config | {'environment': now},
      ignore=['environment'],
    )
    if jax.process_index() == 0:
      (self.path / 'figures').mkdir(exist_ok=True)
      self._warn_of_other_code(now)
    self._file = self.path / 'results.json'
    self.results = {}
    if self._file.exists():
      self.results = json.loads(self._file.read_text('utf-8'))

  def _warn_of_other_code(self, now: dict[str, Any]) -> None:
    made = json.loads((self.path / 'config.json').read_text('utf-8'))
    before = made['environment']
    different = [k for k in now if k != 'devices' and before.get(k) != now[k]]
    if different:
      warnings.warn(
        f'{self.path} was begun with other code or packages (commit '
        f'{before["commit"][:12]}, now {now["commit"][:12]}; different: '
        f'{", ".join(different)}). What is there is kept; to measure the code '
        'as it is now, choose another workdir.',
        stacklevel=3,
      )

  def arm(self, name: str, compute: Callable[[], Any]) -> Any:
    """The result of an arm, computed unless an earlier run finished it.

    Args:
      name: of the arm (and seed) in `results.json`.
      compute: returns its result as JSON values.
    """
    if name not in self.results:
      # Through JSON, so that a resumed run sees just what a fresh one does.
      self.results[name] = json.loads(json.dumps(compute(), allow_nan=False))
      # An arm a line: small, and two runs can be compared.
      rows = [
        f'{json.dumps(k)}: {json.dumps(v)}' for k, v in self.results.items()
      ]
      write_text(self._file, '{\n' + ',\n'.join(rows) + '\n}\n')
    return self.results[name]
