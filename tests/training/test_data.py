"""Text and images from local files, without a network."""

import json
import os
import pathlib

import datasets
import jax
import numpy as np
from PIL import Image
import pytest
import tokenizers

from idesign.training import (
  Batches,
  image_rows,
  load_files,
  load_tokenizer,
  packed_text,
  padded_text,
)

WORDS = ['[UNK]', '<s>', '</s>', '<pad>', 'the', 'cat', 'sat', 'on', 'mat']
TEXTS = ['the cat sat', 'on the mat', 'cat', 'the cat sat on the mat the cat']
ROOT = pathlib.Path(__file__).resolve().parents[2]
SHARED = pathlib.Path(
  os.environ.get('IDESIGN_DATA', ROOT.parent / 'shared' / 'data')
)


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
  def refuse(*args, **kwargs):
    raise AssertionError('the network was used')

  monkeypatch.setattr('socket.getaddrinfo', refuse)


@pytest.fixture
def cache(tmp_path):
  return tmp_path / 'cache'


@pytest.fixture
def tokenizer(tmp_path):
  model = tokenizers.models.WordLevel(
    {word: i for i, word in enumerate(WORDS)}, unk_token='[UNK]'
  )
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  # Files from the Hub often add a token of their own; it must not appear.
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single='<s> $A', special_tokens=[('<s>', 1)]
  )
  path = tmp_path / 'tokenizer.json'
  tokenizer.save(str(path))
  return path


def write(folder, kind, texts=TEXTS, column='text'):
  path = folder / f'rows.{kind}'
  if kind == 'txt':
    path.write_text('\n'.join(texts) + '\n')
  elif kind == 'json':
    path.write_text(json.dumps([{column: text} for text in texts]))
  elif kind == 'jsonl':
    path.write_text(
      ''.join(json.dumps({column: text}) + '\n' for text in texts)
    )
  else:
    rows = datasets.Dataset.from_dict({column: texts})
    getattr(rows, f'to_{kind}')(str(path))
  return path


def ids(*texts, before=(), after=()):
  return [
    i
    for text in texts
    for i in [*before, *(WORDS.index(word) for word in text.split()), *after]
  ]


KINDS = ['txt', 'json', 'jsonl', 'csv', 'parquet']


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('ends', [{}, {'bos': '<s>', 'eos': '</s>'}])
def test_packed_text(tmp_path, cache, tokenizer, kind, ends):
  path = write(tmp_path, kind)
  rows = packed_text(
    path, tokenizer, length=4, cache_dir=cache, sample_by='line', **ends
  )
  around = {'before': [1], 'after': [2]} if ends else {}
  stream = ids(*TEXTS, **around)
  assert rows['tokens'].dtype == np.int32
  assert rows['tokens'].shape == (len(stream) // 4, 4)
  assert rows['tokens'].ravel().tolist() == stream[: len(stream) // 4 * 4]


@pytest.mark.parametrize('kind', ['txt', 'parquet'])
def test_padded_text(tmp_path, cache, tokenizer, kind):
  rows = padded_text(
    write(tmp_path, kind),
    tokenizer,
    length=5,
    pad='<pad>',
    eos='</s>',
    cache_dir=cache,
    sample_by='line',
  )
  documents = [ids(text, after=[2])[:5] for text in TEXTS]
  assert rows['tokens'].tolist() == [d + [3] * (5 - len(d)) for d in documents]
  lengths = [len(d) for d in documents]
  assert rows['mask'].dtype == bool
  assert rows['mask'].sum(1).tolist() == lengths == [4, 4, 2, 5]
  assert (np.diff(rows['mask'].astype(int)) <= 0).all()


def test_a_txt_file_is_one_document_by_default(tmp_path, cache):
  path = write(tmp_path, 'txt', ['one', '', 'two'])
  assert load_files(path, cache_dir=cache)['text'] == ['one\n\ntwo\n']
  lines = load_files(path, cache_dir=cache, sample_by='line')
  assert lines['text'] == ['one', '', 'two']


def test_several_files_and_a_changed_file(tmp_path, cache):
  (tmp_path / 'a').mkdir()
  paths = [write(tmp_path, 'jsonl'), write(tmp_path / 'a', 'jsonl', ['mat'])]
  assert load_files(paths, cache_dir=cache)['text'] == [*TEXTS, 'mat']
  # The cache of `datasets` must not answer for a file that changed.
  write(tmp_path / 'a', 'jsonl', ['on'])
  os.utime(paths[1], (1, 1))
  assert load_files(paths, cache_dir=cache)['text'] == [*TEXTS, 'on']


def test_a_dataset_and_a_tokenizer_in_memory(tokenizer):
  rows = datasets.Dataset.from_dict({'story': TEXTS, 'other': [1, 2, 3, 4]})
  packed = packed_text(
    rows, load_tokenizer(tokenizer), length=3, column='story'
  )
  assert packed['tokens'].ravel().tolist() == ids(*TEXTS)[:15]
  assert Batches(packed, 2, seed=0).batch(0)['tokens'].shape == (2, 3)


def test_bad_text(tmp_path, cache, tokenizer):
  good = write(tmp_path, 'jsonl')
  (tmp_path / 'empty.txt').write_text('')
  (tmp_path / 'broken.jsonl').write_text('{"text": "a"\n{{{')
  (tmp_path / 'rows.pkl').write_text('x')
  (tmp_path / 'numbers.jsonl').write_text('{"text": 3}\n{"text": 4}\n')
  (tmp_path / 'holes.jsonl').write_text('{"text": "cat"}\n{"text": null}\n')
  (tmp_path / 'blank.jsonl').write_text('{"text": "cat"}\n{"text": ""}\n')
  (tmp_path / 'bad.json').write_text('{"model": 1}')
  pack = lambda name, **options: packed_text(
    tmp_path / name,
    options.pop('tokenizer', tokenizer),
    **{'length': 4, 'cache_dir': cache, **options},
  )
  table = [
    (FileNotFoundError, 'absent.txt does not exist', 'absent.txt', {}),
    (ValueError, 'empty.txt is empty', 'empty.txt', {}),
    (ValueError, 'broken.jsonl cannot be read as json', 'broken.jsonl', {}),
    (ValueError, r"kind \['.pkl'\]", 'rows.pkl', {}),
    (
      ValueError,
      r"column 'body'; it has \['text'\]",
      good.name,
      {'column': 'body'},
    ),
    (ValueError, "'text', row 0: expected text, found 3", 'numbers.jsonl', {}),
    (ValueError, "'text', row 1: expected text, found None", 'holes.jsonl', {}),
    (ValueError, "no token '<bos>' among its 9", good.name, {'bos': '<bos>'}),
    (
      ValueError,
      '15 tokens do not fill one row of length=16',
      good.name,
      {'length': 16},
    ),
    (ValueError, 'length=0', good.name, {'length': 0}),
    (
      FileNotFoundError,
      'none.json does not exist',
      good.name,
      {'tokenizer': tmp_path / 'none.json'},
    ),
    (
      ValueError,
      'bad.json is not a tokenizer.json',
      good.name,
      {'tokenizer': tmp_path / 'bad.json'},
    ),
  ]
  for kind, match, name, options in table:
    with pytest.raises(kind, match=match):
      pack(name, **options)
  with pytest.raises(ValueError, match='row 1 has no tokens'):
    padded_text(
      tmp_path / 'blank.jsonl',
      tokenizer,
      length=4,
      pad='<pad>',
      cache_dir=cache,
    )
  with pytest.raises(ValueError, match="no token '<p>'"):
    padded_text(good, tokenizer, length=4, pad='<p>', cache_dir=cache)
  empty = datasets.Dataset.from_dict({'text': []})
  with pytest.raises(ValueError, match='the data set has no rows'):
    packed_text(empty, tokenizer, length=4)


# --- Images.

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 4, 5), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2])


def image_file(folder, kind, images=IMAGES, labels=LABELS):
  path = folder / f'images.{"npz" if kind == "npz" else "parquet"}'
  if kind == 'npz':
    np.savez(path, image=images, label=labels)
    return path
  if kind == 'lists':
    nested = datasets.List(datasets.List(datasets.Value('uint8')))
    columns = {'image': [x.tolist() for x in images], 'label': labels.tolist()}
    features = {'image': nested, 'label': datasets.Value('int64')}
  else:
    columns = {
      'image': [Image.fromarray(x) for x in images],
      'label': labels.tolist(),
    }
    features = {'image': datasets.Image(), 'label': datasets.Value('int64')}
  rows = datasets.Dataset.from_dict(columns, datasets.Features(features))
  if kind == 'plain parquet':
    # As other tools write it: bytes, and nothing that says they are images.
    rows = rows.cast_column('image', datasets.Image(decode=False))
    rows = rows.cast_column(
      'image',
      {'bytes': datasets.Value('binary'), 'path': datasets.Value('string')},
    )
  rows.to_parquet(str(path))
  return path


@pytest.mark.parametrize('kind', ['npz', 'lists', 'encoded', 'plain parquet'])
def test_images(tmp_path, cache, kind):
  rows = image_rows(image_file(tmp_path, kind), cache_dir=cache)
  assert rows['image'].dtype == np.uint8 and rows['label'].dtype == np.int32
  np.testing.assert_array_equal(rows['image'], IMAGES[..., None])
  np.testing.assert_array_equal(rows['label'], LABELS)
  assert Batches(rows, 3, seed=0).batch(1)['image'].shape == (3, 4, 5, 1)


def test_colour_and_float_images(tmp_path):
  images = np.random.default_rng(0).normal(size=(6, 2, 2, 3))
  np.savez(tmp_path / 'a.npz', pixels=images, digit=LABELS)
  rows = image_rows(tmp_path / 'a.npz', image='pixels', label='digit')
  np.testing.assert_array_equal(rows['image'], images)


@pytest.mark.parametrize(
  'arrays, match',
  [
    ({'label': LABELS}, r"no array 'image'; it has \['label'\]"),
    ({'image': IMAGES}, "no array 'label'"),
    ({'image': IMAGES, 'label': LABELS[:5]}, r'\(6, 4, 5, 1\).*\(5,\)'),
    ({'image': IMAGES[0], 'label': LABELS}, r'shape \(4, 5\)'),
    ({'image': IMAGES[:0], 'label': LABELS[:0]}, 'N > 0'),
    ({'image': IMAGES, 'label': LABELS / 2}, 'dtype float64'),
    ({'image': np.array([{}] * 6), 'label': LABELS}, 'cannot be read'),
  ],
)
def test_bad_npz(tmp_path, arrays, match):
  path = tmp_path / 'bad.npz'
  np.savez(path, **arrays)
  with pytest.raises(ValueError, match=match) as error:
    image_rows(path)
  assert 'bad.npz' in str(error.value)


def test_bad_images(tmp_path, cache):
  whole = image_file(tmp_path, 'npz').read_bytes()
  (tmp_path / 'cut.npz').write_bytes(whole[:99])
  with pytest.raises(ValueError, match='cut.npz cannot be read'):
    image_rows(tmp_path / 'cut.npz')
  with pytest.raises(FileNotFoundError, match='none.parquet'):
    image_rows(tmp_path / 'none.parquet')
  (tmp_path / 'cut.parquet').write_bytes(b'PAR1 no more')
  with pytest.raises(ValueError, match='cut.parquet cannot be read as parquet'):
    image_rows(tmp_path / 'cut.parquet', cache_dir=cache)
  sizes = datasets.Dataset.from_dict(
    {'image': [[[1]], [[1, 2]]], 'label': [0, 1]}
  )
  with pytest.raises(ValueError, match="'image' have different shapes"):
    image_rows(sizes)
  with pytest.raises(ValueError, match="no column 'label'"):
    image_rows(sizes.remove_columns('label'))


# --- Real files.


def shared(*parts):
  path = SHARED.joinpath(*parts)
  if not path.exists():
    pytest.skip(f'{path} is absent; set IDESIGN_DATA to the data folder')
  return path


def test_shakespeare_survives_packing(cache):
  path = shared('text_shakespeare', 'input.txt')
  tokenizer = load_tokenizer(shared('lm_stories260K', 'hf', 'tokenizer.json'))
  rows = packed_text(path, tokenizer, length=128, cache_dir=cache)
  text = tokenizer.decode(rows['tokens'].ravel().tolist())
  original = path.read_text()
  # Nothing is lost but the last, unfilled row.
  assert original.startswith(text.lstrip()[:1000])
  assert len(text) > len(original) - 128 * 10
  assert rows['tokens'].max() < 512 and rows['tokens'].shape[1] == 128
  assert jax.tree.leaves(rows)[0].nbytes < 4 * len(original)
