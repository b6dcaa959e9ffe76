"""Edits of a classifier that has wrong labels by heart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.layers import layer_set
from experiments.memorization_world import World, losses, rows
from idesign import curvature, models, sites, training

FISHER = {
  'kfac': curvature.Fisher(normalize='example', num_samples=8),
  'kfac_t1': curvature.Fisher(num_samples=8),  # The published recipe.
  'kfac_t10': curvature.Fisher(temperature=10.0, num_samples=8),
  'kfac_gold': curvature.Fisher(labels='gold', normalize='example'),
}
# At interpolation the gradient of the loss is that of a few images; at this
# temperature every one of them has a say.
BATCH = curvature.Fisher(labels='gold', temperature=10.0)
# What components are analysed with, see `experiments.components`.
COMPONENTS = curvature.Fisher(labels='gold', temperature=3.0)
CONTROLS = ('svd', 'magnitude', 'salient', 'random', 'subnet')
SOFT = ('soft', 'kfac_soft')
ARMS = ('soft', 'batch', 'kfac_soft', *FISHER, *CONTROLS)
_CHUNK = 64  # Images whose gradients are held at a time.


class Trained(NamedTuple):
  """One seed's network, and what an edit of it needs."""

  seed: int
  world: World
  params: Any
  predict: Callable[..., jax.Array]  # Jitted; params, images -> class.
  at: Mapping[str, sites.Site]  # Every weight of the layer sets.
  bases: Mapping[str, Mapping[str, curvature.Spectrum]]  # By K-FAC arm.
  batch: Mapping[str, np.ndarray]  # Batch curvature in the bases of `kfac`.
  singular: Mapping[str, curvature.Singular]
  subnet: Callable[[int], curvature.BalancedSubnet]  # Of a layer set.


class Reader:
  """Reads curvature; every program is compiled once for all seeds."""

  def __init__(self, config, model: models.Model, paths: list[str]):
    self._arms = [arm for arm in FISHER if arm in config.arms]
    self._factors = {
      arm: jax.jit(curvature.kfac_factors(model.apply, paths, FISHER[arm]))
      for arm in self._arms
    }
    self._moments = {
      fisher: jax.jit(curvature.component_moments(model.apply, paths, fisher))
      for fisher in (BATCH, COMPONENTS)
    }
    self._loss = lambda p, x: model.apply(p, x).sum(-1)
    self._paths, self._config, self._model = paths, config, model
    self._subnets: dict[int, curvature.BalancedSubnet] = {}
    self._predict = jax.jit(lambda p, x: jnp.argmax(model.apply(p, x), -1))

  def read(self, seed: int, world: World, params) -> Trained:
    """All that the arms of a seed need, of the training images."""
    images, labels = world.images[world.train], world.labels[world.train]
    at = sites.find_sites(self._loss, params, images, self._paths).by_name
    bases = {}
    for arm in self._arms:
      drawn = {'key': jax.random.key(seed)}
      if FISHER[arm].labels == 'gold':
        drawn = {'labels': labels}
      factors = self._factors[arm](params, images, **drawn)
      bases[arm] = curvature.spectra(factors)
    moments = self.moments(BATCH, params, bases['kfac'], images, labels)
    return Trained(
      seed, world, params, self._predict, at, bases,
      moments.batch_curvature(), curvature.singular(params, at),
      functools.partial(self._subnet, params, at),
    )  # fmt: skip

  def _subnet(self, params, at, index: int) -> curvature.BalancedSubnet:
    if index not in self._subnets:
      s = self._config.subnet
      chosen, layers = layer_set(at, self._config.layer_sets[index])
      self._subnets[index] = curvature.BalancedSubnet(
        losses(self._model), params, chosen,
        curvature.SubnetConfig(
          forget=s.forget, learning_rate=s.learning_rate
        ),
        layers=layers,
      )  # fmt: skip
    return self._subnets[index]

  def moments(
    self, fisher, params, bases, images, labels, *, shuffle=None
  ) -> curvature.Moments:
    """Of the gradients of some images, a chunk at a time.

    Args:
      fisher: `BATCH` or `COMPONENTS`.
      params, bases: of the network.
      images, labels: of equal number.
      shuffle: a key, for the null; chunks are shuffled by themselves.
    """
    bases, parts = curvature.as_bases(bases), []
    for i in range(0, len(images), _CHUNK):
      key = None if shuffle is None else jax.random.fold_in(shuffle, i)
      part = slice(i, i + _CHUNK)
      parts.append(
        self._moments[fisher](
          params, images[part], bases, labels=labels[part], shuffle=key
        )
      )
    return functools.reduce(operator.add, parts)


def measure(trained: Trained, params) -> dict[str, float]:
  """Accuracies of edited parameters, in percent."""
  world = trained.world
  said = np.asarray(trained.predict(params, world.images))
  percent = lambda hits: 100 * float(hits.mean())
  right = said == world.truth
  told = told_of(world)
  wrong = said == world.labels
  return {
    'memorized': percent(wrong[world.noisy]),
    'memorized_told': percent(wrong[told]),
    'memorized_untold': percent(wrong[world.noisy & ~told]),
    'recovered': percent(right[world.noisy]),
    'clean': percent(right[world.train & ~world.noisy]),
    'held_out': percent(right[world.split == 1]),
    'test': percent(right[world.split == 2]),
  }


def told_of(world: World) -> np.ndarray:
  """The half of the wrong labels that BalancedSubnet is told about."""
  wrong = np.flatnonzero(world.noisy)
  told = np.zeros(len(world.noisy), bool)
  told[wrong[::2]] = True
  return told


def make_edit(config, trained: Trained, arm: str, point) -> curvature.Edit:
  """The edit of an arm at a grid point `(layer set, strength)`.

  Args:
    config: of the experiment.
    trained: of the seed.
    arm: one of `ARMS`, not `subnet`.
    point: strengths are shares of the components (or weights) that are kept, of
      soft masks their mean; of the published recipe, of the curvature mass.
  """
  index, strength = point
  at, layers = layer_set(trained.at, config.layer_sets[index])
  params, bases = trained.params, trained.bases['kfac']
  options = {'share': strength, 'layers': layers}
  if arm in (*SOFT, 'batch'):
    make = curvature.score_masks if arm == 'batch' else curvature.soft_masks
    masks = {n: make(_score(trained, arm, n), share=strength) for n in at}
    return curvature.keep_components(params, at, bases, masks, layers=layers)
  if arm == 'svd':
    return curvature.keep_singular(params, at, trained.singular, **options)
  if arm == 'magnitude':
    return curvature.keep_magnitude(params, at, **options)
  if arm == 'salient':
    return curvature.keep_salient(params, at, bases, **options)
  if arm == 'random':
    return curvature.keep_random(
      params, at, bases, seed=trained.seed, **options
    )
  if arm == 'kfac_t1':
    options = {'mass': strength, 'layers': layers}
  return curvature.keep_high_curvature(
    params, at, trained.bases[arm], **options
  )


def _score(trained: Trained, arm: str, name: str) -> np.ndarray:
  """What the components of a weight are kept by.

  Of the MLP on seeds 0 and 1, a soft mask of `|mean s|` did better than one of
  its square, one of K-FAC curvature better than one of its root.
  """
  if arm == 'batch':
    return trained.batch[name]
  if arm == 'kfac_soft':
    score = trained.bases['kfac'][name].mass()
  else:
    score = np.sqrt(trained.batch[name])
  # What has none goes last, but a mask may be large enough to need it.
  largest = score.max(axis=(-2, -1), keepdims=True)
  return np.maximum(score, np.finfo(np.float64).eps * largest)


def subnet_edit(config, trained: Trained, point) -> curvature.Edit:
  """BalancedSubnet, told half of the wrong labels."""
  index, kept = point
  world, s = trained.world, config.subnet
  told = told_of(world)
  subnet = trained.subnet(index)
  streams = [
    training.Batches(
      rows(world, m), min(s.batch, int(m.sum())), seed=trained.seed
    )
    for m in (told, world.train & ~told)
  ]
  state = subnet.init(1 - kept)
  for n in range(s.steps):
    state, _ = subnet.step(
      state, trained.params, *(b.batch(n) for b in streams)
    )
  return subnet.edit(state, trained.params)


def run_point(config, trained: Trained, arm: str, point):
  """Measures one grid point."""
  if arm == 'subnet':
    edit = subnet_edit(config, trained, point)
  else:
    edit = make_edit(config, trained, arm, point)
  return {
    'layer_set': point[0],
    'strength': point[1],
    'removed': 100 * (1 - float(np.mean(list(edit.kept.values())))),
    **measure(trained, edit.apply(trained.params)),
  }


def grid(config, arm: str) -> list[tuple[int, float]]:
  """All points of an arm; every arm has equally many."""
  return [
    (index, strength)
    for index in range(len(config.layer_sets))
    for strength in config.strengths[arm]
  ]
