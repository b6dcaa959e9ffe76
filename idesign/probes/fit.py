"""Fitting probes, their calibration, and what chance would give."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
import numpy as np
import optax
import sklearn.linear_model
import sklearn.metrics

from idesign.probes.architectures import (
  ProbeConfig,
  ProbeParams,
  apply_probe,
  init_probe,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitConfig:
  """How a probe is fitted.

  Attributes:
    l2: the mean loss is minimised plus `l2 / 2` times the squared norm of the
      weights (`logistic`), or these decay at this rate (`mlp`, `attention` and
      `pool='max'`).
    steps: of Adam, for kinds that need it; the learning rate falls to zero.
    batch_size: examples in each of these steps.
    learning_rate: the first.
  """

  l2: float = 1e-2
  steps: int = 600
  batch_size: int = 1024
  learning_rate: float = 5e-3

  def __post_init__(self):
    if self.l2 <= 0 or self.learning_rate <= 0:
      raise ValueError(
        f'l2={self.l2} and learning_rate={self.learning_rate} must be positive.'
      )
    if self.steps < 1 or self.batch_size < 1:
      raise ValueError(
        f'steps={self.steps} and batch_size={self.batch_size} must be at '
        'least 1.'
      )


def split_entities(
  entities: Sequence, shares: Sequence[float], seed: int
) -> list[np.ndarray]:
  """Masks of examples such that no entity is in two parts.

  Examples of one person resemble each other: a probe that has seen some of them
  may know the person, and not what it is asked.

  Args:
    entities: which entity each example is of, `[N]`.
    shares: of the entities, for each part, together 1.
    seed: of the shuffling.

  Raises:
    ValueError: for shares that do not add up to 1, or leave a part empty.
  """
  if abs(sum(shares) - 1) > 1e-6 or min(shares) <= 0:
    raise ValueError(f'shares={shares} must be positive and add up to 1.')
  entities = np.asarray(entities)
  names = np.random.default_rng(seed).permutation(np.unique(entities))
  edges = np.round(np.cumsum([0, *shares]) * len(names)).astype(int)
  if (np.diff(edges) < 1).any():
    raise ValueError(
      f'{len(names)} entities cannot be split by shares={shares}: a part is '
      'empty.'
    )
  return [np.isin(entities, names[a:b]) for a, b in zip(edges, edges[1:])]


def fit_probe(
  config: ProbeConfig,
  h_NTE: Float[Array, 'N T E'],
  mask_NT: Bool[Array, 'N T'],
  labels_N: np.ndarray,
  *,
  fit: FitConfig = FitConfig(),
  key: jax.Array,
) -> ProbeParams:
  """Fits a probe to labelled spans.

  Inputs are standardised by mean and standard deviation over the tokens of all
  spans. The loss is the mean cross-entropy. A logistic probe is fitted to the
  optimum (scikit-learn), a mean difference in closed form, and its scale and
  bias as a logistic regression on the projection.

  Args:
    config: of the probe.
    h_NTE: activations of each span.
    mask_NT: the tokens of each span, at least one.
    labels_N: true or false; with several classes, the class from 0.
    fit: how.
    key: of the initialisation and of the order of examples.

  Raises:
    ValueError: if some class has no example, shapes do not fit, a span is
      empty, or an activation in a span is not finite.
  """
  h_NTE, mask_NT = np.asarray(h_NTE, np.float32), np.asarray(mask_NT, bool)
  labels_N = _check(config, h_NTE, mask_NT, np.asarray(labels_N))
  tokens = h_NTE[mask_NT]
  mean, scale = tokens.mean(axis=0), tokens.std(axis=0)
  params = init_probe(config, key)
  params['mean'] = jnp.asarray(mean)
  # A feature that never changed says nothing, whatever it does later.
  params['scale'] = jnp.asarray(np.where(scale > 0, scale, np.inf))
  if config.kind == 'mean_difference' or (
    config.kind == 'logistic' and config.pool != 'max'
  ):
    return _fit_linear(config, params, h_NTE, mask_NT, labels_N, fit)
  return _fit_adam(
    config, params, jnp.asarray(h_NTE), jnp.asarray(mask_NT),
    jnp.asarray(labels_N), fit, key,
  )  # fmt: skip


def calibrate(
  params: ProbeParams,
  logits_N: Float[np.ndarray, 'N'],
  labels_N: Bool[np.ndarray, 'N'],
) -> ProbeParams:
  """Platt scaling: `logit -> a logit + b`, fitted on examples of their own.

  The map goes into the output's weight and bias. The order of scores stays as
  it was.

  Args:
    params: of a probe with one logit.
    logits_N: the probe's, on examples that it was not fitted on.
    labels_N: what is true.

  Raises:
    ValueError: for one class only, or if higher logits go with fewer
      positives: then it is no probe of this label.
  """
  labels_N = _both_classes(np.asarray(labels_N))
  model = _logistic(np.asarray(logits_N, np.float64)[:, None], labels_N, 1e-9)
  a, b = float(model.coef_[0, 0]), float(model.intercept_[0])
  if a <= 0:
    raise ValueError(
      f'a slope of {a:.3g}: on these examples a higher logit means fewer '
      'positives; the probe cannot be calibrated.'
    )
  scaled = {'weight': a * params['weight'], 'bias': a * params['bias'] + b}
  return {**params, **scaled}


def probe_logits(
  config: ProbeConfig, params: ProbeParams, h_NTE, mask_NT
) -> Float[Array, 'N C']:
  """Logits of many spans."""
  return _logits(config, params, jnp.asarray(h_NTE), jnp.asarray(mask_NT))


def shuffled_null(
  config: ProbeConfig,
  train: tuple[Array, Array, np.ndarray],
  test: tuple[Array, Array, np.ndarray],
  *,
  fit: FitConfig = FitConfig(),
  repeats: int = 20,
  seed: int = 0,
) -> np.ndarray:
  """Areas under the curve of probes fitted on shuffled labels, `[repeats]`.

  What is above them is not what the architecture finds in any labels.

  Args:
    config: of a probe with one logit.
    train: activations, masks and labels to fit on; the labels are shuffled.
    test: the same of other entities, whose labels stay.
    fit: how.
    repeats: how often.
    seed: of the shuffling.
  """
  random = np.random.default_rng(seed)
  areas = []
  for i in range(repeats):
    labels = random.permutation(train[2])
    key = jax.random.fold_in(jax.random.key(seed), i)
    params = fit_probe(config, *train[:2], labels, fit=fit, key=key)
    logits = probe_logits(config, params, *test[:2])[:, 0]
    areas.append(sklearn.metrics.roc_auc_score(test[2], np.asarray(logits)))
  return np.array(areas)


@functools.partial(jax.jit, static_argnames='config')
def _logits(config, params, h_NTE, mask_NT):
  return jax.vmap(lambda h, m: apply_probe(config, params, h, m))(
    h_NTE, mask_NT
  )


def _logistic(x, labels, l2) -> sklearn.linear_model.LogisticRegression:
  model = sklearn.linear_model.LogisticRegression(
    C=1 / (l2 * len(labels)), tol=1e-8, max_iter=10_000
  )
  return model.fit(x, labels)


def _fit_linear(config, params, h_NTE, mask_NT, labels_N, fit) -> ProbeParams:
  mean_E, scale_E = (np.asarray(params[k]) for k in ('mean', 'scale'))
  z_NTE = np.where(mask_NT[..., None], (h_NTE - mean_E) / scale_E, 0)
  if config.pool == 'last':
    last_N = mask_NT.shape[1] - 1 - mask_NT[:, ::-1].argmax(axis=1)
    z_NE = z_NTE[np.arange(len(z_NTE)), last_N]
  else:
    z_NE = z_NTE.sum(axis=1) / mask_NT.sum(axis=1, keepdims=True)
  if config.kind == 'mean_difference':
    difference_E = z_NE[labels_N == 1].mean(0) - z_NE[labels_N == 0].mean(0)
    model = _logistic((z_NE @ difference_E)[:, None], labels_N, fit.l2)
    weight = np.outer(difference_E, model.coef_[0])
    bias = model.intercept_
  else:
    model = _logistic(z_NE, labels_N, fit.l2)
    weight, bias = model.coef_.T, model.intercept_
    if config.classes == 2:
      # Two classes have one row there, and two logits here.
      weight = np.concatenate([np.zeros_like(weight), weight], axis=1)
      bias = np.array([0, bias[0]])
  asarray = lambda x: jnp.asarray(x, jnp.float32)
  return {**params, 'weight': asarray(weight), 'bias': asarray(bias)}


@functools.partial(jax.jit, static_argnames=('config', 'fit'))
def _fit_adam(config, params, h_NTE, mask_NT, labels_N, fit, key):
  fixed = {k: params[k] for k in ('mean', 'scale')}
  learned = {k: v for k, v in params.items() if k not in fixed}
  optimizer = optax.adamw(
    optax.cosine_decay_schedule(fit.learning_rate, fit.steps),
    weight_decay=fit.l2,
    mask={k: 'bias' not in k for k in learned},
  )

  def loss(learned, rows):
    logits_BC = jax.vmap(
      lambda h, m: apply_probe(config, {**fixed, **learned}, h, m)
    )(h_NTE[rows], mask_NT[rows])
    labels_B = labels_N[rows]
    if config.classes == 1:
      values = optax.sigmoid_binary_cross_entropy(
        logits_BC[:, 0], labels_B.astype(jnp.float32)
      )
    else:
      values = optax.softmax_cross_entropy_with_integer_labels(
        logits_BC, labels_B
      )
    return jnp.mean(values)

  def step(carry, key):
    learned, state = carry
    rows = jax.random.randint(key, (fit.batch_size,), 0, len(labels_N))
    gradient = jax.grad(loss)(learned, rows)
    updates, state = optimizer.update(gradient, state, learned)
    return (optax.apply_updates(learned, updates), state), None

  keys = jax.random.split(jax.random.fold_in(key, 1), fit.steps)
  carry = (learned, optimizer.init(learned))
  return {**fixed, **jax.lax.scan(step, carry, keys)[0][0]}


def _check(config, h_NTE, mask_NT, labels_N) -> np.ndarray:
  if h_NTE.ndim != 3 or h_NTE.shape[2] != config.d_in:
    raise ValueError(
      f'activations are {h_NTE.shape}; this probe reads [examples, tokens, '
      f'{config.d_in}].'
    )
  if mask_NT.shape != h_NTE.shape[:2] or labels_N.shape != h_NTE.shape[:1]:
    raise ValueError(
      f'activations {h_NTE.shape}, mask {mask_NT.shape} and labels '
      f'{labels_N.shape} do not belong together.'
    )
  if not mask_NT.any(axis=1).all():
    raise ValueError(
      f'example {int((~mask_NT.any(axis=1)).argmax())} has an empty span.'
    )
  if not np.isfinite(h_NTE[mask_NT]).all():
    wrong = ~np.isfinite(np.where(mask_NT[..., None], h_NTE, 0)).all((1, 2))
    raise ValueError(
      f'an activation of example {int(wrong.argmax())} is not finite.'
    )
  if config.classes == 1:
    return _both_classes(labels_N)
  there = np.unique(labels_N)
  if not np.array_equal(there, np.arange(config.classes)):
    raise ValueError(
      f'labels are {there.tolist()}; classes={config.classes} needs examples '
      f'of each class from 0 to {config.classes - 1}.'
    )
  return labels_N.astype(np.int32)


def _both_classes(labels_N: np.ndarray) -> np.ndarray:
  there = np.unique(labels_N)
  if not np.array_equal(there.astype(int), [0, 1]) or len(there) != 2:
    raise ValueError(
      f'labels are {there.tolist()}: examples of both classes, true and false, '
      'are needed.'
    )
  return labels_N.astype(np.int32)
