r"""Gating a gradient by concept, as an Optax transformation.

Three places where a gate can act, from the cheapest to the last resort:

*Losses* (`gate_losses`). The gradient of a weighted loss is the weighted
gradient, `sum_i w_i g_i = grad sum_i w_i L_i`, so one ordinary backward pass
gates examples and tokens, and no per-example gradient is formed (Bu et al.
2022, https://arxiv.org/abs/2210.00038, clip gradients so).

*Per-example gradients* (`gate_aggregator`), for `optax.experimental
.aggregating`.

*Updates* (`idesign.shaping.confine_movement`), after the optimizer.

What a token's loss has to do with a concept is its *attribution* `a`; what is
to be done with the concept is its *gate* `g`, from a judge: 0 removes, 1
leaves, above 1 amplifies. The weight of example or token `i` is

    w_i = prod_c (1 + (g_c - 1) sigmoid((a_ic - threshold_c) / softness))

so that gates of 1 leave everything as it was, bit for bit. Weights are then
scaled to the sum of what was to be averaged: gating changes *what* is learned
from, not how fast. Gates and attributions are arrays: new verdicts never
compile anything anew.

A token taken away leaves its place open: nothing says any more what belongs
there, and what is learned from its neighbours drifts in. An *anchor*, a second
loss such as the divergence from the frozen model, gets the weight that gates
take away, so that `sum_i w_i L_i + max(1 - w_i, 0) A_i` is learned from: at the
places of what is suppressed the model is told to stay as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import optax
from optax.experimental import aggregating

from idesign import training

PyTree = Any
Losses = Callable[[PyTree, Any], Float[Array, '*B']]


class GateState(NamedTuple):
  """What the last gated step did; arrays only.

  Attributes:
    count: steps so far.
    removed: of the weight there was, the share that gates took away (negative
      where they add more), before scaling to the old sum; finite.
    effective: effective sample size `(sum w)^2 / sum w^2`, as a share of that
      without gates.
    ignored: steps so far whose gates or attributions were NaN, infinite or
      negative and counted as 1.
  """

  count: Int[Array, '']
  removed: Float[Array, '']
  effective: Float[Array, '']
  ignored: Int[Array, '']


def _start(params) -> GateState:
  del params
  # Not one array: a step donates each.
  zero, one = jnp.zeros((), jnp.float32), jnp.ones((), jnp.float32)
  return GateState(
    jnp.zeros((), jnp.int32), zero, one, jnp.zeros((), jnp.int32)
  )


def gate_weights(
  attribution: Float[Array, '*B C'],
  gates: Float[Array, 'C'],
  *,
  threshold: Float[Array, 'C'] | float,
  softness: float = 0.25,
) -> Float[Array, '*B']:
  """Weights from attributions and gates, before any scaling; see the module.

  Args:
    attribution: what each example or token has to do with each concept.
    gates: from `judges.gates`.
    threshold: attribution at which half of a gate applies, in all or each.
    softness: width of the transition, in the units of the attribution.

  Raises:
    ValueError: for gates of another length, or a softness that is not positive.
  """
  return jnp.exp(_log_weights(attribution, gates, threshold, softness))


def _log_weights(attribution, gates, threshold, softness):
  """Logarithms, because a product of many gates overflows."""
  if not softness > 0:
    raise ValueError(f'softness={softness} must be positive.')
  if gates.ndim != 1 or attribution.shape[-1:] != gates.shape:
    raise ValueError(
      f'{gates.shape} gates for attributions {attribution.shape}: there must '
      'be one per concept, the last axis of the attributions.'
    )
  threshold = jnp.broadcast_to(jnp.asarray(threshold), gates.shape)
  row = lambda x: jnp.expand_dims(x, tuple(range(attribution.ndim - 1)))
  concerned = jax.nn.sigmoid((attribution - row(threshold)) / softness)
  return jnp.sum(jnp.log1p(row(gates - 1) * concerned), axis=-1)


def gate_losses(
  *, threshold: Float[Array, 'C'] | float = 1.0, softness: float = 0.25
) -> optax.GradientTransformationExtraArgs:
  """Replaces the gradient by that of the gated mean loss.

  Goes first in a chain: the updates that it is given are ignored, and under
  `jit` never computed.

    optimizer = optax.chain(shaping.gate_losses(), optax.adamw(1e-4))
    step = shaping.make_gated_step(token_losses, optimizer)
    state, metrics = step(state, batch, gates=gates)

  `update` takes, as extra arguments (`make_gated_step` gives the first two):

    pullback     weights, shaped like the losses -> gradient of `sum w L`
    mask         what is averaged without gates, not negative
    attribution  `[*losses, C]`
    gates        `[C]`

  Guarantees. With all gates 1 the gradient is that of the masked mean, bit for
  bit. A gate, or an attribution where the mask holds, that is NaN, infinite or
  (a gate) negative makes the whole step ungated and is counted in
  `GateState.ignored`: nothing is ever trained on a weight that was not meant.
  If gates leave no weight at all, or the mask is 0 everywhere, the gradient is
  zero. With an anchor (see `make_gated_step`) weights and the anchor's together
  have the sum of the mask.

  Args:
    threshold: see `gate_weights`.
    softness: see `gate_weights`.

  Raises (when traced):
    ValueError: for shapes that do not fit.
    TypeError: if an extra argument is missing.
  """

  def update(
    updates, state, params=None, *, pullback, mask, attribution, gates,
    anchored=False, **extra,
  ):  # fmt: skip
    del params, extra
    weights, freed, state = _weights(
      attribution, gates, mask, threshold, softness, state, anchored
    )
    gradient = pullback(weights, freed) if anchored else pullback(weights)
    # Under `optax.masked` parts of the updates are placeholders, and stay so.
    placeholder = lambda x: isinstance(x, optax.MaskedNode)
    keep = lambda u, g: u if placeholder(u) else g
    return jax.tree.map(keep, updates, gradient, is_leaf=placeholder), state

  return optax.GradientTransformationExtraArgs(_start, update)


def gate_aggregator(
  *, threshold: Float[Array, 'C'] | float = 1.0, softness: float = 0.25
) -> aggregating.Aggregator:
  """The gated mean of per-example gradients.

  For `optax.experimental.aggregating.process`; `update` takes gradients
  `[B, *shape]` and the extra arguments `attribution [B, C]` and `gates [C]`.
  Guarantees as `gate_losses`.
  """

  def update(per_example, state, params=None, *, attribution, gates, **extra):
    del params, extra
    sizes = {x.shape[0] for x in jax.tree.leaves(per_example)}
    if sizes != {attribution.shape[0]}:
      raise ValueError(
        f'attributions {attribution.shape} for gradients of {sorted(sizes)} '
        'examples.'
      )
    mask = jnp.ones(attribution.shape[0], attribution.dtype)
    w, _, state = _weights(
      attribution, gates, mask, threshold, softness, state, False
    )
    mean = lambda g: jnp.einsum('b,b...->...', w.astype(g.dtype), g)
    return jax.tree.map(mean, per_example), state

  return aggregating.Aggregator(_start, update)


def _weights(attribution, gates, mask, threshold, softness, state, anchored):
  """Weights, those of an anchor (0 without one), and the new state.

  Together they sum to 1, or to 0.
  """
  # A mask may be fractional, attributions may be counts.
  dtype = jnp.promote_types(
    jnp.promote_types(attribution.dtype, jnp.asarray(mask).dtype), jnp.float32
  )
  mask = jnp.asarray(mask, dtype)
  attribution, gates = attribution.astype(dtype), gates.astype(dtype)
  if attribution.shape[:-1] != mask.shape:
    raise ValueError(
      f'attributions {attribution.shape} for losses {mask.shape}: they need '
      'one more axis, the concepts.'
    )
  inside = mask > 0
  sound = (
    jnp.isfinite(gates).all()
    & (gates >= 0).all()
    & (jnp.isfinite(attribution) | ~jnp.expand_dims(inside, -1)).all()
  )
  gates = jnp.where(sound, gates, 1)
  attribution = jnp.where(sound & jnp.expand_dims(inside, -1), attribution, 0)
  log = _log_weights(attribution, gates, threshold, softness)
  # Only ratios of weights matter: the largest becomes 1, none overflows.
  peak = jnp.max(jnp.where(inside, log, -jnp.inf), initial=-jnp.inf)
  peak = jnp.where(jnp.isfinite(peak), peak, 0)
  if anchored:
    peak = jnp.maximum(peak, 0)  # What is freed is counted from 1 down.
  weight = mask * jnp.where(inside, jnp.exp(log - peak), 0)
  freed = jnp.maximum(mask * jnp.exp(-peak) - weight, 0) * anchored
  ratio = lambda a, b, otherwise: jnp.where(
    b > 0, a / jnp.where(b > 0, b, 1), otherwise
  )
  total, whole = jnp.sum(weight), jnp.sum(mask)
  normal = ratio(weight, total + jnp.sum(freed), 0)
  # The sum of squares of weights that sum to 1.
  concentration = lambda w, sum_: jnp.sum(ratio(w, sum_, 0) ** 2)
  left = jnp.minimum(
    ratio(total, whole, 1) * jnp.exp(peak), jnp.finfo(jnp.float32).max
  )
  state = GateState(
    optax.safe_increment(state.count),
    jnp.asarray(1 - left, jnp.float32),
    jnp.asarray(
      ratio(concentration(mask, whole), concentration(weight, total), 0),
      jnp.float32,
    ),
    state.ignored + jnp.where(sound, 0, 1).astype(jnp.int32),
  )
  return normal, ratio(freed, total + jnp.sum(freed), 0), state


def make_gated_step(
  losses: Losses,
  optimizer: optax.GradientTransformation,
  *,
  anchor: Losses | None = None,
) -> Callable[..., tuple[training.TrainState, dict[str, Array]]]:
  """Builds `step(state, batch, **extra) -> (state, metrics)`, jitted.

  Like `training.make_train_step`, for losses by example or by token, and an
  optimizer that may hold `gate_losses`. The state is donated.

  Args:
    losses: `losses(params, batch) -> [B]` or `[B, T]`. `batch['mask']`, of
      the same shape, says what is averaged; `batch['attribution']` is handed
      to the optimizer if there is one.
    optimizer: any Optax transformation; `extra` (such as `gates`) and the
      batch's attribution are passed on.
    anchor: losses of the same shape, not negative, that get the weight that
      gates take from the others; see the module. Nothing is learned from them
      where nothing is gated.

  Returns:
    The step. Metrics: `loss` (the masked mean, as if nothing were gated) and
    `update_norm`; and from a `GateState` in the optimizer's, `removed`,
    `effective` and `ignored`.
  """
  optimizer = optax.with_extra_args_support(optimizer)

  def step(state: training.TrainState, batch, **extra):
    both = lambda p: (losses(p, batch), anchor(p, batch) if anchor else 0.0)
    (values, kept), pull = jax.vjp(both, state.params)
    mask = jnp.asarray(batch['mask'])
    mask = mask.astype(jnp.promote_types(mask.dtype, values.dtype))
    if mask.shape != values.shape:
      raise ValueError(
        f'batch["mask"] is {mask.shape}; the losses are {values.shape}.'
      )
    whole = jnp.sum(mask)
    mean = jnp.where(whole > 0, mask / jnp.where(whole > 0, whole, 1), 0)
    if anchor and kept.shape != values.shape:
      raise ValueError(
        f"the anchor's losses are {kept.shape}; the losses are {values.shape}."
      )

    def pullback(weights, freed=0.0):
      like = lambda w, x: jnp.broadcast_to(w, jnp.shape(x)).astype(x.dtype)
      kept_ = jnp.asarray(kept)
      return pull((like(weights, values), like(jnp.asarray(freed), kept_)))[0]

    if 'attribution' in batch:
      extra = {'attribution': batch['attribution']} | extra
    if anchor:
      extra = {'anchored': True} | extra
    updates, opt_state = optimizer.update(
      pullback(mean),
      state.opt_state,
      state.params,
      pullback=pullback,
      mask=mask,
      **extra,
    )
    metrics = {
      'loss': jnp.sum(mean * values),
      'update_norm': optax.tree.norm(updates),
    }
    metrics |= gate_metrics(opt_state)
    params = optax.apply_updates(state.params, updates)
    new = training.TrainState(state.step + 1, params, opt_state, state.key)
    return new, metrics

  return jax.jit(step, donate_argnums=0)


def gate_metrics(opt_state: optax.OptState) -> dict[str, Array]:
  """`removed`, `effective` and `ignored` of the gate in an optimizer's state.

  Empty if there is none.
  """
  gate = lambda x: isinstance(x, GateState)
  found = [x for x in jax.tree.leaves(opt_state, is_leaf=gate) if gate(x)]
  if not found:
    return {}
  return {k: getattr(found[0], k) for k in ('removed', 'effective', 'ignored')}
