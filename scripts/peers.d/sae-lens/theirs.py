"""Runs in SAELens' environment: its autoencoders, in its files, and its output.

  python theirs.py FOLDER

Trains each kind for some updates with SAELens' own trainer and writes
`FOLDER/theirs/NAME/` as it does (`sae_weights.safetensors`, `cfg.json`), with
`outputs.npz` beside them: inputs, features and reconstructions. Reads each
`FOLDER/ours/NAME/` and writes what it computes as `read_by_them.npz`. What it
was, `FOLDER/theirs.json` says.
"""

import importlib.metadata
import json
import pathlib
import platform
import sys

import numpy as np
import sae_lens
from sae_lens.config import LoggingConfig, SAETrainerConfig
import torch

D, F, K = 8, 24, 3
ROWS, STEPS = 256, 200

# Of TopK also the choice that its trainer, not its reader, has as default.
KINDS = {
  'topk': sae_lens.TopKTrainingSAEConfig(
    d_in=D, d_sae=F, k=K, rescale_acts_by_decoder_norm=False
  ),
  'topk-rescaled': sae_lens.TopKTrainingSAEConfig(d_in=D, d_sae=F, k=K),
  'topk-scaled-input': sae_lens.TopKTrainingSAEConfig(
    d_in=D, d_sae=F, k=K, normalize_activations='expected_average_only_in'
  ),
  'topk-uncentred': sae_lens.TopKTrainingSAEConfig(
    d_in=D, d_sae=F, k=K, apply_b_dec_to_input=False
  ),
  'batchtopk': sae_lens.BatchTopKTrainingSAEConfig(d_in=D, d_sae=F, k=K),
  'matryoshka': sae_lens.MatryoshkaBatchTopKTrainingSAEConfig(
    d_in=D, d_sae=F, k=K, matryoshka_widths=[8, F]
  ),
  'jumprelu': sae_lens.JumpReLUTrainingSAEConfig(
    d_in=D, d_sae=F, l0_coefficient=0.1
  ),
  'gated': sae_lens.GatedTrainingSAEConfig(d_in=D, d_sae=F, l1_coefficient=0.1),
  'standard': sae_lens.StandardTrainingSAEConfig(
    d_in=D, d_sae=F, l1_coefficient=0.1
  ),
}


def batches(seed):
  """Sparse sums of unit directions, about a mean that is not 0."""
  rng = np.random.default_rng(seed)
  truth = np.random.default_rng(9).normal(size=(F, D))
  truth /= np.linalg.norm(truth, axis=1, keepdims=True)
  while True:
    active = rng.random((ROWS, F)).argsort(1) < 2
    codes = active * rng.uniform(1, 2, (ROWS, F))
    yield torch.tensor(3 * codes @ truth + 1, dtype=torch.float32)


def outputs(folder, inputs):
  """What SAELens' own reader and its autoencoder make of a folder."""
  sae = sae_lens.SAE.load_from_disk(folder)
  with torch.no_grad():
    features = sae.encode(inputs)
    return {
      'inputs': inputs.numpy(),
      'features': features.numpy(),
      'reconstruction': sae.decode(features).numpy(),
    }


def train(config):
  sae = sae_lens.TrainingSAE.get_sae_class_for_architecture(
    config.architecture()
  )(config)
  trainer = sae_lens.SAETrainer(
    SAETrainerConfig(
      total_training_samples=ROWS * STEPS,
      train_batch_size_samples=ROWS,
      lr=1e-2,
      lr_end=1e-3,
      n_batches_for_norm_estimate=10,
      logger=LoggingConfig(log_to_wandb=False),
    ),
    sae,
    batches(0),
  )
  return trainer.fit()


def main():
  folder = pathlib.Path(sys.argv[1])
  torch.set_num_threads(1)
  inputs = next(batches(1))[:20]
  for name, config in KINDS.items():
    torch.manual_seed(0)
    sae = train(config)
    to = folder / 'theirs' / name
    sae.save_inference_model(to)
    np.savez(to / 'outputs.npz', **outputs(to, inputs))
    if name.startswith('topk'):  # A checkpoint of training says more.
      to = folder / 'theirs' / f'{name}-checkpoint'
      sae.save_model(to)
      np.savez(to / 'outputs.npz', **outputs(to, inputs))
    if name in ('topk', 'topk-rescaled'):  # What it takes for what is unsaid.
      to = folder / 'theirs' / f'{name}-unsaid'
      _, path = sae.save_model(to)  # Whose decoder rows have other norms.
      raw = json.loads(path.read_text())
      del raw['rescale_acts_by_decoder_norm']
      path.write_text(json.dumps(raw))
      np.savez(to / 'outputs.npz', **outputs(to, inputs))
  for theirs in sorted((folder / 'ours').iterdir()):
    given = np.load(theirs / 'outputs.npz')['inputs']
    read = outputs(theirs, torch.tensor(given))
    np.savez(theirs / 'read_by_them.npz', **read)
    config = sae_lens.SAE.load_from_disk(theirs).cfg
    (theirs / 'metadata_read_by_them.json').write_text(
      json.dumps(config.metadata.to_dict(), default=str)
    )
  (folder / 'theirs.json').write_text(
    json.dumps(
      {
        'python': platform.python_version(),
        'packages': {
          name: importlib.metadata.version(name)
          for name in (
              'sae-lens', 'torch', 'safetensors', 'transformer-lens', 'numpy',
          )
        },
        'updates': STEPS,
        'rows_per_update': ROWS,
        'rescale_default_of_reader':
            sae_lens.TopKSAEConfig(d_in=1, d_sae=1)
            .rescale_acts_by_decoder_norm,
        'rescale_default_of_trainer':
            sae_lens.TopKTrainingSAEConfig(d_in=1, d_sae=1)
            .rescale_acts_by_decoder_norm,
      }
    )
  )  # fmt: skip


if __name__ == '__main__':
  main()
