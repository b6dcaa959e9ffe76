"""Runs in Opacus' environment: its per-example gradients, then the products.

  python theirs.py FOLDER [PROGRAM]

The model is transformers' own, from the Hugging Face folder that this library
wrote; only its projections are differentiated. `GradSampleModule` leaves the
gradient of every example in `grad_sample`. Without PROGRAM it runs itself once
for each, in a process of its own.
"""

import json
import pathlib

import clock
import numpy as np
from opacus import GradSampleModule
import problem
import records
import torch
import transformers

# Our paths, theirs: kernels are [in, out] here and [out, in] there.
NAMES = {
  **{f'blocks/attn/{x}/kernel': f'self_attn.{x}_proj' for x in 'qkvo'},
  **{
    f'blocks/mlp/{x}/kernel': f'mlp.{x}_proj' for x in ('gate', 'up', 'down')
  },
}


def run(folder: pathlib.Path, name: str) -> None:
  tokens, sides = problem.load(folder)
  tokens = torch.tensor(tokens, dtype=torch.long)
  directions = {k: [torch.tensor(x) for x in v] for k, v in sides.items()}
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder / 'model', dtype=torch.float32
  )
  model.train()
  model.requires_grad_(False)
  layers = len(model.model.layers)
  modules = {
    path: [
      model.model.layers[i].get_submodule(NAMES[path]) for i in range(layers)
    ]
    for path in directions
  }
  for linears in modules.values():
    for linear in linears:
      linear.weight.requires_grad_(True)
  # Not strict: rotary embeddings keep their frequencies in a buffer.
  wrapped = GradSampleModule(model, loss_reduction='sum', strict=False)

  def scores(tokens):
    wrapped.zero_grad(set_to_none=True)
    logits = wrapped(tokens[:, :-1], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(
      logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction='sum'
    )
    loss.backward()
    total = 0.0
    for path, linears in modules.items():
      a, b = directions[path]
      for layer, linear in enumerate(linears):
        gradient = linear.weight.grad_sample
        total = total + torch.einsum(
          'ci,co,boi->bc', a[:, layer], b[:, layer], gradient
        )
        linear.weight.grad_sample = None
    return total.detach()

  size = problem.PROGRAMS[name] or len(tokens)
  call = lambda: torch.cat([scores(part) for part in tokens.split(size)])
  measured = clock.measure(lambda: call)
  np.save(folder / f'{name}.npy', call().numpy())
  (folder / f'{name}.json').write_text(json.dumps(measured), 'utf-8')


if __name__ == '__main__':
  records.answer(
    run, problem.PROGRAMS, ('opacus', 'torch', 'transformers', 'numpy')
  )
