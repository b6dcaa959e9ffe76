"""Runs in our environment; see `scripts/peers.d/shared/scores.py`.

  python ours.py write FOLDER
  python ours.py compare FOLDER REPORT.json
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / 'shared'))

import scores  # pylint: disable=wrong-import-position

if __name__ == '__main__':
  if sys.argv[1] == 'write':
    scores.write(pathlib.Path(sys.argv[2]))
  else:
    scores.compare(pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]))
