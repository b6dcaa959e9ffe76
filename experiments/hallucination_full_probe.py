"""Probes of a real model: where a claim is made, how likely it is made up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool
import numpy as np
import safetensors.numpy

from experiments import contract
from experiments.hallucination_text import LABELS, Graded
from idesign import probes, rewards, sites
from idesign.probes import Observation
from idesign.probes.spans import OUTSIDE

SHARES = (0.6, 0.2, 0.2)  # Of entities: to fit, to calibrate, to measure.


@dataclasses.dataclass(frozen=True)
class Reader:
  """Both probes, for use.

  Attributes:
    probe: says of a claim how likely it is made up.
    where: parameters of the probe of tokens.
    where_config: its config.
    threshold: at and above it a claim is doubted.
    most: claims of a text that are read.
    audit: `audit(params)`: what the probe makes of the same texts read by
      another model, see `rewards.make_monitor`.
  """

  probe: probes.FrozenProbe
  where: probes.ProbeParams
  where_config: probes.ProbeConfig
  threshold: float
  most: int
  audit: Callable[[Any], Mapping[str, float]] | None = None

  def locate(
    self, view: Observation, said_BT: Bool[Array, 'B T']
  ) -> Bool[Array, 'B M T']:
    """Claims in what was said."""
    logits_BTC = jax.vmap(
      lambda h: probes.token_logits(self.where_config, self.where, h)
    )(view.h_BTE)
    tags_BT = jnp.where(said_BT, logits_BTC.argmax(axis=-1), OUTSIDE)
    return probes.span_masks(tags_BT, self.most)


def make_observe(config, model) -> probes.Observe:
  """What the probe reads.

  Raises:
    ValueError: the model has no such activations.
  """
  observe = probes.observer(model.apply, list(config.probe.activations))
  try:
    jax.eval_shape(
      lambda key, tokens: observe(model.init(key), tokens, tokens >= 0),
      jax.random.key(0), np.zeros((1, 2), np.int32),
    )  # fmt: skip
  except sites.SelectionError as error:
    raise ValueError(
      f'config.probe.activations={tuple(config.probe.activations)}: {error}'
    ) from error
  return observe


def fit_reader(
  config, observe: probes.Observe, model, params, graded: Graded,
  workdir: contract.Workdir,
  before: Callable[[Reader], None],
) -> Reader:  # fmt: skip
  """Fits both, or reads what an earlier run has fitted.

  Args:
    config: of the run.
    observe: from `make_observe`.
    model: the base.
    params: its parameters.
    graded: what it said.
    workdir: of the run.
    before: called with a reader that has seen nothing, before anything is read.

  Raises:
    WeakProbeError: with the numbers.
  """
  c = config.probe
  view = jax.eval_shape(observe, params, graded.tokens[:1], graded.mask[:1])
  width = view.h_BTE.shape[-1]
  kind = probes.ProbeConfig(
    kind=c.kind, d_in=width, hidden=c.hidden, heads=c.heads
  )
  where = probes.ProbeConfig(kind='logistic', d_in=width, classes=3)
  key = jax.random.key(config.seed)
  freeze = lambda fitted, quality, **kwargs: probes.freeze(
    params, fitted, observe=observe, config=kind, quality=quality, **kwargs
  )
  nothing = probes.ProbeQuality(0.5, 0.5, 0, 0, 0)
  new = freeze(probes.init_probe(kind, key), nothing, accept_weak_probe=True)
  before(Reader(new, probes.init_probe(where, key), where, 1.0, c.most_claims))
  del new  # It holds a copy of the model.

  file = workdir.path / 'probe.safetensors'
  read = lambda tokens, mask: probes.read_spans(
    observe, params, tokens, mask, batch_size=c.batch
  )
  masks = probes.split_entities(graded.entity, SHARES, config.seed)
  if 'probe' not in workdir.results or not file.is_file():
    claim, found, quality, threshold = _fit(
      c, kind, where, graded, masks, read, config.seed
    )
    fitted = safetensors.numpy.save(
      {
        f'{name}/{k}': np.ascontiguousarray(v)
        for name, part in (('claim', claim), ('where', found))
        for k, v in part.items()
      }
    )
    contract.write_bytes(file, fitted)
    workdir.results.pop('probe', None)
    workdir.arm(
      'probe', lambda: {'quality': quality._asdict(), 'threshold': threshold}
    )
  else:
    fitted = file.read_bytes()
  arrays = safetensors.numpy.load(fitted)
  part = lambda name: {
    k.removeprefix(f'{name}/'): v
    for k, v in arrays.items()
    if k.startswith(f'{name}/')
  }
  found = workdir.results['probe']
  probe = freeze(
    part('claim'), probes.ProbeQuality(**found['quality']),
    minimum_auroc=c.minimum_auroc, accept_weak_probe=c.accept_weak_probe,
  )  # fmt: skip
  # They stay the same throughout; the probe was not fitted on them, though its
  # scale was on some.
  texts = _fixed_texts(
    graded, masks[1] | masks[2], config.exam.audit, config.seed
  )
  audit = rewards.make_monitor(
    probe, texts, seed=config.seed, batch_size=c.batch
  )
  return Reader(
    probe, part('where'), where, found['threshold'], c.most_claims, audit
  )


def _fit(c, kind, where, graded: Graded, masks, read, seed: int):
  """Parameters of both, quality on unseen entities, and the threshold."""
  fit, key = probes.FitConfig(steps=c.steps), jax.random.key(seed)
  parts = [_claims(graded, rows, read, c.batch) for rows in masks]
  (h, spans, labels, _), calibrating, measuring = parts
  claim = probes.fit_probe(kind, h, spans, labels, fit=fit, key=key)
  logits = lambda part: np.asarray(
    probes.probe_logits(kind, claim, part[0], part[1])[:, 0]
  )
  claim = probes.calibrate(claim, logits(calibrating), calibrating[2])
  scores = lambda part: np.asarray(jax.nn.sigmoid(logits(part)))
  threshold = probes.threshold_at(
    scores(calibrating), calibrating[2], c.false_positive_rate
  )
  quality = probes.quality(scores(measuring), measuring[2], measuring[3])
  tokens, tags = _tokens(graded, masks[0], read, c.batch, c.tokens, seed)
  found = probes.fit_probe(
    where, tokens[:, None], np.ones((len(tokens), 1), bool), tags, fit=fit,
    key=key,
  )  # fmt: skip
  return claim, found, quality, threshold


def _batches(graded: Graded, rows, read, size: int):
  """Some texts at a time: which, and their activations."""
  (which,) = np.nonzero(rows)
  for start in range(0, len(which), size):
    now = which[start : start + size]
    yield now, read(graded.tokens[now], graded.mask[now])


def _claims(graded: Graded, rows, read, size: int):
  """Of decided claims: activations of their tokens, masks, labels, entities."""
  decided = graded.label != LABELS['insufficient']
  width = int((graded.stop - graded.start).max())
  parts, kept = [], []
  for texts, h in _batches(graded, rows, read, size):
    for i, text in enumerate(texts):
      for s in np.nonzero((graded.row == text) & decided)[0]:
        span = h[i, graded.start[s] : graded.stop[s]]
        parts.append(np.pad(span, ((0, width - len(span)), (0, 0))))
        kept.append(s)
  kept = np.array(kept, int)
  long = graded.stop[kept] - graded.start[kept]
  return (
    np.array(parts), np.arange(width)[None] < long[:, None],
    graded.label[kept] == LABELS['not supported'],
    graded.entity[graded.row[kept]],
  )  # fmt: skip


def _tokens(graded: Graded, rows, read, size: int, most: int, seed: int):
  """Of tokens that were said, at most so many: activations and classes."""
  random = np.random.default_rng(seed)
  share = min(1.0, most / max(graded.said[rows].sum(), 1))
  tokens, tags = [], []
  for texts, h in _batches(graded, rows, read, size):
    chosen = graded.said[texts]
    chosen &= random.random(chosen.shape) < share
    tokens.append(h[chosen])
    tags.append(graded.tags[texts][chosen])
  return np.concatenate(tokens), np.concatenate(tags)


def _fixed_texts(graded: Graded, rows, most: int, seed: int) -> rewards.Texts:
  """Decided claims of texts, at most so many, a row for each."""
  (of_rows,) = np.nonzero(rows[graded.row] & (graded.label >= 0))
  random = np.random.default_rng(seed)
  chosen = random.permutation(of_rows)[:most]
  row = graded.row[chosen]
  where = np.arange(graded.tokens.shape[1])[None]
  spans = (where >= graded.start[chosen, None]) & (
    where < graded.stop[chosen, None]
  )
  return rewards.Texts(
    graded.tokens[row], graded.mask[row], spans,
    graded.label[chosen] == LABELS['not supported'], graded.entity[row],
  )  # fmt: skip
