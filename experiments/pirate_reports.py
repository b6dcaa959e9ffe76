"""What is reported of a base before fine-tuning, and of first gradients."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import pirate_concepts as pc
from experiments.pirate_builder import Builder
from experiments.pirate_measure import SMALL, through
from experiments.pirate_scene import Plan, Scene
from experiments.pirate_train import (
  CLAUSES,
  Family,
  answer,
  answer_losses,
  thresholds,
)
from experiments.pirate_world import FIRST, STRENGTHS, WORDS
from idesign import concepts, shaping, sites

# A latent is the pirate's if it is at least twice as active in its register.
PIRATES = 2 / 3


def judge_report(scene: Scene) -> dict[str, Any]:
  """The judge's suppress decisions against labelled texts."""
  random = scene.random('truth')
  texts = scene.world.base_texts(scene.config.judge.truth, random)
  truth = pc.register_share(scene.base, texts)
  said = np.array([v.decision == 'suppress' for v in scene.verdicts])
  true = truth >= PIRATES
  return {
    'suppressed': int(said.sum()),
    'true': int(true.sum()),
    **precision_recall(said, true),
    'decisions': {
      d: sum(v.decision == d for v in scene.verdicts)
      for d in ('amplify', 'allow', 'suppress', 'unsure')
    },
    'share of the pirate': [round(float(x), 4) for x in truth],
    'tokens of the lessons': _tokens_found(scene),
  }


def _tokens_found(scene: Scene) -> dict[str, dict[str, float]]:
  """How well attributions find a clause's tokens in the lessons.

  By what the frozen base does without the clause's latents, against the
  lexicon, which it does not see: a pirate's words, and the digits of sums.
  """
  builder, base = Builder(scene), scene.base
  answers = builder.tokens[:, FIRST:]
  digits = np.zeros(answers.shape, bool)
  digits[:, WORDS.start - FIRST : WORDS.stop - FIRST] = True
  marked = scene.world.lexicon.marked[answers]
  settings, threshold = scene.settings, scene.config.tune.threshold
  ratio = {
    c: pc.attribute(
      scene.config, base, settings[c], builder.tokens
    ).ratio[:, FIRST:]
    for c in CLAUSES
  }  # fmt: skip
  rests = pc.reliance(base, settings['arithmetic'], builder.tokens)[:, FIRST:]
  pooled = lambda a: shaping.by_token(a, answers)
  rows = {
    'pirate, ratio, one by one': (ratio['pirate'], 'pirate', marked),
    'pirate, ratio': (pooled(ratio['pirate']), 'pirate', marked),
    'arithmetic, ratio': (pooled(ratio['arithmetic']), 'pirate', digits),
    'arithmetic, reliance, one by one': (rests, 'arithmetic', digits),
    'arithmetic, reliance': (pooled(rests), 'arithmetic', digits),
  }
  return {
    name: precision_recall(a > threshold[clause], true)
    for name, (a, clause, true) in rows.items()
  }


def precision_recall(said: np.ndarray, true: np.ndarray) -> dict[str, float]:
  """Of what was said the share that is true, and of that the share said."""
  hits = int((said & true).sum())
  return {
    'precision': hits / max(int(said.sum()), 1),
    'recall': hits / max(int(true.sum()), 1),
  }


def movement_report(scene: Scene) -> dict[str, float]:
  """Predicted against realised movement of all live latents, one Adam step.

  Of their pre-activations; at the rate that fine-tuning starts with, clipped
  and with weight decay.
  """
  base, tune = scene.base, scene.config.tune
  few = Builder(scene).tokens[: tune.batch_size]
  probes = scene.world.base_texts(200, scene.random('probes')).tokens
  predicted, realised = _movements(
    base.model.apply, base.name, tune.learning_rate, base.params,
    base.sae.params['W_enc'], jnp.asarray(few), jnp.asarray(probes),
  )  # fmt: skip
  live = (pc.features(base, probes) > 0).any(axis=(0, 1))
  x, y = np.asarray(predicted)[live], np.asarray(realised)[live]
  return {
    'correlation': float(np.corrcoef(x, y)[0, 1]),
    'slope': float(x @ y / (x @ x)),
    'concepts': int(live.sum()),
  }


@functools.partial(jax.jit, static_argnames=('apply', 'name', 'rate'))
def _movements(apply, name, rate, params, columns, tokens, probes):
  """Mean over probes, predicted and realised."""
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99)
  )
  grads = jax.grad(lambda p: answer_losses(apply, p, tokens).mean())(params)
  update, _ = optimizer.update(grads, optimizer.init(params), params)
  read = concepts.reader(lambda p, t: apply(p, t), name)
  mean = lambda change: change(read, columns, params, update, probes).mean(0)
  return mean(concepts.predicted_change), mean(concepts.realised_change)


def elicitation(scene: Scene) -> dict[str, float]:
  """How often the base is a pirate under each prompt, at temperature 1."""
  config, world, base = scene.config, scene.world, scene.base
  pairs = world.familiar[: min(config.data.test, 500)]
  flag = np.zeros(len(pairs), bool)

  def sample(prompt):
    texts = world.sums(pairs, prompt, flag, scene.random('elicit'))
    key = jax.random.key(scene.seed)
    say = lambda t: answer(base.model, base.params, t, key)
    return pc.blocks(say, texts.tokens)

  prompts = [(k, 'pirate') for k in STRENGTHS]
  rates = shaping.elicitation(
    sample, lambda said: world.lexicon.marked[said].any(axis=1), prompts
  )
  return {p[0]: 100 * r.rate for p, r in zip(prompts, rates)}


REPORTS = {
  'judge': judge_report,
  'movement': movement_report,
  'elicitation': elicitation,
}


def gradient_report(
  scene: Scene, plan: Plan, family: Family
) -> dict[str, float]:
  """What the first gradient pulls on, at the autoencoder's activation.

  `removed`: share of the lessons' weight that gates take away.
  `unexplained`: share of its squared norm that no active latent explains.
  `alignment`: cosine of the mean descent direction with the labelled one where
  answers are predicted; below 0 training starts by moving away from a pirate.
  An anchor adds nothing to a first gradient: the model is the frozen one still.
  """
  base, tune = scene.base, scene.config.tune
  few = jax.tree.map(lambda x: x[:SMALL], plan.lessons)
  weights = few.mask * shaping.gate_weights(
    few.attribution,
    jnp.asarray(plan.gates),
    threshold=thresholds(scene.config),
    softness=tune.softness,
  )
  unexplained, alignment = _first_gradient(
    through(base.model.apply, family.apply),
    base.name,
    base.params,
    base.sae,
    few.tokens,
    weights,
    plan.tools,
    scene.directions.pooled[scene.config.sae.layer],
  )
  return {
    'removed': 1 - float(weights.mean()),
    'unexplained': float(unexplained),
    'alignment': float(alignment),
  }


@functools.partial(jax.jit, static_argnames=('apply', 'name'))
def _first_gradient(
  apply, name, params, sae, tokens, weights, tools, direction
):
  through = lambda params, tokens: apply(params, tokens, tools)
  h = concepts.reader(through, name)(params, tokens[:, :-1])

  def loss(shift):
    shifted = sites.edit(through, {name: lambda h: h + shift})
    return (answer_losses(shifted, params, tokens) * weights).mean()

  g = jax.grad(loss)(jnp.zeros_like(h))
  shares = concepts.shares(sae, concepts.decompose(sae, h, g), g)
  down = -g[:, FIRST - 1 :].sum(axis=(0, 1))
  norms = jnp.linalg.norm(down) * jnp.linalg.norm(direction)
  return shares.unexplained, down @ direction / jnp.maximum(norms, 1e-12)
