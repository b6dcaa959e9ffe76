"""A workdir belongs to one config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import json
import os
import pathlib
from typing import Any

import jax

_ABSENT = object()


def claim_workdir(
  workdir: str | os.PathLike[str],
  config: Mapping[str, Any],
  *,
  ignore: Sequence[str] = (),
) -> pathlib.Path:
  """Takes a folder for a config, or refuses one that another config made.

  The first call creates the folder and writes `config.json`, whole or not at
  all, on process 0. Later calls compare with it and change nothing.

  Args:
    workdir: the folder, on a file system that all processes see.
    config: values that JSON can hold; `ConfigDict.to_dict()` is one.
    ignore: dotted keys (`num_steps`, `versions.jax`, or `versions` for all
      below it) that are recorded but may differ.

  Returns:
    The workdir as an absolute path.

  Raises:
    ValueError: if the folder was made by another config, listing the keys
      that differ; if `config.json` is damaged; if the config has values that
      JSON cannot hold; or if `workdir` is a URL.
  """
  if '://' in str(workdir):
    raise ValueError(
      f'workdir={workdir} is a URL; files are renamed and appended to, so '
      'mount the bucket (for example with gcsfuse) and give the local path.'
    )
  root = pathlib.Path(workdir).absolute()
  path = root / 'config.json'
  wanted = as_json(config, f'the config for {root}')
  if path.exists():
    try:
      found = json.loads(path.read_text(encoding='utf-8'))
    except json.JSONDecodeError as error:
      raise ValueError(
        f'{path} is not JSON ({error}); restore it, or choose another workdir.'
      ) from error
    different = differences(found, wanted, ignore=ignore)
    if different:
      raise ValueError(
        f'{root} was made by another config. Different (found -> asked for): '
        + '; '.join(different)
        + '. Nothing there was changed. Choose another workdir, or run the '
        f'config in {path} to go on.'
      )
  elif jax.process_index() == 0:
    root.mkdir(parents=True, exist_ok=True)
    temporary = root / 'config.json.tmp'
    temporary.write_text(json.dumps(wanted, indent=2) + '\n', encoding='utf-8')
    os.replace(temporary, path)
  return root


def as_json(value: Mapping[str, Any], what: str) -> dict[str, Any]:
  """`value` as JSON gives it back (tuples become lists); NaN is refused."""
  try:
    return json.loads(json.dumps(value, allow_nan=False))
  except (TypeError, ValueError) as error:
    raise ValueError(
      f'{what} holds a value that JSON cannot ({error}); use numbers, '
      'strings, booleans, None, lists and dicts.'
    ) from error


def differences(
  found: Mapping[str, Any],
  wanted: Mapping[str, Any],
  *,
  ignore: Sequence[str] = (),
) -> list[str]:
  """The keys whose values differ, as `a.b: 1 -> 2`; empty if none do."""
  found, wanted = _flat(found), _flat(wanted)
  different = []
  for key in sorted(found.keys() | wanted.keys()):
    if any(key == name or key.startswith(name + '.') for name in ignore):
      continue
    before, after = found.get(key, _ABSENT), wanted.get(key, _ABSENT)
    # `True == 1` in Python, but not in a config.
    if before != after or type(before) is not type(after):
      different.append(f'{key}: {_shown(before)} -> {_shown(after)}')
  return different


def _shown(value: Any) -> str:
  return '(absent)' if value is _ABSENT else json.dumps(value)


def _flat(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  flat = {}
  for key, value in tree.items():
    if isinstance(value, Mapping) and value:
      flat.update(_flat(value, f'{prefix}{key}.'))
    else:
      flat[f'{prefix}{key}'] = value
  return flat
