"""Texts that language models have by heart; see `configs/memorization.py`.

Table 3 of Merullo et al. 2025 (arXiv 2510.24256): OLMo-2-7B recites 99.9 -> 3.4
% of what it has by heart. Here: a small language, any Hugging Face folder, and
OLMo itself.
"""

import ml_collections


def language(config) -> None:
  """Sequences that a small language model recites, see `recitation.py`."""
  config.seed, config.num_seeds = 10, 5  # 0 and 1 belong to choosing.
  config.language = ml_collections.ConfigDict(
    {
      'recited': 256,  # Sequences that are learned by heart.
      'facts': 128,  # Half of them rare.
      'rarity': 10.0,  # How much more often a frequent one is read.
      'mix': {
        'recite': 22, 'strangers': 4, 'copy': 8, 'reverse': 8, 'increment': 8,
        'sort': 16, 'facts': 12, 'book': 22, 'sums': 28,
      },
    }
  )  # fmt: skip
  config.model = ml_collections.ConfigDict(
    {'d_model': 96, 'n_layers': 3, 'n_heads': 4, 'd_ff': 384}
  )
  config.batch_size, config.steps, config.warmup = 128, 3000, 100
  config.learning_rate, config.weight_decay = 2e-3, 0.1
  config.factors = ml_collections.ConfigDict(
    {
      'rows': 8192,
      'batch': 256,
      'answers': False,  # Factors of all positions, not of answers alone.
    }
  )
  config.exam = 256  # New rows of each task.
  up, down = 'blocks/mlp/up/kernel', 'blocks/mlp/down/kernel'
  config.layer_sets = (
    (up,),
    (up, f'{down}[0:2]'),
    (up, down),
    (f'{up}[0:2]', f'{down}[0:2]'),
    (f'{up}[0:1]', f'{down}[0:1]'),
    (f'{up}[0:2]',),
  )
  config.arms = (
    'kfac', 'kfac_mix', 'kfac_t1', 'ekfac', 'measured', 'svd', 'magnitude',
    'salient', 'random', 'subnet',
  )  # fmt: skip
  config.strengths = ml_collections.ConfigDict(
    {
      'kfac': (0.8, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.35),
      # These damage everything sooner.
      'svd': (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3),
      'magnitude': (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2),
      'random': (0.995, 0.99, 0.98, 0.965, 0.95, 0.92, 0.88, 0.8),
      'subnet': (0.9995, 0.999, 0.998, 0.995, 0.99, 0.98, 0.96, 0.92),
    }
  )
  config.order = (
    0.9, 0.8, 0.7, 0.6, 0.5, 0.42, 0.35, 0.28, 0.22, 0.16, 0.12, 0.08, 0.05,
    0.03, 0.02,
  )  # fmt: skip
  config.leave_out = True
  # Of sums in the factors, next to what the rest weighs.
  config.sums_weights = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
  config.sums_weight = 0.1
  config.subnet = ml_collections.ConfigDict(
    {'steps': 40, 'batch': 64, 'forget': 0.7, 'learning_rate': 0.3}
  )
  config.relearning = ml_collections.ConfigDict(
    {'rate': 1e-3, 'steps': 60, 'every': 5}
  )
  config.components = ml_collections.ConfigDict(
    {'per_layer': 150, 'rows': 2048}
  )
  # Layer set and share kept, from seeds 0 and 1 (preset choose); frozen.
  config.operating_points = ml_collections.ConfigDict({
      'kfac': (1, 0.65), 'kfac_mix': (1, 0.65), 'kfac_t1': (3, 0.65),
      'ekfac': (1, 0.65), 'measured': (3, 0.55), 'svd': (5, 0.8),
      'magnitude': (3, 0.7), 'salient': (2, 0.45), 'random': (1, 0.99),
      'subnet': (1, 0.999),
  })  # fmt: skip
  if config.preset == 'choose':
    config.seed, config.num_seeds = 0, 2
    config.operating_points = ml_collections.ConfigDict(
      {arm: (5, 0.55) for arm in config.arms}
    )
  if config.preset == 'cpu':
    config.num_seeds = 2
    config.arms = ('kfac', 'svd', 'random')
    config.leave_out = False
    config.components.per_layer = 0
  if config.preset == 'smoke':
    config.num_seeds = 2
    config.language.recited, config.language.facts = 16, 12
    config.model.d_model, config.model.d_ff = 16, 32
    config.batch_size, config.steps, config.warmup = 32, 20, 2
    config.factors.rows, config.factors.batch, config.exam = 64, 32, 8
    config.layer_sets = config.layer_sets[1:2]
    config.operating_points = ml_collections.ConfigDict(
      {arm: (0, 0.8) for arm in config.arms}
    )
    config.strengths = ml_collections.ConfigDict({'kfac': (0.8,)})
    config.order = (0.9, 0.1)
    config.sums_weights, config.subnet.steps = (0.1,), 2
    config.subnet.batch = 8
    config.relearning.steps = 5
    config.components.per_layer, config.components.rows = 10, 64


def pretrained(config) -> None:
  """A small pretrained model and its own phrases."""
  data = '../shared/data'
  config.seed, config.num_seeds = 10, 1
  config.model = ml_collections.ConfigDict(
    {
      'path': f'{data}/lm_stories260K/hf',
      'dtype': 'float32',
      'bos': '<s>',  # That begins every text; '' for none.
    }
  )
  config.select = ('blocks/mlp/(gate|up)/kernel[2:5]',)
  config.mass = 0.98  # Of the edit that is saved; published for OLMo: 0.6.
  config.perplexity_limit = 1.2  # At which arms are compared.
  config.eigen = 'host'  # Or 'devices', in float32.
  # Texts of factors; others than `text` are mixed in, an arm each.
  config.factors = ml_collections.ConfigDict(
    {'text': (f'{data}/text_tinystories/tinystories_sample.txt',)}
  )
  config.mixture = 1.0  # Weight of the other text.
  config.batch, config.length, config.num_batches = 8, 128, 16
  config.save_every = 8
  config.perplexity = ml_collections.ConfigDict(
    {'stories': (f'{data}/text_tinystories/tinystories_sample.txt',)}
  )
  config.passages = ml_collections.ConfigDict({})  # Name -> JSON Lines.
  config.phrases = ml_collections.ConfigDict(
    {'stories': 2048, 'length': 96, 'least': 6, 'most': 200}
  )
  config.questions = ml_collections.ConfigDict({})  # Name -> JSON Lines.
  config.exam = ml_collections.ConfigDict(
    {'batch': 16, 'prefix': 6, 'suffix': 9, 'length': 256}
  )
  # Of `kfac` the share of curvature mass that is kept, else of components.
  config.strengths = ml_collections.ConfigDict(
    {
      'kfac': (0.999, 0.995, 0.99, 0.98, 0.95, 0.9, 0.8, 0.6),
      'svd': (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2),
      'random': (0.99, 0.98, 0.97, 0.95, 0.92, 0.9, 0.85, 0.8),
    }
  )
  config.mesh = ml_collections.ConfigDict({'data': -1, 'model': 1})
  # Memory of a device, and its speed; 0 if that is not known.
  config.hardware = ml_collections.ConfigDict({'gib': 8.0, 'tflops': 0.0})
  if config.preset == 'smoke':
    config.num_batches, config.batch, config.length = 2, 8, 32
    config.phrases.stories, config.phrases.least = 64, 2
    config.strengths = ml_collections.ConfigDict(
      {'kfac': (0.9,), 'svd': (0.5,), 'random': (0.9,)}
    )


def full() -> ml_collections.ConfigDict:
  """The published experiment: OLMo-2-7B, on accelerators.

    python -m experiments.memorization --workdir=runs/full \\
        --config=configs/memorization.py:full \\
        --config.model.path=OLMo-2-1124-7B \\
        --config.factors.text="('TEXT.txt',)" \\
        --config.perplexity.text="('HELD_OUT.txt',)"

  On a TPU v5e-16, say: `mesh.model` of 8, 16 GiB and 197 TFLOP/s a device. The
  plan that is printed first says what it takes. It has not been run yet.
  """
  config = ml_collections.ConfigDict()
  config.world, config.preset = 'pretrained', 'full'
  pretrained(config)
  config.model.path, config.model.dtype, config.model.bos = '', 'bfloat16', ''
  config.mass = 0.6
  config.select = ('blocks/mlp/(gate|up)/kernel[23:26]',)
  config.eigen = 'devices'
  config.factors.text = ('',)
  # 20 million tokens, as published.
  config.batch, config.length, config.num_batches = 32, 512, 1221
  config.save_every = 50
  config.perplexity = ml_collections.ConfigDict({'text': ('',)})
  data = '../shared/data/memorization_olmo'
  config.passages = ml_collections.ConfigDict(
    {
      'dolma': f'{data}/olmo_7b_dolma_dedup_val.jsonl',
      'quotes': f'{data}/olmolarge8_bfloat16.jsonl',
    }
  )
  config.phrases.stories = 0
  config.questions = ml_collections.ConfigDict({'boolq': '', 'bbh': ''})
  config.exam = ml_collections.ConfigDict(
    {'batch': 32, 'prefix': 64, 'suffix': 48, 'length': 1024}
  )
  config.mesh.model = 8
  config.hardware.gib, config.hardware.tflops = 16.0, 197.0
  return config
