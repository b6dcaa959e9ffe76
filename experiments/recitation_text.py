"""Texts that a pretrained model may have by heart, and questions to it.

Passages are read from JSON Lines; a row has one of

  prefix_text, suffix_text     spans of a corpus
  full_quote                   quotations; the last tokens are the suffix
  prefix_ids, suffix_ids       the same as token ids of this very model

or they are looked for in what the model says by itself (`repeated_phrases`).
Questions are rows of BoolQ (`passage`, `question`, `answer`) or of BBH (`input`
with options, `target`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import json
import pathlib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from idesign import models


class Passages(NamedTuple):
  """Passages, padded on the right.

  Attributes:
    tokens: `[N, T]`, int32.
    start: `[N]`, where the suffix begins, that is to be recited.
    stop: `[N]`, where it ends.
  """

  tokens: np.ndarray
  start: np.ndarray
  stop: np.ndarray

  def take(self, index) -> 'Passages':
    return Passages(*(a[index] for a in self))


class Choice(NamedTuple):
  """A question with options, of which one is right."""

  prompt: str
  options: tuple[str, ...]
  answer: int


def read_rows(path: str | pathlib.Path) -> list[dict[str, Any]]:
  """Rows of a JSON Lines file; an error names the line."""
  path = pathlib.Path(path)
  rows = []
  for number, line in enumerate(
    path.read_text(encoding='utf-8').splitlines(), 1
  ):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
    except json.JSONDecodeError as error:
      raise ValueError(f'{path}, line {number}: {error}.') from error
    if not isinstance(row, dict):
      raise ValueError(f'{path}, line {number}: a row is an object.')
    rows.append(row)
  if not rows:
    raise ValueError(f'{path} has no rows.')
  return rows


def read_passages(
  path: str | pathlib.Path, tokenizer, *, vocabulary: int, prefix: int,
  suffix: int, quote_suffix: int = 8, bos: int | None = None,
) -> Passages:  # fmt: skip
  """Passages of a file.

  Args:
    path: JSON Lines.
    tokenizer: a `tokenizers.Tokenizer`, of the model.
    vocabulary: of the model; larger ids are another model's.
    prefix: tokens before the suffix, at most; the last ones are kept.
    suffix: tokens to be recited, of spans; longer ones are cut.
    quote_suffix: the same of quotations.
    bos: a token to put first.

  Raises:
    ValueError: naming the line, for a row of another form, ids of another
      vocabulary, or a text too short to be cut.
  """
  encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
  first = [] if bos is None else [bos]
  rows, seen = [], set()
  for number, row in enumerate(read_rows(path), 1):
    place = f'{path}, row {number}'
    if 'full_quote' in row:
      if row['full_quote'] in seen:  # Cut elsewhere.
        continue
      seen.add(row['full_quote'])
      ids = encode(row['full_quote'])
      before, after = ids[:-quote_suffix], ids[-quote_suffix:]
    elif 'prefix_text' in row:
      before, after = encode(row['prefix_text']), encode(row['suffix_text'])
    elif 'prefix_ids' in row:
      before, after = row['prefix_ids'], row['suffix_ids']
      if max(*before, *after) >= vocabulary:
        raise ValueError(
          f'{place}: token {max(*before, *after)} is not among the '
          f"model's {vocabulary:,}; these ids are another model's."
        )
    else:
      raise ValueError(
        f'{place} has {sorted(row)}; a passage has prefix_text and '
        'suffix_text, full_quote, or prefix_ids and suffix_ids.'
      )
    if not before or not after:
      raise ValueError(f'{place} is too short for a prefix and a suffix.')
    rows.append((first + before[-prefix:], after[:suffix]))
  return pack(rows)


def pack(rows: Iterable[tuple[list[int], list[int]]]) -> Passages:
  """Passages of prefixes and suffixes."""
  rows = list(rows)
  length = max(len(a) + len(b) for a, b in rows)
  tokens = np.zeros((len(rows), length), np.int32)
  start, stop = np.zeros(len(rows), int), np.zeros(len(rows), int)
  for i, (a, b) in enumerate(rows):
    tokens[i, : len(a) + len(b)] = [*a, *b]
    start[i], stop[i] = len(a), len(a) + len(b)
  return Passages(tokens, start, stop)


def repeated_phrases(
  model: models.Model, params, *, bos: int, prefix: int, suffix: int,
  stories: int, length: int, least: int, most: int, seed: int,
) -> Passages:  # fmt: skip
  """What a model says again and again: its generic openings and phrases.

  Texts are sampled; every run of `prefix + suffix` tokens that occurs in at
  least `least` of them is a candidate. So as to be different phrases, of those
  that are kept no suffix is found in another, but for its first tokens.

  Args:
    model, params: of the model.
    bos: the token that texts begin with.
    prefix, suffix: tokens.
    stories: texts to sample, at temperature 1.
    length: tokens of each.
    least: texts that a phrase must occur in.
    most: phrases at most, the most frequent ones.
    seed: of sampling.

  Raises:
    ValueError: there is no such phrase.
  """
  prompts = jnp.full((stories, 1), bos, jnp.int32)
  said = models.generate(
    model.apply, params, prompts, jnp.ones(prompts.shape, bool),
    key=jax.random.key(seed), max_new_tokens=length,
    cache=models.init_cache(model.config, batch=stories, slots=length + 1),
  ).tokens_BN  # fmt: skip
  texts = np.concatenate([np.full((stories, 1), bos), np.asarray(said)], axis=1)
  size, counts = prefix + suffix, {}
  for text in texts.tolist():
    runs = {tuple(text[i : i + size]) for i in range(len(text) - size + 1)}
    for run in runs:
      counts[run] = counts.get(run, 0) + 1
  kept, parts = [], set()
  half = -(-2 * suffix // 3)
  for run, count in sorted(counts.items(), key=lambda c: (-c[1], c[0])):
    if count < least or len(kept) == most:
      break
    mine = {run[i : i + half] for i in range(prefix, size - half + 1)}
    if not mine & parts:
      kept.append((list(run[:prefix]), list(run[prefix:])))
      parts |= mine
  if not kept:
    raise ValueError(
      f'No run of {size} tokens occurs in {least} of {stories} sampled texts: '
      'sample more, or ask for shorter ones.'
    )
  return pack(kept)


def read_choices(path: str | pathlib.Path) -> list[Choice]:
  """Questions of BoolQ or BBH; an error names the row."""
  return [
    _choice(row, f'{path}, row {n}') for n, row in enumerate(read_rows(path), 1)
  ]


def _choice(row: Mapping[str, Any], place: str) -> Choice:
  if {'passage', 'question', 'answer'} <= set(row):
    prompt = f'{row["passage"]}\nQuestion: {row["question"]}?\nAnswer:'
    return Choice(prompt, (' no', ' yes'), int(bool(row['answer'])))
  if {'input', 'target'} <= set(row):
    letters = re.findall(r'^\(([A-Z])\)', row['input'], flags=re.MULTILINE)
    target = row['target'].strip('()')
    if target in letters:
      options = tuple(f' ({letter})' for letter in letters)
      return Choice(f'{row["input"]}\nAnswer:', options, letters.index(target))
  raise ValueError(
    f'{place} is no question: BoolQ has passage, question and answer; BBH has '
    'an input whose options stand on lines of their own, (A) first, and the '
    'target, one of them.'
  )
