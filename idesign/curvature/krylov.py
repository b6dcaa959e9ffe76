"""Spectra and traces of a symmetric matrix that is only known by its products.

Vectors are trees like the parameters and stay sharded as those are. A basis is
a tree with one axis more in front.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from idesign.curvature.fisher import at_least_float32

PyTree = Any
Product = Callable[[PyTree], PyTree]


class Lanczos(NamedTuple):
  """`V^T A V` is the tridiagonal matrix of `diagonal` and `off_diagonal`.

  Attributes:
    diagonal: `[k]`.
    off_diagonal: `[k - 1]`, not negative.
    basis: tree like the start, leaves `[k, ...]`, orthonormal; zero from
      `rank` on.
    rank: steps before the start's Krylov space was exhausted, at most `k`.
      From there on `diagonal` and `off_diagonal` are zero.
  """

  diagonal: Float[Array, 'k']
  off_diagonal: Float[Array, 'k-1']
  basis: PyTree
  rank: Int[Array, '']

  def matrix(self) -> Float[Array, 'k k']:
    """The tridiagonal matrix."""
    off = self.off_diagonal
    return jnp.diag(self.diagonal) + jnp.diag(off, 1) + jnp.diag(off, -1)


class Density(NamedTuple):
  """Stochastic Lanczos quadrature of a spectrum (Ghorbani et al. 2019).

  Attributes:
    nodes: `[probes, k]`, Ritz values.
    weights: `[probes, k]`, the squared first components of the Ritz vectors;
      each row sums to one.
    dimension: of the matrix.
  """

  nodes: Float[Array, 'probes k']
  weights: Float[Array, 'probes k']
  dimension: int

  def __call__(self, at: np.ndarray, width: float) -> np.ndarray:
    """The density at values `at [n]`, smoothed by a normal of that width."""
    if not width > 0:
      raise ValueError(f'width must be positive, not {width}.')
    nodes = np.asarray(self.nodes, np.float64).reshape(-1)
    weights = np.asarray(self.weights, np.float64).reshape(-1)
    z = (np.asarray(at, np.float64)[:, None] - nodes) / width
    kernel = np.exp(-(z**2) / 2) / (width * np.sqrt(2 * np.pi))
    return kernel @ weights / len(self.nodes)

  def trace(self) -> float:
    """Of the matrix, estimated as `dimension * E[node]`."""
    mean = np.sum(np.asarray(self.nodes * self.weights, np.float64), axis=1)
    return self.dimension * float(mean.mean())


class Trace(NamedTuple):
  """An estimate with its standard error, over the probes of its random part."""

  value: Float[Array, '']
  standard_error: Float[Array, '']


def lanczos(product: Product, start: PyTree, num_steps: int) -> Lanczos:
  """Tridiagonalises a symmetric matrix on the Krylov space of a vector.

  Every new vector is orthogonalised twice against all before it, without which
  converged eigenvalues come back as copies. Where the space is exhausted what
  is left of the next vector is rounding: below 64 roundings of the largest
  Ritz bound seen it counts as zero, and the steps after it do nothing.

  Args:
    product: `v -> A v`.
    start: not zero; any norm.
    num_steps: `k`, at least 1.
  """
  if num_steps < 1:
    raise ValueError(f'num_steps must be at least 1, not {num_steps}.')
  start = jax.tree.map(lambda x: x / _norm(start), start)
  zero = jnp.zeros((), _norm(start).dtype)
  small = 64 * jnp.finfo(zero.dtype).eps
  basis = jax.tree.map(
    lambda x: jnp.zeros((num_steps, *x.shape), x.dtype).at[0].set(x), start
  )

  def step(carry, i):
    basis, bound, rank = carry
    alive = rank == i
    v = jax.tree.map(lambda b: b[i], basis)
    w = product(v)
    diagonal = jnp.where(alive, _dot(v, w), 0)
    before = _norm(w)
    w = _orthogonal(basis, _orthogonal(basis, w))
    beta = _norm(w)
    # The norm of A v bounds nothing less than an eigenvalue near it.
    bound = jnp.maximum(bound, before)
    alive = alive & (beta > small * bound) & (i + 1 < num_steps)
    scale = jnp.where(alive, 1 / jnp.where(beta > 0, beta, 1), 0)
    write = jnp.minimum(i + 1, num_steps - 1)
    basis = jax.tree.map(
      lambda b, x: b.at[write].set(
        jnp.where(alive, (x * scale).astype(b.dtype), b[write])
      ),
      basis, w,
    )  # fmt: skip
    rank = jnp.where(alive, i + 1, rank)
    return (basis, bound, rank), (diagonal, jnp.where(alive, beta, 0))

  carry = basis, zero, jnp.int32(0)
  (basis, _, rank), (diagonal, off) = jax.lax.scan(
    step, carry, jnp.arange(num_steps, dtype=jnp.int32)
  )
  return Lanczos(diagonal, off[:-1], basis, rank + 1)


def spectral_density(
  product: Product, like: PyTree, key: Array, *, num_steps: int, num_probes: int
) -> Density:
  """The eigenvalue density of a symmetric matrix.

  Args:
    product: `v -> A v`.
    like: a tree like `v`, for shapes and dtypes.
    key: of the probes, standard normal vectors.
    num_steps: of Lanczos, for each probe; `2 k - 1` moments are exact for it.
    num_probes: one after another, so that memory does not grow with them.
  """

  def probe(key):
    run = lanczos(product, _normal(key, like), num_steps)
    nodes, vectors = jnp.linalg.eigh(run.matrix())
    return nodes, vectors[0] ** 2

  nodes, weights = jax.lax.map(probe, jax.random.split(key, num_probes))
  return Density(nodes, weights, _size(like))


def hutchpp_trace(
  product: Product, like: PyTree, key: Array, *, num_products: int
) -> Trace:
  """The trace of a symmetric matrix (Hutch++, Meyer et al. 2021).

  A third of the products find a subspace that holds the largest eigenvalues, a
  third take the trace there exactly, and a third estimate the rest with random
  signs. For a positive matrix the error falls as `1 / num_products`, where that
  of signs alone falls as its root.

  Args:
    product: `v -> A v`.
    like: a tree like `v`, for shapes and dtypes.
    key: of the probes.
    num_products: at least 6, of which a multiple of three is used.
  """
  count = num_products // 3
  if count < 2:
    raise ValueError(f'num_products must be at least 6, not {num_products}.')
  first, second = jax.random.split(key)
  sketch = jax.lax.map(
    lambda k: product(_signs(k, like)), jax.random.split(first, count)
  )
  basis = _orthonormal(sketch)
  inside = jnp.sum(jax.lax.map(lambda q: _dot(q, product(q)), basis))

  def rest(key):
    g = _orthogonal(basis, _signs(key, like))
    return _dot(g, product(g))

  outside = jax.lax.map(rest, jax.random.split(second, count))
  error = jnp.std(outside, ddof=1) / count**0.5
  return Trace(inside + jnp.mean(outside), error)


def _dot(a: PyTree, b: PyTree) -> Array:
  parts = jax.tree.map(
    lambda x, y: jnp.vdot(at_least_float32(x), at_least_float32(y)), a, b
  )
  return jax.tree.reduce(jnp.add, parts)


def _norm(a: PyTree) -> Array:
  return jnp.sqrt(_dot(a, a))


def _orthogonal(basis: PyTree, v: PyTree) -> PyTree:
  """`v` without its part in the span of the basis' vectors."""
  along = jax.vmap(lambda b: _dot(b, v))(basis)
  return jax.tree.map(
    lambda b, x: x - jnp.tensordot(along.astype(b.dtype), b, 1), basis, v
  )


def _orthonormal(vectors: PyTree) -> PyTree:
  """Gram-Schmidt, twice over; zero where a vector adds no direction."""
  count = jax.tree.leaves(vectors)[0].shape[0]
  basis = jax.tree.map(jnp.zeros_like, vectors)

  def step(basis, i):
    v = jax.tree.map(lambda x: x[i], vectors)
    before = _norm(v)
    v = _orthogonal(basis, _orthogonal(basis, v))
    left = _norm(v)
    kept = left > 64 * jnp.finfo(left.dtype).eps * before
    scale = jnp.where(kept, 1 / jnp.where(left > 0, left, 1), 0)
    set_row = lambda b, x: b.at[i].set((x * scale).astype(b.dtype))
    return jax.tree.map(set_row, basis, v), None

  return jax.lax.scan(step, basis, jnp.arange(count))[0]


def _size(tree: PyTree) -> int:
  return sum(x.size for x in jax.tree.leaves(tree))


def _random(draw, key, like: PyTree) -> PyTree:
  leaves, tree = jax.tree.flatten(like)
  keys = jax.random.split(key, len(leaves))
  drawn = [draw(k, x.shape, x.dtype) for k, x in zip(keys, leaves)]
  return jax.tree.unflatten(tree, drawn)


def _normal(key, like: PyTree) -> PyTree:
  return _random(jax.random.normal, key, like)


def _signs(key, like: PyTree) -> PyTree:
  return _random(jax.random.rademacher, key, like)
