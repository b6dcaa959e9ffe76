"""What a pretrained model recites, and what it can do otherwise."""

from __future__ import annotations

from collections.abc import Sequence
import math

import jax
import jax.numpy as jnp
import numpy as np

from experiments.recitation_text import Choice, Passages
from idesign import curvature, models

LOOSE = 0.75  # Of the suffix, by edit distance, as published.


def levenshtein(a: Sequence[int], b: Sequence[int]) -> int:
  """The number of tokens to insert, delete or replace."""
  row = list(range(len(b) + 1))
  for i, x in enumerate(a, 1):
    above, row[0] = row[0], i
    for j, y in enumerate(b, 1):
      above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (x != y))
  return row[-1]


class TextExam:
  """Asks a model; every program is compiled once, batches are of one size."""

  def __init__(self, model: models.Model, batch: int):
    self._model, self._batch = model, batch
    self._predict = jax.jit(
      lambda params, tokens: jnp.argmax(model.apply(params, tokens), axis=-1)
    )
    self._losses = jax.jit(
      lambda params, tokens, mask: curvature.negative_log_likelihood(
        model.apply(params, tokens[:, :-1]), tokens[:, 1:], mask
      )
    )

  def recitation(self, params, passages: Passages) -> dict[str, float]:
    """How much of suffixes is recited, in percent, but for the distance.

    Returns:
      `strict`: every token right, given the right ones before it, as published;
      `tokens`: of them, those that are; `free`: said on from the prefix, word
      for word; `loose`: the same within a quarter of the suffix's tokens;
      `distance`: mean edit distance as a share of the suffix.
    """
    hits, lengths = self._suffixes(params, passages)
    distances = []
    for index, said in self._continuations(params, passages):
      row = passages.take(index)
      wanted = row.tokens[row.start : row.stop].tolist()
      distances.append(levenshtein(said, wanted) / len(wanted))
    distances = np.array(distances)
    percent = lambda x: 100 * float(np.mean(x))
    return {
      'strict': percent(hits == lengths),
      'tokens': 100 * float(hits.sum() / lengths.sum()),
      'free': percent(distances == 0),
      'loose': percent(1 - distances >= LOOSE),
      'distance': float(distances.mean()),
      'each': (hits == lengths).astype(int).tolist(),  # Strictly.
    }

  def recited(self, params, passages: Passages) -> np.ndarray:
    """Which passages are recited strictly, `[N]`."""
    hits, lengths = self._suffixes(params, passages)
    return hits == lengths

  def _suffixes(self, params, passages: Passages):
    """Tokens of each suffix that are right, and how many it has, `[N]` each."""
    hits, lengths = [], []
    for part in self._parts(passages):
      said = np.asarray(self._predict(params, part.tokens))[:, :-1]
      place = np.arange(1, part.tokens.shape[1])
      inside = (place >= part.start[:, None]) & (place < part.stop[:, None])
      hits += ((said == part.tokens[:, 1:]) & inside).sum(1).tolist()
      lengths += inside.sum(1).tolist()
    count = len(passages.tokens)
    return np.array(hits[:count]), np.array(lengths[:count])

  def perplexity(self, params, tokens: np.ndarray) -> float:
    """`exp(total loss / total tokens)` of rows `[N, T]`.

    The mean is over tokens before the exponential is taken: that of a mean over
    batches depends on how they are cut.
    """
    total = count = 0.0
    for start in range(0, len(tokens), self._batch):
      rows = tokens[start : start + self._batch]
      real = len(rows)
      rows = np.resize(rows, (self._batch, rows.shape[1]))
      mask = np.ones((self._batch, rows.shape[1] - 1), bool)
      losses = np.asarray(self._losses(params, rows, mask), np.float64)
      total += losses[:real].sum()
      count += real * (rows.shape[1] - 1)
    return math.exp(total / count)

  def accuracy(
    self, params, choices: Sequence[Choice], tokenizer, length: int
  ) -> float:
    """Questions whose right option is the likeliest, in percent.

    Args:
      params: of the model.
      choices: questions; of a prompt too long the end is kept.
      tokenizer: of the model.
      length: tokens of prompt and option, at most.
    """
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    rows, masks = [], []
    for choice in choices:
      prompt = encode(choice.prompt)
      for option in choice.options:
        answer = encode(option)
        ids = [*prompt[-(length - len(answer)) :], *answer]
        row = np.zeros(length, np.int32)
        row[: len(ids)] = ids
        mask = np.zeros(length - 1, bool)
        mask[len(ids) - len(answer) - 1 : len(ids) - 1] = True
        rows.append(row)
        masks.append(mask)
    rows, masks, losses = np.array(rows), np.array(masks), []
    for start in range(0, len(rows), self._batch):
      part = slice(start, start + self._batch)
      size = (self._batch, length)
      losses += np.asarray(
        self._losses(
          params, np.resize(rows[part], size),
          np.resize(masks[part], (size[0], length - 1)),
        )
      )[: len(rows[part])].tolist()  # fmt: skip
    right, at = [], 0
    for choice in choices:
      mine = losses[at : at + len(choice.options)]
      at += len(choice.options)
      right.append(int(np.argmin(mine)) == choice.answer)
    return 100 * float(np.mean(right))

  def _parts(self, passages: Passages):
    """Batches of one size, the last filled up with its first rows."""
    for start in range(0, len(passages.tokens), self._batch):
      index = np.arange(start, min(start + self._batch, len(passages.tokens)))
      yield passages.take(np.resize(index, self._batch))

  def _continuations(self, params, passages: Passages):
    """Number of a passage and what is said after its prefix, greedily."""
    longest = int((passages.stop - passages.start).max())
    width = int(passages.start.max())
    cache = models.init_cache(
      self._model.config, batch=self._batch, slots=width + longest
    )
    for start in range(0, len(passages.tokens), self._batch):
      index = np.arange(start, min(start + self._batch, len(passages.tokens)))
      part = passages.take(np.resize(index, self._batch))
      # Padded on the left, so that all go on at the same place.
      prompts = np.zeros((self._batch, width), np.int32)
      mask = np.zeros(prompts.shape, bool)
      for row, (tokens, n) in enumerate(zip(part.tokens, part.start)):
        prompts[row, width - n :], mask[row, width - n :] = tokens[:n], True
      said = models.generate(
        self._model.apply, params, jnp.asarray(prompts), jnp.asarray(mask),
        key=jax.random.key(0), max_new_tokens=longest, cache=cache,
        temperature=0.0,
      ).tokens_BN  # fmt: skip
      for row, number in enumerate(index):
        n = passages.stop[number] - passages.start[number]
        yield int(number), np.asarray(said)[row, :n].tolist()
