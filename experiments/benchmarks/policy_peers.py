"""The other side of the policy benchmark: transformers and TRL, and the model.

Their libraries are imported where they are used: TRL is in an environment of
its own (`scripts/peers trl`).
"""

from __future__ import annotations

from collections.abc import Callable
import pathlib
import time
from typing import Any

import numpy as np

PROMPT, NEW, GROUP, VOCAB = 32, 64, 8, 512
BETA = 0.04


def write_model(folder: pathlib.Path) -> None:
  """A random Llama, as transformers writes it."""
  import transformers  # Only here: it is slow to import.

  config = transformers.LlamaConfig(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=172,
    num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=4,
    max_position_embeddings=PROMPT + NEW, tie_word_embeddings=True,
    bos_token_id=1, eos_token_id=2, pad_token_id=0,
  )  # fmt: skip
  transformers.set_seed(0)
  transformers.LlamaForCausalLM(config).save_pretrained(folder)


def counted(tokens) -> Any:
  """The reward: how often token 7 is said."""
  return (tokens == 7).sum(-1)


def make_generate(folder: pathlib.Path, prompts: np.ndarray):
  """`generate` of transformers on the same prompts."""
  import torch
  import transformers

  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32
  ).eval()
  tokens = torch.tensor(np.repeat(prompts, GROUP, axis=0))

  def generate():
    with torch.inference_mode():
      out = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=True,
        top_k=0, max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0,
      )  # fmt: skip
    assert out.shape[1] == PROMPT + NEW
    return out

  return generate


def make_trainer(folder: pathlib.Path, prompts: np.ndarray, steps: int):
  """`GRPOTrainer`; `train()` leaves the seconds of each step in a list."""
  import datasets
  import transformers
  import trl

  seconds: list[float] = []

  class Clock(transformers.TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
      self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
      seconds.append(time.perf_counter() - self.began)

  text = [' '.join(f't{i}' for i in row) for row in prompts]
  scratch = folder / 'trl'
  trainer = trl.GRPOTrainer(
    model=str(folder),
    reward_funcs=lambda completion_ids, **kw: [
      float(counted(np.asarray(ids))) for ids in completion_ids
    ],
    args=trl.GRPOConfig(
      output_dir=str(scratch), use_cpu=True, report_to='none', bf16=False,
      per_device_train_batch_size=len(prompts) * GROUP, num_generations=GROUP,
      gradient_accumulation_steps=1, max_completion_length=NEW, max_steps=steps,
      beta=BETA, loss_type='grpo', learning_rate=1e-5, save_strategy='no',
      logging_strategy='no', disable_tqdm=True, temperature=1.0, top_k=0,
      generation_kwargs={'min_new_tokens': NEW}, gradient_checkpointing=False,
    ),
    train_dataset=datasets.Dataset.from_dict({'prompt': text * steps}),
    processing_class=make_tokenizer(VOCAB),
    callbacks=[Clock()],
  )  # fmt: skip
  return trainer, seconds


def after_each_step(call: Callable[[], None]):
  import transformers

  class After(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
      call()

  return After()


def make_tokenizer(vocab: int):
  """Of words `t0`, `t1`, ...: each is a token."""
  import tokenizers
  import transformers

  words = {f't{i}': i for i in range(vocab)}
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(words, unk_token='t0')
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, pad_token='t0', eos_token='t2', bos_token='t1'
  )
