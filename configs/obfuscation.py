"""What is punished in sight goes underground.

  python -m experiments.obfuscation --config=configs/obfuscation.py:cpu \
      --workdir=runs/obfuscation-cpu

Presets: `smoke` (every code path, no claim meant), `cpu` (two seeds of the arms
that show the point), `paper` (five seeds of every arm), and `choose`: seeds 0
and 1, on which settings were chosen; nothing is claimed of them.
"""

import ml_collections

PRESETS = ('smoke', 'cpu', 'paper', 'choose')


def get_config(preset: str = 'cpu') -> ml_collections.ConfigDict:
  """The config of a preset, locked."""
  if preset not in PRESETS:
    raise ValueError(f'Unknown preset {preset!r}; choose from {PRESETS}.')
  config = ml_collections.ConfigDict()
  config.preset = preset
  config.seed = 2  # The first; settings were chosen on 0 and 1.
  config.num_seeds = 5
  config.world = ml_collections.ConfigDict(
    {
      # Shares of texts: without an instruction, copying allowed, an option,
      # forbidden; and how often their writers copy.
      'instructed': (0.55, 0.2, 0.1, 0.15),
      'copies': (0.1, 1.0, 0.6, 0.02),
      'hidden': 0.06,  # Of those who copy, who do not say so.
      'talk': 0.02,  # Of the others, who speak of it.
      'wrong': 0.5,
      'missing': 0.2,
    }
  )
  config.model = ml_collections.ConfigDict(
    {'d_model': 64, 'n_layers': 3, 'n_heads': 4, 'd_ff': 256}
  )
  config.base = ml_collections.ConfigDict(
    {'batch_size': 256, 'steps': 1500, 'learning_rate': 3e-3}
  )
  config.probe = ml_collections.ConfigDict(
    {
      'activation': 'resid_post[1:2]',  # A block is left after it.
      # Whether an answer is the sum a small probe cannot tell from activations
      # alone (AUROC .83): it reads how likely the base holds it as well.
      'confidence': True,
      'kind': 'mlp',
      'hidden': 32,
      'steps': 600,
      'texts': 6000,
      'minimum_auroc': 0.9,
      'accept_weak_probe': False,
    }
  )
  config.rl = ml_collections.ConfigDict(
    {
      'steps': 300,
      'prompts': 32,
      'group': 16,
      'retained': 64,  # Texts of a step, where an arm retains what is ordinary.
      'learning_rate': 5e-4,
      # Adam's, above the gradients here, so that a step is as large as what
      # there is to learn. Inoculation needs that: where an instruction allows
      # what is rewarded, almost nothing is left to learn, and it is not to be
      # blown up (arm `inoculation, normalised`).
      'eps': 1.5e-3,
      'divergence': 0.02,  # Weight, from the frozen model.
      'monitor': 1.0,  # Weight of what the monitor says; copying earns 1.
      'probe': 1.5,  # The same of the probe.
      'every': 15,  # Steps between two looks at the policy.
    }
  )
  config.exam = ml_collections.ConfigDict({'tasks': 2000, 'look': 500})
  if preset in ('cpu', 'choose'):
    config.num_seeds = 2
  if preset == 'choose':
    config.seed = 0
  if preset == 'smoke':
    config.num_seeds = 2
    config.model.d_model, config.model.d_ff = 16, 32
    config.base.batch_size, config.base.steps = 32, 60
    config.probe.steps, config.probe.texts = 20, 200
    config.probe.accept_weak_probe = True
    config.rl.steps, config.rl.every = 4, 2
    config.rl.prompts, config.rl.group = 4, 4
    config.exam.tasks, config.exam.look = 50, 20
  return config.lock()
