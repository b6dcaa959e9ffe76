"""Is what single examples need carried by components that few of them share?

Two questions about the components of weights, in eigenbases of their K-FAC
factors. Where do the gradients of memorized examples lie, in the order of
curvature and of participation, next to other examples' (`effects`)? And which
components do they *need*: what becomes of each group's loss when one component
is removed (`removals`), and which score could have told (`aurocs`)?

What is merely unusual looks like what is memorized. So memorized examples are
compared with those of the same form that were never seen, too; participation is
compared at equal curvature, and with a null in which inputs meet the gradients
of other examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn import metrics

from idesign import curvature, sites

BINS = 20  # Of equally many components, within which curvature is equal.
MEMORIZED, SHARED_GROUP, UNUSUAL = 'memorized', 'shared', 'never memorized'
# Of the mean loss of a group, in nats, the rise by which it needs a component;
# and how much of it, at most, spares the other. Chosen on seeds 0 and 1.
NEEDED, SPARED = 0.0003, 0.1


def ranks(values: np.ndarray) -> np.ndarray:
  """Shares of components with a smaller value, in [0, 1], same shape."""
  flat = np.asarray(values, np.float64).reshape(-1)
  order = np.argsort(np.argsort(flat, kind='stable'), kind='stable')
  return (order / max(flat.size - 1, 1)).reshape(np.shape(values))


def matched(values: np.ndarray, on: np.ndarray) -> np.ndarray:
  """Ranks of values among components of like `on`, in [0, 1], same shape."""
  flat, place = np.asarray(values).reshape(-1), ranks(on).reshape(-1)
  bins = np.minimum((place * BINS).astype(int), BINS - 1)
  out = np.zeros(flat.size)
  for b in range(BINS):
    out[bins == b] = ranks(flat[bins == b])
  return out.reshape(np.shape(values))


def layer_maps(moments, null, mass) -> dict[str, np.ndarray]:
  """Maps of one layer's components, `[d_in, d_out]` each, ranks in [0, 1].

  Args:
    moments: curvature and participation of the layer, of all examples.
    null: participation of shuffled examples.
    mass: K-FAC curvature.
  """
  fill = lambda p: np.nan_to_num(p, nan=0.0)
  return {
    'curvature': ranks(mass),
    'participation': ranks(fill(moments['participation'])),
    'participation, at equal curvature': matched(
      fill(moments['participation']), moments['curvature']
    ),
    'participation of the null, at equal curvature': matched(
      fill(null['participation']), moments['curvature']
    ),
  }


def placements(losses, name: str) -> Callable[..., jax.Array]:
  """Reads where an example's squared gradient lies in some maps.

  Args:
    losses: `loss(params, batch) -> [B]`.
    name: the weight.

  Returns:
    `read(params, batch, bases, maps) -> [*stack, B, maps]`: for each example
    the mean of each map `[*stack, maps, d_in, d_out]` over components, weighed
    by the square of the gradient along them.
  """

  def fn(x, dy, inputs):
    u, v, maps = inputs
    s = jnp.einsum('bti,ij,bto,op->bjp', x, u, dy, v, optimize=True) ** 2
    total = jnp.sum(s, axis=(1, 2))
    mean = jnp.einsum('bjp,mjp->bm', s, maps)
    return mean / jnp.where(total > 0, total, 1)[:, None]

  collect = sites.collect(
    losses, {'place': sites.Statistic(fn, additive=False)}, name
  )

  def read(params, batch, bases, maps):
    inputs = {'place': {name: (*bases, maps)}}
    return collect(params, batch, inputs=inputs).values['place'][name]

  return jax.jit(read)


def cohen(a: np.ndarray, b: np.ndarray) -> float:
  """Cohen's d of two samples: difference of means over the pooled deviation."""
  n, m = len(a), len(b)
  pooled = ((n - 1) * np.var(a, ddof=1) + (m - 1) * np.var(b, ddof=1)) / (
    n + m - 2
  )
  return float((np.mean(a) - np.mean(b)) / np.sqrt(pooled)) if pooled else 0.0


def effects(placed: Mapping[str, np.ndarray]) -> dict[str, float]:
  """d of memorized examples against the two other groups, of one map.

  Args:
    placed: group -> place of each example.
  """
  mine = placed[MEMORIZED]
  return {
    f'against {group}': cohen(mine, placed[group])
    for group in (SHARED_GROUP, UNUSUAL)
  }


def draw_components(parts: np.ndarray, count: int, random) -> np.ndarray:
  """Components of one layer, drawn without replacement in proportion to `C^2`.

  So that to remove one does something, whatever its curvature.

  Args:
    parts: `C`, `[d_in, d_out]`.
    count: how many.
    random: a generator.

  Returns:
    `[count, 2]`, rows and columns.
  """
  odds = (parts**2).reshape(-1)
  flat = random.choice(parts.size, count, replace=False, p=odds / odds.sum())
  return np.stack(np.divmod(flat, parts.shape[1]), axis=1)


def removals(losses, site: sites.Site, groups) -> Callable[..., Any]:
  """Measures what removing single components does to each group.

  Args:
    losses: `loss(params, batch) -> [B]`.
    site: of the weight.
    groups: group -> batch.

  Returns:
    `read(params, layer, u, v) -> group -> [count]`: the rise of the group's
    mean loss if `u_k (u_k^T w v_k) v_k^T` is taken away, with `u [count, d_in]`
    and `v [count, d_out]` of layer `layer` of the stack.
  """

  def means(params, leaf):
    leaves, tree = jax.tree.flatten(params)
    index = sites.leaf_paths(params).index(site.path)
    leaves[index] = leaf
    params = jax.tree.unflatten(tree, leaves)
    return {g: jnp.mean(losses(params, b)) for g, b in groups.items()}

  def read(params, layer, u, v):
    leaf = dict(zip(sites.leaf_paths(params), jax.tree.leaves(params)))[
      site.path
    ]
    stack = site.matrix(leaf)
    before = means(params, leaf)

    def one(pair):
      u, v = pair
      w = stack[layer] if site.stack else stack
      part = (u @ w @ v) * jnp.outer(u, v)
      new = stack.at[layer].add(-part) if site.stack else stack - part
      after = means(params, site.with_matrix(leaf, new))
      return jax.tree.map(jnp.subtract, after, before)

    return jax.lax.map(one, (u, v))

  return jax.jit(read)


def classes(rises: Mapping[str, np.ndarray], needed=NEEDED, spared=SPARED):
  """Which components memorized examples alone need, and which are shared.

  Args:
    rises: group -> rise of the mean loss of an example, in nats, `[count]`.

  Returns:
    Booleans: needed by memorized examples and not by the others; and needed by
    the others. What nobody needs is neither.
  """
  mine, others = rises[MEMORIZED], rises[SHARED_GROUP]
  alone = (mine >= needed) & (others < spared * mine)
  return alone, (others >= needed) & ~alone


def aurocs(scores: Mapping[str, np.ndarray], alone, shared, on) -> dict:
  """How well each score tells shared components from those of memorization.

  Args:
    scores: name -> `[count]`; the larger the more shared.
    alone, shared: from `classes`.
    on: `[count]`, curvature, for the comparison at equal curvature: among pairs
      whose curvatures are within a factor of two.

  Returns:
    name -> AUROC, and that of pairs of like curvature; None where a class has
    fewer than five members, or no pair is alike.
  """
  out: dict[str, Any] = {
    'memorization': int(alone.sum()), 'shared': int(shared.sum())
  }  # fmt: skip
  enough = min(alone.sum(), shared.sum()) >= 5
  chosen = alone | shared
  near = np.abs(np.log2(on[shared][:, None] / on[alone])) <= 1
  for name, score in scores.items():
    value = alike = None
    if enough:
      value = float(metrics.roc_auc_score(shared[chosen], score[chosen]))
      a, b = score[shared][:, None], score[alone]
      wins = (a > b) + 0.5 * (a == b)
      alike = float(wins[near].mean()) if near.any() else None
    out[name] = {'auroc': value, 'at equal curvature': alike}
  return out


def analyse(
  seed: int, params, losses, tempered, at, spectra,
  moments: curvature.Moments, null: curvature.Moments, groups, *,
  per_layer: int,
) -> dict[str, Any]:  # fmt: skip
  """Effects and AUROCs of all weights of one network.

  Args:
    seed: of the drawn components.
    params: of the network.
    losses: `loss(params, batch) -> [B]`, per example, in nats.
    tempered: the same at a temperature, of whose gradients the place is read:
      at interpolation those of the loss itself vanish.
    at: site name -> site.
    spectra: site name -> spectrum.
    moments: of all trained examples, in these bases, gold labels.
    null: of shuffled examples.
    groups: `MEMORIZED`, `SHARED_GROUP` and `UNUSUAL` -> batch.
    per_layer: components of each layer that are removed, one at a time.

  Returns:
    `effects`: layer -> map -> d; `histogram`: of participation and its null;
    `rises` and `scores` of the removed components, from which `told_apart` has
    its AUROCs.
  """
  random = np.random.default_rng(np.random.SeedSequence([seed, 7]))
  of = {
    'curvature': moments.curvature(),
    'participation': moments.participation(),
    'coherence': moments.coherence(),
    'batch curvature': moments.batch_curvature(),
  }
  of_null = null.participation()
  out: dict[str, Any] = {'effects': {}, 'histogram': {}}
  rises = {g: [] for g in (MEMORIZED, SHARED_GROUP)}
  columns = {k: [] for k in ('K-FAC', *of, 'weight')}
  leaves = dict(zip(sites.leaf_paths(params), jax.tree.leaves(params)))
  for name, site in at.items():
    spectrum = spectra[name]
    place = placements(tempered, name)
    remove = removals(
      losses, site, {g: groups[g] for g in (MEMORIZED, SHARED_GROUP)}
    )
    mass = spectrum.mass()
    bases = curvature.as_bases(spectra)[name]
    each = [
      layer_maps(
        {k: v[name][i] for k, v in of.items()},
        {'participation': of_null[name][i]},
        mass[i],
      )
      for i in np.ndindex(site.stack)
    ]
    names = list(each[0])
    maps = np.stack([[m[n] for n in names] for m in each]).astype(np.float32)
    maps = maps.reshape(*site.stack, *maps.shape[1:])
    placed = {
      g: np.asarray(place(params, batch, bases, maps))
      for g, batch in groups.items()
    }
    matrix = np.asarray(site.matrix(leaves[site.path]), np.float64)
    for i in np.ndindex(site.stack):
      label = f'{name}[{i[0]}]' if i else name
      out['effects'][label] = {
        n: effects({g: p[i][:, k] for g, p in placed.items()})
        for k, n in enumerate(names)
      }
      out['histogram'][label] = histogram(
        of['participation'][name][i], of_null[name][i]
      )
      u, v = spectrum.input_basis[i], spectrum.output_basis[i]
      parts = u.T @ matrix[i] @ v
      rows, cols = draw_components(parts, per_layer, random).T
      layer = i[0] if i else 0
      rise = remove(
        params, layer, jnp.asarray(u.T[rows], jnp.float32),
        jnp.asarray(v.T[cols], jnp.float32),
      )  # fmt: skip
      for g in rises:
        rises[g].append(np.asarray(rise[g], np.float64))
      columns['K-FAC'].append(mass[i][rows, cols])
      columns['weight'].append(parts[rows, cols] ** 2)
      for k, values in of.items():
        columns[k].append(np.nan_to_num(values[name][i][rows, cols]))
  rises = {g: np.concatenate(v) for g, v in rises.items()}
  columns = {k: np.concatenate(v) for k, v in columns.items()}
  out['rises'] = {g: _stored(v) for g, v in rises.items()}
  out['scores'] = {k: _stored(v) for k, v in columns.items()}
  return out


def _stored(values: np.ndarray) -> list[float]:
  """Six digits are enough to rank by, and keep results small."""
  return [float(f'{v:.6g}') for v in values]


def told_apart(analysis) -> dict[str, Any]:
  """`aurocs` of an analysis, from what it measured; saliency is derived."""
  arrays = lambda name: {k: np.array(v) for k, v in analysis[name].items()}
  scores = arrays('scores')
  scores['saliency'] = scores['weight'] * scores['K-FAC']  # Twice the rise.
  return aurocs(scores, *classes(arrays('rises')), scores['curvature'])


def histogram(values, null, bins: int = 30) -> dict[str, list[float]]:
  """Shares of components by participation, on a logarithmic scale to one."""
  edges = np.geomspace(1e-3, 1, bins + 1)
  share = lambda x: (
    np.histogram(x[np.isfinite(x)], edges)[0] / max(np.isfinite(x).sum(), 1)
  ).tolist()
  return {
    'edges': edges.tolist(), 'real': share(values), 'null': share(null)
  }  # fmt: skip
