"""What is written of both sides, in any environment."""

from collections.abc import Callable, Iterable
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any


def versions(packages: Iterable[str]) -> dict[str, Any]:
  """Of Python and of packages."""
  return {
    'python': platform.python_version(),
    'packages': {name: importlib.metadata.version(name) for name in packages},
  }


def answer(
  run: Callable[[pathlib.Path, str], None],
  programs: Iterable[str],
  packages: Iterable[str],
) -> None:
  """The command line of `theirs.py`: `theirs.py FOLDER [PROGRAM]`.

  Without PROGRAM it runs itself once for each, in a process of its own, and
  writes `theirs.json`.

  Args:
    run: `run(folder, program)`, which leaves `PROGRAM.json`, and its arrays.
    programs: their names.
    packages: whose versions are recorded.
  """
  folder = pathlib.Path(sys.argv[1])
  if len(sys.argv) > 2:
    return run(folder, sys.argv[2])
  for name in programs:
    subprocess.run([sys.executable, *sys.argv, name], check=True)
  read = lambda name: json.loads((folder / f'{name}.json').read_text('utf-8'))
  record = {
    **versions(packages), 'programs': {name: read(name) for name in programs}
  }  # fmt: skip
  (folder / 'theirs.json').write_text(json.dumps(record), 'utf-8')


def write_report(
  path: pathlib.Path, record: dict[str, Any], worst: float, bound: float
) -> None:
  """Writes a report, whole or not at all; exits 1 if numbers differ.

  Args:
    path: to write; its folder is made.
    record: what is particular to the comparison.
    worst: the largest difference.
    bound: the largest that there may be.
  """
  record = {
    'device': f'{platform.machine()} with {os.cpu_count()} cores',
    **record,
    'bound': bound,
    'largest_difference': worst,
    'same_numbers': worst <= bound,
  }
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(path.name + '.tmp')
  temporary.write_text(json.dumps(record, indent=2) + '\n', encoding='utf-8')
  temporary.replace(path)
  if worst > bound:
    sys.exit(f'{path}: the largest difference is {worst:.1e} > {bound:g}.')
