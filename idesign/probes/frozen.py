"""A probe that reads a model which does not change.

A policy that is rewarded by a probe on its own activations can please it by
moving them. Read by a frozen copy of the model, it can only by what it says:
of `E[R] - E[psi(y, now)] = E[R] - E[psi(y, frozen)] + E[psi(y, frozen) - psi(y,
now)]` the last term, representations that change, is not there
(https://arxiv.org/abs/2602.15515). What remains is text that fools the frozen
model; a weak probe is fooled at once, so weak ones are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import contextvars
import dataclasses
import enum
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from idesign.probes.architectures import ProbeConfig, ProbeParams, apply_probe
from idesign.probes.calibration import ProbeQuality
from idesign.probes.reading import Observation, Observe, in_batches


class Pressure(enum.IntEnum):
  """How hard training pushes against what a probe can see; worse is larger.

  `NONE`: no probe is read. `FROZEN`: one on the frozen model (`scores`).
  `LIVE`: one on the model that is trained, whose value counts (`live_scores`).
  `GRADIENT`: the same, differentiated (`allow_gradient=True`).
  """

  NONE = 0
  FROZEN = 1
  LIVE = 2
  GRADIENT = 3


class PressureError(ValueError):
  """A reward presses harder on a probe than it declares."""


_declared: contextvars.ContextVar[Pressure] = contextvars.ContextVar(
  'declared', default=Pressure.GRADIENT
)


@contextlib.contextmanager
def declared(pressure: Pressure) -> Iterator[None]:
  """Inside, a probe that is read with more pressure raises PressureError."""
  token = _declared.set(pressure)
  try:
    yield
  finally:
    _declared.reset(token)


def _within(needed: Pressure, call: str) -> None:
  if needed > _declared.get():
    raise PressureError(
      f'{call} inside of a reward that declares pressure '
      f'{_declared.get().name}: give its term pressure=Pressure.{needed.name}, '
      'by which the run is marked.'
    )


class WeakProbeError(ValueError):
  """A probe is too weak to be trained on."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FrozenProbe:
  """A probe and the frozen model that it reads: a pytree of arrays.

  Nothing that comes out of it has a gradient: not with respect to these
  parameters, nor to any others that the texts may depend on.

  Attributes:
    params: of the model, its own copy (`freeze`).
    probe: parameters of the probe.
    observe: `observer(apply, names)`.
    config: of the probe.
    quality: on entities that the probe was not fitted on.
  """

  params: Any
  probe: ProbeParams
  observe: Observe = dataclasses.field(metadata={'static': True})
  config: ProbeConfig = dataclasses.field(metadata={'static': True})
  # Not static: another probe of the same kind compiles nothing anew.
  quality: ProbeQuality

  def read(
    self, tokens_BT: Int[Array, 'B T'], mask_BT: Bool[Array, 'B T']
  ) -> Observation:
    """The frozen model's view, for a reference divergence and for `scores`."""
    params = jax.lax.stop_gradient(self.params)
    observation = self.observe(params, tokens_BT, mask_BT)
    return jax.lax.stop_gradient(observation)

  def scores(
    self, observation: Observation, spans_BT: Bool[Array, 'B T']
  ) -> Float[Array, 'B']:
    """Probability of the label for one span of each text.

    Raises:
      PressureError: inside of a reward that declares no pressure.
      ValueError: shapes do not agree.
    """
    _within(Pressure.FROZEN, 'scores')
    observation = jax.lax.stop_gradient(observation)
    return jax.lax.stop_gradient(self._scores(observation, spans_BT))

  def live_scores(
    self,
    observation: Observation,
    spans_BT: Bool[Array, 'B T'],
    *,
    allow_gradient: bool = False,
  ) -> Float[Array, 'B']:
    """The same on the activations of a model that is being trained.

    Args:
      observation: of `observe` with that model's parameters.
      spans_BT: one span of each text.
      allow_gradient: whether training may differentiate the probe, which
        teaches the model to look innocent: the highest pressure there is.
        Inside of a reward the term must declare it (`Pressure.GRADIENT`), by
        which the run is marked; in a loss of one's own nothing marks it.

    Raises:
      PressureError: inside of a reward that declares less.
    """
    needed = Pressure.GRADIENT if allow_gradient else Pressure.LIVE
    _within(needed, f'live_scores(allow_gradient={allow_gradient})')
    if not allow_gradient:
      return self.scores(observation, spans_BT)
    return self._scores(observation, spans_BT)

  def _scores(self, observation, spans_BT):
    if self.config.classes != 1:
      raise ValueError(f'classes={self.config.classes}: one score needs 1.')
    texts = observation.h_BTE.shape[:2]
    if spans_BT.shape != texts:
      raise ValueError(
        f'spans have shape {spans_BT.shape}; one of each text, {texts}, is '
        'asked of the probe.'
      )
    logits_BC = jax.vmap(
      lambda h, m: apply_probe(self.config, self.probe, h, m)
    )(observation.h_BTE, spans_BT)
    return jax.nn.sigmoid(logits_BC[:, 0])


def freeze(
  params: Any,
  probe: ProbeParams,
  *,
  observe: Observe,
  config: ProbeConfig,
  quality: ProbeQuality,
  minimum_auroc: float = 0.9,
  accept_weak_probe: bool = False,
) -> FrozenProbe:
  """Copies a model, so that what is donated in training is not what is read.

  Args:
    params: of the model, copied.
    probe: parameters of the probe.
    observe: `observer(apply, names)`.
    config: of the probe.
    quality: `quality(...)` on entities that it was not fitted on.
    minimum_auroc: below it a probe is refused.
    accept_weak_probe: take it all the same.

  Raises:
    WeakProbeError: with the numbers.
  """
  if quality.auroc < minimum_auroc and not accept_weak_probe:
    raise WeakProbeError(
      f'AUROC {quality.auroc:.3f} on {quality.entities} unseen entities '
      f'({quality.positives} positives, {quality.negatives} negatives) is '
      f'below {minimum_auroc}: what pleases such a probe need not be true. '
      'Label more entities, read another layer, or pass '
      'accept_weak_probe=True.'
    )
  return FrozenProbe(
    jax.tree.map(jnp.copy, params), jax.tree.map(jnp.asarray, probe),
    observe, config, quality,
  )  # fmt: skip


def score_spans(
  probe: FrozenProbe,
  tokens_NT: Int[np.ndarray, 'N T'],
  mask_NT: Bool[np.ndarray, 'N T'],
  spans_NT: Bool[np.ndarray, 'N T'],
  *,
  batch_size: int = 1024,
) -> Float[np.ndarray, 'N']:
  """Scores of many texts, one span each, a batch at a time, on the host.

  Raises:
    ValueError: for shapes that do not belong together.
  """
  if not tokens_NT.shape == mask_NT.shape == spans_NT.shape:
    raise ValueError(
      f'tokens {tokens_NT.shape}, mask {mask_NT.shape}, spans {spans_NT.shape}.'
    )
  score = functools.partial(_score, probe)
  return in_batches(score, (tokens_NT, mask_NT, spans_NT), batch_size)


@jax.jit
def _score(probe, tokens_BT, mask_BT, spans_BT):
  return probe.scores(probe.read(tokens_BT, mask_BT), spans_BT)
