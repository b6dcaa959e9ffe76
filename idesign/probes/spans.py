"""Spans of text and spans of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np


class Span(NamedTuple):
  """Tokens (or characters) `start` to `stop`, which is not in it."""

  start: int
  stop: int


def align_span(
  text: str, offsets: Sequence[tuple[int, int]], span: Span
) -> Span:
  """Tokens of a span of characters.

  White space at the edges of tokens and of the span does not count.

  Args:
    text: what was tokenized.
    offsets: of each token, its first character and the one after its last, as
      `tokenizers.Encoding.offsets` gives them; tokens that are not in the text
      are empty.
    span: characters.

  Raises:
    ValueError: if the span is not in the text, or an edge is within a token;
      names the span's text and the tokens there.
  """
  start, stop = span
  if not 0 <= start < stop <= len(text) or not text[start:stop].strip():
    raise ValueError(
      f'characters {start} to {stop} are no words in a text of {len(text)}.'
    )
  start, stop = _stripped(text, start, stop)
  inside = []
  for i, (a, b) in enumerate(offsets):
    if a == b or not text[a:b].strip():
      continue
    a, b = _stripped(text, a, b)
    if b <= start or a >= stop:
      continue
    if a < start or b > stop:
      raise ValueError(
        f'{text[start:stop]!r} (characters {start} to {stop}) does not align '
        f'with the tokenizer: token {i} is {text[a:b]!r}. Label whole tokens, '
        'or use the tokenizer that the labels were made for.'
      )
    inside.append(i)
  if not inside:
    raise ValueError(f'no token for {text[start:stop]!r}.')
  return Span(inside[0], inside[-1] + 1)


def span_mask(span: Span, length: int) -> Bool[np.ndarray, 'T']:
  """True at the tokens of the span."""
  if not 0 <= span.start < span.stop <= length:
    raise ValueError(f'{span} is not in {length} tokens.')
  where = np.arange(length)
  return (where >= span.start) & (where < span.stop)


# Classes of the tokens of a text in which spans are to be found.
OUTSIDE, BEGINS, CONTINUES = range(3)


def tag_spans(
  spans: Sequence[Span], length: int
) -> Int[np.ndarray, 'T']:
  """Class of each token: outside of all spans, the first of one, or further.

  Raises:
    ValueError: if spans overlap.
  """
  tags = np.full(length, OUTSIDE)
  for span in spans:
    mask = span_mask(span, length)
    if (tags[mask] != OUTSIDE).any():
      raise ValueError(f'{span} overlaps another span.')
    tags[mask] = CONTINUES
    tags[span.start] = BEGINS
  return tags


def find_spans(logits_TC: Float[np.ndarray, 'T C']) -> list[Span]:
  """Spans from the likeliest class of each token, see `tag_spans`.

  A token that continues nothing begins a span.
  """
  tags = np.argmax(np.asarray(logits_TC), axis=1)
  spans, start = [], None
  for i, tag in enumerate([*tags, OUTSIDE]):
    if start is not None and tag != CONTINUES:
      spans.append(Span(start, i))
      start = None
    if start is None and tag != OUTSIDE:
      start = i
  return spans


def span_masks(
  tags_BT: Int[Array, 'B T'], most: int
) -> Bool[Array, 'B M T']:
  """The spans of `find_spans` as masks, jittable: the first `most` of a text.

  Args:
    tags_BT: class of each token, see `tag_spans`.
    most: number of masks of each text, `M`; those for which there is no span
      are empty.
  """
  inside_BT = tags_BT != OUTSIDE
  before_BT = jnp.pad(inside_BT[:, :-1], ((0, 0), (1, 0)))
  first_BT = (tags_BT == BEGINS) | (inside_BT & ~before_BT)
  number_BT = jnp.cumsum(first_BT, axis=1) - 1
  which_M = jnp.arange(most)
  here_BMT = number_BT[:, None] == which_M[None, :, None]
  return here_BMT & inside_BT[:, None]


def _stripped(text: str, start: int, stop: int) -> tuple[int, int]:
  part = text[start:stop]
  start += len(part) - len(part.lstrip())
  return start, start + len(part.strip())
