"""The language model, the text it samples, and the documents it is read on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from idesign import concepts, curvature, models, sites, training

MODEL = 'lm_stories260K/hf'
DOCUMENTS = 'text_tinystories/tinystories_sample.txt'
BOS, EOS = '<s>', '</s>'


class Text(NamedTuple):
  """Documents, each beginning with the same token, padded at the end."""

  tokens_BT: np.ndarray
  mask_BT: np.ndarray  # True for real tokens.


class Subject(NamedTuple):
  """The model, and how its activation is read."""

  params: Any
  apply: Callable[..., Any]
  config: models.TransformerConfig
  stops: tuple[int, int]  # The tokens between documents; the first begins one.
  read: Callable[[Any, Text], jax.Array]  # The activation, [B, T, D].
  documents: Text


def load(config) -> Subject:
  """The model and the documents.

  Raises:
    FileNotFoundError: if they are not there.
    ValueError: if the model has no such activation, or is no match for its
      tokenizer.
  """
  folder = pathlib.Path(config.data_dir)
  for name in (f'{MODEL}/config.json', f'{MODEL}/tokenizer.json', DOCUMENTS):
    if not (folder / name).is_file():
      raise FileNotFoundError(
        f'config.data_dir={config.data_dir}: {(folder / name).absolute()} is '
        'absent. Name the folder that holds lm_stories260K and '
        'text_tinystories, with --config.data_dir=FOLDER.'
      )
  model, params = models.load_pretrained(folder / MODEL)
  tokenizer = training.load_tokenizer(folder / MODEL / 'tokenizer.json')
  stops = tuple(map(tokenizer.token_to_id, (BOS, EOS)))
  texts = (folder / DOCUMENTS).read_text('utf-8').split('<|endoftext|>')
  rows = [tokenizer.encode(t.strip()).ids for t in texts if t.strip()]
  if None in stops or any(row[0] != stops[0] for row in rows):
    raise ValueError(
      f'{folder / MODEL}/tokenizer.json does not begin a text with {BOS}, or '
      f'has no {EOS}; restore the file.'
    )
  tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
  for to, row in zip(tokens, rows):
    to[: len(row)] = row
  lengths = np.array([len(row) for row in rows])
  documents = Text(tokens, np.arange(tokens.shape[1])[None] < lengths[:, None])

  def logits(params, text):
    return model.apply(params, text.tokens_BT, mask_BT=text.mask_BT)

  read = concepts.reader(logits, config.activation)
  try:
    jax.eval_shape(read, params, documents)
  except (sites.SelectionError, ValueError) as error:
    raise ValueError(
      f'config.activation={config.activation!r}: {error}'
    ) from error
  return Subject(params, model.apply, model.config, stops, read, documents)


def sample_text(config, subject: Subject, seed: int) -> Iterator[Text]:
  """Stories that the model tells, `config.text.batch` at a time.

  Each begins with the model's first token and ends, without it, before the next
  one, or at `config.text.length` tokens.
  """
  size, length = config.text.batch, config.text.length
  first = np.full((size, 1), subject.stops[0], np.int32)
  cache = models.init_cache(subject.config, size, length)
  key = jax.random.fold_in(jax.random.key(seed), 0)
  for number in range(-(-config.text.sequences // size)):
    out = models.generate(
      subject.apply,
      subject.params,
      first,
      np.ones(first.shape, bool),
      key=jax.random.fold_in(key, number),
      max_new_tokens=length - 1,
      cache=cache,
      stop_tokens=subject.stops,
    )
    tokens = np.concatenate([first, np.asarray(out.tokens_BN)], axis=1)
    ended = np.isin(tokens[:, 1:], subject.stops).any(axis=1)
    lengths = 1 + np.asarray(out.lengths_B) - ended
    yield Text(tokens, np.arange(length)[None] < lengths[:, None])


def activations(config, subject: Subject, seed: int) -> np.ndarray:
  """Shuffled activations of one seed's text, `[N, D]`."""
  rows = concepts.stream(
    subject.read,
    subject.params,
    ((text, text.mask_BT) for text in sample_text(config, subject, seed)),
    rows=config.rows,
    buffer=config.text.sequences * config.text.length // 2 + 2 * config.rows,
    seed=seed,
  )
  return np.concatenate(list(rows))


def story_loss(subject: Subject):
  """`loss(params, text) -> [B]`: nats per document, its first token given."""

  def loss(params, text):
    logits = subject.apply(params, text.tokens_BT, mask_BT=text.mask_BT)
    return curvature.negative_log_likelihood(
      logits[:, :-1], text.tokens_BT[:, 1:], text.mask_BT[:, 1:]
    )

  return loss
