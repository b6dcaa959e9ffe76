"""Time and memory of a call, in any of the environments."""

import pathlib
import statistics
import time

REPEATS = 5
_STATUS = pathlib.Path('/proc/self/status')


def _mib(key: str) -> float:
  for line in _STATUS.read_text('ascii').splitlines():
    if line.startswith(key + ':'):
      return int(line.split()[1]) / 1024
  raise RuntimeError(f'{_STATUS} has no {key}: memory is measured on Linux.')


def measure(prepare) -> dict[str, float]:
  """Seconds of a call, and its memory above what the process had before.

  Memory is the highest resident size while it is called, above that before it
  was prepared: what a compiler leaves with the allocator counts. The process
  should be fresh. The first call, which warms up, counts for memory and not for
  time.

  Args:
    prepare: returns the call, compiled if need be; the call takes no arguments
      and returns when everything is computed.
  """
  before = _mib('VmRSS')
  call = prepare()
  # From here on the kernel's mark of the highest resident size starts anew.
  pathlib.Path('/proc/self/clear_refs').write_text('5', 'ascii')
  seconds = []
  for repeat in range(REPEATS + 1):
    start = time.perf_counter()
    call()
    if repeat:
      seconds.append(time.perf_counter() - start)
  return {
    'seconds': statistics.median(seconds),
    'seconds_range': [min(seconds), max(seconds)],
    'peak_mib': _mib('VmHWM') - before,
  }


def seconds(call) -> float:
  """Median seconds of a call, after one that warms up."""
  taken = []
  for _ in range(REPEATS + 1):
    start = time.perf_counter()
    call()
    taken.append(time.perf_counter() - start)
  return statistics.median(taken[1:])
