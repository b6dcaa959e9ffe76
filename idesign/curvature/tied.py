"""Factors of a weight that a model uses several times."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from idesign import sites
from idesign.curvature.kfac import Factors

PyTree = Any
_STEPS = 100


def merge_uses(
  factors: Factors, found: Iterable[sites.Site], params: PyTree
) -> Factors:
  """One pair of factors for each weight, under its path.

  The Fisher block of a tied weight is about `sum_u A_u (x) G_u` over its uses.
  The nearest product to that sum in the Frobenius norm has `A` and `G` within
  the spans of the `A_u` and the `G_u` (Van Loan & Pitsianis 1993), so that it
  is found in as many dimensions as there are uses; coefficients are not
  negative, and the factors positive as theirs. A use that has the weight
  transposed exchanges its two factors.

  Args:
    factors: of sites `path#0`, `path#1`, ...
    found: the sites.
    params: the parameters, for their shapes.

  Returns:
    Factors under parameter paths, scaled so that `A (x) G / (count *
    positions)` is the block's average; weights with one use are as they were.
  """
  leaves = dict(zip(sites.leaf_paths(params), jax.tree.leaves(params)))
  uses: dict[str, list[sites.Site]] = {}
  for site in found:
    uses.setdefault(site.path, []).append(site)
  inputs, outputs, positions = {}, {}, {}
  for path, group in uses.items():
    if len(group) == 1:
      name = group[0].name
      inputs[path], outputs[path] = factors.inputs[name], factors.outputs[name]
      positions[path] = factors.positions[name]
      continue
    pairs = []
    for site in group:
      pair = [factors.inputs[site.name], factors.outputs[site.name]]
      if _transposed(site, group[0], leaves[path]):
        pair = pair[::-1]
      # Of every use its own number of positions.
      scale = factors.positions[site.name]
      pairs.append((pair[0] / scale.astype(pair[0].dtype), pair[1]))
    inputs[path], outputs[path] = _nearest(*map(jnp.stack, zip(*pairs)))
    positions[path] = jnp.ones_like(factors.count)
  return Factors(inputs, outputs, factors.count, positions)


def _transposed(site: sites.Site, first: sites.Site, leaf) -> bool:
  """Whether one use of a weight has as its input what the other puts out."""
  if site.d_in != site.d_out:
    return (site.d_in, site.d_out) != (first.d_in, first.d_out)
  index = jnp.arange(leaf.size, dtype=jnp.int32).reshape(leaf.shape)
  here, there = (np.asarray(s.matrix(index)) for s in (site, first))
  return not np.array_equal(here, there)


def _nearest(a, g):
  """`A (x) G` nearest to `sum_u a_u (x) g_u`, each stacked along axis 0."""
  gram = lambda m: jnp.einsum('u...ij,v...ij->...uv', m, m)
  of_a, of_g = gram(a), gram(g)

  def step(_, pair):
    _, right = pair
    # <G_u, G>, then <A_u, A>: the power iteration of the rearranged matrix.
    left = jnp.einsum('...uv,...v->...u', of_g, right)
    right = jnp.einsum('...uv,...v->...u', of_a, left)
    return left, right / jnp.linalg.norm(right, axis=-1, keepdims=True)

  start = jnp.ones(of_a.shape[:-1], a.dtype)
  _, right = jax.lax.fori_loop(0, _STEPS, step, (start, start))
  norm = jnp.einsum('...u,...uv,...v->...', right, of_g, right)
  left = jnp.einsum('...uv,...v->...u', of_g, right) / norm[..., None]
  combine = lambda c, m: jnp.einsum('...u,u...ij->...ij', c, m)
  return combine(left, a), combine(right, g)
