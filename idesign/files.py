"""Folders that are there whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import os
import pathlib
import shutil
import tempfile


@contextlib.contextmanager
def new_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """A temporary sibling that becomes `folder` when the block succeeds.

  If the block raises, nothing is left behind.

  Raises:
    FileExistsError: if `folder` exists and is not an empty folder.
  """
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise FileExistsError(
      f'{folder} exists and is not an empty folder; choose another or remove '
      'it.'
    )
  folder.parent.mkdir(parents=True, exist_ok=True)
  temporary = pathlib.Path(
    tempfile.mkdtemp(prefix=f'.{folder.name}.tmp-', dir=folder.parent)
  )
  try:
    yield temporary
    # mkdtemp's folders are private; this one is to be shared like any other.
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o777 & ~umask)
    os.replace(temporary, folder)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
