"""Edits of a model of the small language, and what they are held against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
import math
import operator
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.layers import layer_paths, layer_set
from experiments.recitation_measure import (
  FACTS, Exam, answer_losses, factor_rows, worst_kept,
)  # fmt: skip
from experiments.recitation_world import MARKERS, World, recitations
from idesign import curvature, models, sites, training

# Rows that need no rule: what a user who knows what is memorized leaves out.
BY_HEART = ('recite', 'strangers')
EVERY = curvature.Fisher(normalize='example')


class Source(NamedTuple):
  """What factors are collected of.

  Attributes:
    fisher: which Fisher information.
    without: tasks that are left out.
  """

  fisher: curvature.Fisher
  without: tuple[str, ...] = ()


SOURCES = {
  'kfac': Source(EVERY, BY_HEART),
  'kfac_mix': Source(EVERY),
  'kfac_t1': Source(curvature.Fisher()),  # The published recipe.
}
# Scores in the bases of `kfac`, of the same rows.
SCORES = {
  'ekfac': curvature.Fisher(normalize='example'),
  'measured': curvature.Fisher(labels='gold', temperature=3.0),
}
# What components are analysed with, see `experiments.components`.
COMPONENTS = curvature.Fisher(labels='gold', temperature=3.0)
_CHUNK = 64  # Rows whose gradients are held at a time.
# Tasks of which one after another factors see nothing.
LEFT_OUT = tuple(t for t in MARKERS if t != 'recite')
CONTROLS = ('svd', 'magnitude', 'salient', 'random', 'subnet')
ARMS = (*SOURCES, *SCORES, *CONTROLS)


class Prepared(NamedTuple):
  """One seed's model, and what its edits need.

  Attributes:
    params: unedited.
    at: site name -> site, of every weight that some layer set names.
    bases: source -> site -> spectrum.
    scores: of `SCORES`, site -> `[*stack, d_in, d_out]`.
    sums: factors of sums alone.
    without_sums: of everything else; None where nothing is left out.
    singular: site -> decomposition of the weight.
    subnet: BalancedSubnet of a layer set.
  """

  seed: int
  world: World
  params: Any
  at: Mapping[str, sites.Site]
  bases: Mapping[str, Mapping[str, curvature.Spectrum]]
  scores: Mapping[str, Mapping[str, np.ndarray]]
  sums: curvature.Factors
  without_sums: curvature.Factors | None
  singular: Mapping[str, curvature.Singular]
  subnet: Callable[[int], curvature.BalancedSubnet]


class Collector:
  """Reads factors of any rows; each kind is compiled once for all seeds."""

  def __init__(self, config, model: models.Model):
    self._config, self._model = config, model
    self._paths = layer_paths(config.layer_sets)
    self._readers = {}
    self._subnets: dict[int, curvature.BalancedSubnet] = {}

  def sites(self, params) -> Mapping[str, sites.Site]:
    tokens = np.zeros((2, 8), np.int32)
    loss = lambda p, x: self._model.apply(p, x).sum((1, 2))
    return sites.find_sites(loss, params, tokens, self._paths).by_name

  def factors(self, params, world: World, source: Source, number: int):
    """K-FAC factors of a source; `number` tells random streams apart."""
    batches = self._batches(world, source.without, number)
    read = self._reader(curvature.kfac_factors, source.fisher)
    return self._add(read, source.fisher, params, batches, number)

  def scores(self, params, world: World, fisher, bases, number: int):
    """Curvature measured along the components of `bases`, by site."""
    batches = self._batches(world, BY_HEART, number)
    read = self._reader(curvature.ekfac_eigenvalues, fisher)
    bases = curvature.as_bases(bases)
    total = self._add(read, fisher, params, batches, number, bases)
    return {n: np.asarray(v) for n, v in total.mean().items()}

  def moments(self, params, world: World, bases, *, shuffle=None):
    """Moments of components over rows of the whole mix, but strangers."""
    rows = factor_rows(
      world, self._config.components.rows, 70, answers=True,
      without=('strangers',),
    )  # fmt: skip
    read = self._reader(curvature.component_moments, COMPONENTS)
    bases, parts = curvature.as_bases(bases), []
    for i in range(0, len(rows['inputs']), _CHUNK):
      key = None if shuffle is None else jax.random.fold_in(shuffle, i)
      part = {k: v[i : i + _CHUNK] for k, v in rows.items()}
      parts.append(
        read(
          params, part['inputs'], bases, labels=part['labels'],
          mask=part['mask'], shuffle=key,
        )
      )  # fmt: skip
    return functools.reduce(operator.add, parts)

  def subnet(self, params, at, index: int) -> curvature.BalancedSubnet:
    """BalancedSubnet of a layer set; one for all seeds."""
    if index not in self._subnets:
      s = self._config.subnet
      chosen, layers = layer_set(at, self._config.layer_sets[index])
      self._subnets[index] = curvature.BalancedSubnet(
        answer_losses(self._model), params, chosen,
        curvature.SubnetConfig(
          forget=s.forget, learning_rate=s.learning_rate
        ),
        layers=layers,
      )  # fmt: skip
    return self._subnets[index]

  def _reader(self, make, fisher):
    key = make, fisher
    if key not in self._readers:
      self._readers[key] = jax.jit(make(self._model.apply, self._paths, fisher))
    return self._readers[key]

  def _batches(self, world: World, without, number: int):
    f = self._config.factors
    rows = factor_rows(
      world, f.rows, 10 + number, answers=f.answers, without=without
    )
    size = f.batch
    usable = len(rows['inputs']) // size * size
    return [
      {k: v[i : i + size] for k, v in rows.items()}
      for i in range(0, usable, size)
    ]

  def _add(self, read, fisher, params, batches, number, *bases):
    parts = []
    for i, batch in enumerate(batches):
      drawn = {'labels': batch['labels']}
      if fisher.labels == 'model':
        drawn = {'key': jax.random.fold_in(jax.random.key(number), i)}
      parts.append(
        read(params, batch['inputs'], *bases, mask=batch['mask'], **drawn)
      )
    return functools.reduce(operator.add, parts)


def prepare(config, collector: Collector, world: World, params) -> Prepared:
  """Collects and decomposes all that the arms of a seed need."""
  at = collector.sites(params)
  bases = {}
  for i, (name, source) in enumerate(SOURCES.items()):
    if name in config.arms:
      bases[name] = curvature.spectra(
        collector.factors(params, world, source, i)
      )
  scores = {
    name: collector.scores(params, world, fisher, bases['kfac'], 20 + i)
    for i, (name, fisher) in enumerate(SCORES.items())
    if name in config.arms
  }
  without = {}
  for i, task in enumerate(LEFT_OUT if config.leave_out else ()):
    source = Source(EVERY, (*BY_HEART, task))
    without[task] = collector.factors(params, world, source, 40 + i)
    bases[f'without {task}'] = curvature.spectra(without[task])
  alone = Source(EVERY, tuple({*MARKERS, 'strangers'} - {'sums'}))
  sums = collector.factors(params, world, alone, 30)
  return Prepared(
    world.seed, world, params, at, bases, scores, sums,
    without.get('sums'),
    curvature.singular(params, at),
    functools.partial(collector.subnet, params, at),
  )  # fmt: skip


def make_edit(config, prepared: Prepared, arm: str, point) -> curvature.Edit:
  """The edit of an arm at a grid point `(layer set, share kept)`.

  `without TASK` are edits of factors that saw nothing of a task.
  """
  index, share = point
  at, layers = layer_set(prepared.at, config.layer_sets[index])
  params, options = prepared.params, {'share': share, 'layers': layers}
  if arm == 'svd':
    return curvature.keep_singular(params, at, prepared.singular, **options)
  if arm == 'magnitude':
    return curvature.keep_magnitude(params, at, **options)
  if arm == 'random':
    return curvature.keep_random(
      params, at, prepared.bases['kfac'], seed=prepared.seed, **options
    )
  if arm == 'salient':
    return curvature.keep_salient(params, at, prepared.bases['kfac'], **options)
  if arm in SCORES:
    masks = {
      n: curvature.score_masks(prepared.scores[arm][n], share=share) for n in at
    }
    return curvature.keep_components(
      params, at, prepared.bases['kfac'], masks, layers=layers
    )
  return curvature.keep_high_curvature(
    params, at, prepared.bases[arm], **options
  )


def edit_with_sums(config, prepared: Prepared, point, weight) -> curvature.Edit:
  """The edit of factors that saw no sums, and of sums alone mixed in.

  Args:
    config: of the experiment.
    prepared: of the seed.
    point: layer set, and share of components kept.
    weight: of a position of sums, next to one of everything else.
  """
  index, share = point
  at, layers = layer_set(prepared.at, config.layer_sets[index])
  mixed = curvature.mixture(prepared.without_sums, prepared.sums, weight)
  return curvature.keep_high_curvature(
    prepared.params, at, curvature.spectra(mixed), share=share, layers=layers
  )


def subnet_edit(config, prepared: Prepared, point) -> curvature.Edit:
  """BalancedSubnet, told the first half of the sequences."""
  index, share = point
  world, s = prepared.world, config.subnet
  told = recitations(world.recited[: len(world.recited) // 2])
  other = world.corpus(s.steps * s.batch + 64, 60, without=BY_HEART)
  subnet = prepared.subnet(index)
  batches = [
    training.Batches(rows._asdict(), s.batch, seed=prepared.seed)
    for rows in (told, other)
  ]
  state = subnet.init(1 - share)
  for n in range(s.steps):
    state, _ = subnet.step(
      state, prepared.params, *(b.batch(n) for b in batches)
    )
  return subnet.edit(state, prepared.params)


def run_point(config, exam: Exam, prepared, arm, point, base):
  """Measures one grid point of an arm."""
  if arm == 'subnet':
    edit = subnet_edit(config, prepared, point)
  else:
    edit = make_edit(config, prepared, arm, point)
  return measured(config, exam, prepared, edit, point, base)


def measured(config, exam: Exam, prepared, edit, point, base) -> dict[str, Any]:
  """A row of results: the exam, the worst task, and what was removed."""
  row = exam(edit.apply(prepared.params))
  at, layers = layer_set(prepared.at, config.layer_sets[point[0]])
  edited = {
    site.path: len(layers.get(name) or range(math.prod(site.stack)))
    * (site.d_in * site.d_out)
    for name, site in at.items()
  }
  removed = sum(n * (1 - edit.kept[path]) for path, n in edited.items())
  total = sum(x.size for x in jax.tree.leaves(prepared.params))
  return {
    'layer_set': point[0],
    'strength': point[1],
    'components_removed': 100 * removed / sum(edited.values()),
    'of_all_weights': 100 * removed / total,
    'worst': worst_kept(row, base),
    'worst_fact': worst_kept(row, base, FACTS),
    **row,
  }


def grid(config, arm: str) -> list[tuple[int, float]]:
  """All points of an arm; every arm has equally many."""
  return [
    (index, strength)
    for index in range(len(config.layer_sets))
    for strength in config.strengths.get(arm, config.strengths.kfac)
  ]
