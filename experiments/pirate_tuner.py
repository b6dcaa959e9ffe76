"""Fine-tunes arms, and looks at what came of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from experiments.pirate_arms import plans
from experiments.pirate_builder import WIDTH, Builder
from experiments.pirate_measure import SMALL, Exam
from experiments.pirate_reports import gradient_report
from experiments.pirate_scene import Plan, Scene, families
from experiments.pirate_table import LIFTED
from experiments.pirate_train import make_finetune


class Tuner:
  """Fine-tunes one arm after another; a program is compiled once."""

  def __init__(self, config, model):
    self._families = families(config, model)
    self._programs: dict[str, Any] = {}
    self._config, self._model = config, model

  def __call__(
    self, builder: Builder, exam: Exam, name: str, *, causal: bool
  ) -> dict[str, Any]:
    """Trains an arm, looks, and asks; everything as JSON values.

    Args:
      builder: of the seed.
      exam: of the seed.
      name: of the arm.
      causal: of plain fine-tuning, also ask without the labelled directions.
    """
    scene, plan = builder.scene, plans(builder)[name]()
    family = self._families[plan.family]
    snapshots = self.train(scene.base.params, plan, scene.seed)
    every, steps = self._config.tune.every, self._config.tune.steps
    at = lambda i: jax.tree.map(lambda x: x[i], snapshots)
    count = steps // every
    curve = [exam.look(at(i), plan, family) for i in range(count)]
    last = at(count - 1)
    out = exam.final(last)
    out['curve'] = {k: [row[k] for row in curve] for k in curve[0]}
    out['steps'] = [every * (i + 1) for i in range(count)]
    out['first gradient'] = gradient_report(scene, plan, family)
    out['relearn'] = self._relearn(scene, exam, last)
    if name == 'plain' and causal:
      for rank in (1, WIDTH):
        basis = builder.basis(rank)
        out[f'without {rank}'] = exam.without_direction(
          last, self._families['ablate'], basis
        )
    return out

  def train(self, params, plan: Plan, seed: int):
    """The parameters after every `config.tune.every` steps, stacked."""
    if plan.family not in self._programs:
      self._programs[plan.family] = make_finetune(
        self._config, self._model, self._families[plan.family]
      )
    return self._programs[plan.family](
      params, plan.lessons, plan.replay, jnp.asarray(plan.gates), plan.tools,
      seed,
    )  # fmt: skip

  def base(self, builder: Builder, exam: Exam) -> dict[str, Any]:
    """The same of the model before fine-tuning.

    `asked without`: as a pirate when asked, the labelled directions removed at
    every layer. Are they what makes it one?
    """
    params = builder.scene.base.params
    out = exam.final(params)
    out['relearn'] = self._relearn(builder.scene, exam, params)
    for rank in (1, WIDTH):
      out[f'asked without {rank}'] = exam.without_direction(
        params, self._families['ablate'], builder.basis(rank), 'sums, asked'
      )
    return out

  def _relearn(self, scene: Scene, exam: Exam, params) -> list[float]:
    """Pirate in the course of plain fine-tuning, nothing in its way."""
    config = self._config.copy_and_resolve_references()
    with config.unlocked():
      config.tune.steps = min(LIFTED, config.tune.steps)
      config.tune.every = 1
    if 'lifted' not in self._programs:
      self._programs['lifted'] = make_finetune(
        config, self._model, self._families['data']
      )
    plain = plans(Builder(scene))['plain']()
    after = self._programs['lifted'](
      params, plain.lessons, plain.replay, jnp.asarray(plain.gates), (),
      scene.seed + 1,
    )  # fmt: skip
    few = exam.sets['sums'][:SMALL]
    return [
      exam.ask(jax.tree.map(lambda x: x[i], after), few)['pirate']  # noqa: B023
      for i in range(config.tune.steps)
    ]
