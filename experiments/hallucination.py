"""A policy rewarded by a probe, and what becomes of the truth and of the probe.

A small transformer is trained on a world of subjects of whom some facts can be
known, and makes up the rest. A probe, fitted on its activations, tells what it
makes up; reinforcement learning then rewards claims that the probe does not
doubt. The arms differ in what the probe reads: a frozen copy of the model, or
the policy's own activations, with a gradient through them or without; and in
what stands in its place: the truth, nothing, its scores in another order, a
random direction.

Run: see `configs/hallucination.py`.
"""

from __future__ import annotations

import pathlib

import jax
import tqdm

from experiments import contract, hallucination_figures, hallucination_full
from experiments.hallucination_arms import (
  ARMS, INTERVENTIONS, MAIN, Prompts, Trainer, settings,
)  # fmt: skip
from experiments.hallucination_base import make_model, train_base
from experiments.hallucination_claims import make_claims
from experiments.hallucination_facts import Facts
from experiments.hallucination_measure import Exam, best_of, flagged
from experiments.hallucination_people import People
from experiments.hallucination_pipeline import (
  Watcher, accounts, fit_localiser,
)  # fmt: skip
from experiments.hallucination_probe import draft, make_monitor
from idesign import probes, rewards, training

CHOSEN_ON = (0, 1)
PIPELINE = ('frozen', *INTERVENTIONS)
PRESETS = {
  'smoke': ('frozen', 'live, gradient', 'oracle'),
  'cpu': (*MAIN, *INTERVENTIONS),
  'paper': tuple(ARMS),
}


class Scene:
  """One seed: its world, its base, its probe, and its exams."""

  def __init__(self, config, model, observe, world, params, seed: int):
    self.config, self.model, self.world = config, model, world
    self.params, self.seed = params, seed
    groups = world.groups
    self.subjects = groups.test
    if config.preset == 'choose':
      self.subjects = groups.validation
    self.monitor = make_monitor(
      config, model, observe, params, world, seed, self.subjects
    )
    drafts = draft(
      model, params, world, groups.policy, config.rl.drafts, [seed, 6]
    )
    self.drafts = flagged(self.monitor, drafts)
    localiser = fit_localiser(config, observe, params, world, seed)
    self.watcher = Watcher(config, model, world, self.monitor, localiser)
    exam = lambda subjects, count, number: Exam(
      config, model, world, params, self.monitor, subjects, count,
      [seed, 7, number],
    )  # fmt: skip
    self.way = exam(groups.validation, config.exam.curve_texts, 0)
    self.exam = exam(self.subjects, config.exam.texts, 1)

  def accounts(self, params) -> dict:
    """Of the pipeline, see `hallucination_pipeline`."""
    return accounts(
      self.watcher, self.config.exam, params, self.subjects, self.seed
    )


def train(trainer: Trainer, scene: Scene, name: str) -> dict:
  """Trains an arm and measures it."""
  config, arm = scene.config, ARMS[name]
  step, optimizer, policy = trainer.build(arm, scene.params)
  probe = scene.monitor.probe
  if arm.source == 'random':
    probe = scene.monitor.random
  state = rewards.init_policy(
    scene.params, optimizer, jax.random.key(scene.seed), policy
  )
  curve, logged = [], []

  def look(state):
    curve.append([int(state.step), scene.way(state.params, capabilities=False)])
    return {}

  def watch(number, metrics):
    check(number, metrics)
    if number % config.rl.every == 0:
      logged.append([number, metrics])

  check = rewards.make_watch()
  prompts = Prompts(
    settings(config, arm), scene.world, scene.drafts, scene.seed
  )
  state = training.fit(
    state, step, prompts, num_steps=config.rl.steps,
    evaluate=look, evaluate_every=config.rl.every, watch=watch,
    extra=lambda state, batch: {'probe': probe},
  )  # fmt: skip
  result = {**scene.exam(state.params), 'curve': curve, 'training': logged}
  if name in PIPELINE:
    result['pipeline'] = scene.accounts(state.params)
  return result


def base(scene: Scene) -> dict:
  """What there is before reinforcement learning."""
  config = scene.config
  return {
    **scene.exam(scene.params),
    'curve': [[0, scene.way(scene.params, capabilities=False)]],
    'best of': best_of(
      config, scene.model, scene.params, scene.world, scene.monitor,
      scene.exam.questions, jax.random.key(scene.seed), config.exam.best_of,
    ),
    'pipeline': scene.accounts(scene.params),
    'probe': {
      'quality': scene.monitor.quality,
      'null': scene.monitor.null,
      'threshold': scene.monitor.threshold,
      'reliability': scene.monitor.reliability,
    },
  }  # fmt: skip


def make_world(config, seed: int):
  """The world of a seed."""
  if config.kind == 'facts':
    return Facts(config.world, seed, config.data_dir)
  return People(config.world, seed)


def run(config, folder: pathlib.Path) -> None:
  """Trains bases, probes and every arm; resumes by arm and seed."""
  if config.preset == 'full':
    hallucination_full.run(config, folder)
    return
  if config.arms not in PRESETS:
    raise ValueError(
      f'config.arms={config.arms!r} is no set of arms; there are '
      f'{sorted(PRESETS)}.'
    )
  seeds = contract.reported_seeds(config, CHOSEN_ON)
  worlds = [make_world(config, seed) for seed in seeds]
  data = [a for w in worlds for a in (w.true, w.status, *w.groups)]
  workdir = contract.Workdir(folder, config, contract.fingerprint(*data))
  model = make_model(config, worlds[0].grammar.vocabulary)
  observe = probes.observer(
    model.apply, [config.probe.activation], confidence=config.probe.confidence
  )
  trainer = Trainer(config, model, worlds[0].grammar, observe)
  for seed, world in zip(seeds, worlds):
    params = train_base(config, model, world, seed, workdir)
    scene = Scene(config, model, observe, world, params, seed)
    workdir.arm(f'{seed}/base', lambda: base(scene))
    for name in tqdm.tqdm(PRESETS[config.arms], desc=f'seed {seed}'):
      workdir.arm(f'{seed}/{name}', lambda: train(trainer, scene, name))
  claims = []
  if config.preset != 'choose':
    claims = make_claims(config, workdir.results, seeds)
  contract.save_claims(workdir.path / 'claims.json', claims)
  if jax.process_index() == 0:
    hallucination_figures.draw(workdir.path)


if __name__ == '__main__':
  contract.main(run)
