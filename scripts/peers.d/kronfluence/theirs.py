"""Runs in kronfluence's environment: its factors, and those of plain hooks.

  python theirs.py FOLDER [PROGRAM]

The model is transformers' own, from the Hugging Face folder that this library
wrote. `kronfluence`: its covariances and eigendecompositions, through the files
that it keeps them in. `torch hooks`: what a script would do, as the published
one does: a hook at every projection that adds to `x^T x` and `g^T g`. Both get
new weights in the same way: components sorted by the product of eigenvalues.
"""

import json
import pathlib

import clock
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments
from kronfluence.task import Task
from layers import NAMES
import numpy as np
import records
import torch
import transformers

PROGRAMS = ('kronfluence', 'torch hooks')


def cross_entropy(model, tokens):
  logits = model(tokens[:, :-1], use_cache=False).logits
  return torch.nn.functional.cross_entropy(
    logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction='sum'
  )


class NextToken(Task):
  def __init__(self, modules):
    self.modules = modules

  def compute_train_loss(self, batch, model, sample=False):
    return cross_entropy(model, batch)

  def compute_measurement(self, batch, model):
    return self.compute_train_loss(batch, model)

  def get_influence_tracked_modules(self):
    return self.modules


class Kronfluence:
  """Factors by kronfluence's public functions."""

  def __init__(self, folder, model, modules, tokens, part):
    self.modules, self.tokens, self.part = modules, tokens, part
    names = list(modules)
    task = NextToken(names)
    self.analyzer = Analyzer(
      'factors', prepare_model(model, task), task, cpu=True,
      output_dir=str(folder / 'kronfluence'), disable_tqdm=True,
    )  # fmt: skip
    self.options = FactorArguments(use_empirical_fisher=True)

  def factors(self):
    self.analyzer.fit_covariance_matrices(
      'all', self.tokens, per_device_batch_size=self.part,
      factor_args=self.options, overwrite_output_dir=True,
    )  # fmt: skip
    found = self.analyzer.load_covariance_matrices('all')
    return {
      name: (
        found['activation_covariance'][name], found['gradient_covariance'][name]
      )
      for name in self.modules
    }  # fmt: skip

  def bases(self, factors):
    del factors  # It reads its own files.
    self.analyzer.perform_eigendecomposition(
      'all', factor_args=self.options, overwrite_output_dir=True
    )
    found = self.analyzer.load_eigendecomposition('all')
    sides = ('activation', 'gradient')
    return {
      name: tuple(
        (found[f'{s}_eigenvalues'][name], found[f'{s}_eigenvectors'][name])
        for s in sides
      )
      for name in self.modules
    }


class Hooks:
  """Factors by forward and backward hooks."""

  def __init__(self, folder, model, modules, tokens, part):
    del folder
    self.modules, self.tokens, self.part = modules, tokens, part
    self.model = model.requires_grad_(False)
    # So that there is a graph: everything after it has a gradient.
    model.get_input_embeddings().weight.requires_grad_(True)
    for name, module in modules.items():
      module.register_forward_hook(self.hook(name))

  def hook(self, name):
    def backward(g):
      g = g.flatten(0, -2)
      self.sums[name][1].addmm_(g.T, g)

    @torch.no_grad()
    def forward(module, inputs, output):
      if self.sums is not None:
        x = inputs[0].flatten(0, -2)
        self.sums[name][0].addmm_(x.T, x)
        output.register_hook(backward)

    return forward

  sums = None

  def factors(self):
    square = lambda n: torch.zeros(n, n)
    self.sums = {
      name: (square(m.in_features), square(m.out_features))
      for name, m in self.modules.items()
    }
    for tokens in self.tokens.split(self.part):
      cross_entropy(self.model, tokens).backward()
    self.model.zero_grad(set_to_none=True)
    sums, self.sums = self.sums, None
    return sums

  def bases(self, factors):
    solve = lambda moment: torch.linalg.eigh(moment.double())
    return {name: tuple(map(solve, pair)) for name, pair in factors.items()}


def edit(w, basis, mass):
  """New weights of one projection, `[out, in]`."""
  (inputs, u), (outputs, v) = (
    (torch.clamp(e.double(), min=0), b.double()) for e, b in basis
  )
  products = torch.outer(outputs, inputs).flatten()
  order = torch.argsort(products, descending=True, stable=True)
  total = torch.cumsum(products[order], 0)
  count = int(torch.searchsorted(total, mass * total[-1])) + 1
  kept = torch.zeros_like(products)
  kept[order[:count]] = 1
  coefficients = (v.T @ w.double() @ u) * kept.view(len(outputs), len(inputs))
  return (v @ coefficients @ u.T).to(w.dtype)


def run(folder: pathlib.Path, name: str) -> None:
  problem = json.loads((folder / 'problem.json').read_text('utf-8'))
  tokens = torch.tensor(np.load(folder / 'tokens.npy'), dtype=torch.long)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder / 'model', dtype=torch.float32
  )
  depth = range(len(model.model.layers))
  paths = {
    path: [f'model.layers.{i}.{theirs}' for i in depth]
    for path, theirs in NAMES.items()
  }
  modules = {
    module: model.get_submodule(module) for p in paths.values() for module in p
  }
  weights = {k: m.weight.detach().clone() for k, m in modules.items()}

  def prepare():
    kind = {'kronfluence': Kronfluence, 'torch hooks': Hooks}[name]
    made.append(kind(folder, model, modules, tokens, problem['part']))
    return whole

  def whole():
    factors = made[0].factors()
    bases = made[0].bases(factors)
    with torch.no_grad():
      edited = {
        k: edit(w, bases[k], problem['mass']) for k, w in weights.items()
      }
    return factors, edited

  made = []
  measured = clock.measure(prepare)
  factors, edited = whole()
  measured['factors'] = clock.seconds(made[0].factors)
  measured['gradient'] = clock.seconds(
    lambda: gradient(folder, tokens, problem['part'])
  )
  arrays = {}
  for path, names in paths.items():
    stack = lambda of: np.stack([of(k).numpy() for k in names])
    arrays[f'{path} input'] = stack(lambda k: factors[k][0])
    arrays[f'{path} output'] = stack(lambda k: factors[k][1])
    arrays[f'{path} edited'] = stack(lambda k: edited[k].T)
  np.savez(folder / f'{name}.npz', **arrays)
  (folder / f'{name}.json').write_text(json.dumps(measured), 'utf-8')


_PLAIN = []


def gradient(folder, tokens, part) -> None:
  """The gradient of all weights, of a model without hooks."""
  if not _PLAIN:
    _PLAIN.append(
      transformers.AutoModelForCausalLM.from_pretrained(
        folder / 'model', dtype=torch.float32
      )
    )
  for piece in tokens.split(part):
    _PLAIN[0].zero_grad(set_to_none=True)
    cross_entropy(_PLAIN[0], piece).backward()


if __name__ == '__main__':
  records.answer(
    run, PROGRAMS, ('kronfluence', 'torch', 'transformers', 'numpy')
  )
