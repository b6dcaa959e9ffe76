"""What a run does to the probe that rewards it, and to the truth.

Of `E[R] - alpha E[psi(y, now)]`, a task's reward less a probe's score, three
parts can be told apart when the same texts are also read by the frozen model
(https://arxiv.org/abs/2602.15515, equation 3):

    E[R]  -  alpha E[psi(y, frozen)]  +  alpha E[psi(y, frozen) - psi(y, now)]
    task     penalty                     change of representation

A policy may lower the second by honest texts or by texts that fool the frozen
model, and the third by activations that fool the probe. Only the truth tells
the first two apart; a probe fitted anew tells whether what the old one has lost
is still there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from idesign import probes
from idesign.probes import FitConfig, FrozenProbe


class RewardParts(NamedTuple):
  """Means over samples; `task - penalty + change` is what a live probe pays.

  Attributes:
    task: what is paid without the probe.
    penalty: what the frozen model's reading takes from it.
    change: what activations that moved give back.
  """

  task: float
  penalty: float
  change: float

  @property
  def total(self) -> float:
    return self.task - self.penalty + self.change


def reward_parts(
  task_B: Float[Array, 'B'],
  frozen_B: Float[Array, 'B'],
  live_B: Float[Array, 'B'],
  weight: float = 1.0,
) -> RewardParts:
  """Splits a penalised reward.

  Args:
    task_B: rewards without the probe.
    frozen_B: scores by the frozen model.
    live_B: scores of the same texts by the model that is trained.
    weight: `alpha`.

  Raises:
    ValueError: if they are not of the same samples.
  """
  task, frozen, live = (
    np.asarray(x, np.float64) for x in (task_B, frozen_B, live_B)
  )
  if not task.shape == frozen.shape == live.shape or task.ndim != 1:
    raise ValueError(
      f'rewards {task.shape} and scores {frozen.shape}, {live.shape} must all '
      'be [samples].'
    )
  return RewardParts(
    float(task.mean()),
    float(weight * frozen.mean()),
    float(weight * (frozen - live).mean()),
  )


class Texts(NamedTuple):
  """Labelled spans that stay the same throughout a run.

  Attributes:
    tokens: `[N, T]`.
    mask: which are real, `[N, T]`.
    spans: one span of each, `[N, T]`.
    labels: what is true of it, `[N]`.
    entities: which entity each is about, `[N]`.
  """

  tokens: Int[np.ndarray, 'N T']
  mask: Bool[np.ndarray, 'N T']
  spans: Bool[np.ndarray, 'N T']
  labels: Bool[np.ndarray, 'N']
  entities: np.ndarray

  def rows(self, rows) -> Texts:
    """Some of them."""
    return jax.tree.map(lambda x: x[rows], self)


def make_monitor(
  probe: FrozenProbe,
  texts: Texts,
  *,
  fit: FitConfig = FitConfig(),
  seed: int = 0,
  batch_size: int = 1024,
) -> Callable[[Any], Mapping[str, float]]:
  """`monitor(params) -> metrics` of a model, on texts that stay the same.

  Half of the entities are for fitting a new probe of the same kind, the rest
  for measuring both: no entity is in both halves.

  Args:
    probe: whose weights are read on the model's own activations.
    texts: labelled spans.
    fit: how the new probe is fitted.
    seed: of the halves, and of the new probe.
    batch_size: texts that are read at a time.

  Returns:
    A function with, of the halves that are for measuring: `auroc` and `ece` of
    the original probe, `refitted_auroc` of the new one, and the original's mean
    `score/true` and `score/false` where the label is and is not.

  Raises:
    ValueError: if a half has only one label.
  """
  fitting, measuring = (
    texts.rows(rows)
    for rows in probes.split_entities(texts.entities, (0.5, 0.5), seed)
  )
  for half in (fitting, measuring):
    if half.labels.all() or not half.labels.any():
      raise ValueError(
        f'all {len(half.labels)} labels of a half are {half.labels[0]}: label '
        'more texts.'
      )

  def monitor(params: Any) -> dict[str, float]:
    read = lambda t: probes.read_spans(
      probe.observe, params, t.tokens, t.mask, batch_size=batch_size
    )
    h = read(measuring)
    logits = probes.probe_logits(probe.config, probe.probe, h, measuring.spans)
    scores = np.asarray(jax.nn.sigmoid(logits[:, 0]))
    refitted = probes.fit_probe(
      probe.config, read(fitting), fitting.spans, fitting.labels, fit=fit,
      key=jax.random.key(seed),
    )  # fmt: skip
    again = probes.probe_logits(probe.config, refitted, h, measuring.spans)
    measure = lambda s: probes.quality(s, measuring.labels, measuring.entities)
    old = measure(scores)
    return {
      'auroc': old.auroc,
      'ece': old.ece,
      'refitted_auroc': measure(np.asarray(jax.nn.sigmoid(again[:, 0]))).auroc,
      'score/true': float(scores[measuring.labels].mean()),
      'score/false': float(scores[~measuring.labels].mean()),
    }

  return monitor


def by_label(
  values_B: Float[Array, 'B'], labels: Mapping[str, Bool[Array, 'B']]
) -> dict[str, float]:
  """Means of a value over the samples that each label holds of.

  A divergence by label, say: of true claims, of false ones, of none. NaN where
  there is no such sample.
  """
  values = np.asarray(values_B, np.float64)
  out = {}
  for name, rows in labels.items():
    rows = np.asarray(rows, bool)
    if rows.shape != values.shape:
      raise ValueError(f'{name}: {rows.shape}, and values {values.shape}.')
    out[name] = float(values[rows].mean()) if rows.any() else float('nan')
  return out
