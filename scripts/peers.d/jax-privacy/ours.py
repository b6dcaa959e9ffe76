"""Runs in our environment; see `scripts/peers.d/shared/scores.py`.

  python ours.py write FOLDER
  python ours.py compare FOLDER REPORT.json
"""

import pathlib
import sys

import scores

if __name__ == '__main__':
  if sys.argv[1] == 'write':
    scores.write(pathlib.Path(sys.argv[2]))
  else:
    scores.compare(pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]))
