"""Routing: who learns what.

*Gradient routing* (Cloud et al. 2024, https://arxiv.org/abs/2410.04332) stops
gradients at activations by a mask that depends on the data.

*A disposable adapter* goes further: a small map at one activation is first
taught the trait, on a handful of examples and with the model frozen; then the
model is trained through it, with the adapter frozen; then the adapter is
dropped. While it speaks the dialect, the model need not. Nothing is blocked, so
nothing has to be routed around.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from idesign import sites

Apply = Callable[..., Any]


def route_gradients(
  apply: Apply, masks: Mapping[str, Float[Array, '*BT']]
) -> Apply:
  """`h -> m h + (1 - m) stop_gradient(h)`; the forward is as it was.

  Args:
    apply: a function whose activations are named.
    masks: activation -> what broadcasts to it, 1 where gradients pass.
  """

  def route(m):
    def edit(h):
      mask = jnp.asarray(m, h.dtype)
      if mask.ndim > h.ndim:
        raise ValueError(f'a mask {mask.shape} for an activation {h.shape}.')
      return mask * h + (1 - mask) * jax.lax.stop_gradient(h)

    return edit

  return sites.edit(apply, {name: route(m) for name, m in masks.items()})


class Adapter(NamedTuple):
  """`h -> h + h A + b` at one activation; a pytree of parameters.

  Attributes:
    A: `[D, D]`.
    b: `[D]`.
  """

  A: Float[Array, 'D D']
  b: Float[Array, 'D']


def init_adapter(width: int) -> Adapter:
  """The adapter that changes nothing."""
  if width < 1:
    raise ValueError(f'width={width} must be at least 1.')
  return Adapter(jnp.zeros((width, width)), jnp.zeros(width))


def adapt(
  apply: Apply,
  name: str,
  adapter: Adapter,
  on_B: Float[Array, 'B'] | None = None,
) -> Apply:
  """A model seen through an adapter.

  Args:
    apply: a function whose activations are named.
    name: where the adapter goes. Late activations leave most to the model: the
      last one before the logits is where an adapter changes only how things
      are said.
    adapter: its parameters. To freeze them, differentiate with respect to the
      model's alone.
    on_B: for each example how much of the adapter applies; all if None.
  """

  def edit(h):
    change = h @ adapter.A.astype(h.dtype)
    change = change + jnp.expand_dims(
      adapter.b.astype(h.dtype), tuple(range(h.ndim - 1))
    )
    if on_B is not None:
      # Layers come first where an edit covers several.
      shape = [1] * (h.ndim - 3) + [-1, 1, 1]
      change = change * on_B.astype(h.dtype).reshape(shape)
    return h + change

  return sites.edit(apply, {name: edit})
