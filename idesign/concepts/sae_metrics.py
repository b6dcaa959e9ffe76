"""How well a sparse autoencoder stands for the activations it was made for."""

from __future__ import annotations

from collections.abc import Iterable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np

from idesign import sites
from idesign.concepts.sae import SAE


class Fit(NamedTuple):
  """Of all rows seen, `x` the activation and `e = x - sae(x)`.

  Attributes:
    l0: mean number of active features.
    fvu: `sum |e|^2 / sum |x - mean x|^2`, fraction of variance unexplained.
    explained_variance: `1 - sum_d var(e_d) / sum_d var(x_d)`. It does not see a
      constant error, which `fvu` does.
    dead: share of features that were never active.
    fired_F: in what share of the rows each feature was active.
    rows: how many rows.
  """

  l0: float
  fvu: float
  explained_variance: float
  dead: float
  fired_F: np.ndarray
  rows: int


@jax.jit
def _sums(sae: SAE, x_ND: Array, mask_N: Array, origin_D: Array):
  # About an origin near the mean: squares of large means would lose digits.
  f_NF = sae.encode(x_ND)
  kept_N1 = mask_N[:, None]
  e_ND = jnp.where(kept_N1, x_ND - sae.decode(f_NF), 0)
  x_ND = jnp.where(kept_N1, x_ND - origin_D[None], 0)
  return {
    'rows': jnp.sum(mask_N),
    'fired': jnp.sum((f_NF > 0) & kept_N1, axis=0),
    'x': jnp.sum(x_ND, axis=0),
    'xx': jnp.sum(jnp.square(x_ND)),
    'e': jnp.sum(e_ND, axis=0),
    'ee': jnp.sum(jnp.square(e_ND)),
  }


def evaluate_sae(sae: SAE, batches: Iterable[Any]) -> Fit:
  """Measures the fit in one pass.

  Args:
    sae: the autoencoder.
    batches: activations `[..., D]`, or pairs of them and a mask `[...]`, false
      for rows to leave out (padding), whatever they hold.

  Raises:
    ValueError: if there are no rows, or all are equal.
  """
  origin_D, total = None, None
  for batch in batches:
    x, mask = batch if isinstance(batch, tuple) else (batch, None)
    x_ND = jnp.asarray(x).reshape(-1, x.shape[-1])
    if mask is None:
      mask = np.ones(x.shape[:-1], bool)
    mask_N = np.asarray(mask, bool).reshape(-1)
    if not mask_N.any():
      continue  # It has no mean that could be the origin.
    if origin_D is None:
      origin_D = jnp.mean(x_ND, axis=0, where=mask_N[:, None])
    sums = _sums(sae, x_ND, jnp.asarray(mask_N), origin_D)
    sums = jax.tree.map(lambda a: np.asarray(a, np.float64), sums)
    total = sums if total is None else jax.tree.map(np.add, total, sums)
  rows = 0 if total is None else int(total['rows'])
  if not rows:
    raise ValueError('there are no activations to evaluate on.')
  about = lambda square, first: square - np.sum(first**2) / rows
  variance = about(total['xx'], total['x'])
  if not variance > 0:
    raise ValueError(
      f'the {rows} activations are all equal: no variance to explain.'
    )
  return Fit(
    l0=float(total['fired'].sum() / rows),
    fvu=float(total['ee'] / variance),
    explained_variance=float(1 - about(total['ee'], total['e']) / variance),
    dead=float(np.mean(total['fired'] == 0)),
    fired_F=total['fired'] / rows,
    rows=rows,
  )


class LossRecovered(NamedTuple):
  """Mean losses as the model is, with the reconstruction, and with zeros.

  `share` is `(zeros - spliced) / (zeros - original)`: 1 if the reconstruction
  does as well as the activation, 0 if it does as well as nothing.
  """

  original: float
  spliced: float
  zeros: float

  @property
  def share(self) -> float:
    return (self.zeros - self.spliced) / (self.zeros - self.original)


# Outside the function, so that the same loss again is not compiled again.
@functools.partial(jax.jit, static_argnames=('loss', 'activation'))
def _three_losses(loss, activation, params, batch, sae: SAE):
  """Sums as the model is, reconstructed and with zeros; how many examples."""
  arms = (
    loss,
    sites.edit(loss, {activation: lambda h: sae(h).astype(h.dtype)}),
    sites.edit(loss, {activation: jnp.zeros_like}),
  )
  losses = [arm(params, batch) for arm in arms]
  # How many examples a batch has, only the loss knows.
  return jnp.stack([jnp.sum(x) for x in losses]), losses[0].size


def loss_recovered(
  loss: sites.Loss,
  params: Any,
  batches: Iterable[Any],
  sae: SAE,
  activation: str,
) -> LossRecovered:
  """What a model loses when an activation is replaced by its reconstruction.

  Args:
    loss: `loss(params, batch) -> [B]`.
    params: of the model.
    batches: what `loss` takes.
    sae: the autoencoder.
    activation: name of the activation, such as `resid_post[2:3]`; other layers
      of the name run as they are.

  Raises:
    SelectionError: if no activation is named so.
    ValueError: if there are no batches, or the width does not fit.
  """
  sums, count = np.zeros(3), 0
  for batch in batches:
    totals, size = _three_losses(loss, activation, params, batch, sae)
    sums += np.asarray(totals, np.float64)
    count += int(size)
  if not count:
    raise ValueError('there are no batches to measure the loss on.')
  return LossRecovered(*(sums / count).tolist())
