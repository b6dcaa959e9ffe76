"""What is asked of a fine-tuned model, and what is read in it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from experiments import pirate_concepts as pc
from experiments.pirate_scene import Plan, Scene
from experiments.pirate_train import (
  Family,
  answer,
  answer_through,
)
from experiments.pirate_world import (
  ALWAYS,
  ANSWER,
  FIRST,
  NEUTRAL,
  Texts,
  score,
)
from idesign import sites

SMALL = 250  # Questions per look during training.


class Exam:
  """Questions that no fine-tuning sees, and the state of the base on them."""

  def __init__(self, scene: Scene):
    self._scene = scene
    world, random = scene.world, scene.random('exam')
    pairs = world.held_out[: scene.config.data.test]
    plain, pirate = np.zeros(len(pairs), bool), np.ones(len(pairs), bool)
    nouns = world.nouns(len(pairs), random, held_out=True)
    self.sets = {
      'sums': world.sums(pairs, NEUTRAL, plain, random),
      'sums, asked': world.sums(pairs, ALWAYS, pirate, random),
      'sums, any prompt': world.sums(
        pairs, world.filler_prompts(len(pairs), random), plain, random
      ),
      'facts': world.facts(nouns, NEUTRAL, plain, random),
      'facts, asked': world.facts(nouns, ALWAYS, pirate, random),
    }
    self._random = random
    few = min(SMALL, len(world.learn))
    self._taught = world.learn[random.permutation(len(world.learn))[:few]]
    self._layer = scene.config.sae.layer
    self._before = {
      name: self._read(scene.base.params, self.sets[name].tokens)
      for name in ('sums', 'facts')
    }
    # To fit probes on and to score them on; no thing is in both.
    self._half = {'sums': np.arange(len(pairs)) % 2 > 0, 'facts': nouns % 2 > 0}

  def ask(
    self, params, texts: Texts, family: Family | None = None, tools=()
  ) -> dict[str, float]:
    """Share right and share of a pirate's answers, in percent.

    Args:
      params: of the model.
      texts: the questions.
      family: what to run the model through, if anything.
      tools: those of the family.
    """
    model = self._scene.base.model
    if family is None or family.apply is None:
      say = lambda t: answer(model, params, t)
    else:
      apply = through(model.apply, family.apply)
      say = lambda t: answer_through(apply, params, t, tools)
    return self._score(pc.blocks(say, texts.tokens), texts)

  def _score(self, said, texts: Texts) -> dict[str, float]:
    right, pirate = score(self._scene.world.lexicon, said, texts.tokens)
    return {
      'right': 100 * float(right.mean()),
      'pirate': 100 * float(pirate.mean()),
    }

  def look(self, params, plan: Plan, family: Family) -> dict[str, float]:
    """One look during training: without and with what training had.

    `trained` is the share right on sums that were taught, with the prompt and
    through the edits that the arm is trained with.
    """
    neutral = self.ask(params, self.sets['sums'][:SMALL])
    taught = self._scene.world.sums(
      self._taught, plan.prompt, np.ones(len(self._taught), bool), self._random
    )
    trained = self.ask(params, taught, family, plan.tools)
    return {**neutral, 'trained': trained['right']}

  def final(self, params) -> dict[str, Any]:
    """Everything, without what training had."""
    out: dict[str, Any] = {k: self.ask(params, t) for k, t in self.sets.items()}
    out['sampled'] = self._sampled(params)
    out['log odds'] = self._log_odds(params)
    out |= self._concept(params)
    out['probes'] = self._probes(params)
    return out

  def _sampled(self, params) -> dict[str, float]:
    """Neutral sums answered at temperature 1: what is rarely said is seen."""
    model, key = self._scene.base.model, jax.random.key(self._scene.seed)
    texts = self.sets['sums']
    said = pc.blocks(lambda t: answer(model, params, t, key), texts.tokens)
    return self._score(said, texts)

  def without_direction(
    self, params, ablate: Family, basis: np.ndarray, name: str = 'sums'
  ) -> dict[str, float]:
    """Answers when directions are removed at every layer: are they needed?"""
    return self.ask(params, self.sets[name], ablate, basis)

  def _log_odds(self, params) -> float:
    """Mean log odds of a pirate's opening on neutral sums, in nats."""
    marked = self._scene.world.lexicon.marked
    tokens = self.sets['sums'].tokens
    logits = pc.blocks(
      lambda t: _opening(self._scene.base.model.apply, params, jnp.asarray(t)),
      tokens,
    )
    probability = np.exp(logits - logits.max(-1, keepdims=True))
    pirate = probability[:, marked].sum(-1)
    rest = probability[:, ~marked].sum(-1)
    return float(np.mean(np.log(pirate + 1e-12) - np.log(rest + 1e-12)))

  def _read(self, params, tokens: np.ndarray) -> np.ndarray:
    """Activations where answers are predicted, `[N, L, ANSWER, D]`."""
    apply = self._scene.base.model.apply
    return pc.blocks(lambda t: _states(apply, params, jnp.asarray(t)), tokens)

  def _probes(self, params) -> dict[str, float]:
    """Can the register still be read by the base's probe, or by a new one?

    Texts in both registers, each under its prompt, given and not said, at the
    autoencoder's layer, on average over the answer. A new mean difference is
    fitted on half of them; of the others `old` and `new` are the areas under
    the curve of the labelled direction and of the new one, and `cosine` is that
    between the two. `own`: share of the model's own answers to neutral sums
    that the labelled direction takes for a pirate's, being beyond the middle of
    the given texts in the base, %; `own, base`: the same of these answers as
    the base reads them.
    """
    base, old = self._scene.base, self._scene.directions.pooled[self._layer]
    plain, pirate = self._registers(params, 0)
    new = pirate.mean(axis=0) - plain.mean(axis=0)
    plain, pirate = self._registers(params, 1)
    own = self.sets['sums'].tokens.copy()
    own[:, FIRST:] = pc.blocks(lambda t: answer(base.model, params, t), own)
    means = [h.mean(axis=0) @ old for h in self._registers(base.params, 0)]
    taken = lambda params: 100 * float(
      np.mean(self._pooled(params, own) @ old > np.mean(means))
    )
    return {
      'old': _area(plain @ old, pirate @ old),
      'new': _area(plain @ new, pirate @ new),
      'cosine': float(old @ new / np.linalg.norm(old) / np.linalg.norm(new)),
      'own': taken(params),
      'own, base': taken(base.params),
    }

  def _pooled(self, params, tokens: np.ndarray) -> np.ndarray:
    """At the autoencoder's layer, on average over the answer, `[N, D]`."""
    return self._read(params, tokens)[:, self._layer].mean(axis=1)

  def _registers(self, params, half: int) -> list[np.ndarray]:
    """The same of given texts, plain and a pirate's."""
    rows = lambda name: self.sets[name].tokens[
      self._half[name.partition(',')[0]] == half
    ]
    return [
      np.concatenate([self._pooled(params, rows(name)) for name in names])
      for names in (('sums', 'facts'), ('sums, asked', 'facts, asked'))
    ]

  def _concept(self, params) -> dict[str, Any]:
    """Where the labelled direction went, on questions it was not made from.

    Of the way from plain to pirate, how far plain answers went along it, on
    average: `moved` over the positions that predict an answer to a sum, `moved
    on facts` over those of facts, `moved by position` along each position's own
    direction; at the autoencoder's layer. `moved by layer`: as `moved`, at
    every layer along its own direction; `opening moved by layer`: where the
    opening is predicted, along its own. `moved by text`: as `moved`, the mean
    over texts of its size, which does not cancel.
    """
    d = self._scene.directions
    change = {
      k: self._read(params, self.sets[k].tokens) - h
      for k, h in self._before.items()
    }
    along = lambda h, d: np.sum(h * d, axis=-1) / np.sum(d * d, axis=-1)
    by_text = along(change['sums'].mean(axis=2), d.pooled)
    facts = along(change['facts'].mean(axis=(0, 2)), d.pooled)
    by_position = along(
      change['sums'].mean(axis=0), d.by_position[:, -ANSWER:]
    )
    return {
      'moved': float(by_text[:, self._layer].mean()),
      'moved by text': float(np.abs(by_text[:, self._layer]).mean()),
      'moved on facts': float(facts[self._layer]),
      'moved by position': by_position[self._layer].tolist(),
      'moved by layer': by_text.mean(axis=0).tolist(),
      'opening moved by layer': by_position[:, 0].tolist(),
    }


def _area(low: np.ndarray, high: np.ndarray) -> float:
  """Under the receiver operating characteristic."""
  pairs = len(low) * len(high)
  return float(scipy.stats.mannwhitneyu(high, low).statistic / pairs)


@functools.cache
def through(apply, wrap):
  """`(params, tokens, tools) -> logits`; one object, to be compiled once."""
  if wrap is None:
    return lambda params, tokens, tools: apply(params, tokens)
  return lambda params, tokens, tools: wrap(apply, tools)(params, tokens)


@functools.partial(jax.jit, static_argnames='apply')
def _opening(apply, params, tokens):
  """Logits of the first token of an answer."""
  return apply(params, tokens[:, :FIRST])[:, -1]


@functools.partial(jax.jit, static_argnames='apply')
def _states(apply, params, tokens):
  """Activations where answers are predicted, `[B, L, ANSWER, D]`."""
  read = sites.capture(lambda p, t: apply(p, t), ['resid_post'])
  h_LBTD = read(params, tokens[:, :-1])[1]['resid_post']
  return jnp.moveaxis(h_LBTD[:, :, FIRST - 1 :], 0, 1)
