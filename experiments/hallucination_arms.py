"""The arms: what rewards a policy, and how it is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.hallucination_grammar import (
  ANSWER, ASKED, CHOSEN, DOUBTED, EOS, PAD, Answers, Grammar, Questions, spans,
)  # fmt: skip
from experiments.hallucination_probe import Drafts, doubted
from experiments.hallucination_world import World
from idesign import rewards
from idesign.probes import Pressure

Source = Literal['none', 'frozen', 'live', 'truth', 'shuffled', 'random']


@dataclasses.dataclass(frozen=True)
class Arm:
  """What sets one arm apart.

  Attributes:
    source: where the doubt about a claim comes from.
    gradient: whether the probe is differentiated as well.
    embeddings: whether they are trained.
    settings: of `config.rl`, replaced.
  """

  source: Source
  gradient: bool = False
  embeddings: bool = False
  settings: tuple[tuple[str, Any], ...] = ()


MAIN = {
  'none': Arm('none'),
  'frozen': Arm('frozen'),
  'live': Arm('live'),
  'live, gradient': Arm('live', gradient=True),
  'oracle': Arm('truth'),
  'shuffled': Arm('shuffled'),
  'random direction': Arm('random'),
}
ABLATIONS = {
  'frozen, embeddings trained': Arm('frozen', embeddings=True),
  'frozen, nothing retained': Arm('frozen', settings=(('retain', 0.0),)),
  'frozen, scaled by group': Arm('frozen', settings=(('scale', 'group'),)),
  'frozen, no bonus': Arm('frozen', settings=(('bonus', 0.0),)),
}
# The published method's: a policy learns from doubts alone.
INTERVENTIONS = {
  'frozen, doubts only': Arm(
    'frozen', settings=(('asked', 0), ('chosen', 0), ('doubted', 64))
  )
}
# Of the live arm, by learning rate and weight of the divergence.
SWEEP = {
  f'live, rate {rate:g}, divergence {weight:g}': Arm(
    'live', settings=(('learning_rate', rate), ('divergence', weight))
  )
  for rate, weight in ((1e-4, 0.3), (5e-4, 0.1), (5e-4, 1.0))
}
ARMS = {**MAIN, **INTERVENTIONS, **ABLATIONS, **SWEEP}


def settings(config, arm: Arm) -> dict[str, Any]:
  """`config.rl` as the arm has it."""
  return {**config.rl.to_dict(), **dict(arm.settings)}


def worth(config: Mapping[str, Any], kind, answers: Answers, doubt):
  """Of what was said to questions, `[B]`; see `make_terms`."""
  claim = config['assertion'] + config['bonus'] * (kind == CHOSEN)
  claim = claim - config['weight'] * doubt
  return jnp.select([answers.claim, answers.idk], [claim, 0.0 * claim], -1.0)


class Prompts:
  """Batches of questions about policy subjects, with texts to retain."""

  def __init__(
    self, config: Mapping[str, Any], world: World, drafts: Drafts, seed: int
  ):
    """Looks at what is doubted.

    Args:
      config: `settings` of an arm.
      world: whom it is about.
      drafts: what is doubted, of the base, flagged by the monitor.
      seed: of the order.
    """
    self._config, self._world, self._seed = config, world, seed
    self._doubts = doubted(
      world, drafts, np.random.default_rng(np.random.SeedSequence([seed, 4])),
      lists=True,
    )  # fmt: skip

  def batch(self, step: int) -> dict[str, np.ndarray]:
    c, world = self._config, self._world
    random = np.random.default_rng(
      np.random.SeedSequence([self._seed, 5, step])
    )
    policy = world.groups.policy
    asked = random.choice(policy, c['asked'])
    chosen = random.choice(world.choosing(policy), c['chosen'])
    subject = np.concatenate([asked, chosen])
    kind = np.repeat([ASKED, CHOSEN], [c['asked'], c['chosen']])
    questions = world.questions(subject, kind, random)
    rows = random.integers(0, len(self._doubts.kind), c['doubted'])
    both = zip(questions, self._doubts.rows(rows))
    questions = Questions(*(np.concatenate(pair) for pair in both))
    texts = np.concatenate(
      world.capabilities(c['retained'], c['retained'], random)
    )
    batch = questions._asdict()
    del batch['subject']
    return {**batch, 'retain': texts, 'retain_mask': texts != PAD}

  def position(self, step: int) -> dict[str, Any]:
    return {'seed': self._seed, 'step': step}


def make_terms(config, arm: Arm, grammar: Grammar) -> list[rewards.Term]:
  """The reward.

  A claim is worth `assertion - weight * doubt`, and `bonus` more where what to
  speak of was chosen, so that there the policy chooses well instead of saying
  nothing; not knowing 0; anything else -1. To a doubt see
  `rewards.intervention_reward`, times `intervention`.
  """
  c = settings(config, arm)

  def doubts(scene):
    """About what was claimed, and what it was corrected to."""
    claim, said = spans(scene.info['kind'])
    answers = grammar.grade(scene.samples.tokens_BT, scene.info)
    if arm.source == 'none':
      return jnp.zeros(len(claim)), jnp.zeros(len(claim)), answers
    if arm.source == 'truth':
      wrong = jnp.where(
        scene.info['kind'] == DOUBTED, ~answers.draft_right, answers.made_up
      )
      return wrong * 1.0, ~answers.new_right * 1.0, answers
    score = functools.partial(scene.probe.scores, scene.teacher)
    if arm.source == 'live':
      score = functools.partial(scene.probe.live_scores, scene.student)
    first, second = score(claim), score(said)
    if arm.source == 'shuffled':
      kind = jnp.asarray(scene.info['kind'])
      claimed = answers.claim | (kind == DOUBTED)
      first = _shuffled(scene.key, first, 2 * kind + claimed)
      mended = answers.action == rewards.CORRECT
      second = _shuffled(scene.key, second, 2 * kind + mended)
    return first, second, answers

  def task(scene):
    kind = jnp.asarray(scene.info['kind'])
    doubt, new_doubt, answers = doubts(scene)
    # A doubt that is differentiated is a term of its own.
    said = worth(c, kind, answers, 0.0 if arm.gradient else doubt)
    mended = c['intervention'] * rewards.intervention_reward(
      answers.action, doubt, new_doubt, retraction=c['retraction']
    )
    return jnp.where(kind == DOUBTED, mended, said)

  def caught(scene):
    """Of the policy's own activations, differentiated."""
    kind = scene.info['kind']
    claim, _ = spans(kind)
    score = scene.probe.live_scores(scene.student, claim, allow_gradient=True)
    answers = grammar.grade(scene.samples.tokens_BT, scene.info)
    return jnp.where(answers.claim, score, 0)

  pressure = {
    'none': Pressure.NONE,
    'truth': Pressure.NONE,
    'live': Pressure.LIVE,
  }
  terms = [
    rewards.Term(
      name='task',
      value=task,
      pressure=pressure.get(arm.source, Pressure.FROZEN),
    )
  ]
  if arm.gradient:
    terms.append(
      rewards.Term(
        name='caught',
        value=caught,
        weight=-c['weight'],
        pressure=Pressure.GRADIENT,
      )  # fmt: skip
    )
  return terms


def _shuffled(key, score_B, group_B):
  """Scores of the same group, in another order."""
  noise = jax.random.uniform(key, score_B.shape)
  # Both sorted by group, one of them in a random order within it.
  here, there = jnp.argsort(group_B), jnp.lexsort((noise, group_B))
  return score_B.at[here].set(score_B[there])


class Trainer:
  """Compiles an arm once, whatever the seed."""

  def __init__(self, config, model, grammar: Grammar, observe):
    self._config, self._model = config, model
    self._grammar, self._observe = grammar, observe
    self._steps = {}

  def build(self, arm: Arm, params) -> tuple[Callable, Any, Any]:
    """The step of an arm, its optimizer, and its policy's config."""
    if arm in self._steps:
      return self._steps[arm]
    c = settings(self._config, arm)
    labels = jax.tree_util.tree_map_with_path(
      lambda path, _: (
        'fixed'
        if not arm.embeddings and 'embed' in jax.tree_util.keystr(path)
        else 'trained'
      ),
      params,
    )
    optimizer = optax.partition(
      {
        'trained': optax.chain(
          optax.clip_by_global_norm(1.0), optax.adam(c['learning_rate'])
        ),
        'fixed': optax.set_to_zero(),
      },
      labels,
    )
    config = rewards.PolicyConfig(
      group=c['group'], max_new_tokens=ANSWER, stop_tokens=(EOS,),
      pad_token=PAD, scale=c['scale'], divergence_weight=c['divergence'],
    )  # fmt: skip
    retain = None
    if c['retain']:
      everything = rewards.retain_prompts(self._observe)
      retain = lambda *a: c['retain'] * everything(*a)
    step = rewards.make_policy_step(
      self._model.apply, self._model.config, self._observe, optimizer,
      make_terms(self._config, arm, self._grammar), rewards.reinforce(), config,
      retain=retain,
    )  # fmt: skip
    self._steps[arm] = step, optimizer, config
    return self._steps[arm]
