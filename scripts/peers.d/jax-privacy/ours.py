"""Runs in our environment; see `scripts/peers.d/shared/scores.py`."""

import scores

if __name__ == '__main__':
  scores.main()
