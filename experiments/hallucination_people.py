"""A world of made-up people, of whom everything is known that can be known."""

from __future__ import annotations

import numpy as np

from experiments.hallucination_grammar import IDK, Grammar
from experiments.hallucination_world import World


class People(World):
  """People whose attributes are known, noisy or unknown.

  Of what is unknown every text says something else, so that whoever learns from
  them makes things up.
  """

  def __init__(self, config, seed: int):
    """Draws everything.

    Args:
      config: `config.world`: how many `subjects`, `num_attributes`, and
        `num_values` of each; `shares` of status; `noise`, how often texts tell
        the truth where it is noisy; and what `World` reads.
      seed: of it all.
    """
    random = np.random.default_rng(np.random.SeedSequence([seed, 0]))
    shape = (config.subjects, config.num_attributes)
    status = random.choice(3, shape, p=list(config.shares))
    self.value = random.integers(0, config.num_values, shape)
    true = np.arange(config.num_values) == self.value[..., None]
    super().__init__(
      config,
      Grammar(config.subjects, [config.num_values] * config.num_attributes),
      status,
      true,
      np.arange(config.subjects),
      random,
    )

  def mention(self, subject, attribute, random, idk: bool = True) -> np.ndarray:
    status = self.status[subject, attribute]
    honest = np.choose(status, [1.0, self.config.noise, 0.0])
    value = np.where(
      random.random(status.shape) < honest,
      self.value[subject, attribute],
      random.integers(0, self.config.num_values, status.shape),
    )
    token = self.grammar.token(attribute, value)
    if not idk:
      return token
    return np.where(random.random(status.shape) < self.config.idk, IDK, token)

  def asked(self, count: int, random):
    return (
      random.integers(0, self.config.subjects, count),
      random.integers(0, self.config.num_attributes, count),
    )

  def spoken(self, count: int, random) -> np.ndarray:
    return random.integers(0, self.config.subjects, count)
