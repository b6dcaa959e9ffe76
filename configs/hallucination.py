"""Reward from a probe that reads a frozen model: fewer hallucinations.

  python -m experiments.hallucination --config=configs/hallucination.py:cpu \
      --workdir=runs/hallucination-cpu

The argument is `[WORLD-]PRESET`. Worlds: `people` (the default, made up) and
`facts` (of Wikidata and the relations data set, read from `config.data_dir`).
Presets: `smoke` (what the claims need, in little; no claim meant), `cpu` (two
seeds of the arms that show the point, some two hours on one core), `paper`
(five seeds: of `people` every arm, of `facts` those of `cpu`), and `choose`:
those of `cpu` on seeds 0 and 1, measured on validation subjects, on which
settings were chosen; nothing is claimed of them.

`full` is another command: an instruct model of your own and its graded answers
(`experiments/hallucination_text.py` describes the files), on accelerators:

  python -m experiments.hallucination --config=configs/hallucination.py:full \
      --config.model.path=MODEL --config.graded=GRADED.jsonl \
      --config.prompts="('PROMPTS.jsonl',)" --workdir=runs/hallucination-full

It says what memory and time it will take before it begins, and stops if a
device has too little; it has not been run on an accelerator yet. As configured
a model of a billion parameters takes 4e15 FLOP a step and, with a vocabulary of
128 thousand, 168 GB of logits over all devices (256 answers of 1,280 tokens):
on few devices lower `rl.prompts`, `rl.group` or `lengths.completion`. The
published run, of 12 billion, took 12 hours on 128 H200.
"""

import ml_collections

WORLDS = ('people', 'facts')
PRESETS = ('smoke', 'cpu', 'paper', 'choose')


def get_config(preset: str = 'cpu') -> ml_collections.ConfigDict:
  """The config of `[world-]preset`, locked."""
  if preset == 'full':
    return _full().lock()
  world, _, name = preset.rpartition('-')
  world = world or 'people'
  if world not in WORLDS or name not in PRESETS:
    raise ValueError(
      f'Unknown preset {preset!r}: it is [WORLD-]PRESET with a world of '
      f'{WORLDS} and a preset of {PRESETS}, such as people-cpu, or full.'
    )
  config = ml_collections.ConfigDict()
  config.preset = name
  config.kind = world
  config.data_dir = '../shared/data'
  config.seed = 2  # The first; settings were chosen on 0 and 1.
  config.num_seeds = 5
  config.world = _world(world)
  config.model = ml_collections.ConfigDict(
    {'d_model': 64, 'n_layers': 4, 'n_heads': 4, 'd_ff': 256}
  )
  config.base = ml_collections.ConfigDict(
    {
      'rows': 64,  # Per step, each of these short texts and one list.
      'short_texts': 7,
      'steps': 1500,
      'learning_rate': 4e-3,
    }
  )
  config.probe = ml_collections.ConfigDict(
    {
      'kind': 'mlp',
      'activation': 'resid_post[2:3]',  # A block is left after it.
      'confidence': False,  # Whether it reads log-probabilities as well.
      'pool': 'mean',  # Over the claim's two tokens.
      'hidden': 32,
      'steps': 600,
      'texts': 100,  # Questions of each subject, to fit on.
      'validation_texts': 60,
      'test_texts': 60,
      'lists': 4,  # Of each subject.
      'corrections': 4,  # One in so many claims is doubted.
      'false_positive_rate': 0.2,  # Of true claims, the monitor's.
      'null_repeats': 3,
      'minimum_auroc': 0.9,
      'accept_weak_probe': False,
    }
  )
  config.rl = ml_collections.ConfigDict(
    {
      'steps': 220,
      'asked': 24,  # Prompts of a batch.
      'chosen': 24,
      'doubted': 16,
      'group': 16,
      'learning_rate': 5e-4,
      'divergence': 0.3,  # Weight, from the frozen model.
      'retain': 1.0,  # The same, on texts of capabilities.
      'retained': 32,  # Texts of each capability.
      'scale': 'batch',
      'assertion': 1.1,
      'bonus': 0.7,
      'weight': 2.0,  # Of a doubt.
      'intervention': 2.0,
      'retraction': 0.3,
      'drafts': 20,  # Questions of each policy subject, to be doubted.
      'every': 55,  # Steps between two looks at the policy.
    }
  )
  config.exam = ml_collections.ConfigDict(
    {
      'texts': 60,  # Questions of each subject.
      'curve_texts': 20,  # The same on the way, of validation subjects.
      'best_of': 16,  # Answers, at most.
      'lists': 20,  # Of each subject, under a monitor.
    }
  )
  config.arms = 'paper' if world == 'people' else 'cpu'
  if world == 'facts':
    config.seed = 7  # On 2 to 6 other settings were looked at.
    # What was never mentioned is not marked as unknown by training, as what is
    # said differently every time is: from activations alone a probe learns its
    # subjects by heart.
    config.probe.confidence, config.probe.pool = True, 'last'
    # A guess of real facts is often right: doubts are lower, and cost more. Of
    # what claims are changed to there is little, and much depends on it.
    config.probe.corrections = 1
    config.rl.weight, config.rl.doubted = 2.5, 24
    config.rl.intervention, config.rl.retraction = 4.0, 0.1
  if name == 'cpu':
    config.num_seeds, config.arms = 2, 'cpu'
  if name == 'choose':
    config.seed, config.num_seeds, config.arms = 0, 2, 'cpu'
  if name == 'smoke':
    _smoke(config)
  return config.lock()


def _world(world: str) -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict(
    {
      'idk': 0.05,  # How often texts say that they do not know.
      'held_out': 3000,  # Groups of numbers, of each capability.
      'sorted_numbers': 24,
      # Weights of known, noisy and unknown in what writers speak of.
      'careful': (4.0, 1.5, 0.5),
      'careless': (1.0, 1.0, 1.5),
      'chosen': (2.0, 1.5, 1.0),
      'doubted': 0.3,
      # Maintain, retract, correct: of careful writers who are right, and who
      # are wrong, and of careless ones.
      'responses': ((0.8, 0.1, 0.1), (0.1, 0.45, 0.45), (0.45, 0.1, 0.45)),
      # Shares of texts: asked, chosen, doubted, maximum, sorting.
      'mix': (0.4, 0.25, 0.15, 0.1, 0.1),
    }
  )
  if world == 'people':
    config.subjects, config.num_attributes, config.num_values = 512, 6, 16
    config.shares = (0.4, 0.2, 0.4)  # Known, noisy, unknown.
    config.noise = 0.62
    config.groups = ml_collections.ConfigDict(
      {'probe': 128, 'policy': 224, 'validation': 48}
    )
  else:
    config.subjects = ml_collections.ConfigDict(
      {'players': 240, 'cities': 240, 'others': 120}
    )
    # Known facts of a subject, at least.
    config.least = ml_collections.ConfigDict(
      {'players': 3, 'cities': 5, 'others': 1}
    )
    config.num_values = 32  # Of an attribute, at most.
    config.exemplars = 96
    config.taught = 0.5  # Share of the facts of other subjects.
    config.groups = ml_collections.ConfigDict(
      {'probe': 130, 'policy': 190, 'validation': 70}
    )
  return config


def _smoke(config) -> None:
  config.num_seeds, config.arms = 2, 'smoke'
  w = config.world
  w.held_out, w.sorted_numbers = 20, 10
  w.groups.probe, w.groups.policy, w.groups.validation = 12, 12, 8
  if config.kind == 'people':
    w.subjects = 40
    w.shares = 0.5, 0.1, 0.4
  else:
    w.subjects.players, w.subjects.cities, w.subjects.others = 20, 20, 8
    w.exemplars = 8
  config.model.d_model, config.model.d_ff = 32, 64
  config.base.rows, config.base.steps = 16, 300
  config.base.learning_rate = 1e-2
  p = config.probe
  p.steps, p.texts, p.validation_texts, p.test_texts = 100, 40, 40, 40
  p.corrections = 1
  p.null_repeats, p.accept_weak_probe = 2, True
  r = config.rl
  r.steps, r.asked, r.chosen, r.doubted, r.group = 4, 2, 2, 2, 4
  r.retained, r.drafts, r.every = 2, 8, 2
  config.exam.texts, config.exam.curve_texts, config.exam.best_of = 8, 8, 4
  config.exam.lists = 4


def _full() -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.preset = 'full'
  config.kind = 'text'
  config.seed = 2
  config.num_seeds = 1
  config.arms = ('none', 'frozen')
  config.model = ml_collections.ConfigDict(
    {'path': '', 'dtype': 'bfloat16', 'remat': True}
  )
  config.graded = ''  # A file of graded texts.
  config.prompts = ('',)  # Files of prompts, such as LongFact's.
  config.mesh = ml_collections.ConfigDict({'data': -1, 'model': 1})
  config.lengths = ml_collections.ConfigDict(
    {'prompt': 256, 'completion': 1024}  # Tokens.
  )
  config.probe = ml_collections.ConfigDict(
    {
      'kind': 'attention',
      # Of 48 layers the published probes read 20 and 30.
      'activations': ('resid_post[6:7]', 'resid_post[10:11]'),
      'hidden': 128,  # Of each head.
      'heads': 16,
      'steps': 3000,
      'batch': 16,  # Texts that are read at a time.
      'tokens': 200_000,  # At most, to learn where claims are.
      'most_claims': 64,  # That are read in an answer.
      'false_positive_rate': 0.2,
      'minimum_auroc': 0.9,
      'accept_weak_probe': False,
    }
  )
  config.rl = ml_collections.ConfigDict(
    {
      'steps': 300,
      'prompts': 16,  # Of a batch.
      'group': 16,
      'adapted': 'blocks/.*/kernel',
      'rank': 32,
      'alpha': 64.0,
      'learning_rate': 2e-5,
      'weight': 2.0,  # Of a doubt.
      'gain': 0.2,  # Of the constraint on claims.
      'cap': 4.0,  # Of the importance ratio.
      'divergence': 'k1',
      'divergence_weight': 0.02,
      'minibatches': 4,
      'save_every': 25,
      'audit_every': 50,  # Steps after which the probe is asked of the policy.
    }
  )
  config.exam = ml_collections.ConfigDict(
    {
      'prompts': 256,  # Held out; two answers to each.
      'batch': 32,  # Of them at a time.
      'audit': 1024,  # Graded claims that every arm reads.
    }
  )
  return config
