"""Low-rank adapters of any model's kernels, as a pytree of their own."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from idesign import sites

LoRA = dict[str, dict[str, Array]]


def init_lora(
  params: Any, pattern: str, *, rank: int, key: jax.Array
) -> LoRA:
  """Adapters `W + (alpha / rank) A B` with `B = 0`: nothing changes yet.

  Hu et al. 2021, https://arxiv.org/abs/2106.09685.

  Args:
    params: of the model.
    pattern: which kernels, by path (`sites.match_paths`): arrays `[..., d_in,
      d_out]`, whose leading axes (layers of a stack) each get their own.
    rank: of each adapter.
    key: of `A`, normal with variance `1 / d_in`.

  Returns:
    path -> `{'A': [..., d_in, rank], 'B': [..., rank, d_out]}`, in the dtype of
    the kernel.

  Raises:
    SelectionError: if nothing matches.
    ValueError: for a rank below 1 or a parameter that is no matrix.
  """
  if rank < 1:
    raise ValueError(f'rank={rank} must be at least 1.')
  leaves = _by_path(params)
  adapters = {}
  for i, path in enumerate(sites.match_paths(pattern, list(leaves))):
    kernel = leaves[path]
    if kernel.ndim < 2:
      raise ValueError(
        f'{path} has shape {kernel.shape}; an adapter needs a matrix. Narrow '
        f'the pattern {pattern!r}, to kernels, say.'
      )
    *stack, d_in, d_out = kernel.shape
    draw = jax.random.normal(
      jax.random.fold_in(key, i), (*stack, d_in, rank), kernel.dtype
    )
    adapters[path] = {
      'A': draw / math.sqrt(d_in),
      'B': jnp.zeros((*stack, rank, d_out), kernel.dtype),
    }
  return adapters


def merge_lora(params: Any, adapters: LoRA, *, scale: float = 1.0) -> Any:
  """Parameters `W + scale A B`, to call the model with.

  Args:
    params: of the model; not differentiated.
    adapters: from `init_lora`.
    scale: `alpha / rank` of the paper.

  Raises:
    ValueError: for an adapter of a parameter that is not there.
  """
  leaves = _by_path(params)
  unknown = sorted(set(adapters) - set(leaves))
  if unknown:
    raise ValueError(f'{unknown[0]!r} is adapted, but no such parameter.')
  change = lambda a: scale * jnp.matmul(a['A'], a['B'])
  merged = [
    jax.lax.stop_gradient(w) + change(adapters[path]).astype(w.dtype)
    if path in adapters
    else jax.lax.stop_gradient(w)
    for path, w in leaves.items()
  ]
  return jax.tree.unflatten(jax.tree.structure(params), merged)


def _by_path(params: Any) -> dict[str, Array]:
  return dict(zip(sites.leaf_paths(params), jax.tree.leaves(params)))
