"""Probes of made-up claims: what they are fitted on, and how good they are."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.hallucination_base import grade, say
from experiments.hallucination_grammar import (
  ANS, ASK, BOS, CHOOSE, CHOSEN, CLAIMS, DOUBTED, LIST, LONG, PAD,
  Questions, spans,
)  # fmt: skip
from experiments.hallucination_world import World
from idesign import probes, rewards
from idesign.rewards import Texts

FRAMES = np.array([ASK, CHOOSE])  # Of `ASKED` and `CHOSEN`.


class Drafts(NamedTuple):
  """What a base model claims.

  Attributes:
    texts: of these claims, labelled true where they are made up.
    kind: `ASKED` or `CHOSEN`.
    attribute: that each is of.
    value: the token claimed.
  """

  texts: Texts
  kind: np.ndarray
  attribute: np.ndarray
  value: np.ndarray

  def rows(self, rows) -> Drafts:
    """Some of them."""
    return jax.tree.map(lambda x: x[rows], self)


def draft(model, params, world: World, subjects, count: int, seed) -> Drafts:
  """Claims about subjects: `count` questions of each, half of each kind.

  Args:
    model: the decoder.
    params: its parameters.
    world: whom it is asked about.
    subjects: who they are.
    count: questions of each.
    seed: numbers, of all that is drawn.
  """
  random = np.random.default_rng(np.random.SeedSequence(seed))
  asked = world.survey(subjects, count, random)
  key = jax.random.key(int(random.integers(2**31)))
  texts = say(model, params, asked.prompts, key)
  said = grade(world, texts, asked)
  at = np.asarray(spans(asked.kind)[0])
  last = texts.shape[1] - 1 - at[:, ::-1].argmax(axis=1)
  value = texts[np.arange(len(texts)), last]
  labelled = Texts(texts, texts != PAD, at, said.made_up, asked.subject)
  drafts = Drafts(labelled, asked.kind, said.attribute, value)
  return drafts.rows(said.claim)


def doubted(
  world: World, drafts: Drafts, random, lists: bool = False
) -> Questions:
  """The drafts, doubted: in the texts they were made in, or half in lists."""
  frame = FRAMES[drafts.kind]
  if lists:
    turn = (drafts.kind == CHOSEN) & (random.random(len(frame)) < 0.5)
    frame = np.where(turn, LIST, frame)
  return world.questions(
    drafts.texts.entities, DOUBTED, random, attribute=drafts.attribute,
    value=drafts.value, frame=frame,
  )  # fmt: skip


def corrections(model, params, world: World, drafts: Drafts, seed) -> Texts:
  """What a model corrects drafts to, where it does."""
  random = np.random.default_rng(np.random.SeedSequence(seed))
  asked = doubted(world, drafts, random)
  key = jax.random.key(int(random.integers(2**31)))
  texts = say(model, params, asked.prompts, key)
  said = grade(world, texts, asked)
  rows = said.action == rewards.CORRECT
  at = np.asarray(spans(asked.kind)[1])
  return Texts(texts, texts != PAD, at, ~said.new_right, asked.subject).rows(
    rows
  )


def listed(model, params, world: World, subjects, count: int, seed) -> Texts:
  """Claims of lists, a row for each."""
  random = np.random.default_rng(np.random.SeedSequence(seed))
  subject = np.repeat(world.choosing(subjects), count)
  n = len(subject)
  prompts = np.stack(
    [np.full(n, BOS), np.full(n, LIST), world.grammar.subject + subject,
     np.full(n, ANS)], axis=1,
  )  # fmt: skip
  key = jax.random.key(int(random.integers(2**31)))
  texts = say(model, params, prompts, key, new_tokens=2 * CLAIMS)
  where = np.arange(texts.shape[1])
  parts = []
  for i in range(CLAIMS):
    value = 5 + 2 * i
    attribute, right = world.read(subject, texts[:, value - 1], texts[:, value])
    at = np.broadcast_to((where == value) | (where == value - 1), texts.shape)
    all_of = Texts(texts, texts != PAD, at, ~right, subject)
    parts.append(all_of.rows(attribute >= 0))
  return Texts(*map(np.concatenate, zip(*parts)))


def together(*parts: Texts) -> Texts:
  """Texts of several widths, padded on the right."""
  wide = [
    t._replace(
      **{
        k: np.pad(getattr(t, k), ((0, 0), (0, LONG - t.tokens.shape[1])))
        for k in ('tokens', 'mask', 'spans')
      }
    )
    for t in parts
  ]
  return Texts(*map(np.concatenate, zip(*wide)))


def width(config) -> int:
  """Numbers of each token that probes read."""
  return config.model.d_model + 2 * config.probe.confidence


class Monitor(NamedTuple):
  """A probe for use.

  Attributes:
    probe: that reads the base.
    random: the same of a random direction, its scores as widely spread.
    threshold: at and above it a claim is doubted.
    quality: on other subjects, of `claims`, `corrections` and `lists`.
    null: areas under the curve of probes fitted on shuffled labels.
    reliability: of `claims`: mean score, rate and count of each bin.
  """

  probe: probes.FrozenProbe
  random: probes.FrozenProbe
  threshold: float
  quality: dict[str, dict[str, float]]
  null: list[float]
  reliability: dict[str, list[float]]


def make_monitor(
  config, model, observe, params, world: World, seed: int, subjects
) -> Monitor:
  """Fits a probe on its subjects, calibrates it on those of validation.

  Args:
    config: of the experiment.
    model: the decoder.
    observe: what the probe reads of it.
    params: its parameters.
    world: whom claims are about.
    seed: of all that is drawn.
    subjects: on whom its quality is measured.

  Raises:
    WeakProbeError: on validation subjects it is below 0.9.
  """
  c = config.probe

  def sample(subjects, count, number):
    own = lambda i: [seed, 2, number, i]
    drafts = draft(model, params, world, subjects, count, own(0))
    fixed = corrections(
      model,
      params,
      world,
      drafts.rows(slice(None, None, c.corrections)),
      own(1),
    )
    lists = listed(model, params, world, subjects, c.lists, own(2))
    return {'claims': drafts.texts, 'corrections': fixed, 'lists': lists}

  fitting = together(*sample(world.groups.probe, c.texts, 0).values())
  validation = sample(world.groups.validation, c.validation_texts, 1)
  test = sample(subjects, c.test_texts, 2)
  read = lambda t: probes.read_spans(observe, params, t.tokens, t.mask)
  kind = probes.ProbeConfig(
    kind=c.kind, d_in=width(config), pool=c.pool, hidden=c.hidden
  )
  fit = probes.FitConfig(steps=c.steps)
  key = jax.random.key(seed)
  h = read(fitting)
  fitted = probes.fit_probe(
    kind, h, fitting.spans, fitting.labels, fit=fit, key=key
  )
  logits = lambda p, t, k=kind: np.asarray(
    probes.probe_logits(k, p, read(t), t.spans)[:, 0]
  )
  held = together(*validation.values())
  fitted = probes.calibrate(fitted, logits(fitted, held), held.labels)
  scores = lambda t: np.asarray(jax.nn.sigmoid(logits(fitted, t)))
  quality = lambda t: probes.quality(scores(t), t.labels, t.entities)
  # Calibrated on the same claims: its error of calibration here is optimistic;
  # what is reported is that of test subjects.
  claims = validation['claims']
  probe = probes.freeze(
    params, fitted, observe=observe, config=kind, quality=quality(claims),
    minimum_auroc=c.minimum_auroc,
    accept_weak_probe=c.accept_weak_probe,
  )  # fmt: skip
  null = probes.shuffled_null(
    kind, (h, fitting.spans, fitting.labels),
    (read(test['claims']), test['claims'].spans, test['claims'].labels),
    fit=fit, repeats=c.null_repeats, seed=seed,
  )  # fmt: skip
  bins = probes.reliability(scores(test['claims']), test['claims'].labels)
  return Monitor(
    probe,
    _random(config, probe, h, fitting, logits(fitted, held), seed),
    probes.threshold_at(scores(claims), claims.labels, c.false_positive_rate),
    {k: quality(t)._asdict() for k, t in test.items()},
    null.tolist(),
    {k: np.nan_to_num(v, nan=-1).tolist() for k, v in bins._asdict().items()},
  )


def _random(config, probe, h, texts: Texts, like, seed: int):
  """Along a random direction, with logits of the mean and spread of `like`."""
  kind = probes.ProbeConfig(kind='logistic', d_in=width(config))
  params = probes.init_probe(kind, jax.random.key(seed))
  tokens = h[texts.spans]
  params |= {'mean': tokens.mean(axis=0), 'scale': tokens.std(axis=0)}
  direction = np.random.default_rng(np.random.SeedSequence([seed, 3])).normal(
    size=params['weight'].shape
  )
  params['weight'] = jnp.asarray(direction, jnp.float32)
  raw = np.asarray(probes.probe_logits(kind, params, h, texts.spans))
  scale = like.std() / raw.std()
  params['weight'] = params['weight'] * scale
  params['bias'] = jnp.full(1, like.mean() - scale * raw.mean(), jnp.float32)
  return probes.freeze(
    probe.params, params, observe=probe.observe, config=kind,
    quality=probe.quality._replace(auroc=0.5), accept_weak_probe=True,
  )  # fmt: skip
