"""Weight decay along components of low curvature, against plain weight decay.

The same network of digits with wrong labels is trained with decay of many
strengths: plain, of all components alike, or sparing a share of them
(`curvature.decay_components`), with factors collected anew as training goes on.
`kfac` spares what has most K-FAC curvature; `batch` what has most batch
curvature, by which the edit of a trained network chooses (`memorization`);
`added` decays all components a little, and those it does not spare more. The
question is which memorizes less at an equal loss on test images.

Run: see `configs/memorization.py`, world `decay`.
"""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from experiments import contract, memorization_decay_figures
from experiments.memorization_arms import BATCH
from experiments.memorization_claims import CHOSEN_ON
from experiments.memorization_decay_claims import make_claims
from experiments.memorization_world import (
  World, losses, make_model, make_world, rows,
)  # fmt: skip
from idesign import curvature, sites, training

KERNELS = r'layer_\d+/kernel'
FISHER = curvature.Fisher(normalize='example')
ARMS = ('plain', 'kfac', 'batch', 'added')


class Trainer:
  """Trains one network at a time; compiled once for all arms and strengths."""

  def __init__(self, config, model, world: World):
    self._config, self._model = config, model
    params = jax.eval_shape(model.init, jax.random.key(0))
    images = world.images[:2]
    found = sites.find_sites(
      lambda p, x: model.apply(p, x).sum(-1), params, images, KERNELS
    )
    self._at = found.by_name
    # The strength is in the shields, so that it compiles nothing.
    self._optimizer = optax.chain(
      optax.scale_by_adam(),
      curvature.decay_components(1.0, self._at),
      optax.scale_by_learning_rate(
        optax.cosine_decay_schedule(config.learning_rate, self.num_steps(world))
      ),
    )
    self._factors = jax.jit(
      curvature.kfac_factors(model.apply, KERNELS, FISHER)
    )
    self._gradient = jax.jit(jax.grad(self._loss(BATCH.temperature)))
    self._run = jax.jit(self._steps, donate_argnums=(0, 1))

  def num_steps(self, world: World) -> int:
    return self._config.epochs * (
      int(world.train.sum()) // self._config.batch_size
    )

  def __call__(self, world: World, seed: int, arm: str, strength: float):
    """The trained parameters."""
    c = self._config
    data = rows(world, world.train)
    batches = training.Batches(data, c.batch_size, seed=seed)
    params = self._model.init(jax.random.key(seed))
    state = self._optimizer.init(params)
    # There is no curvature to speak of before anything is learned.
    least = c.floor if arm == 'added' else 0.0
    shields = self._shields(params, data, seed, 'plain', least + strength)
    total, done = self.num_steps(world), 0
    while done < total:
      count = min(c.refresh, total - done)
      part = [batches.batch(done + i) for i in range(count)]
      stacked = jax.tree.map(lambda *x: np.stack(x), *part)
      params, state = self._run(params, state, shields, stacked)
      done += count
      if arm != 'plain' and done < total:
        shields = self._shields(params, data, seed, arm, strength)
    return params

  def _loss(self, temperature):
    each = losses(self._model, temperature)
    return lambda params, batch: jnp.mean(each(params, batch))

  def _steps(self, params, state, shields, batches):
    loss = self._loss(1.0)

    def step(carry, batch):
      params, state = carry
      grads = jax.grad(loss)(params, batch)
      updates, state = self._optimizer.update(
        grads, state, params, shields=shields
      )
      return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), batches)[0]

  def _shields(self, params, data, seed, arm, strength):
    """What decays at which strength.

    Of components that are spared `floor` (of `added`; of others nothing), of
    all others `floor + strength`.
    """
    spared, bases = {}, {}
    if arm != 'plain':
      bases = curvature.spectra(
        self._factors(params, data['image'], key=jax.random.key(seed))
      )
      scores = self._scores(params, data, bases, arm)
    for name, site in self._at.items():
      if arm == 'plain':
        spared[name] = np.zeros((site.d_in, site.d_out))
        bases[name] = _identity(site)
      else:
        spared[name] = curvature.score_masks(
          scores[name], share=self._config.kept
        )
    floor = self._config.floor if arm == 'added' else 0.0
    masks = {n: 1 - floor - strength * (1 - m) for n, m in spared.items()}
    return curvature.shields(bases, masks)

  def _scores(self, params, data, bases, arm):
    """By which components are spared, site -> `[d_in, d_out]`."""
    if arm == 'kfac':
      return {name: bases[name].mass() for name in self._at}
    # The square of what all images together pull at a component, which is what
    # `Moments.batch_curvature` measures.
    gradient = self._gradient(params, data)
    leaves = dict(zip(sites.leaf_paths(gradient), jax.tree.leaves(gradient)))
    out = {}
    for name, site in self._at.items():
      g = np.asarray(site.matrix(leaves[site.path]), np.float64)
      out[name] = (
        bases[name].input_basis.T @ g @ bases[name].output_basis
      ) ** 2
    return out


def _identity(site) -> curvature.Spectrum:
  one = lambda n: (np.ones(n), np.eye(n))
  zero = np.zeros(())
  return curvature.Spectrum(*one(site.d_in), *one(site.d_out), zero, zero)


def measure(model, world: World, params) -> dict[str, float]:
  """Accuracies in percent, and the loss on test images in nats."""
  logits = np.asarray(model.apply(params, world.images), np.float64)
  said = logits.argmax(-1)
  percent = lambda hits: 100 * float(hits.mean())
  log_p = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
  nll = -log_p[np.arange(len(said)), world.truth]
  return {
    'memorized': percent((said == world.labels)[world.noisy]),
    'recovered': percent((said == world.truth)[world.noisy]),
    'clean': percent((said == world.truth)[world.train & ~world.noisy]),
    'test': percent((said == world.truth)[world.split == 2]),
    'test_loss': float(nll[world.split == 2].mean()),
    'held_out_loss': float(nll[world.split == 1].mean()),
  }


def run(config, folder: pathlib.Path) -> None:
  """Trains every arm at every strength; resumes by network."""
  seeds = contract.reported_seeds(config, CHOSEN_ON)
  worlds = [make_world(s, **config.data.to_dict()) for s in seeds]
  workdir = contract.Workdir(
    folder, config, contract.fingerprint(*(a for w in worlds for a in w))
  )
  model = make_model(config)
  trainer = Trainer(config, model, worlds[0])

  def one(world, seed, arm, strength) -> dict[str, Any]:
    params = trainer(world, seed, arm, strength)
    return {'strength': strength, **measure(model, world, params)}

  for seed, world in zip(seeds, worlds):
    for arm in ARMS:
      for strength in tqdm.tqdm(config.strengths[arm], desc=f'{seed}, {arm}'):
        workdir.arm(
          f'{seed}/{arm}/{strength:g}',
          functools.partial(one, world, seed, arm, strength),
        )
  claims = []
  if config.preset != 'choose':
    claims = make_claims(config, workdir.results, seeds)
  contract.save_claims(workdir.path / 'claims.json', claims)
  if jax.process_index() == 0:
    memorization_decay_figures.draw(workdir.path)
