"""Eigenbases of Kronecker factors.

A weight `w [d_in, d_out]` has components `C_ij = u_i^T w v_j` in the eigenbases
`u` of the input factor and `v` of the output factor. Under K-FAC the curvature
of a component is the product of its two eigenvalues, its *mass*.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent import futures
import heapq
import itertools
import os
from typing import Literal, NamedTuple

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np
import threadpoolctl

from idesign.curvature.kfac import Factors

# A matrix from this size on has all cores and the memory to itself. Of smaller
# ones, for which LAPACK has little use for a second core, each core solves one.
_ALONE = 2048


class EigenError(ValueError):
  """A factor that has no eigendecomposition; the message names it."""


class Spectrum(NamedTuple):
  """Eigendecomposition of one site's factors; float64, on the host.

  Attributes:
    input_values: `[*stack, d_in]`, descending, not negative.
    input_basis: `[*stack, d_in, d_in]`, eigenvectors in columns.
    output_values: `[*stack, d_out]`, descending, not negative.
    output_basis: `[*stack, d_out, d_out]`.
    input_residual: `[*stack]`, `|A - U diag(values) U^T| / |A|` (Frobenius) of
      the symmetrised factor, clamped values included; 0 of a zero factor.
    output_residual: likewise.
  """

  input_values: np.ndarray
  input_basis: np.ndarray
  output_values: np.ndarray
  output_basis: np.ndarray
  input_residual: np.ndarray
  output_residual: np.ndarray

  def mass(self) -> np.ndarray:
    """Curvature of every component, `[*stack, d_in, d_out]`.

    The K-FAC approximation of the diagonal of the Fisher information, averaged
    over examples.
    """
    return self.input_values[..., :, None] * self.output_values[..., None, :]


class _Task(NamedTuple):
  """One matrix to decompose."""

  site: str
  side: str
  index: tuple[int, ...]  # Of the stack.
  size: int

  def __str__(self) -> str:
    layer = f', layer {",".join(map(str, self.index))}' if self.index else ''
    return f'the {self.side} factor of {self.site!r}{layer}'


def spectra(
  factors: Factors, *, where: Literal['host', 'devices'] = 'host'
) -> dict[str, Spectrum]:
  """Eigendecompositions by site, of `A / positions` and `G / examples`.

  Factors are symmetrised, eigenvalues below zero, which a second moment has by
  rounding only, are clamped. With several processes each decomposes its share,
  of about the same cost (`d^3`), and all of them return the same spectra.

  Args:
    factors: sums; arrays that are sharded over processes are gathered.
    where: `'host'`: in float64, on all cores; `'devices'`: in float32 (float64
      with x64), spread over all devices by cost.

  Raises:
    EigenError: a factor is not finite or was not decomposed, naming it.
    ValueError: the factors hold no example.
  """
  if where not in ('host', 'devices'):
    raise ValueError(f"where is 'host' or 'devices', not {where!r}.")
  tasks, read = _tasks(factors)
  if where == 'host':
    mine = spread([t.size**3 for t in tasks], jax.process_count())
    solved = _solve_on_host(tasks, read, mine[jax.process_index()])
  else:
    solved = _solve_on_devices(tasks, read)
  solved = _gather(tasks, solved)
  for task, (values, basis, _) in zip(tasks, solved):
    if not (np.isfinite(values).all() and np.isfinite(basis).all()):
      raise EigenError(
        f'{task} was not decomposed: the solver did not converge. Decompose it '
        "in float64 (where='host'), or leave it out."
      )
  return _assemble(factors, solved)


def spread(costs: list[float], num_workers: int) -> list[list[int]]:
  """Shares work out: the costliest first, to whoever has least so far.

  Returns:
    For each worker the indices of its tasks, ascending. The heaviest worker
    has at most 4/3 of the least possible load (Graham 1969).
  """
  loads = [(0.0, w) for w in range(num_workers)]
  shares: list[list[int]] = [[] for _ in range(num_workers)]
  for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
    load, worker = heapq.heappop(loads)
    shares[worker].append(i)
    heapq.heappush(loads, (load + costs[i], worker))
  return [sorted(share) for share in shares]


def as_bases(
  spectra: Mapping[str, Spectrum], dtype=jnp.float32
) -> dict[str, tuple[Array, Array]]:
  """The eigenbases as arrays, as `ekfac_eigenvalues` takes them."""
  pair = lambda s: (s.input_basis, s.output_basis)
  return {
    name: tuple(jnp.asarray(basis, dtype) for basis in pair(s))
    for name, s in spectra.items()
  }


def domain_mass(spectrum: Spectrum, inputs, outputs) -> np.ndarray:
  """Curvature of other data along the same components, `[*stack, d_in, d_out]`.

  `(u_i^T A u_i) (v_j^T G v_j)`, with factors of another domain: to keep in one
  basis what each of several domains needs (`edit.union`).

  Args:
    spectrum: the basis, such as that of all domains' factors added up.
    inputs: `A`, `[*stack, d_in, d_in]`.
    outputs: `G`, `[*stack, d_out, d_out]`.
  """

  def along(basis, moment):
    moment = np.asarray(moment, np.float64)
    return np.maximum(np.einsum('...di,...di->...i', basis, moment @ basis), 0)

  rows = along(spectrum.input_basis, inputs)
  columns = along(spectrum.output_basis, outputs)
  return rows[..., :, None] * columns[..., None, :]


def _on_host(x) -> np.ndarray:
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    x = multihost_utils.process_allgather(x, tiled=True)
  return np.asarray(x)


def _tasks(factors: Factors):
  """What to decompose, and `read(task)`, the same on every process."""
  count = float(_on_host(factors.count))
  if not count > 0:
    raise ValueError('The factors hold no example: collect at least one batch.')
  tasks, held = [], {}
  for site in factors.inputs:
    positions = float(_on_host(factors.positions[site]))
    if not positions > 0:
      raise ValueError(f'Every position was masked at {site!r}.')
    sides = (
      ('input', factors.inputs[site], positions),
      ('output', factors.outputs[site], count),
    )
    for side, moments, total in sides:
      held[site, side] = _on_host(moments), total
      for index in np.ndindex(moments.shape[:-2]):
        tasks.append(_Task(site, side, index, moments.shape[-1]))

  def read(task: _Task) -> np.ndarray:
    moments, total = held[task.site, task.side]
    moment = np.asarray(moments[task.index], np.float64) / total
    return (moment + moment.T) / 2

  for task in tasks:  # On all processes alike, before any work.
    if not np.isfinite(held[task.site, task.side][0][task.index]).all():
      raise EigenError(
        f'{task} has entries that are not finite: the loss or an activation '
        'overflowed there. Look at that layer, or collect in float32.'
      )
  return tasks, read


def _solve_on_host(tasks, read, share: list[int]) -> dict[int, tuple]:
  def solve(i):
    moment = read(tasks[i])
    try:
      values, basis = np.linalg.eigh(moment)
    except np.linalg.LinAlgError:  # Told to all processes as not finite.
      values = np.full(len(moment), np.nan)
      basis = np.full(moment.shape, np.nan)
    return _finish(moment, values, basis)

  small = [i for i in share if tasks[i].size < _ALONE]
  with (
    threadpoolctl.threadpool_limits(1, 'blas'),
    futures.ThreadPoolExecutor(os.cpu_count()) as pool,
  ):
    solved = dict(zip(small, pool.map(solve, small)))
  return solved | {i: solve(i) for i in share if i not in solved}


def _solve_on_devices(tasks, read):
  devices = jax.devices()
  started = {}
  shares = spread([t.size**3 for t in tasks], len(devices))
  for device, share in zip(devices, shares):
    if device.process_index != jax.process_index():
      continue
    for i in share:
      moment = read(tasks[i])
      # Scaled, since squares of small gradients leave the range of float32.
      scale = np.abs(moment).max() or 1.0
      dtype = jnp.asarray(0.0).dtype  # float64 with x64.
      on_device = jax.device_put((moment / scale).astype(dtype), device)
      started[i] = moment, scale, _eigh(on_device)  # Not waited for.
  return {
    i: _finish(
      moment, np.asarray(values, np.float64) * scale,
      np.asarray(basis, np.float64),
    )
    for i, (moment, scale, (values, basis)) in started.items()
  }  # fmt: skip


_eigh = jax.jit(jnp.linalg.eigh)


def _finish(moment, values, basis):
  """Descending, clamped, with the residual."""
  values, basis = np.maximum(values, 0.0)[::-1], basis[:, ::-1]
  norm = np.linalg.norm(moment)
  residual = np.linalg.norm(moment - (basis * values) @ basis.T)
  return values, basis, float(residual / norm) if norm else 0.0


def _gather(tasks, solved: Mapping[int, tuple]) -> list[tuple]:
  """Everybody's solutions in the order of tasks, on every process."""
  if jax.process_count() == 1:
    return [solved[i] for i in range(len(tasks))]
  sizes = [t.size for t in tasks]
  lengths = [n + n * n + 1 for n in sizes]
  starts = list(itertools.accumulate(lengths, initial=0))
  flat = np.zeros(starts[-1], np.float64)
  for i, parts in solved.items():
    flat[starts[i] : starts[i + 1]] = np.concatenate(
      [np.ravel(part) for part in parts]
    )
  # As integers: exact, and zero where a process has nothing to say.
  words = multihost_utils.process_allgather(flat.view(np.uint32))
  flat = np.bitwise_or.reduce(np.asarray(words), axis=0).view(np.float64)

  def parts(i):
    values, basis, residual = np.split(
      flat[starts[i] : starts[i + 1]], [sizes[i], sizes[i] + sizes[i] ** 2]
    )
    return values, basis.reshape(sizes[i], -1), float(residual[0])

  return [parts(i) for i in range(len(tasks))]


def _assemble(factors, solved: list[tuple]) -> dict[str, Spectrum]:
  solved.reverse()  # Each is let go of once it is in place.
  out = {}
  for site, moment in factors.inputs.items():
    stack = moment.shape[:-2]
    fields = []
    for size in (moment.shape[-1], factors.outputs[site].shape[-1]):
      layers = [solved.pop() for _ in np.ndindex(stack)]
      values, basis, residual = (np.array(part) for part in zip(*layers))
      fields.append(
        (
          values.reshape(*stack, size),
          basis.reshape(*stack, size, size),
          residual.reshape(stack),
        )
      )
    (a, u, in_residual), (g, v, out_residual) = fields
    out[site] = Spectrum(a, u, g, v, in_residual, out_residual)
  return out
