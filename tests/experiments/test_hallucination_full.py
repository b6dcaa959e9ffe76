"""The run on a real model, with a tiny random one, on a mesh of 4 x 2."""

import json
import sys

import numpy as np
import pytest

from configs import hallucination as config_lib
from experiments import hallucination
from experiments.hallucination_full_lab import Prompts
from experiments.hallucination_text import Chat, read_graded, read_prompts
from idesign import probes

NUMBERS, WORDS = 12, 20
SPECIAL = ['<pad>', '<end>', '<user>', '<model>', '<turn>']
TEMPLATE = (
  '{% for m in messages %}<user> {{ m.content }} {% endfor %}'
  '{% if add_generation_prompt %}<model> {% endif %}'
)
TOKENS = [
  *SPECIAL,
  *(f'n{i}' for i in range(NUMBERS)),
  *(f'w{i}' for i in range(WORDS)),
]


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
  transformers = pytest.importorskip('transformers')
  import tokenizers

  folder = tmp_path_factory.mktemp('model')
  config = transformers.LlamaConfig(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=40,
    tie_word_embeddings=True, eos_token_id=[1, 4], pad_token_id=0,
  )  # fmt: skip
  transformers.set_seed(0)
  model = transformers.LlamaForCausalLM(config)
  model.model.embed_tokens.weight.data.mul_(15)  # Tokens stand out.
  model.save_pretrained(folder)
  words = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({t: i for i, t in enumerate(TOKENS)}, 'w0')
  )
  words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=words, pad_token='<pad>', eos_token='<end>',
    chat_template=TEMPLATE,
  ).save_pretrained(folder)  # fmt: skip
  return str(folder)


@pytest.fixture(scope='module')
def chat(checkpoint):
  return Chat(checkpoint)


def graded_line(random, entity):
  """Claims are numbers, and the upper half is made up; w0 is their unit."""
  words, spans, at = [], [], 0
  for _ in range(6):
    number = random.random() < 0.4
    i = random.integers(NUMBERS) if number else 1 + random.integers(WORDS - 1)
    words.append(f'{"n" if number else "w"}{i}')
    if number:
      words[-1] += ' w0' if random.random() < 0.3 else ''
      label = 'not supported' if i >= NUMBERS // 2 else 'supported'
      label = 'insufficient' if random.random() < 0.1 else label
      spans.append(
        {'start': at, 'stop': at + len(words[-1]), 'label': label}
      )  # fmt: skip
    at += len(words[-1]) + 1
  return {
    'prompt': f'w{random.integers(WORDS)}', 'completion': ' '.join(words),
    'entity': f'who {entity}', 'spans': spans,
  }  # fmt: skip


def write(path, rows):
  path.write_text('\n'.join(map(json.dumps, rows)) + '\n')
  return str(path)


@pytest.fixture(scope='module')
def config(checkpoint, tmp_path_factory):
  folder = tmp_path_factory.mktemp('data')
  random = np.random.default_rng(0)
  c = config_lib.get_config('full')
  with c.unlocked():
    c.model.path = checkpoint
    c.model.dtype = 'float32'
    c.graded = write(
      folder / 'graded.jsonl',
      [graded_line(random, i // 2) for i in range(120)],
    )
    c.prompts = (
      write(
        folder / 'prompts.jsonl',
        [{'prompt': f'w{i} w{i // 2}', 'canary': ''} for i in range(20)],
      ),
    )
    c.mesh.data, c.mesh.model = 4, 2
    c.lengths.prompt, c.lengths.completion = 6, 8
    c.arms = ('none', 'frozen', 'live')
    c.probe.activations = ('resid_post[0:1]', 'resid_post[1:2]')
    c.probe.hidden, c.probe.heads, c.probe.steps = 8, 2, 300
    c.probe.most_claims = 6
    r = c.rl
    r.steps, r.prompts, r.group, r.rank, r.save_every = 20, 4, 8, 4, 8
    r.learning_rate, r.minibatches, r.audit_every = 0.003, 1, 8
    c.exam.prompts, c.exam.batch, c.exam.audit = 8, 4, 200
  return c


def test_every_path_on_a_mesh(config, tmp_path, capsys):
  hallucination.run(config, tmp_path)
  said = capsys.readouterr().out
  assert 'memory of a device' in said and '20 steps' in said
  results = json.loads((tmp_path / 'results.json').read_text())
  assert set(results) == {'probe', 'base', *config.arms}
  assert results['probe']['quality']['auroc'] > 0.95
  for name in ('base', *config.arms):
    answers = results[name]['answers']
    claims, tokens = (np.array(answers[k]) for k in ('claims', 'tokens'))
    assert claims.shape == (2 * config.exam.prompts,)
    assert (claims <= np.minimum(tokens, config.probe.most_claims)).all()
    assert (np.array(answers['doubted']) <= claims).all()
    assert 0 <= results[name]['audit']['auroc'] <= 1
    if name != 'base':  # On the way, and at the end what the end says.
      steps, seen = zip(*results[name]['audits'])
      assert steps == (8, 16, 20)
      end = {k.removeprefix('audit/'): v for k, v in seen[-1].items()}
      assert end == pytest.approx(results[name]['audit'])
    lines = (tmp_path / f'{name}.jsonl').read_text().splitlines()
    assert len(lines) == 2 * config.exam.prompts
    # Once a grader has filled in the spans they are graded texts.
    assert set(json.loads(lines[0])) == set(GOOD)
    assert json.loads(lines[0])['prompt'].startswith('w')
  # Nothing has moved yet: policy and base read the same.
  base = results['base']['answers']
  np.testing.assert_allclose(base['divergence'], 0, atol=1e-6)
  np.testing.assert_allclose(base['doubt'], base['live doubt'], rtol=1e-5)
  doubted = {
    name: np.sum(results[name]['answers']['doubted'])
    / np.sum(results[name]['answers']['claims'])
    for name in ('base', 'frozen')
  }
  assert doubted['frozen'] < 0.5 * doubted['base']
  assert [results[a]['pressure'] for a in config.arms] == [
    'NONE', 'FROZEN', 'LIVE'
  ]  # fmt: skip
  assert {p.name for p in (tmp_path / 'figures').iterdir()} == {
    'answers.png', 'training.png'
  }  # fmt: skip
  # An arm that was lost is trained again from its last checkpoint, to the same.
  kept = dict(results)
  del kept['frozen']
  (tmp_path / 'results.json').write_text(json.dumps(kept))
  hallucination.run(config, tmp_path)
  assert json.loads((tmp_path / 'results.json').read_text()) == results


def test_graded_texts(chat, tmp_path):
  rows = [
    {
      'prompt': 'w1', 'completion': 'w2 n3 w4 n9 n2', 'entity': 'a',
      'spans': [
        {'start': 3, 'stop': 8, 'label': 'supported'},
        {'start': 9, 'stop': 11, 'label': 'not supported'},
        {'start': 12, 'stop': 14, 'label': 'insufficient'},
      ],
    },
    {'prompt': 'w1 w1', 'completion': 'w2', 'entity': 'b', 'spans': []},
  ]  # fmt: skip
  graded = read_graded(write(tmp_path / 'g.jsonl', rows), chat, 10)
  text = [[TOKENS[t] for t in row] for row in graded.tokens]
  assert text[0] == '<user> w1 <model> w2 n3 w4 n9 n2'.split()
  assert text[1] == '<user> w1 w1 <model> w2 <pad> <pad> <pad>'.split()
  assert graded.mask.sum(axis=1).tolist() == [8, 5]
  assert graded.said.sum(axis=1).tolist() == [5, 1]
  assert graded.tags[0].tolist() == [0, 0, 0, 0, 1, 2, 1, 1]
  assert not graded.tags[1].any()
  spans = list(zip(graded.row, graded.start, graded.stop, graded.label))
  assert spans == [(0, 4, 6, 0), (0, 6, 7, 1), (0, 7, 8, -1)]
  assert graded.entity[0] != graded.entity[1]


GOOD = {
  'prompt': 'w1', 'completion': 'w2 n3', 'entity': 'a',
  'spans': [{'start': 3, 'stop': 5, 'label': 'supported'}],
}  # fmt: skip


@pytest.mark.parametrize(
  'change,message',
  [
    ({'completion': ' '}, 'line 2: the completion is empty'),
    ({'completion': 'w1 ' * 20}, 'line 2: 3 . 20 tokens'),
    ({'spans': [{'start': 3, 'stop': 4, 'label': 'supported'}]},
     "line 2: 'n' .* does not align with the tokenizer: token 1 is 'n3'"),
    ({'spans': [{'start': 3, 'stop': 5, 'label': 'wrong'}]},
     "line 2: label 'wrong' is none"),
    ({'spans': [{'start': 3, 'stop': 5}]}, "line 2: 'label'"),
    ({'spans': 2 * GOOD['spans']}, 'line 2: .*overlaps'),
    ({}, "decided have labels .'supported'.: a probe needs both"),
  ],
)  # fmt: skip
def test_bad_graded_texts(change, message, chat, tmp_path):
  path = write(tmp_path / 'g.jsonl', [GOOD, GOOD | change])
  with pytest.raises(ValueError, match=message):
    read_graded(path, chat, 12)


def test_prompts(chat, tmp_path):
  path = write(tmp_path / 'p.jsonl', [{'prompt': 'w1'}, {'prompt': 'w2 w3'}])
  asked = read_prompts([path, path], chat, 5)
  tokens, mask, texts = asked
  assert texts.tolist() == 2 * ['w1', 'w2 w3']
  assert [TOKENS[t] for t in tokens[0][mask[0]]] == ['<user>', 'w1', '<model>']
  assert mask.tolist() == 2 * [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]]
  with pytest.raises(ValueError, match='line 2: a prompt of 4 tokens'):
    read_prompts([path], chat, 3)
  batch, again = (Prompts(asked, 3, 0).batch(1) for _ in range(2))
  assert batch['prompts'].shape == (3, 5)
  assert np.array_equal(batch['prompts'], again['prompts'])


@pytest.mark.parametrize(
  'text,message',
  [('{"prompt": 1', 'line 1: no JSON'), ('{"a": 1}', "'prompt' is missing"),
   ('{"prompt": " "}', 'prompt is empty'), ('\n', 'is empty')],
)  # fmt: skip
def test_bad_prompts(text, message, chat, tmp_path):
  path = tmp_path / 'p.jsonl'
  path.write_text(text)
  with pytest.raises(ValueError, match=message):
    read_prompts([str(path)], chat, 5)
  with pytest.raises(FileNotFoundError, match='JSON lines'):
    read_prompts([''], chat, 5)


def test_stop_tokens_are_the_tokenizer_s_and_the_model_s(chat):
  assert chat.stop_tokens == (1, 4)
  assert chat.pad_token == 0
  assert chat.text([5, 6, 1]) == 'n0 n1'


def test_a_model_without_a_chat_template(checkpoint, tmp_path):
  import transformers

  tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
  tokenizer.chat_template = None
  tokenizer.save_pretrained(tmp_path)
  with pytest.raises(ValueError, match='no chat template'):
    Chat(str(tmp_path))


def test_no_model_at_all(tmp_path):
  config = config_lib.get_config('full')
  with pytest.raises(FileNotFoundError, match='config.model.path'):
    hallucination.run(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_a_weak_probe_is_refused(config, tmp_path):
  with config.unlocked():
    minimum = config.probe.minimum_auroc
    config.probe.minimum_auroc = 1.01
  with pytest.raises(probes.WeakProbeError, match='below 1.01'):
    hallucination.run(config, tmp_path)
  with config.unlocked():
    config.probe.minimum_auroc = minimum


def test_a_context_that_is_too_short(config, tmp_path):
  with config.unlocked():
    config.lengths.completion = 100
  with pytest.raises(ValueError, match='106 tokens.*context of 40'):
    hallucination.run(config, tmp_path)
  with config.unlocked():
    config.lengths.completion = 8


def test_activations_that_the_model_lacks_are_refused_before_work(
  config, tmp_path
):
  bad = config.copy_and_resolve_references()
  with bad.unlocked():
    bad.probe.activations = ('resid_post[6:7]',)
  message = r"probe.activations=\('resid_post\[6:7\]',\): .* has 2"
  with pytest.raises(ValueError, match=message):
    hallucination.run(bad, tmp_path)
  assert not list(tmp_path.iterdir())


def test_the_key_of_a_missing_file_is_named(chat):
  for name, read in (
    ('graded', lambda: read_graded('', chat, 20)),
    ('prompts', lambda: read_prompts(('none.jsonl',), chat, 20)),
  ):
    with pytest.raises(FileNotFoundError, match=f'--config.{name}: '):
      read()


def test_what_to_install_is_said(checkpoint, monkeypatch):
  monkeypatch.setitem(sys.modules, 'transformers', None)
  with pytest.raises(ImportError, match=r"pip install -e '\.\[real\]'"):
    Chat(checkpoint)
