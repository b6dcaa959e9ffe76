"""Selecting parameters and activations by name, and layers of a stack."""

from __future__ import annotations

from collections.abc import Iterable
import re
from typing import Any, NamedTuple

import jax

# Only the colon form is a layer range, so that a regular expression may still
# end in a character class.
_LAYERS = re.compile(
  r'^(?P<name>.*)\[(?P<start>(-?\d+)?):(?P<stop>(-?\d+)?)\]$'
)


class SelectionError(ValueError):
  """A name or a layer range that selects nothing."""


class Pattern(NamedTuple):
  """A name pattern and the layers that it is restricted to.

  Attributes:
    text: the pattern as the user wrote it.
    name: the part that names.
    layers: Python slice bounds over the layers of a stack; None for all.
  """

  text: str
  name: str
  layers: slice | None

  def steps(self, length: int) -> tuple[int, int] | None:
    """The range of steps of a loop of `length`; None for all of them."""
    if self.layers is None:
      return None
    start, stop, _ = self.layers.indices(length)
    if start >= stop:
      raise SelectionError(
        f'{self.text!r} selects no layer: the stack has {length}.'
      )
    return start, stop


def parse(text: str) -> Pattern:
  """Splits `'blocks/mlp/up/kernel[23:26]'` into its name and its layers."""
  match = _LAYERS.match(text)
  if match is None:
    return Pattern(text, text, None)
  bounds = [int(b) if b else None for b in match.group('start', 'stop')]
  return Pattern(text, match['name'], slice(*bounds))


def leaf_paths(tree: Any) -> list[str]:
  """The path of every leaf, keys joined by `/`, in `jax.tree.leaves` order."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  paths = [
    jax.tree_util.keystr(path, simple=True, separator='/') for path, _ in leaves
  ]
  if len(set(paths)) != len(paths):
    twice = sorted({p for p in paths if paths.count(p) > 1})
    raise ValueError(
      f'Several parameters have the path {", ".join(twice)}; rename the keys '
      'that hold a "/".'
    )
  return paths


def match_paths(
  select: str | Iterable[str], paths: list[str]
) -> dict[str, Pattern]:
  """The selected paths, each with the first pattern that matches it whole.

  Args:
    select: one regular expression or several, matched with `re.fullmatch`;
      each may end in a layer range `[start:stop]`.
    paths: what there is to select from.

  Raises:
    SelectionError: if a pattern matches nothing; lists what there is.
  """
  patterns = [
    parse(s) for s in ([select] if isinstance(select, str) else select)
  ]
  chosen: dict[str, Pattern] = {}
  for pattern in patterns:
    hits = [p for p in paths if re.fullmatch(pattern.name, p)]
    if not hits:
      raise SelectionError(
        f'{pattern.text!r} matches no parameter. Patterns must match a whole '
        f'path; the paths are: {", ".join(paths)}.'
      )
    for path in hits:
      chosen.setdefault(path, pattern)
  return chosen
