"""Runs in TRL's environment: batches that it logs, then the benchmark.

  python theirs.py FOLDER

For each loss a real `GRPOTrainer` makes two updates from each batch of samples
(in the second the policy is no longer what was sampled from) on a tiny random
model; what goes into the loss, the loss, and its gradient with respect to the
log-probabilities are written to `FOLDER/NAME-STEP.npz`, rewards and advantages
to `FOLDER/NAME-STEP-advantages.npz`. An `RLOOTrainer` makes one update from
each batch, as its ratios are of whole samples and ours of tokens: they agree
where they are 1. The environment has this library, too, so that
`experiments.benchmarks.policy` measures both in one process.
"""

import json
import pathlib
import sys

import datasets
from experiments.benchmarks import policy as benchmark
from experiments.benchmarks.policy_peers import make_tokenizer
import numpy as np
import torch
import transformers
import trl

VOCAB, PROMPTS, GROUP, NEW, STEPS = 16, 4, 4, 6, 4
# Name -> TRL's settings; `ours.py` has ours.
LOSSES = {
  'grpo': {'loss_type': 'grpo', 'scale_rewards': 'group'},
  'dr_grpo': {'loss_type': 'dr_grpo', 'scale_rewards': 'none'},
  'dapo': {
    'loss_type': 'dapo', 'scale_rewards': 'group', 'epsilon_high': 0.28
  },
  'cispo': {
    'loss_type': 'cispo', 'scale_rewards': 'none', 'epsilon_high': 1.05
  },
}  # fmt: skip


RLOO = {
  'rloo': {'normalize_advantages': False},
  'rloo_batch': {'normalize_advantages': True},
}


class Logs:
  """Writes down what a trainer's formulas are given, and make of it."""

  folder: pathlib.Path
  name: str
  steps = 0

  def _calculate_rewards(self, *args, **kwargs):
    self.raw = super()._calculate_rewards(*args, **kwargs)
    return self.raw

  def _generate_and_score_completions(self, inputs):
    out = super()._generate_and_score_completions(inputs)
    np.savez(
      self.folder / f'{self.name}-{self.steps}-advantages.npz',
      rewards=self.raw[:, 0].numpy(), advantages=out['advantages'].numpy(),
    )  # fmt: skip
    return out

  def _get_per_token_logps_and_entropies(self, *args, **kwargs):
    out = super()._get_per_token_logps_and_entropies(*args, **kwargs)
    self.logps = out[0]
    return out

  def _compute_loss(self, model, inputs):
    loss = super()._compute_loss(model, inputs)
    (gradient,) = torch.autograd.grad(loss, self.logps, retain_graph=True)
    logps = self.logps.detach()
    old = inputs.get('old_per_token_logps')
    reference = inputs.get('ref_per_token_logps')  # RLOO has it in the reward.
    np.savez(
      self.folder / f'{self.name}-{self.steps}.npz',
      logps=logps.numpy(), old=(logps if old is None else old).numpy(),
      reference=(logps if reference is None else reference).numpy(),
      mask=inputs['completion_mask'].bool().numpy(),
      advantages=inputs['advantages'].numpy(), loss=loss.item(),
      gradient=gradient.numpy(), beta=self.beta,
    )  # fmt: skip
    self.steps += 1
    return loss


class LoggedGRPO(Logs, trl.GRPOTrainer):
  pass


class LoggedRLOO(Logs, trl.RLOOTrainer):
  pass


def reward(completion_ids, **kwargs):
  """Of some token and of length; and of all, so that no two are alike."""
  return [
    float(np.sum(np.asarray(ids) == 7) + 0.1 * len(ids) + 1e-3 * np.sum(ids))
    for ids in completion_ids
  ]


def log(folder: pathlib.Path, name: str) -> None:
  config = transformers.LlamaConfig(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32,
    bos_token_id=1, eos_token_id=2, pad_token_id=0,
  )  # fmt: skip
  transformers.set_seed(0)
  random = np.random.default_rng(0)
  text = [
    ' '.join(f't{i}' for i in random.integers(3, VOCAB, 5))
    for _ in range(PROMPTS * STEPS)
  ]
  # By its folder: the reference model is read from there.
  start = folder / f'{name}-model'
  transformers.LlamaForCausalLM(config).save_pretrained(start)
  shared = {
    'output_dir': str(folder / name), 'use_cpu': True, 'report_to': 'none',
    'bf16': False, 'per_device_train_batch_size': PROMPTS * GROUP,
    'num_generations': GROUP, 'gradient_accumulation_steps': 1,
    'max_completion_length': NEW, 'max_steps': STEPS, 'learning_rate': 0.05,
    'lr_scheduler_type': 'constant', 'save_strategy': 'no',
    'logging_strategy': 'no', 'disable_tqdm': True, 'temperature': 1.0,
    'gradient_checkpointing': False,
  }  # fmt: skip
  if name in RLOO:
    kind = LoggedRLOO
    args = trl.RLOOConfig(**shared, beta=0.0, num_iterations=1, **RLOO[name])
  else:
    kind = LoggedGRPO
    args = trl.GRPOConfig(**shared, beta=0.1, num_iterations=2, **LOSSES[name])
  trainer = kind(
    model=str(start), reward_funcs=reward, args=args,
    train_dataset=datasets.Dataset.from_dict({'prompt': text}),
    processing_class=make_tokenizer(VOCAB),
  )  # fmt: skip
  trainer.folder, trainer.name = folder, name
  trainer.train()


def main(folder: pathlib.Path) -> None:
  for name in (*LOSSES, *RLOO):
    log(folder, name)
  result = benchmark.measure((1, 8), 7)
  versions = {
    'torch': torch.__version__,
    'transformers': transformers.__version__,
  }
  result['versions'] |= versions
  (folder / 'benchmark.json').write_text(json.dumps(result), 'utf-8')


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1]))
