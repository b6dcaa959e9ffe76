"""Runs in our environment; see `scripts/peers.d/shared/factors.py`."""

import factors

if __name__ == '__main__':
  factors.main({'times_faster': 2.0, 'share_of_memory': 1.0})
