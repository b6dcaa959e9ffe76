"""One page with every claim, its interval, its target and its figure.

`python -m experiments.contract.page` reads `results/*` (committed, of the
paper presets) and `runs/*` (local), and writes `results/index.html`.
"""

from __future__ import annotations

import base64
import html
import json
import pathlib
from typing import Any

from experiments.contract.workdir import write_text

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }
table { border-collapse: collapse; width: 100%; margin: 1rem 0 }
td, th { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid #ddd;
  vertical-align: top }
td.n { white-space: nowrap; font-variant-numeric: tabular-nums }
.holds { color: #0a6b2d } .fails { color: #b3261e } small { color: #666 }
img { max-width: 100%; margin: .5rem 0; border: 1px solid #eee }
"""


def _read(workdir: pathlib.Path) -> list[dict[str, Any]]:
  return json.loads((workdir / 'claims.json').read_text('utf-8'))


def markdown(workdir: pathlib.Path) -> str:
  """The claims of a run as the README shows them."""
  rows = ['| claim | mean [95 % interval] | target | |', '|---|---|---|---|']
  for c in _read(workdir):
    low, high = c['ci95']
    sign = {'>=': '≥', '<=': '≤'}[c['comparator']]
    # A share or a ratio is not told from its target by one decimal.
    d = 3 if 0 < abs(c['target']) < 2 else 1
    rows.append(
      f'| {c["statement"]} | {c["value"]:.{d}f} [{low:.{d}f}, {high:.{d}f}] '
      f'| {sign} {c["target"]:g} | {"holds" if c["passed"] else "**fails**"} |'
    )
  return '\n'.join(rows) + '\n'


def _claims(workdir: pathlib.Path) -> str:
  rows = []
  for c in _read(workdir):
    verdict = 'holds' if c['passed'] else 'fails'
    low, high = c['ci95']
    sign = {'>=': '≥', '<=': '≤'}[c['comparator']]
    note = f'{c["reference"]}; {len(c["seeds"])} seeds'
    rows.append(
      f'<tr><td class="{verdict}">{verdict}</td>'
      f'<td>{html.escape(c["statement"])}<br>'
      f'<small>{html.escape(note)}</small></td>'
      f'<td class=n>{c["value"]:.2f} [{low:.2f}, {high:.2f}]</td>'
      f'<td class=n>{sign} {c["target"]:g}</td></tr>'
    )
  columns = ('', 'claim', 'mean [95 % interval]', 'target')
  head = ''.join(f'<th>{c}</th>' for c in columns)
  return f'<table><tr>{head}</tr>{"".join(rows)}</table>'


def _section(workdir: pathlib.Path) -> str:
  config = json.loads((workdir / 'config.json').read_text('utf-8'))
  where = '/'.join(workdir.parts[-2:])
  ran = config['environment']
  note = f'{where}, commit {ran["commit"][:12]}, {ran["devices"]}'
  smoke = config.get('preset') == 'smoke'
  parts = [
    f'<h2>{html.escape(workdir.name)}</h2>',
    '<p>No claim is meant to hold: smoke runs every code path.</p>' * smoke,
    f'<p><small>{html.escape(note)}</small></p>',
    _claims(workdir),
  ]
  # Embedded, so that the page can be sent to somebody as one file.
  for figure in sorted((workdir / 'figures').glob('*.png')):
    data = base64.b64encode(figure.read_bytes()).decode()
    name = html.escape(figure.stem)
    parts.append(f'<img alt="{name}" src="data:image/png;base64,{data}">')
  return '\n'.join(parts)


def write_page(root: pathlib.Path) -> pathlib.Path:
  """Writes `results/index.html` under `root` and returns its path.

  Raises:
    FileNotFoundError: there is no finished run.
  """
  found = [
    *sorted((root / 'runs').glob('*/claims.json')),
    *sorted((root / 'results').glob('*/claims.json')),
  ]
  if not found:
    raise FileNotFoundError(
      f'No claims.json under {root / "results"} or {root / "runs"}; run an '
      'experiment first, for example with scripts/reproduce.'
    )
  # A run that only chooses settings claims nothing.
  sections = [_section(p.parent) for p in found if _read(p.parent)]
  page = (
    '<!doctype html><meta charset="utf-8"><title>idesign results</title>'
    f'<style>{_STYLE}</style><h1>idesign: claims</h1>\n'
    '<p>A claim holds if the bound of its 95 % interval that hurts is on the '
    'right side of the target.</p>\n' + '\n'.join(sections) + '\n'
  )
  (root / 'results').mkdir(exist_ok=True)
  path = root / 'results' / 'index.html'
  write_text(path, page)
  return path


if __name__ == '__main__':
  print(write_page(pathlib.Path()))
