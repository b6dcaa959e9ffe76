"""Passages, questions and what is measured of a pretrained model."""

import json
import os
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import recitation_exam as exam_lib
from experiments import recitation_text as text
from idesign import models
from idesign import training

BESIDE = pathlib.Path(__file__).resolve().parents[3] / 'shared' / 'data'
DATA = pathlib.Path(os.environ.get('IDESIGN_DATA', BESIDE))
LETTERS = 'abcdefghijklmnopqrstuvwxyz ?:\n()ABC.'


class Letters:
  """A tokenizer of letters."""

  def encode(self, string, add_special_tokens):
    assert not add_special_tokens
    return types.SimpleNamespace(ids=[LETTERS.index(c) for c in string])


def write(tmp_path, *rows):
  file = tmp_path / 'rows.jsonl'
  file.write_text('\n'.join(json.dumps(r) for r in rows) + '\n')
  return file


def read(file, **kwargs):
  options = {'vocabulary': 40, 'prefix': 3, 'suffix': 2, **kwargs}
  return text.read_passages(file, Letters(), **options)


def test_three_kinds_of_passages(tmp_path):
  file = write(
    tmp_path,
    {'prefix_text': 'abcde', 'suffix_text': 'fgh'},
    {'full_quote': 'lmnopq', 'prefix': 'lm'},
    {'full_quote': 'lmnopq', 'prefix': 'lmn'},  # The same, cut elsewhere.
    {'prefix_ids': [1, 2], 'suffix_ids': [3]},
  )
  got = read(file, quote_suffix=2, bos=39)
  rows = [
    row[:stop].tolist() for row, stop in zip(got.tokens, got.stop.tolist())
  ]
  assert rows == [[39, 2, 3, 4, 5, 6], [39, 12, 13, 14, 15, 16], [39, 1, 2, 3]]
  assert got.start.tolist() == [4, 4, 3] and got.stop.tolist() == [6, 6, 4]


@pytest.mark.parametrize(
  'row, message',
  [
    ({'text': 'abc'}, r"row 1 has \['text'\]; a passage has prefix_text"),
    ({'prefix_ids': [1], 'suffix_ids': [77]}, 'token 77 is not among'),
    ({'prefix_text': '', 'suffix_text': 'a'}, 'row 1 is too short'),
  ],
)
def test_bad_passages_are_named(tmp_path, row, message):
  with pytest.raises(ValueError, match=message):
    read(write(tmp_path, row))


def test_bad_lines_are_named(tmp_path):
  file = tmp_path / 'rows.jsonl'
  file.write_text('{"a": 1}\n{\n')
  with pytest.raises(ValueError, match='line 2'):
    text.read_rows(file)
  file.write_text('\n')
  with pytest.raises(ValueError, match='has no rows'):
    text.read_rows(file)
  file.write_text('3\n')
  with pytest.raises(ValueError, match='a row is an object'):
    text.read_rows(file)


def test_questions(tmp_path):
  bbh = 'Who is first?\nOptions:\n(A) Ann\n(B) Bob\n(C) Cat'
  file = write(
    tmp_path,
    {'passage': 'Ice is cold.', 'question': 'is ice cold', 'answer': True},
    {'input': bbh, 'target': '(C)'},
  )
  boolq, logic = text.read_choices(file)
  assert boolq.prompt == 'Ice is cold.\nQuestion: is ice cold?\nAnswer:'
  assert boolq.options[boolq.answer] == ' yes'
  assert logic.options == (' (A)', ' (B)', ' (C)') and logic.answer == 2
  with pytest.raises(ValueError, match='row 1 is no question'):
    text.read_choices(write(tmp_path, {'input': bbh, 'target': '(D)'}))


@pytest.mark.parametrize(
  'a, b, distance',
  [
    ('kitten', 'sitting', 3),
    ('', 'abc', 3),
    ('abc', 'abc', 0),
    ('ab', 'ba', 2),
  ],
)
def test_levenshtein(a, b, distance):
  assert exam_lib.levenshtein(a, b) == distance
  assert exam_lib.levenshtein(b, a) == distance


class Cycle:
  """Says after every token the next one, of ten."""

  config = models.TransformerConfig(
    vocab_size=10, d_model=4, n_layers=1, n_heads=1, d_ff=4
  )

  def apply(self, params, tokens, *, mask_BT=None, cache=None):
    logits = 9.0 * jax.nn.one_hot((tokens + 1) % 10, 10) * params
    return logits if cache is None else (logits, cache)


PASSAGES = text.pack(
  [
    ([1, 2, 3], [4, 5, 6, 7]),  # As it would go on.
    ([7, 8], [9, 0, 1, 3]),  # One token of four is another.
    ([5, 5], [6, 6, 6, 6]),  # None is right in a row but the first.
  ]
)


def test_recitation():
  exam = exam_lib.TextExam(Cycle(), 2)
  got = exam.recitation(jnp.float32(1), PASSAGES)
  assert got['each'] == [1, 0, 0]
  assert got['strict'] == pytest.approx(100 / 3)
  # 4 of 4, 3 of 4 and, given the right ones, 1 of 4.
  assert got['tokens'] == pytest.approx(100 * 8 / 12)
  assert got['free'] == pytest.approx(100 / 3)
  assert got['loose'] == pytest.approx(200 / 3)
  assert got['distance'] == pytest.approx((0 + 0.25 + 0.75) / 3)
  recited = exam.recited(jnp.float32(1), PASSAGES)
  assert recited.tolist() == [True, False, False]


def test_perplexity_does_not_depend_on_the_batch():
  rows = np.random.default_rng(0).integers(0, 10, (7, 5))
  values = [
    exam_lib.TextExam(Cycle(), batch).perplexity(jnp.float32(0.1), rows)
    for batch in (2, 7)
  ]
  assert values[0] == pytest.approx(values[1], rel=1e-6)
  # By hand: the mean over tokens, then the exponential.
  logits = np.asarray(Cycle().apply(0.1, jnp.asarray(rows[:, :-1])), np.float64)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  nll = -np.take_along_axis(log_p, rows[:, 1:, None], -1).mean()
  assert values[0] == pytest.approx(np.exp(nll), rel=1e-5)


def test_choices_are_the_likeliest_option():
  class Digits:
    def encode(self, string, add_special_tokens):
      return types.SimpleNamespace(ids=[int(c) for c in string])

  choices = [
    text.Choice('123', ('45', '99'), 0),  # Goes on: right.
    text.Choice('777777777', ('12', '89'), 0),  # It takes the other one.
  ]
  exam = exam_lib.TextExam(Cycle(), 3)
  assert exam.accuracy(jnp.float32(1), choices, Digits(), 6) == 50


def test_phrases_are_what_is_said_often():
  model = Cycle()
  got = text.repeated_phrases(
    types.SimpleNamespace(apply=model.apply, config=model.config),
    jnp.float32(100), bos=1, prefix=2, suffix=3, stories=4, length=8, least=3,
    most=5, seed=0,
  )  # fmt: skip
  # All texts are 1 2 3 4 5 ...; phrases that share half a suffix are one.
  assert got.tokens[0].tolist() == [1, 2, 3, 4, 5]
  runs = [set(row.tolist()) for row in got.tokens]
  assert len(runs) >= 1
  with pytest.raises(ValueError, match='No run of 5 tokens'):
    text.repeated_phrases(
      model, jnp.float32(0), bos=1, prefix=2, suffix=3, stories=4, length=8,
      least=4, most=5, seed=0,
    )  # fmt: skip


@pytest.mark.skipif(not DATA.is_dir(), reason='set IDESIGN_DATA to the data')
def test_the_published_files_are_read():
  folder = DATA / 'memorization_olmo'
  tokenizer = training.load_tokenizer(
    DATA / 'lm_stories260K' / 'hf' / 'tokenizer.json'
  )
  read_file = lambda name: text.read_passages(
    folder / name, tokenizer, vocabulary=512, prefix=64, suffix=48
  )
  spans = read_file('olmo_7b_dolma_dedup_val.jsonl')
  assert len(spans.tokens) == 500
  assert (spans.stop - spans.start <= 48).all()
  quotes = read_file('olmolarge8_bfloat16.jsonl')
  assert len(quotes.tokens) == 1691
  assert (quotes.stop - quotes.start == 8).all()
  with pytest.raises(ValueError, match="another model's"):
    read_file('olmo2_1b_mem_extra_dedup_j70.jsonl')
