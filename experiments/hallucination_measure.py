"""What is measured of a policy: on which subjects, and with which texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.hallucination_arms import worth
from experiments.hallucination_base import grade, say
from experiments.hallucination_grammar import (
  ASKED, CHOSEN, PAD, PROMPT, in_order, maximum, spans,
)  # fmt: skip
from experiments.hallucination_probe import Drafts, Monitor, doubted, draft
from experiments.hallucination_world import World
from idesign import probes, rewards
from idesign.rewards import divergence

NAMES = {ASKED: 'asked', CHOSEN: 'chosen'}


class Exam:
  """Questions that stay the same for every model of a seed."""

  def __init__(
    self, config, model, world: World, base, monitor: Monitor, subjects,
    count: int, seed,
  ):  # fmt: skip
    """Draws the questions, and the texts that are read throughout a run.

    Args:
      config: of the experiment.
      model: the decoder.
      world: whom it is about.
      base: parameters before reinforcement learning.
      monitor: its probe.
      subjects: who is asked about.
      count: questions of each.
      seed: numbers, of all that is drawn.
    """
    self._config, self._model, self._world = config, model, world
    self._monitor = monitor
    random = np.random.default_rng(np.random.SeedSequence([*seed, 0]))
    self.questions = world.survey(subjects, count, random)
    drafts = draft(model, base, world, subjects, count, [*seed, 1])
    self._fixed = rewards.make_monitor(monitor.probe, drafts.texts, seed=0)
    self.drafts = flagged(monitor, drafts)
    self.doubts = doubted(world, self.drafts, random)
    self._key = jax.random.key(int(random.integers(2**31)))

  def __call__(self, params, *, capabilities: bool = True) -> dict[str, Any]:
    """Everything, as JSON values."""
    questions, world = self.questions, self._world
    texts = say(self._model, params, questions.prompts, self._key)
    said = grade(world, texts, questions)
    views = self._views(params, texts, questions.kind)
    out = {
      NAMES[kind]: self._of(said, views, questions.kind == kind)
      for kind in NAMES
    }
    by_label = rewards.by_label(
      views['divergence'],
      {'right': said.right, 'made up': said.made_up, 'idk': said.idk},
    )
    # What is not said at all has none.
    out['divergence by what is said'] = {
      k: None if np.isnan(v) else v for k, v in by_label.items()
    }
    out['divergence'] = float(views['divergence'].mean())
    out['reward'] = self._parts(said, views)
    out['fixed texts'] = dict(self._fixed(params))
    out['doubted'] = self._doubted(params)
    if capabilities:
      out['capabilities'] = capability(self._model, params, world)
    return out

  def _views(self, params, texts, kind) -> dict[str, np.ndarray]:
    """Scores of claims by base and policy, and how far these are apart."""
    parts = []
    for start in range(0, len(texts), 1024):
      rows = slice(start, start + 1024)
      parts.append(_view(self._monitor.probe, params, texts[rows], kind[rows]))
    return {
      k: np.concatenate([np.asarray(p[k]) for p in parts]) for k in parts[0]
    }

  def _of(self, said, views, rows) -> dict[str, float | None]:
    """Rates per question of a kind."""
    mean = lambda x: float(x[rows].mean())
    made_up = rows & said.made_up
    score = lambda k: float(views[k][made_up].mean()) if made_up.any() else None
    return {
      'claims': mean(said.claim),
      'made up': mean(said.made_up),
      'right': mean(said.right),
      'idk': mean(said.idk),
      'live score of made up': score('live'),
      'frozen score of made up': score('frozen'),
    }

  def _parts(self, said, views) -> Mapping[str, float]:
    c = self._config.rl
    parts = rewards.reward_parts(
      worth(c, self.questions.kind, said, 0.0),
      said.claim * views['frozen'],
      said.claim * views['live'],
      c['weight'],
    )
    return parts._asdict()

  def _doubted(self, params) -> dict[str, float | None]:
    """Of flagged drafts: what is done with those that are true, and not."""
    key = jax.random.fold_in(self._key, 1)
    texts = say(self._model, params, self.doubts.prompts, key)
    said = grade(self._world, texts, self.doubts)
    share = lambda what, rows: float(what[rows].mean()) if rows.any() else None
    true, false = said.draft_right, ~said.draft_right
    kept = said.action == rewards.MAINTAIN
    return {
      'flagged by mistake': float(true.mean()),
      'kept of true': share(kept, true),
      'kept of false': share(kept, false),
      'retracted of false': share(said.action == rewards.RETRACT, false),
      'fixed of false': share(said.new_right, false),
      'malformed': float((said.action == rewards.MALFORMED).mean()),
    }


def flagged(monitor: Monitor, drafts: Drafts) -> Drafts:
  """Those that the monitor doubts."""
  texts = drafts.texts
  doubt = probes.score_spans(
    monitor.probe, texts.tokens, texts.mask, texts.spans
  )
  return drafts.rows(doubt >= monitor.threshold)


@jax.jit
def _view(probe, params, tokens, kind):
  mask = tokens != PAD
  at, _ = spans(kind)
  frozen = probe.read(tokens, mask)
  live = probe.observe(params, tokens, mask)
  apart = divergence.exact(live.logits_BTV, frozen.logits_BTV)
  sampled = mask & (jnp.arange(tokens.shape[1])[None] >= PROMPT)
  # What is predicted at a token is the next.
  apart = jnp.where(sampled[:, 1:], apart[:, :-1], 0)
  return {
    'frozen': probe.scores(frozen, at),
    'live': probe.live_scores(live, at),
    'divergence': apart.sum(axis=1),
  }


def capability(model, params, world: World) -> dict[str, float]:
  """Share of held-out answers that are right, %, greedily."""
  out = {}
  for name, texts, start, count in (
    ('maximum', maximum(world.pairs[1]), 5, 1),
    ('sorting', in_order(world.triples[1]), 6, 3),
  ):
    prompts = texts[:, :start]
    said = say(
      model, params, prompts, jax.random.key(0), new_tokens=count, greedy=True
    )
    right = (said == texts[:, : start + count]).all(axis=1)
    out[name] = float(100 * right.mean())
  return out


def best_of(config, model, params, world, monitor, questions, key, most: int):
  """Of `n` answers the one that the reward likes best, without training.

  Returns:
    For `n` of 1, 2, 4, ... up to `most`: rates by kind of question.
  """
  claims, right, values = [], [], []
  for i in range(most):
    texts = say(model, params, questions.prompts, jax.random.fold_in(key, i))
    said = grade(world, texts, questions)
    at = np.asarray(spans(questions.kind)[0])
    doubt = probes.score_spans(monitor.probe, texts, texts != PAD, at)
    claims.append(said.claim)
    right.append(said.right)
    values.append(worth(config.rl, questions.kind, said, doubt))
  claims, right, values = map(np.array, (claims, right, values))
  out = {}
  n = 1
  while n <= most:
    best = values[:n].argmax(axis=0)
    pick = lambda x: np.take_along_axis(x, best[None], axis=0)[0]
    claim, true = pick(claims), pick(right)
    out[str(n)] = {
      name: {
        'claims': float(claim[questions.kind == kind].mean()),
        'made up': float((claim & ~true)[questions.kind == kind].mean()),
        'right': float(true[questions.kind == kind].mean()),
      }
      for kind, name in NAMES.items()
    }
    n *= 2
  return out
