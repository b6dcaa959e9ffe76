"""One seed of the pirate experiment before fine-tuning, and what an arm is."""

from __future__ import annotations

from collections.abc import Mapping
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments import pirate_concepts as pc
from experiments.pirate_train import CLAUSES, Family, Lessons
from experiments.pirate_world import FIRST, NEUTRAL, World
from idesign import judges, shaping, sites


class Scene(NamedTuple):
  """One seed, before fine-tuning.

  Attributes:
    config: the config.
    seed: the seed.
    world: its world.
    base: the frozen base and its autoencoder.
    objective: what is wanted.
    verdicts: the judge's, one per latent.
    reversed_verdicts: the same judge's on the opposite objective.
    settings: clause -> its latents, to be set and removed.
    known: texts that the base says as a pirate, as if nobody had asked.
    directions: labelled mean differences.
    replay: texts repeated in every fine-tuning.
  """

  config: Any
  seed: int
  world: World
  base: pc.Base
  objective: judges.Objective
  verdicts: list[judges.Verdict]
  reversed_verdicts: list[judges.Verdict]
  settings: Mapping[str, pc.Setting]
  known: np.ndarray
  directions: pc.Directions
  replay: np.ndarray

  def random(self, what: str) -> np.random.Generator:
    """A stream of its own for every use."""
    return np.random.default_rng(
      np.random.SeedSequence([self.seed, *what.encode()])
    )


class Plan(NamedTuple):
  """An arm.

  Attributes:
    family: a key of `families`.
    lessons: what it is trained on.
    replay: what is repeated.
    gates: one per clause.
    tools: arrays for the family.
    prompt: that of the lessons.
  """

  family: str
  lessons: Lessons
  replay: Lessons
  gates: np.ndarray
  tools: Any = ()
  prompt: tuple[str, ...] = NEUTRAL


def _by_layer(wrap, apply, tools):
  """Applies `wrap(apply, {activation: tool})` with one tool per layer."""
  return wrap(apply, {pc.activation(i): tools[i] for i in range(len(tools))})


def _current(model_apply):
  """Holds what `Builder.strengths` reads on `Builder.probes`."""
  capture = sites.capture(model_apply, ['resid_post'])

  def make(tools):
    # Of each kind of text [C, K, L, ANSWER, D]; its texts [P, K, N, T].
    directions, probes = tools

    def strengths(params, part):
      means = []
      for texts in probes[part]:
        h_LBTD = capture(params, texts)[1]['resid_post'][:, :, FIRST - 1 :]
        means.append(h_LBTD.mean(axis=1))
      return jnp.einsum('kltd,ckltd->c', jnp.stack(means), directions)

    return shaping.hold_concepts(strengths, parts=len(probes))

  return make


def families(config, model) -> dict[str, Family]:
  """Every way to train; arms of a family share a compiled program."""
  last = config.model.n_layers - 1
  return {
    'data': Family(),
    'anchor': Family(anchor=True),
    'steer': Family(apply=functools.partial(_by_layer, shaping.steer)),
    'ablate': Family(apply=functools.partial(_by_layer, shaping.ablate)),
    'block': Family(
      apply=functools.partial(_by_layer, shaping.block_activation_gradient)
    ),
    'before': Family(before=shaping.project_out),
    'after': Family(after=shaping.project_out),
    'current': Family(after=_current(model.apply)),
    'adapter': Family(
      apply=lambda apply, adapter: shaping.adapt(
        apply, pc.activation(last), adapter
      )
    ),
  }


def clause_gates(verdicts, *, boost: float) -> np.ndarray:
  """One gate per column of attributions: the mean of the clause's latents.

  1 for a clause that no verdict rests on, so that nothing is done without one.
  """
  by_latent = judges.gates(verdicts, len(verdicts), boost=boost)
  out = np.ones(len(CLAUSES), np.float32)
  for column, clause in enumerate(CLAUSES):
    mine = [v.concept for v in verdicts if v.clause == clause]
    if mine:
      out[column] = by_latent[mine].mean()
  return out
