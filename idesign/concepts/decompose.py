r"""What does an update teach? Gradients and movements, concept by concept.

Two different questions are answered here, and neither stands for the other.

*What does the loss pull on?* `decompose` takes a vector at every position of
an activation `h`, usually the gradient `g = dL/dh`, and splits it over the
features that are active there.

*What will the update move?* `predicted_change` takes the update that is really
applied, after Adam, clipping and decay, and gives the first-order movement of
**every** concept in one forward-mode pass, whatever their number: positions
are averaged before concepts are read, and reading is linear.

The literature describes the idea in words only (Goodfire, "Intentionally
designing the future of AI", 2026); formulas and statistics are this library's.

Dimensions: `B` examples, `T` positions, `D` width of the activation, `F`
concepts, `K` active concepts of a position.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np
import scipy.stats

from idesign.concepts.activations import Read, token_mean
from idesign.concepts.sae import SAE

_HALVINGS = 100


class Decomposition(NamedTuple):
  r"""A vector `v` at each position, split over the active features.

  `v = sum_k coefficient_k d_k + residual`, `d_k` being decoder rows. Shares of
  `|v|^2` are `coefficient_k <d_k, v> / |v|^2`; with the residual's, `<residual,
  v> / |v|^2`, they add up to 1. A share can be negative: then a feature's part
  opposes the whole.

  Attributes:
    index: which features, `[B, T, K]`.
    active: which of the K places hold an active feature; the others count
      nothing, and their coefficients and scores are 0.
    score: `f_k <d_k, v>`, the first-order effect on the loss of scaling the
      feature, if `v` is the loss's gradient. Features that point the same way
      each count what they share.
    coefficient: least squares over the active features, which counts it once.
    projection: `<d_k, v>`.
    residual: what no active feature explains, `[B, T, D]`.
    dropped: active features beyond the K largest, `[B, T]`.
  """

  index: Int[Array, 'B T K']
  active: Bool[Array, 'B T K']
  score: Float[Array, 'B T K']
  coefficient: Float[Array, 'B T K']
  projection: Float[Array, 'B T K']
  residual: Float[Array, 'B T D']
  dropped: Int[Array, 'B T']


def decompose(
  sae: SAE,
  h: Float[Array, 'B T D'],
  v: Float[Array, 'B T D'],
  *,
  k: int | None = None,
  ridge: float = 1e-6,
) -> Decomposition:
  r"""Splits `v` over the features that are active in `h`.

    coefficient = (D_A D_A^T + ridge I)^-1 D_A v,    A = the active features

  Args:
    sae: whose decoder rows are the directions.
    h: the activation, which says what is active.
    v: what to split: `dL/dh`, or the movement of `h` under an update.
    k: how many features to consider per position, the most active ones;
      the autoencoder's own `k` if None. `dropped` says how many that left out.
    ridge: added to the Gram matrix, relative to its mean diagonal, so that
      features which point the same way still have a solution. What it keeps
      from being explained is in the residual, exactly.

  Raises:
    ValueError: if `h` and `v` differ in shape, do not fit the autoencoder, or
      `k` is needed and not given.
  """
  if h.shape != v.shape or h.ndim != 3:
    raise ValueError(
      f'h is {h.shape} and v is {v.shape}; both must be [batch, time, width].'
    )
  k = sae.config.k if k is None else k
  if k is None or not 1 <= k <= sae.config.d_sae:
    raise ValueError(
      f'k={k}: say how many active features to consider per position, from 1 '
      f'to d_sae={sae.config.d_sae}.'
    )
  f_BTF = sae.encode(h)
  f, index = jax.lax.top_k(f_BTF, k)
  active = f > 0
  rows = jnp.where(active[..., None], sae.directions[index], 0)
  projection = jnp.einsum('btkd,btd->btk', rows, v)
  gram = jnp.einsum('btkd,btjd->btkj', rows, rows)
  diagonal = jnp.diagonal(gram, axis1=-2, axis2=-1)
  count = jnp.maximum(jnp.sum(active, axis=-1), 1)
  added = ridge * jnp.sum(diagonal, axis=-1) / count
  # Empty places get an equation of their own, 1 x = 0.
  added = jnp.where(active, added[..., None], 1)
  gram = gram + added[..., None] * jnp.eye(k, dtype=gram.dtype)[None, None]
  coefficient = jnp.linalg.solve(gram, projection[..., None])[..., 0]
  return Decomposition(
    index=index,
    active=active,
    score=f * projection,
    coefficient=coefficient,
    projection=projection,
    residual=v - jnp.einsum('btk,btkd->btd', coefficient, rows),
    dropped=jnp.sum(f_BTF > 0, axis=-1) - jnp.sum(active, axis=-1),
  )


class Shares(NamedTuple):
  """Of `sum |v|^2` over the positions that count.

  Attributes:
    share_F: each feature's; with `unexplained` they add up to 1. Of a `v` that
      is 0 everywhere no feature has a share, and `unexplained` is 1.
    unexplained: the residual's.
    score_F: summed `f_c <d_c, v>`.
  """

  share_F: Float[Array, 'F']
  unexplained: Float[Array, '']
  score_F: Float[Array, 'F']


def shares(
  sae: SAE,
  parts: Decomposition,
  v: Float[Array, 'B T D'],
  mask: Bool[Array, 'B T'] | None = None,
) -> Shares:
  """Adds a decomposition up over positions.

  Args:
    sae: the autoencoder of `parts`.
    parts: from `decompose`.
    v: what was decomposed.
    mask: positions that count; all if None.
  """
  mask = jnp.ones(v.shape[:2], bool) if mask is None else mask
  v = jnp.where(mask[..., None], v, 0)
  # Shares do not depend on the unit of v; its square may underflow.
  unit = jnp.max(jnp.abs(v), initial=0)
  unit = jnp.where(unit == 0, 1, unit)
  v = v / unit
  total = jnp.sum(v**2)
  nothing = total == 0
  total = jnp.where(nothing, 1, total)
  add = lambda x: (
    jnp.zeros((sae.config.d_sae,), x.dtype)
    .at[parts.index]
    .add(jnp.where(mask[..., None], x, 0))
  )
  rest = jnp.where(mask[..., None], parts.residual / unit * v, 0)
  explained = (parts.coefficient / unit) * (parts.projection / unit)
  return Shares(
    add(explained) / total,
    jnp.where(nothing, 1, jnp.sum(rest) / total),
    add(parts.score),
  )


def predicted_change(
  read: Read,
  readout_DF: Float[Array, 'D F'],
  params: Any,
  update: Any,
  probes: Any,
  mask: Float[Array, 'B T'] | None = None,
) -> Float[Array, 'B F']:
  r"""First-order movement of every concept under `params + update`.

    change[b, c] = < e_c, mean_t (d/ds) h[b, t](params + s update) >  at s = 0

  One forward-mode pass gives `dh/ds`; only its mean over positions meets the
  concepts, so that the cost hardly grows with their number. For an autoencoder
  `e_c` is an encoder column and the change is that of the mean
  **pre-activation**, which exists also for a feature that is not active yet;
  features themselves have no derivative where they switch on.

  Args:
    read: `read(params, probes) -> h [B, T, D]`, from `reader`.
    readout_DF: `sae.params['W_enc']`, or labelled directions as columns.
    params: before the update.
    update: what is *added* to them, like what an Optax chain returns last.
    probes: what to read the concepts on. Probes that also define an
      intervention say nothing about it: use fresh ones.
    mask: positions that count.

  Raises:
    ValueError: if `readout_DF` has another width.
  """

  def read_mean(params):
    return token_mean(_fitting(read(params, probes), readout_DF), mask)

  _, moved_BD = jax.jvp(read_mean, (params,), (update,))
  return moved_BD @ readout_DF


def realised_change(
  read: Read,
  readout_DF: Float[Array, 'D F'],
  params: Any,
  update: Any,
  probes: Any,
  mask: Float[Array, 'B T'] | None = None,
) -> Float[Array, 'B F']:
  """What `predicted_change` predicts: the difference of two forward passes."""
  after = jax.tree.map(jnp.add, params, update)
  h = _fitting(read(params, probes), readout_DF)
  return token_mean(read(after, probes) - h, mask) @ readout_DF


def _fitting(h: Array, readout_DF: Array) -> Array:
  if h.shape[-1] != readout_DF.shape[0]:
    raise ValueError(
      f'the activation has width {h.shape[-1]} and the concepts are read from '
      f'width {readout_DF.shape[0]}: they belong to another layer or model.'
    )
  return h


class ChangeStatistics(NamedTuple):
  """Of each concept's change over probes, `[F]` each.

  Attributes:
    mean: the change.
    low, high: Student's t interval of the mean, 95 %.
    effect_size: mean over standard deviation (Cohen's d of one sample); its
      sign times infinity where all probes agree but for rounding, 0 where all
      are 0.
    sign_agreement: in what share of random halvings of the probes the two
      halves' means have the same sign, two zeros counting half: 0.5 for noise
      and for no change at all, 1 for what is there.
  """

  mean: np.ndarray
  low: np.ndarray
  high: np.ndarray
  effect_size: np.ndarray
  sign_agreement: np.ndarray


def change_statistics(
  change_BF: Float[Array, 'B F'], *, seed: int = 0
) -> ChangeStatistics:
  """Is a change there, or is it noise between probes?

  Args:
    change_BF: per probe, from `predicted_change` or any score per example.
    seed: of the halvings.

  Raises:
    ValueError: for fewer than four probes, or a value that is not finite.
  """
  x = np.asarray(change_BF, np.float64)
  if x.ndim != 2 or len(x) < 4:
    raise ValueError(
      f'the changes are {x.shape}; [probes, concepts] with at least four '
      'probes are needed for an interval and two halves.'
    )
  if not np.isfinite(x).all():
    concept = int(np.flatnonzero(~np.isfinite(x).all(axis=0))[0])
    raise ValueError(
      f'the change of concept {concept} is not finite: the update or the '
      'activation holds NaN or infinity.'
    )
  size = len(x)
  mean, sd = x.mean(axis=0), x.std(axis=0, ddof=1)
  # The mean of equal numbers is rounded, so that they seem to spread about it.
  same = np.ptp(x, axis=0) <= 4 * np.finfo(x.dtype).eps * np.abs(x).max(axis=0)
  sd = np.where(same, 0, sd)
  half = scipy.stats.t.ppf(0.975, size - 1) * sd / np.sqrt(size)
  with np.errstate(divide='ignore', invalid='ignore'):
    effect = np.where(mean == 0, 0.0, mean / sd)
  random = np.random.default_rng(seed)
  first = np.zeros((_HALVINGS, size))
  for row in first:
    row[random.permutation(size)[: size // 2]] = 1
  in_first = first @ x
  signs = np.sign(in_first), np.sign((1 - first) @ x)
  agree = np.where((signs[0] == 0) & (signs[1] == 0), 0.5, signs[0] == signs[1])
  return ChangeStatistics(
    mean, mean - half, mean + half, effect, agree.mean(axis=0)
  )
