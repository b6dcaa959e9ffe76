"""The report of an update: what it does to each concept, and how surely."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
import json
import os
import pathlib
import re
from typing import Any, NamedTuple
import warnings

import jax
from jaxtyping import Bool, Float, Int
import numpy as np

from idesign.concepts.activations import Read, token_mean
from idesign.concepts.decompose import (
  ChangeStatistics,
  Decomposition,
  Shares,
  change_statistics,
  decompose,
  shares,
)
from idesign.concepts.label import Decode, Spans, label, render, visible
from idesign.concepts.sae import SAE

_NUMBERS = ('score', 'low', 'high', 'effect_size', 'sign_agreement')
_TEXTS = ('label', 'spans', 'promoted')
_BY_SIZE = ('score', 'effect_size', 'share')
_ORDERS = (*_BY_SIZE, 'sign_agreement', 'concept')
_UP, _DOWN = '#0072B2', '#D55E00'


class Description(NamedTuple):
  """A concept in words.

  Attributes:
    label: see `label`.
    spans: see `render`, the most active first.
    promoted: the tokens it promotes, the most promoted first.
  """

  label: str = ''
  spans: tuple[str, ...] = ()
  promoted: tuple[str, ...] = ()


def describe(
  spans: Spans,
  promoted_FK: Int[np.ndarray, 'F K'] | None,
  decode: Decode,
  *,
  words: int = 3,
) -> list[Description]:
  """Every concept in words.

  Args:
    spans: from `top_spans`.
    promoted_FK: from `promoted_tokens`, or None.
    decode: the text of one token.
    words: see `label`.

  Raises:
    ValueError: if spans and promoted tokens are of different concepts.
  """
  size = len(spans.text_FK)
  if promoted_FK is None:
    promoted_FK = np.empty((size, 0), int)
  if len(promoted_FK) != size:
    raise ValueError(
      f'there are spans of {size} concepts and promoted tokens of '
      f'{len(promoted_FK)}: they belong to different autoencoders.'
    )
  decode = functools.cache(decode)
  described = []
  for concept, row in enumerate(promoted_FK.tolist()):
    mine = spans.of(concept)
    marked = [decode(span.tokens[span.marked]) for span in mine]
    said = tuple(map(decode, row))
    shown = tuple(render(span, decode) for span in mine)
    described.append(Description(label(marked, said, words=words), shown, said))
  return described


@dataclasses.dataclass(frozen=True, eq=False)
class ConceptReport:
  """What an update does to each of `N` concepts; numbers are float64.

  Attributes:
    concept: their indices, `[N]`.
    label, spans, promoted: see `Description`, `N` of each.
    score: the predicted change, `[N]`.
    low, high: its 95 % interval, `[N]`.
    effect_size, sign_agreement: see `ChangeStatistics`, `[N]`.
    share: of the squared movement of the activation, `[N]`, or None.
    unexplained: the share of that which no concept has, or None.

  Raises:
    ValueError: for a field of another length, a number that is not one (only
      an effect size may be infinite), or a concept that is there twice.
  """

  concept: Int[np.ndarray, 'N']
  label: tuple[str, ...]
  spans: tuple[tuple[str, ...], ...]
  promoted: tuple[tuple[str, ...], ...]
  score: Float[np.ndarray, 'N']
  low: Float[np.ndarray, 'N']
  high: Float[np.ndarray, 'N']
  effect_size: Float[np.ndarray, 'N']
  sign_agreement: Float[np.ndarray, 'N']
  share: Float[np.ndarray, 'N'] | None = None
  unexplained: float | None = None

  def __post_init__(self):
    size = len(self.concept)
    numbers = _NUMBERS if self.share is None else (*_NUMBERS, 'share')
    for name in (*numbers, *_TEXTS):
      if len(getattr(self, name)) != size:
        raise ValueError(
          f'{name} has {len(getattr(self, name))} values for {size} concepts.'
        )
    for name in numbers:
      x = getattr(self, name)
      bad = np.isnan(x) if name == 'effect_size' else ~np.isfinite(x)
      if bad.any():
        concept = self.concept[np.flatnonzero(bad)[0]]
        raise ValueError(
          f'{name} of concept {concept} is not finite: the update holds NaN, '
          'or moved nothing that could be shared.'
        )
    if self.unexplained is not None and not np.isfinite(self.unexplained):
      raise ValueError(f'unexplained={self.unexplained} is not finite.')
    if len(np.unique(self.concept)) < size:
      raise ValueError('a concept is there twice.')

  def rows(self, n: int | None = None, by: str = 'score') -> np.ndarray:
    """The first `n` rows (all if None) in an order, as their numbers.

    Args:
      n: how many.
      by: `score`, `effect_size` or `share`, the largest in size first;
        `sign_agreement`, the largest first; or `concept`. Equal ones stay as
        they are.

    Raises:
      ValueError: for another order, a negative `n`, or a share without any.
    """
    if by not in _ORDERS or (n is not None and n < 0):
      raise ValueError(f'by={by!r}, n={n}: choose from {_ORDERS}, and n >= 0.')
    key = getattr(self, by)
    if key is None:
      raise ValueError('this report has no shares; make it with `shares`.')
    key = key if by == 'concept' else -(np.abs(key) if by in _BY_SIZE else key)
    return np.argsort(key, kind='stable')[:n]

  def table(self, n: int = 20, by: str = 'score') -> str:
    """The first `n` concepts as a Markdown table; what is quoted is escaped.

    Args:
      n: how many.
      by: see `rows`.
    """
    lines = [
      '| concept | label | top text | promoted | score | 95 % interval '
      '| effect size | sign agreement | share |',
      '|--:|---|---|---|--:|:-:|--:|--:|--:|',
    ]
    for i in self.rows(n, by):
      share = '' if self.share is None else f'{self.share[i]:+.1%}'
      cells = [
        str(self.concept[i]),
        _escaped(self.label[i]),
        _escaped(_clipped(self.spans[i][0] if self.spans[i] else '')),
        ', '.join(_escaped(visible(t)) for t in self.promoted[i][:5]),
        f'{self.score[i]:+.3g}',
        f'[{self.low[i]:+.3g}, {self.high[i]:+.3g}]',
        f'{self.effect_size[i]:+.2f}',
        f'{self.sign_agreement[i]:.2f}',
        share,
      ]
      lines.append(f'| {" | ".join(cells)} |')
    if self.unexplained is not None:
      lines += ['', f'Unexplained by any concept: {self.unexplained:.1%}.']
    return '\n'.join(lines) + '\n'

  def draw(self, where: Any, n: int = 20, by: str = 'score') -> None:
    """Bars with intervals, the label on their left, the top text on the right.

    Args:
      where: a path, whose ending says the format, or Matplotlib axes.
      n: how many concepts.
      by: see `rows`.

    Raises:
      ValueError: as `rows`, and for an ending that Matplotlib does not know;
        then nothing is written.
    """
    if not isinstance(where, str | os.PathLike):
      return _draw(self, where, self.rows(n, by))
    from matplotlib.figure import Figure

    path = pathlib.Path(where)
    rows = self.rows(n, by)
    figure = Figure(figsize=(4.4, 0.9 + 0.22 * max(len(rows), 4)))
    _draw(self, figure.subplots(), rows)
    temporary = path.with_name(f'.{path.name}.tmp')
    try:
      with warnings.catch_warnings():
        # Texts may be in any script; what the font lacks is drawn as boxes.
        warnings.filterwarnings('ignore', 'Glyph .* missing from')
        figure.savefig(
          temporary, dpi=200, bbox_inches='tight', format=path.suffix[1:]
        )
      os.replace(temporary, path)
    finally:
      temporary.unlink(missing_ok=True)

  def to_json(self) -> str:
    """All of it as JSON; an infinite effect size is the string 'inf'."""
    number = lambda x: float(x) if np.isfinite(x) else str(float(x))
    fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    for name in (*_NUMBERS, 'share'):
      if fields[name] is not None:
        fields[name] = [number(x) for x in fields[name]]
    fields['concept'] = [int(c) for c in self.concept]
    return json.dumps(fields, allow_nan=False)

  @classmethod
  def from_json(cls, text: str) -> ConceptReport:
    """The report that `to_json` wrote.

    Raises:
      ValueError: if it is none.
    """
    array = lambda x: np.array([float(v) for v in x])
    strings = lambda rows: tuple(tuple(map(str, row)) for row in rows)
    try:
      raw = json.loads(text)
      raw |= {name: array(raw[name]) for name in _NUMBERS}
      raw |= {name: strings(raw[name]) for name in ('spans', 'promoted')}
      raw['label'] = tuple(map(str, raw['label']))
      raw['concept'] = np.array([int(c) for c in raw['concept']], int)
      if raw['share'] is not None:
        raw['share'] = array(raw['share'])
      return cls(**raw)
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(f'this is no concept report: {error!r}') from error


def make_report(
  statistics: ChangeStatistics,
  *,
  shares: Shares | None = None,
  descriptions: Sequence[Description] | None = None,
) -> ConceptReport:
  """A report of all concepts, `[F]`, from its parts.

  Args:
    statistics: of `predicted_change`.
    shares: of the movement of the activation.
    descriptions: from `describe`; without, concepts are numbers.

  Raises:
    ValueError: as `ConceptReport`: if the parts are of different concepts, or
      hold numbers that are not finite.
  """
  size = len(statistics.mean)
  if descriptions is None:
    descriptions = [Description()] * size
  words = zip(*descriptions) if descriptions else ((), (), ())
  number = lambda x: np.asarray(x, np.float64)
  return ConceptReport(
    np.arange(size),
    *map(tuple, words),
    *map(number, statistics),
    None if shares is None else number(shares.share_F),
    None if shares is None else float(shares.unexplained),
  )


def report(
  read: Read,
  sae: SAE,
  params: Any,
  update: Any,
  probes: Any,
  mask: Bool[np.ndarray, 'B T'] | None = None,
  *,
  descriptions: Sequence[Description] | None = None,
  k: int | None = None,
  seed: int = 0,
) -> ConceptReport:
  r"""What `params + update` does to every feature of an autoencoder.

  The score is the predicted change of the feature's pre-activation; the share
  is its part of `sum |dh|^2`, `dh` being the first-order movement of the
  activation, split over the features that are active there. An update that
  moves the activation nowhere has no shares.

  Args:
    read: `read(params, probes) -> h [B, T, D]`, from `reader`. Jit it if the
      report is made often.
    sae: whose features are the concepts.
    params: before the update.
    update: what is added to them.
    probes: at least four, which the concepts are read on.
    mask: positions that count.
    descriptions: from `describe`.
    k: see `decompose`.
    seed: see `change_statistics`.

  Raises:
    ValueError: as `change_statistics` and `decompose`.
  """
  # One forward-mode pass; the change is that of `predicted_change`.
  h, dh = jax.jvp(lambda p: read(p, probes), (params,), (update,))
  parts = _decomposed(sae, h, dh, k)
  change_BF = token_mean(dh, mask) @ sae.params['W_enc']
  statistics = change_statistics(change_BF, seed=seed)
  split = shares(sae, parts, dh, mask)
  moved = dh if mask is None else dh[np.asarray(mask, bool)]
  return make_report(
    statistics,
    shares=split if moved.any() else None,
    descriptions=descriptions,
  )


@functools.partial(jax.jit, static_argnames='k')
def _decomposed(sae: SAE, h, dh, k: int | None) -> Decomposition:
  """Probe by probe: all features at all tokens at once are gigabytes."""
  one = lambda x: decompose(sae, x[0][None], x[1][None], k=k)
  parts = jax.lax.map(one, (h, dh))
  return jax.tree.map(lambda x: x[:, 0], parts)


def _draw(report: ConceptReport, axes: Any, rows: np.ndarray) -> None:
  score, place = report.score[rows], np.arange(len(rows))
  error = [score - report.low[rows], report.high[rows] - score]
  colors = [_UP if s > 0 else _DOWN for s in score]
  axes.barh(
    place, score, 0.72, color=colors, xerr=error,
    error_kw={'elinewidth': 0.8, 'capsize': 1.5, 'capthick': 0.8},
  )  # fmt: skip
  axes.axvline(0, color='black', lw=0.8)
  names = [
    f'{_clipped(report.label[i], 32) or "concept"}  #{report.concept[i]}'
    for i in rows
  ]
  axes.set_yticks(place, names, fontsize=7.5)
  beside = axes.get_yaxis_transform()
  texts = [
    axes.text(
      1.03, y, _clipped(report.spans[i][0] if report.spans[i] else ''),
      transform=beside, va='center', fontsize=6.5, color='#555555',
    )
    for y, i in zip(place, rows)
  ]  # fmt: skip
  # A dollar sign in a text is no formula.
  for text in (*texts, *axes.get_yticklabels()):
    text.set_parse_math(False)
  axes.set_ylim(len(rows) - 0.4, -0.6)
  axes.set_xlabel('predicted change (95 % interval)', fontsize=8)
  axes.tick_params(axis='x', labelsize=7.5)
  axes.tick_params(axis='y', length=0)
  axes.spines[['top', 'right', 'left']].set_visible(False)


def _printable(text: str) -> str:
  """One line of printable characters."""
  return ' '.join(''.join(c if c.isprintable() else ' ' for c in text).split())


def _clipped(text: str, longest: int = 60) -> str:
  """At most so many characters, the active token among them."""
  text = _printable(text)
  start = max(0, min(text.find('<<') - longest // 2, len(text) - longest))
  end = start + longest
  return '…' * (start > 0) + text[start:end] + '…' * (end < len(text))


def _escaped(text: str) -> str:
  """For a cell of a Markdown table: no markup, no HTML, no end of the cell."""
  return re.sub(r'([\\`*_\[\]<>|&~$#!])', r'\\\1', _printable(text))
