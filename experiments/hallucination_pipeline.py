"""Long texts under a monitor: claims are located, doubted, and answered for.

A policy writes a list of claims. A probe of single tokens finds where a claim
is made, another says how likely it is made up; what is flagged is doubted, and
the policy keeps it, takes it back or corrects it. In line, its answer stays in
the text, and what it says next can depend on it; otherwise it is only noted.
Both probes read the frozen model. (RLFR, https://arxiv.org/abs/2602.10067.)
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from experiments.hallucination_base import say
from experiments.hallucination_grammar import (
  ANS, BOS, CHECK, CLAIMS, CORRECT, EOS, LIST, LONG, MAINTAIN, PAD, RETRACT,
)  # fmt: skip
from experiments.hallucination_probe import Monitor, width
from experiments.hallucination_world import World
from idesign import probes, rewards
from idesign.probes.spans import BEGINS, CONTINUES, OUTSIDE

ACTIONS = {
  MAINTAIN: rewards.MAINTAIN, RETRACT: rewards.RETRACT, CORRECT: rewards.CORRECT
}  # fmt: skip
# Of the published method: RLFR, table 1, in line, one sample; %.
PUBLISHED = {
  'policy': 10.0,
  'in_context': 34.7,
  'direct': 11.8,
  'overall': 56.6,
}


class Localiser(NamedTuple):
  """Says of every token whether it begins a claim or continues one."""

  config: probes.ProbeConfig
  params: probes.ProbeParams

  def tags(self, h_NTE) -> np.ndarray:
    """Classes of tokens, `[N, T]`."""
    logits = jax.vmap(
      lambda h: probes.token_logits(self.config, self.params, h)
    )(h_NTE)
    return np.asarray(logits.argmax(axis=-1))


def fit_localiser(
  config, observe, params, world: World, seed: int
) -> Localiser:
  """Fits one on lists that the base is trained on, of the probe's subjects."""
  random = np.random.default_rng(np.random.SeedSequence([seed, 8]))
  subject = np.repeat(world.choosing(world.groups.probe), config.probe.lists)
  texts = world.lists(subject, random)
  h = probes.read_spans(observe, params, texts, texts != PAD)
  real = texts != PAD
  kind = probes.ProbeConfig(kind='logistic', d_in=width(config), classes=3)
  fitted = probes.fit_probe(
    kind, h[real][:, None], np.ones((real.sum(), 1), bool),
    true_tags(world, texts)[real], fit=probes.FitConfig(l2=1e-4),
    key=jax.random.key(seed),
  )  # fmt: skip
  return Localiser(kind, fitted)


def true_tags(world: World, texts) -> np.ndarray:
  """Where claims are made: an attribute's token, and a value of it after it."""
  first, second = texts[:, :-1], texts[:, 1:]
  attribute = world.claimed(first, second)
  tags = np.full(texts.shape, OUTSIDE)
  tags[:, :-1][attribute >= 0] = BEGINS
  tags[:, 1:][attribute >= 0] = CONTINUES
  return tags


def accounts(watcher: Watcher, config, params, subjects, seed: int) -> dict:
  """Counts of a policy with and without a monitor, as JSON values.

  Args:
    watcher: of the seed.
    config: `config.exam`.
    params: of the policy.
    subjects: whom lists are about.
    seed: of all that is drawn.
  """
  who = np.repeat(watcher.world.choosing(subjects), config.lists)
  key = jax.random.key(seed)

  def count(**kw):
    counts, texts = watcher(params, who, key, **kw)
    return counts._asdict() | {'recounted': recount(watcher.world, texts)}

  out = {
    'alone': count(watched=False),
    'not in line': count(watched=True, in_line=False),
  }
  n = 1
  while n <= config.best_of:
    out[f'in line, {n}'] = count(watched=True, samples=n)
    if n > 1:
      out[f'in line, {n}, no vote'] = count(watched=True, samples=n, vote=False)
    n *= 4
  return out


class Written(NamedTuple):
  """Lists, and what in them the monitor wrote.

  Attributes:
    tokens: padded on the right, `[N, LONG]`.
    doubted: where the monitor, and not the policy itself, wrote `CHECK`.
  """

  tokens: np.ndarray
  doubted: np.ndarray


def recount(world: World, texts: Written) -> float:
  """What the texts themselves leave wrong, per list.

  Claims that are false as they stand at the end, and true ones that were taken
  back when they were doubted: what `rewards.Counts.standing` adds up while they
  are written. That a policy doubts itself, unasked, changes nothing.
  """
  wrong = 0
  for tokens, doubted in zip(*texts):
    subject = tokens[2] - world.grammar.subject
    end = len(np.trim_zeros(tokens, 'b'))
    at = 4
    while at + 1 < end and tokens[at] != EOS:
      claim = np.array([[subject], [tokens[at]], [tokens[at + 1]]])
      about, right = world.read(*claim)
      stands = right[0]
      at += 2
      if at + 1 < end and doubted[at]:
        action = tokens[at + 1]
        at += 2
        if action == CORRECT:
          stands = world.right(subject, max(about[0], 0), tokens[at])
          at += 1
        elif action == RETRACT:
          stands = not right[0]
      wrong += about[0] >= 0 and not stands
  return wrong / len(texts.tokens)


class _Lists:
  """Texts that grow, `[N, LONG]`, padded on the right."""

  def __init__(self, world: World, subject):
    self.subject = subject
    self.tokens = np.full((len(subject), LONG), PAD, np.int32)
    self.doubted = np.zeros(self.tokens.shape, bool)
    self.lengths = np.zeros(len(subject), int)
    self.add(np.ones(len(subject), bool), BOS, LIST,
             world.grammar.subject + subject, ANS)  # fmt: skip

  def add(self, rows, *columns) -> None:
    """Writes a token of each column after what these rows hold."""
    for column in columns:
      column = np.broadcast_to(column, len(self.tokens))
      self.tokens[rows, self.lengths[rows]] = column[rows]
      self.lengths[rows] += 1

  def answer(self, rows, action) -> None:
    """Writes the monitor's doubt after what these rows hold, and an answer."""
    self.doubted[rows, self.lengths[rows]] = True
    self.add(rows, CHECK, action)

  def last(self, back: int = 1) -> np.ndarray:
    return self.tokens[np.arange(len(self.tokens)), self.lengths - back]

  def last_span(self) -> np.ndarray:
    """The last two tokens, as a mask."""
    where = np.arange(LONG)
    end = self.lengths[:, None]
    return (where < end) & (where >= end - 2)

  def left(self) -> np.ndarray:
    """The same texts, padded on the left: what a model goes on from."""
    where = np.arange(LONG) - (LONG - self.lengths)[:, None]
    tokens = np.take_along_axis(self.tokens, np.maximum(where, 0), axis=1)
    return np.where(where >= 0, tokens, PAD)


class Watcher:
  """A policy's lists, with a monitor or without.

  Attributes:
    world: whom they are about.
  """

  def __init__(
    self, config, model, world: World, monitor: Monitor, localiser: Localiser
  ):
    self.world, self._config, self._model = world, config, model
    self._monitor, self._localiser = monitor, localiser

  def __call__(
    self, params, subjects, key, *, watched: bool, in_line: bool = True,
    samples: int = 1, vote: bool = True,
  ) -> tuple[rewards.Counts, Written]:  # fmt: skip
    """Writes a list about each subject, and counts.

    Args:
      params: of the policy.
      subjects: who the lists are about.
      key: of all that is drawn.
      watched: whether claims are doubted at all.
      in_line: whether the answers stay in the texts.
      samples: answers to each doubt, of which one is taken.
      vote: whether it is the best of those that most agree with, as published,
        or the best of all.

    Returns:
      Counts per list, and the lists.
    """
    lists = _Lists(self.world, np.asarray(subjects))
    going = np.ones(len(subjects), bool)
    total = np.zeros(len(rewards.Counts._fields))
    for i in range(CLAIMS):
      step = jax.random.fold_in(key, i)
      text = say(self._model, params, lists.left(), step, new_tokens=2)
      first, second = text[:, -2], text[:, -1]
      going &= first != EOS
      lists.add(going, first, second)
      attribute, right = self.world.read(lists.subject, first, second)
      claimed = going & (attribute >= 0)
      wrong = claimed & ~right
      if not watched:
        total += [wrong.sum(), 0, 0, 0, 0, 0]
        continue
      doubt = self._doubt(lists, going)
      flagged = doubt >= self._monitor.threshold
      action, value = self._answer(
        params, lists, flagged, attribute, doubt, jax.random.fold_in(step, 1),
        samples, vote,
      )  # fmt: skip
      caught, mistaken = flagged & wrong, flagged & claimed & right
      corrected = action == CORRECT
      truly = self.world.right(lists.subject, np.maximum(attribute, 0), value)
      total += [
        wrong.sum(),
        caught.sum(),
        (caught & corrected & truly).sum(),
        (caught & (action == RETRACT)).sum(),
        mistaken.sum(),
        (mistaken & ((action == MAINTAIN) | (corrected & truly))).sum(),
      ]
      if in_line:
        lists.answer(flagged, action)
        lists.add(flagged & corrected, value)
    counts = rewards.Counts(*(total / len(subjects)).tolist())
    return counts, Written(lists.tokens, lists.doubted)

  def _doubt(self, lists: _Lists, rows) -> np.ndarray:
    """How likely the last claim is made up; -1 where none is located."""
    probe = self._monitor.probe
    h = probes.read_spans(
      probe.observe, probe.params, lists.tokens, lists.tokens != PAD
    )
    tags = self._localiser.tags(h)
    at = np.arange(len(tags))
    located = rows & (tags[at, lists.lengths - 2] == BEGINS)
    located &= tags[at, lists.lengths - 1] == CONTINUES
    logits = probes.probe_logits(
      probe.config, probe.probe, h, lists.last_span()
    )[:, 0]
    return np.where(located, np.asarray(jax.nn.sigmoid(logits)), -1)

  def _answer(
    self, params, lists, flagged, attribute, doubt, key, samples, vote
  ):
    """The best of several answers: its action, and what follows it."""
    asked = _Lists(self.world, lists.subject)
    asked.tokens, asked.lengths = lists.tokens.copy(), lists.lengths.copy()
    asked.add(flagged, CHECK)
    prompts = asked.left()
    actions, values, scores = [], [], []
    for i in range(samples):
      # Two tokens: what is done, and a new value if that is what is done.
      text = say(
        self._model, params, prompts, jax.random.fold_in(key, i), new_tokens=2
      )
      action, value = text[:, -2], text[:, -1]
      of_it = self.world.grammar.attribute_of(value) == attribute
      malformed = (action == CORRECT) & ~of_it
      kind = np.select(
        [action == token for token in ACTIONS],
        list(ACTIONS.values()),
        rewards.MALFORMED,
      )
      kind = np.where(malformed, rewards.MALFORMED, kind)
      actions.append(action)
      values.append(value)
      score = rewards.intervention_reward(
        kind,
        doubt,
        self._new_doubt(asked, flagged, action, value),
        retraction=self._config.rl.retraction,
      )
      scores.append((kind, np.asarray(score)))
    kinds, worth = (np.stack(x, axis=1) for x in zip(*scores))
    best = rewards.best_of_n(kinds, worth) if vote else worth.argmax(axis=1)
    pick = lambda x: np.stack(x, axis=1)[np.arange(len(best)), best]
    kind = pick(list(kinds.T))
    # Of an answer that is none the claim stands, and the text has `maintain`.
    action = np.where(kind == rewards.MALFORMED, MAINTAIN, pick(actions))
    return action, pick(values)

  def _new_doubt(self, asked, flagged, action, value) -> np.ndarray:
    corrected = flagged & (action == CORRECT)
    if not corrected.any():
      return np.zeros(len(action))
    text = _Lists(self.world, asked.subject)
    text.tokens, text.lengths = asked.tokens.copy(), asked.lengths.copy()
    text.add(corrected, action, value)
    return probes.score_spans(
      self._monitor.probe, text.tokens, text.tokens != PAD, text.last_span()
    )
