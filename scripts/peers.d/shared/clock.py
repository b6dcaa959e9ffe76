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


def measure(call) -> dict[str, float]:
  """Seconds of a call, and its memory above what the process had before.

  The process should be fresh: what an allocator kept from earlier work is not
  seen. The first call, which warms up, counts for memory and not for time.

  Args:
    call: without arguments; returns when everything is computed.
  """
  before = _mib('VmRSS')
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
