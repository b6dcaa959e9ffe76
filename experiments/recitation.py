"""Sequences that a small language model recites, removed by curvature.

A small decoder learns, beside tasks with a rule, facts, look-ups in an open
book and sums, 256 random sequences by heart. Keeping the weight components of
high curvature makes it forget them. The factors see no recitation: who edits
knows what the model is for, and need not know what it has memorized.

Controls, each with a grid of the same size: rank truncation, magnitude,
saliency (optimal brain damage), a random choice of components, and
BalancedSubnet, which has to be told what to forget (half the sequences here;
what becomes of the other half is the question). Strict recitation exaggerates,
as one token of twelve is enough to fail: five tokens, single ones, and what is
said on and on are beside it; so is how fast what was forgotten is learned
again, next to what never was known.

Run: see `configs/memorization.py`, world `lm`.
"""

from __future__ import annotations

import pathlib

import jax
import numpy as np
import optax
import tqdm

from experiments import components, contract, recitation_figures
from experiments.layers import check_operating_points
from experiments.recitation_arms import (
  ARMS, BY_HEART, COMPONENTS, LEFT_OUT, Collector, Prepared, edit_with_sums,
  grid, make_edit, measured, prepare, run_point,
)  # fmt: skip
from experiments.recitation_claims import CHOSEN_ON, choose, make_claims
from experiments.recitation_measure import (
  Exam, answer_losses, relearning, weighted_losses,
)  # fmt: skip
from experiments.recitation_world import (
  LENGTH, VOCABULARY, World, recitations,
)  # fmt: skip
from experiments.seeds import train_seeds
from idesign import models

TRAINING = 3  # The stream of rows; 1 and 2 are the exam's.


def make_model(config) -> models.Model:
  """The decoder."""
  return models.transformer(
    models.TransformerConfig(
      vocab_size=VOCABULARY, max_len=LENGTH, gated=False, **config.model
    )
  )


def train(config, model, worlds, workdir):
  """The models of all seeds, side by side."""
  rows = [
    world.corpus(config.batch_size * config.steps, TRAINING)._asdict()
    for world in worlds
  ]
  # Shares are rounded, by a row or two.
  shortest = min(len(r['tokens']) for r in rows)
  rows = [{k: v[:shortest] for k, v in r.items()} for r in rows]
  optimizer = optax.adamw(
    optax.warmup_cosine_decay_schedule(
      0.0, config.learning_rate, config.warmup, config.steps
    ),
    weight_decay=config.weight_decay,
  )
  return train_seeds(
    model.init, weighted_losses(model), optimizer, rows,
    [w.seed for w in worlds], workdir, batch_size=config.batch_size,
    num_steps=config.steps, save_every=max(1, config.steps // 10),
    log_every=max(1, config.steps // 50),
  )  # fmt: skip


def check(config) -> list[int]:
  """The seeds of a run; whatever would fail later is an error here."""
  seeds = contract.reported_seeds(config, CHOSEN_ON)
  unknown = set(config.arms) - set(ARMS)
  if unknown or 'kfac' not in config.arms:
    raise ValueError(
      f'config.arms={config.arms}: it must have kfac, and may have {ARMS}.'
    )
  sizes = {arm: len(grid(config, arm)) for arm in config.arms}
  if len(set(sizes.values())) > 1:
    raise ValueError(f'config.strengths: grids differ in size, {sizes}.')
  check_operating_points(config)
  return seeds


def run(config, folder: pathlib.Path) -> None:
  """Trains, edits, measures, judges and draws; resumes by arm and seed."""
  seeds = check(config)
  model = make_model(config)
  worlds = [World(config.language, seed) for seed in seeds]
  data = [a for w in worlds for a in (w.recited, w.keys, w.values, w.held_out)]
  workdir = contract.Workdir(folder, config, contract.fingerprint(*data))
  trained = train(config, model, worlds, workdir)
  collector = Collector(config, model)
  for world, params in zip(worlds, trained):
    _run_seed(config, model, collector, world, params, workdir)
  results = workdir.results
  claims = []
  if config.preset == 'choose':  # Nothing is claimed of what was chosen on.
    for arm in config.arms:
      print(f'operating point of {arm}: {choose(results, seeds, arm)}')
  else:
    claims = make_claims(config, results, seeds)
  contract.save_claims(workdir.path / 'claims.json', claims)
  if jax.process_index() == 0:
    recitation_figures.draw(workdir.path)


def _run_seed(config, model, collector, world, params, workdir) -> None:
  exam = Exam(model, world, config.exam)
  name = lambda *parts: '/'.join([str(world.seed), *parts])
  base = workdir.arm(name('unedited'), lambda: exam(params))
  prepared = prepare(config, collector, world, params)
  point = config.operating_points.kfac
  for arm in config.arms:
    one = lambda at, arm=arm: run_point(config, exam, prepared, arm, at, base)
    workdir.arm(
      name(arm),
      lambda: [
        one(at)
        for at in tqdm.tqdm(
          grid(config, arm), desc=f'seed {world.seed}, {arm}', leave=False
        )
      ],
    )
    workdir.arm(
      name(arm, 'operating'), lambda: one(config.operating_points[arm])
    )
  # How much there has to be removed until half of a kind is lost.
  workdir.arm(
    name('order'),
    lambda: [
      run_point(config, exam, prepared, 'kfac', (point[0], share), base)
      for share in config.order
    ],
  )
  for task in LEFT_OUT if config.leave_out else ():
    workdir.arm(
      name('without', task),
      lambda: run_point(config, exam, prepared, f'without {task}', point, base),
    )
  if config.leave_out:
    for weight in config.sums_weights:
      workdir.arm(
        name('with sums', f'{weight:g}'),
        lambda: measured(
          config, exam, prepared,
          edit_with_sums(config, prepared, point, weight), point, base,
        ),
      )  # fmt: skip
  if config.components.per_layer:
    workdir.arm(
      name('components'),
      lambda: component_analysis(config, model, collector, prepared),
    )
  edited = make_edit(config, prepared, 'kfac', point).apply(params)
  options = config.relearning.to_dict()
  workdir.arm(
    name('relearning'), lambda: relearning(model, world, edited, **options)
  )


def component_analysis(config, model, collector: Collector, prepared: Prepared):
  """Who needs which component, see `experiments.components`."""
  world, params, bases = prepared.world, prepared.params, prepared.bases['kfac']
  random = np.random.default_rng(np.random.SeedSequence([world.seed, 4]))
  others = world.corpus(512, 71, without=BY_HEART)
  strangers = world.rows('strangers', len(world.recited), random)
  read = lambda shuffle: collector.moments(
    params, world, bases, shuffle=shuffle
  )
  temperature = COMPONENTS.temperature
  return components.analyse(
    world.seed, params, answer_losses(model), answer_losses(model, temperature),
    prepared.at, bases, read(None), read(jax.random.key(world.seed)),
    {
      components.MEMORIZED: recitations(world.recited)._asdict(),
      components.SHARED_GROUP: others._asdict(),
      components.UNUSUAL: strangers._asdict(),
    },
    per_layer=config.components.per_layer,
  )  # fmt: skip
