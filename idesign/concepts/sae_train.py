"""Training sparse autoencoders on a stream of activations."""

from __future__ import annotations

from collections.abc import Callable
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import optax

from idesign.concepts.sae import SAE, SAEConfig, kth_largest, make_sae

# Width of the window through which a jump's threshold feels features near it,
# in units of the activations' root mean square (Rajamanoharan et al. 2024).
_BANDWIDTH = 0.1
_THRESHOLD_DECAY = 0.99  # Of the moving average of batchtopk's threshold.


class SAEState(NamedTuple):
  """Everything training needs to go on.

  Attributes:
    params: what is optimised, in units in which activations have mean square
      norm `D`. Of `jumprelu` the logarithm of the threshold, as
      `log_threshold`.
    opt_state: the optimizer's.
    scale: activations are multiplied by it before anything else.
    idle_F: tokens seen since each feature was last active, counted up to
      `dead_after`.
    threshold: moving average of the least active feature (`batchtopk`).
  """

  params: dict[str, Array]
  opt_state: optax.OptState
  scale: Float[Array, '']
  idle_F: Int[Array, 'F']
  threshold: Float[Array, '']


def init_sae(
  config: SAEConfig,
  optimizer: optax.GradientTransformation,
  key: jax.Array,
  sample_ND: Float[Array, 'N D'],
) -> SAEState:
  """A new state: random unit decoder rows, the encoder their transpose.

  Args:
    config: the autoencoder.
    optimizer: any Optax transformation.
    key: random key.
    sample_ND: some thousand activations; their mean is where `b_dec` starts and
      their mean square norm sets the unit.

  Raises:
    ValueError: if the sample has another width, no spread, or is not finite.
  """
  if sample_ND.ndim != 2 or sample_ND.shape[1] != config.d_in:
    raise ValueError(
      f'the sample is {sample_ND.shape}; it must be [tokens, {config.d_in}].'
    )
  sample_ND = sample_ND.astype(jnp.float32)
  scale = jax.lax.rsqrt(jnp.mean(jnp.square(sample_ND)))
  if not bool(jnp.isfinite(scale)) or not bool(jnp.ptp(sample_ND, 0).any()):
    raise ValueError(
      'the sample of activations is not finite, or all its rows are equal.'
    )
  rows_FD = jax.random.normal(key, (config.d_sae, config.d_in))
  rows_FD = rows_FD / jnp.linalg.norm(rows_FD, axis=1, keepdims=True)
  start = {
    'W_enc': rows_FD.T,
    'W_dec': rows_FD,
    'b_dec': jnp.mean(sample_ND * scale, axis=0),
    'log_threshold': jnp.full(
      (config.d_sae,), math.log(_BANDWIDTH), jnp.float32
    ),
  }
  # Not one array of zeros: the step donates each.
  params = {
    name: start[name] if name in start else jnp.zeros(config.d_sae)
    for name in _trained_names(config)
  }
  return SAEState(
    params,
    optimizer.init(params),
    scale,
    jnp.zeros((config.d_sae,), jnp.int32),
    jnp.zeros(()),
  )


def finished(config: SAEConfig, state: SAEState) -> SAE:
  """The autoencoder in the units of the activations, decoder rows of norm 1."""
  params = dict(state.params)
  if 'log_threshold' in params:
    params['threshold'] = jnp.exp(params.pop('log_threshold'))
  if config.architecture == 'batchtopk':
    params['threshold'] = jnp.full((config.d_sae,), state.threshold)
  # f(s h) = s f'(h) if whatever is added or compared is divided by s.
  for name in ('b_enc', 'b_gate', 'b_mag', 'b_dec', 'threshold'):
    if name in params:
      params[name] = params[name] / state.scale
  return make_sae(config, params)


def make_sae_step(
  config: SAEConfig,
  optimizer: optax.GradientTransformation,
  *,
  sparsity: float = 1.0,
  dead_after: int = 100_000,
  aux_weight: float = 1 / 32,
) -> Callable[..., tuple[SAEState, dict[str, Array]]]:
  r"""Builds `step(state, h_ND) -> (state, metrics)`, jitted; donates the state.

  The loss is the fraction of variance unexplained, `sum |x - x'|^2 / sum |x -
  mean x|^2` over the batch (its mean over `prefixes`, for Matryoshka), plus

    relu       sparsity * mean_n sum_f f_nf / sqrt(D)
    gated      the same of the gate's relu, and the unexplained variance of the
               gate's own reconstruction through a constant decoder
    jumprelu   sparsity * (mean_n L0_n / k - 1)^2, with gradients to the
               threshold through a window of width 0.1 (Rajamanoharan et al.
               2024; a target for L0 instead of a price)
    all        aux_weight * the unexplained part of the residual when only dead
               features (idle for `dead_after` tokens), at most D / 2 per token,
               reconstruct it, times min(dead / (D / 2), 1) (Gao et al. 2024)

  Decoder rows keep norm 1: the gradient along them is removed and they are
  renormalised after the update.

  The metrics are `loss`, `fvu`, `l0` and `dead` (share), of the batch before
  the update.
  """
  if config.architecture in ('batchtopk', 'jumprelu') and config.k is None:
    raise ValueError(f'training {config.architecture} needs k.')

  def step(state: SAEState, h_ND):
    x_ND = h_ND.astype(jnp.float32) * state.scale
    dead_F = state.idle_F >= dead_after

    def objective(params):
      return _objective(config, params, x_ND, dead_F, sparsity, aux_weight)

    grads, (metrics, f_NF) = jax.grad(objective, has_aux=True)(state.params)
    rows_FD = state.params['W_dec']
    along_F1 = jnp.sum(grads['W_dec'] * rows_FD, 1, keepdims=True)
    grads['W_dec'] = grads['W_dec'] - along_F1 * rows_FD
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    norms_F1 = jnp.linalg.norm(params['W_dec'], axis=1, keepdims=True)
    params['W_dec'] = params['W_dec'] / norms_F1
    fired_F = jnp.any(f_NF > 0, axis=0)
    # `min(idle + n, dead_after)` in an order that cannot wrap.
    n = x_ND.shape[0]
    idle_F = jnp.minimum(state.idle_F, dead_after - n) + n
    idle_F = jnp.where(fired_F, 0, idle_F)
    least = jnp.min(jnp.where(f_NF > 0, f_NF, jnp.inf))
    least = jnp.where(jnp.isfinite(least), least, state.threshold)
    decay = jnp.where(state.threshold == 0, 0, _THRESHOLD_DECAY)
    threshold = decay * state.threshold + (1 - decay) * least
    metrics['dead'] = jnp.mean(dead_F)
    return SAEState(params, opt_state, state.scale, idle_F, threshold), metrics

  return jax.jit(step, donate_argnums=0)


def _trained_names(config: SAEConfig) -> list[str]:
  names = [n for n in config.shapes if n != 'threshold']
  return names + ['log_threshold'] * (config.architecture == 'jumprelu')


def _objective(config, params, x_ND, dead_F, sparsity, aux_weight):
  """The loss; its metrics and the features."""
  total = jnp.sum(jnp.square(x_ND - jnp.mean(x_ND, 0, keepdims=True)))
  unexplained = lambda e_ND: jnp.sum(jnp.square(e_ND)) / total
  sae = SAE(params, config)
  z_NF = sae.preactivations(x_ND)
  f_NF, penalty = _train_features(config, params, z_NF)
  out_ND = jnp.broadcast_to(params['b_dec'][None], x_ND.shape)
  fvus, start = [], 0
  for stop in config.prefixes or (config.d_sae,):
    part = slice(start, stop)
    out_ND = out_ND + f_NF[:, part] @ params['W_dec'][part]
    fvus.append(unexplained(x_ND - out_ND))
    start = stop
  loss = sum(fvus) / len(fvus) + sparsity * penalty
  if config.architecture == 'gated':
    constant = jax.lax.stop_gradient
    gate_ND = jax.nn.relu(z_NF) @ constant(params['W_dec'])
    gate_ND = gate_ND + constant(params['b_dec'])[None]
    loss = loss + unexplained(x_ND - gate_ND)
  most = max(1, min(config.d_in // 2, config.d_sae))
  residual_ND = jax.lax.stop_gradient(x_ND - out_ND)
  dead_NF = jnp.where(dead_F[None], z_NF, -jnp.inf)
  dead_NF = jnp.where(dead_NF >= kth_largest(dead_NF, most), dead_NF, 0)
  dead_NF = jnp.where(dead_F[None], jax.nn.relu(dead_NF), 0)
  share = jnp.minimum(jnp.sum(dead_F) / most, 1)
  left = jnp.sum(jnp.square(residual_ND - dead_NF @ params['W_dec']))
  left = left / jnp.maximum(jnp.sum(jnp.square(residual_ND)), 1e-12)
  loss = loss + aux_weight * jnp.where(share > 0, share * left, 0)
  l0 = jnp.mean(jnp.sum(f_NF > 0, axis=1))
  return loss, ({'loss': loss, 'fvu': fvus[-1], 'l0': l0}, f_NF)


def _train_features(config, params, z_NF):
  """Features as training sees them, and what they cost."""
  width = config.d_in**0.5
  kind = config.architecture
  if kind == 'batchtopk':
    flat = jax.nn.relu(z_NF).reshape(-1)
    kept = flat >= kth_largest(flat, config.k * z_NF.shape[0])
    return jnp.where(kept, flat, 0).reshape(z_NF.shape), 0.0
  if kind == 'jumprelu':
    threshold_1F = jnp.exp(params['log_threshold'])[None]
    f_NF = z_NF * jump(z_NF, threshold_1F)
    # The jump itself has no gradient in z: only its threshold is learned so.
    active_NF = jump(jax.lax.stop_gradient(z_NF), threshold_1F)
    l0 = jnp.mean(jnp.sum(active_NF, axis=1))
    return f_NF, jnp.square(l0 / config.k - 1)
  f_NF = SAE(params, config).activate(z_NF)
  cost_NF = jax.nn.relu(z_NF)
  if kind in ('relu', 'gated'):
    return f_NF, jnp.mean(jnp.sum(cost_NF, axis=1)) / width
  return f_NF, 0.0


@jax.custom_vjp
def jump(z: Array, threshold: Array) -> Array:
  """1 where z > threshold; the derivative in the threshold is a window's."""
  return (z > threshold).astype(z.dtype)


def _jump_forward(z, threshold):
  return jump(z, threshold), (z, threshold)


def _jump_backward(saved, g):
  z, threshold = saved
  window = (jnp.abs(z - threshold) < _BANDWIDTH / 2) / _BANDWIDTH
  to_threshold = jnp.sum(-g * window, axis=0, keepdims=True)
  return jnp.zeros_like(z), to_threshold.astype(threshold.dtype)


jump.defvjp(_jump_forward, _jump_backward)
