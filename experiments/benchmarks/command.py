"""The command line that benchmarks share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import json
import pathlib
import time
from typing import Any

from absl import app
from absl import flags

from experiments.contract import write_text

_REPEATS = flags.DEFINE_integer('repeats', 7, 'Timed repeats of each program.')
_OUT = flags.DEFINE_string('out', None, 'JSON file to write.')


def interleaved(
  calls: Mapping[str, Callable[[], Any]], repeats: int
) -> dict[str, list[float]]:
  """Seconds of every call, in turn, so that all see the same machine.

  Args:
    calls: by name; they return when everything is computed.
    repeats: that count; one more, the first, warms up.
  """
  times: dict[str, list[float]] = {name: [] for name in calls}
  for repeat in range(repeats + 1):
    for name, call in calls.items():
      start = time.perf_counter()
      call()
      if repeat:
        times[name].append(time.perf_counter() - start)
  return times


def run(
  measure: Callable[[int], dict[str, Any]],
  markdown: Callable[[dict[str, Any]], str],
) -> None:
  """Measures, prints the table and writes `--out`.

  Args:
    measure: of the number of repeats.
    markdown: the table of what it returns.
  """

  def main(argv):
    if len(argv) > 1:
      raise app.UsageError(f'Unknown arguments: {argv[1:]}.')
    out = _OUT.value and pathlib.Path(_OUT.value)
    if out and not out.parent.is_dir():
      raise app.UsageError(f'--out={out}: there is no folder {out.parent}.')
    result = measure(_REPEATS.value)
    print(markdown(result))
    if out:
      write_text(out, json.dumps(result, indent=2) + '\n')

  app.run(main)
