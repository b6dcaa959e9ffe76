"""Rewards: pure functions of samples and of what models make of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from idesign.probes import FrozenProbe, Observation, Pressure, declared
from idesign.rewards.rollout import Samples


class Scene(NamedTuple):
  """What a reward may look at.

  Attributes:
    samples: the texts.
    info: what is known of each text's prompt, arrays `[B, ...]`.
    probe: the frozen probe.
    teacher: the frozen model's view of the texts.
    student: the policy's own; None unless some term asks for it.
    key: for rewards that draw something.
  """

  samples: Samples
  info: Mapping[str, Array]
  probe: FrozenProbe
  teacher: Observation
  student: Observation | None
  key: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Term:
  """One part of a reward.

  Attributes:
    name: of it, in metrics and errors.
    value: `value(scene)`: `[B]`, or `[B, T]` where each token has its own, or
      one value for each span that stands at the span's last token.
    weight: what it is multiplied by, after the bounds.
    low: values below count as it.
    high: values above count as it.
    pressure: what it does to the probe. `LIVE` terms are given the policy's
      own activations; those of `GRADIENT` are differentiated as well, on top
      of counting in the advantages like all others, and are not divided by
      the advantages' scale.
  """

  name: str
  value: Callable[[Scene], Float[Array, 'B'] | Float[Array, 'B T']]
  weight: float = 1.0
  low: float = -jnp.inf
  high: float = jnp.inf
  pressure: Pressure = Pressure.NONE

  def __post_init__(self):
    if not self.name or '/' in self.name:
      raise ValueError(f'name={self.name!r} of a term: some text without "/".')
    if not self.low < self.high:
      raise ValueError(
        f'{self.name}: low={self.low} must be below high={self.high}.'
      )


def evaluate(
  terms: Sequence[Term], scene: Scene
) -> dict[str, Float[Array, 'B T']]:
  """Weighted values of all terms, of each token.

  The value of a whole text stands at the last token that was sampled, or at
  the text's last if nothing was.

  Raises:
    ValueError: for two terms of a name, or a value of another shape.
    PressureError: a term reads the policy's activations and does not say so.
  """
  names = [t.name for t in terms]
  if len(set(names)) < len(names) or not names:
    raise ValueError(f'terms {names}: at least one, and each has its own name.')
  batch, time = scene.samples.tokens_BT.shape
  out = {}
  for term in terms:
    with declared(term.pressure):
      value = jnp.asarray(term.value(scene), jnp.float32)
    if value.shape not in ((batch,), (batch, time)):
      raise ValueError(
        f'the reward {term.name!r} has shape {value.shape}; it must be '
        f'({batch},) or ({batch}, {time}).'
      )
    # A bound must not hide that something is not a number: clip keeps it.
    value = term.weight * jnp.clip(value, term.low, term.high)
    if value.ndim == 1:
      value = jnp.where(last_sampled(scene.samples), value[:, None], 0)
    out[term.name] = value
  return out


def last_sampled(samples: Samples) -> Array:
  """True at the last sampled token of each text, `[B, T]`."""
  _, time = samples.tokens_BT.shape
  where = jnp.arange(time)[None]
  last = lambda mask: jnp.max(jnp.where(mask, where, -1), axis=1)
  sampled_B = last(samples.sampled_BT)
  last_B = jnp.where(sampled_B < 0, last(samples.mask_BT), sampled_B)
  return where == last_B[:, None]


def pressure(terms: Sequence[Term]) -> Pressure:
  """The worst of the terms': that of a run."""
  return max((t.pressure for t in terms), default=Pressure.NONE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RateConstraint:
  """Keeps the share of samples in which something happens at a target.

  A multiplier `lambda` is taken from the reward of every sample in which it
  does, and follows the rate: `lambda <- clip(lambda + gain (rate - target))`
  (dual ascent; https://arxiv.org/abs/2602.10067, where retractions were so
  held at 40 %). Negative multipliers reward what is too rare.

  Attributes:
    name: of it, in metrics.
    event: `event(scene) -> [B]`, true where it happens.
    among: `among(scene) -> [B]`, true where it could; None: everywhere.
    target: the rate, from 0 to 1.
    gain: how fast the multiplier follows, per step.
    low: least multiplier.
    high: largest.
  """

  name: str
  event: Callable[[Scene], Array]
  among: Callable[[Scene], Array] | None = None
  target: float
  gain: float = 0.2
  low: float = -1.0
  high: float = 1.0

  def __post_init__(self):
    if not 0 <= self.target <= 1:
      raise ValueError(f'{self.name}: target={self.target} is no rate.')
    if not self.low < self.high or self.gain <= 0:
      raise ValueError(
        f'{self.name}: low={self.low} must be below high={self.high}, and '
        f'gain={self.gain} positive.'
      )

  def update(
    self, multiplier: Float[Array, ''], scene: Scene
  ) -> tuple[Float[Array, ''], Float[Array, 'B'], Float[Array, '']]:
    """The next multiplier, what this one adds to rewards, and the rate.

    Where it could not happen in any sample, the multiplier stays.
    """
    event_B = self._true('event', self.event(scene), scene)
    among_B = jnp.ones_like(event_B)
    if self.among is not None:
      among_B = self._true('among', self.among(scene), scene)
    count = jnp.sum(among_B)
    rate = jnp.sum(event_B & among_B) / jnp.maximum(count, 1)
    moved = multiplier + self.gain * (rate - self.target)
    moved = jnp.clip(moved, self.low, self.high)
    moved = jnp.where(count > 0, moved, multiplier)
    return moved, -multiplier * (event_B & among_B), rate

  def _true(self, what: str, value, scene: Scene) -> Array:
    value, batch = jnp.asarray(value), len(scene.samples.tokens_BT)
    if value.shape != (batch,) or value.dtype != bool:
      raise ValueError(
        f'{what} of the constraint {self.name!r} is {value.dtype}'
        f'{list(value.shape)}; it must be true or false of each text, '
        f'bool[{batch}].'
      )
    return value
