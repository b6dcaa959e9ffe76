"""Spans of characters and of tokens."""

import numpy as np
import pytest

from idesign import probes
from idesign.probes import Span

TEXT = 'Ada Lovelace wrote it.'
# As a byte-level tokenizer has it: white space goes with the word after it.
OFFSETS = [(0, 0), (0, 3), (3, 8), (8, 12), (12, 18), (18, 21), (21, 22)]


@pytest.mark.parametrize(
  'span,want',
  [((0, 3), (1, 2)), ((0, 12), (1, 4)), ((4, 12), (2, 4)), ((3, 12), (2, 4)),
   ((4, 13), (2, 4)), ((13, 22), (4, 7))],
)  # fmt: skip
def test_align(span, want):
  assert probes.align_span(TEXT, OFFSETS, Span(*span)) == want


@pytest.mark.parametrize(
  'span,message',
  [((4, 10), "token 3 is 'lace'"), ((5, 12), "token 2 is 'Love'"),
   ((3, 4), 'no words'), ((0, 99), 'no words'), ((5, 5), 'no words')],
)  # fmt: skip
def test_what_does_not_align(span, message):
  with pytest.raises(ValueError, match=message):
    probes.align_span(TEXT, OFFSETS, Span(*span))


def test_a_text_that_was_cut():
  with pytest.raises(ValueError, match='no token'):
    probes.align_span(TEXT, OFFSETS[:4], Span(13, 18))


def test_tags_and_back():
  spans = [Span(1, 3), Span(3, 4), Span(6, 8)]
  tags = probes.tag_spans(spans, 8)
  assert tags.tolist() == [0, 1, 2, 1, 0, 0, 1, 2]
  assert probes.find_spans(np.eye(3)[tags]) == spans


def test_a_token_that_continues_nothing_begins_a_span():
  tags = [0, 2, 2, 0, 2]
  assert probes.find_spans(np.eye(3)[tags]) == [Span(1, 3), Span(4, 5)]
  assert probes.find_spans(np.zeros((0, 3))) == []


def test_bad_spans():
  with pytest.raises(ValueError, match='overlaps'):
    probes.tag_spans([Span(0, 3), Span(2, 4)], 5)
  with pytest.raises(ValueError, match='not in 4 tokens'):
    probes.span_mask(Span(2, 5), 4)


def test_masks_are_the_spans_that_are_found():
  tags = np.random.default_rng(0).integers(0, 3, (40, 12))
  masks = np.asarray(probes.span_masks(tags, 5))
  for row, mask in zip(tags, masks):
    spans = probes.find_spans(np.eye(3)[row])[:5]
    want = [probes.span_mask(s, 12) for s in spans]
    want += [np.zeros(12, bool)] * (5 - len(spans))
    assert np.array_equal(mask, want)
