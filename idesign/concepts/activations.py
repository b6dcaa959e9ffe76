"""One activation of a model, as a function and as a shuffled stream of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from idesign import sites

Read = Callable[[Any, Any], Float[Array, 'B T D']]


def reader(fn: Callable[[Any, Any], Any], name: str) -> Read:
  """The function `read(params, batch) -> h [B, T, D]` of one activation.

  Args:
    fn: `fn(params, batch)`, whose activations are named.
    name: which one; of a name with several layers, one by its range, such as
      `resid_post[2:3]`.

  Raises (when called or traced):
    SelectionError: if no activation is named so.
    ValueError: if the name selects several layers, or the activation is not
      `[B, T, D]`.
  """
  captured = sites.capture(fn, [name])

  def read(params, batch):
    h = captured(params, batch)[1][name]
    if h.ndim == 4 and h.shape[0] == 1:
      h = h[0]
    if h.ndim != 3:
      raise ValueError(
        f'{name!r} has shape {h.shape}; one layer, [batch, time, width], is '
        f'needed. Select it as in {name.split("[")[0]!r} + "[2:3]".'
      )
    return h

  return read


def stream(
  read: Read,
  params: Any,
  batches: Iterable[tuple[Any, np.ndarray | None]],
  *,
  rows: int,
  buffer: int,
  seed: int = 0,
) -> Iterator[np.ndarray]:
  """Rows of an activation in random order, a batch of them at a time.

  A buffer on the host is filled from the model; whenever it is full, half of
  it is handed out at random and refilled, so that the rows of one text lie far
  apart. Every row is handed out exactly once, except that fewer than `rows` at
  the very end are dropped.

  Args:
    read: `read(params, batch) -> [B, T, D]`; jitted here.
    params: of the model.
    batches: pairs of what `read` takes and a mask `[B, T]`, false for
      positions to leave out (padding, a first token), or None.
    rows: rows in each array handed out.
    buffer: rows to hold, at least `2 * rows`.
    seed: of the shuffling.

  Yields:
    Float32 arrays `[rows, D]`.

  Raises:
    ValueError: for a buffer that is too small, a mask of another shape, an
      activation that is not finite, or batches with fewer than `rows` rows in
      all.
  """
  if rows < 1 or buffer < 2 * rows:
    raise ValueError(
      f'buffer={buffer} must hold at least two batches of rows={rows}.'
    )
  read = jax.jit(read)
  random = np.random.default_rng(seed)
  held: list[np.ndarray] = []
  count, given = 0, 0

  def shuffled() -> np.ndarray:
    return random.permutation(np.concatenate(held), axis=0)

  for number, (batch, mask) in enumerate(batches):
    h = np.asarray(read(params, batch), np.float32)
    if mask is not None and np.shape(mask) != h.shape[:2]:
      raise ValueError(
        f'the mask of batch {number} is {np.shape(mask)}; the activation has '
        f'positions {h.shape[:2]}.'
      )
    if mask is None:
      kept = h.reshape(-1, h.shape[-1])
    else:
      # Integers would not select positions but index texts.
      kept = h[np.asarray(mask, bool)]
    if not np.isfinite(kept).all():
      raise ValueError(f'the activation of batch {number} is not finite.')
    held.append(kept)
    count += len(kept)
    if count >= buffer:
      pool = shuffled()
      out = max(count // 2 // rows, 1) * rows
      for start in range(0, out, rows):
        yield pool[start : start + rows]
      held, count, given = [pool[out:]], count - out, given + out
  pool = shuffled() if held else np.empty((0, 0))
  if given + len(pool) < rows:
    raise ValueError(
      f'the batches hold {given + len(pool)} rows, fewer than one batch of '
      f'rows={rows}.'
    )
  for start in range(0, len(pool) - rows + 1, rows):
    yield pool[start : start + rows]


def token_mean(
  h: Float[Array, 'B T D'], mask: Float[Array, 'B T'] | None = None
) -> Float[Array, 'B D']:
  """Mean over the positions of each example where `mask` holds (all if None).

  An example without any position is 0. What stands where the mask does not
  hold makes no difference, NaN neither.
  """
  if mask is None:
    return jnp.mean(h, axis=1)
  if mask.shape != h.shape[:2]:
    raise ValueError(
      f'the mask is {mask.shape}; the activation has positions {h.shape[:2]}.'
    )
  weight = mask.astype(h.dtype)
  # A weight of 0 alone would not do: 0 * NaN is NaN.
  h = jnp.where(weight[..., None] != 0, h, 0)
  total = jnp.maximum(jnp.sum(weight, axis=1), 1)
  return jnp.einsum('btd,bt->bd', h, weight) / total[:, None]
