"""The step of reinforcement learning: sample, read, reward, improve.

One jitted function. The frozen model is run once on what was sampled and gives
both what the policy is held near to and what the probe reads. All randomness is
`fold_in(state.key, state.step)`, so a run that stopped goes on to the same
bits (`training.fit` with a checkpointer).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key
import optax

from idesign import models, training
from idesign.probes import FrozenProbe, Observe, Pressure, token_logprobs
from idesign.rewards import divergence
from idesign.rewards.advantages import Baseline, Scale, advantages
from idesign.rewards.objectives import Average, Objective, mean_loss
from idesign.rewards.rollout import Samples, sample_groups
from idesign.rewards.terms import (
  RateConstraint, Scene, Term, evaluate, last_sampled, pressure,
)  # fmt: skip

Lift = Callable[[Any, Any], Any]
Divergence = Literal['exact', 'k1', 'k3']


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig:
  """How a policy is sampled and improved.

  Published methods, each with its objective (`rewards.objectives`):

  | method | baseline | scale | average | objective |
  |---|---|---|---|---|
  | RLOO | leave_one_out | none | constant | reinforce |
  | GRPO | mean | group | sequence | clipped |
  | Dr. GRPO | mean | none | constant | clipped |
  | CISPO | mean | group | token | cispo |
  | RLFR | mean | batch | constant | reinforce, cap 4 |

  Attributes:
    group: completions of each prompt.
    max_new_tokens: of each.
    temperature: of sampling.
    stop_tokens: that end a completion.
    pad_token: what follows them.
    baseline: see `advantages`.
    scale: see `advantages`.
    average: see `mean_loss`; of the divergence, too.
    divergence: of what is sampled from, from the reference: `k1` as a part of
      the reward, `k3` or `exact` as a part of the loss.
    divergence_weight: what it is multiplied by.
    minibatches: optimizer steps for each batch of samples. In the later ones
      the samples are that many steps old.
    reset_reference_every: steps after which the reference becomes the policy;
      None: it stays the frozen model.
  """

  group: int
  max_new_tokens: int
  temperature: float = 1.0
  stop_tokens: tuple[int, ...] = ()
  pad_token: int = 0
  baseline: Baseline = 'leave_one_out'
  scale: Scale = 'batch'
  average: Average = 'constant'
  divergence: Divergence = 'exact'
  divergence_weight: float = 0.1
  minibatches: int = 1
  reset_reference_every: int | None = None

  def __post_init__(self):
    if self.group < 2:
      raise ValueError(f'group={self.group} must be at least 2.')
    if self.temperature <= 0:
      raise ValueError(
        f'temperature={self.temperature}: what is always the same teaches '
        'nothing; it must be positive.'
      )
    if self.divergence not in get_args(Divergence):
      raise ValueError(
        f'divergence={self.divergence!r}; choose from {get_args(Divergence)}.'
      )
    if self.divergence_weight < 0 or self.minibatches < 1:
      raise ValueError(
        f'divergence_weight={self.divergence_weight} must be at least 0 and '
        f'minibatches={self.minibatches} at least 1.'
      )
    every = self.reset_reference_every
    if every is not None and every < 1:
      raise ValueError(f'reset_reference_every={every} must be at least 1.')


# Of a batch, what is not known of each prompt.
_OF_BATCH = ('prompts', 'mask', 'retain', 'retain_mask')


class PolicyState(NamedTuple):
  """Everything a run needs to go on, apart from prompts and frozen probe.

  Attributes:
    step: number of batches of samples that were learned from, int32.
    params: what is trained: the model's parameters, or adapters.
    opt_state: the optimizer's.
    key: root of all randomness; it never changes.
    multipliers: of each constraint.
    reference: what the policy is held near to, like `params`; empty where this
      is the frozen model.
  """

  step: Int[Array, '']
  params: Any
  opt_state: optax.OptState
  key: Key[Array, '']
  multipliers: dict[str, Float[Array, '']]
  reference: Any


def init_policy(
  params: Any,
  optimizer: optax.GradientTransformation,
  key: Key[Array, ''],
  config: PolicyConfig,
  constraints: Sequence[RateConstraint] = (),
) -> PolicyState:
  """The state before the first step; `params` are copied."""
  copy = lambda tree: jax.tree.map(jnp.copy, tree)
  return PolicyState(
    jnp.zeros((), jnp.int32),
    copy(params),
    optimizer.init(params),
    jnp.copy(key),
    {c.name: jnp.zeros(()) for c in constraints},
    copy(params) if config.reset_reference_every else (),
  )


def make_policy_step(
  apply: Callable[..., Any],
  model_config: models.TransformerConfig,
  observe: Observe,
  optimizer: optax.GradientTransformation,
  terms: Sequence[Term],
  objective: Objective,
  config: PolicyConfig,
  *,
  constraints: Sequence[RateConstraint] = (),
  lift: Lift | None = None,
  retain: Callable[[Any, Any, Mapping[str, Array]], Array] | None = None,
) -> Callable[..., tuple[PolicyState, dict[str, Float[Array, '']]]]:
  """Builds `step(state, batch, probe=) -> (state, metrics)`, jitted.

  The state is donated. `batch` holds `prompts [P, T]`, `mask [P, T]` and what
  rewards want to know of each prompt, arrays `[P, ...]`. What is learned from
  is the reward of a whole text, the sum over its tokens: all of them have the
  same advantage.

  Args:
    apply: the model, `apply(params, tokens, mask_BT=, cache=)`.
    model_config: of the model.
    observe: as the probe's, for the policy's own view.
    optimizer: of what is trained.
    terms: parts of the reward, added up.
    objective: of the policy, see `rewards.objectives`.
    config: the rest.
    constraints: on rates.
    lift: `lift(trained, frozen) -> params`, where what is trained is not all of
      the model: `merge_lora`, say.
    retain: `retain(params, frozen, batch) -> scalar`, added to the loss: what
      keeps the model as it was elsewhere.

  Returns:
    The step. Metrics, float32 scalars: `reward`, `reward/NAME` of each term,
    `sample/NAME` (the first sample whose value is not finite, or -1),
    `informative` (share of groups whose rewards differ), `divergence`,
    `length`, `ratio` (the largest importance ratio), `loss`, `grad_norm`,
    `pressure` (the worst `Pressure` of a term: what the run does to the probe),
    and `multiplier/NAME` (after the step) and `rate/NAME` (of its samples) of
    each constraint. `reward` is what is learned from, with weights, constraints
    and, as `k1`, the divergence; `reward/NAME` is weighted.

  Raises:
    ValueError: at the first step: `prompts` or `mask` is missing, the state was
      made with other constraints, the probe reads other activations than
      `observe` and some term reads the policy's.
  """
  lift = lift or (lambda trained, frozen: trained)
  needs_student = any(t.pressure >= Pressure.LIVE for t in terms)
  differentiated = [t for t in terms if t.pressure is Pressure.GRADIENT]

  def sample(state, batch, probe, key):
    params = lift(state.params, probe.params)
    samples = sample_groups(
      apply, params, batch['prompts'], batch['mask'], config=model_config,
      group=config.group, max_new_tokens=config.max_new_tokens, key=key,
      temperature=config.temperature, stop_tokens=config.stop_tokens,
      pad_token=config.pad_token,
    )  # fmt: skip
    info = {
      k: jnp.repeat(x, config.group, axis=0)
      for k, x in batch.items()
      if k not in _OF_BATCH
    }
    view = lambda params: observe(params, samples.tokens_BT, samples.mask_BT)
    teacher = probe.read(samples.tokens_BT, samples.mask_BT)
    student = view(params) if needs_student else None
    reference_BTV = teacher.logits_BTV
    if config.reset_reference_every:
      reference_BTV = view(lift(state.reference, probe.params)).logits_BTV
    # What is compared are the distributions that are sampled from.
    reference_BTV = reference_BTV / config.temperature
    return samples, info, teacher, student, reference_BTV

  def loss(trained, probe, rows, batch, key):
    samples, info, teacher, reference_BTV, advantage_B = rows
    params = lift(trained, probe.params)
    now = observe(params, samples.tokens_BT, samples.mask_BT)
    scaled_BTV = now.logits_BTV / config.temperature
    logprobs_BT = token_logprobs(scaled_BTV, samples.tokens_BT)
    average = lambda x_BT: mean_loss(
      x_BT, samples.sampled_BT, average=config.average
    )
    advantage_BT = jnp.broadcast_to(advantage_B[:, None], logprobs_BT.shape)
    total = average(objective(logprobs_BT, samples.logprobs_BT, advantage_BT))
    apart_BT = _apart(config, samples, scaled_BTV, reference_BTV, logprobs_BT)
    if config.divergence != 'k1':
      total += config.divergence_weight * average(apart_BT)
    scene = Scene(samples, info, probe, teacher, now, key)
    if differentiated:
      # What the same reward is divided by on its way through the advantages,
      # but for their scale.
      value_B = sum(evaluate(differentiated, scene).values()).sum(axis=1)
      total -= average(
        jnp.where(last_sampled(samples), value_B[:, None], 0)
      )
    if retain is not None:
      total += retain(params, probe.params, batch)
    ratio = jnp.max(
      jnp.where(samples.sampled_BT, logprobs_BT - samples.logprobs_BT, 0)
    )
    return total, {'divergence': average(apart_BT), 'ratio': jnp.exp(ratio)}

  def check(state, batch, probe):
    missing = sorted({'prompts', 'mask'} - set(batch))
    if missing:
      raise ValueError(f'the batch has no {missing}; it has {sorted(batch)}.')
    mine = sorted(c.name for c in constraints)
    theirs = sorted(state.multipliers)
    if mine != theirs:
      raise ValueError(
        f'constraints of the step: {mine}, of the state: {theirs}. Give the '
        'same ones to `init_policy` and to `make_policy_step`.'
      )
    if needs_student and probe.observe is not observe:
      raise ValueError(
        'a reward reads the policy, and `observe` is not what the probe reads '
        'with: pass `probe.observe`.'
      )

  def step(state: PolicyState, batch, probe: FrozenProbe):
    check(state, batch, probe)
    key = jax.random.fold_in(state.key, state.step)
    sample_key, reward_key = jax.random.split(key)
    samples, info, teacher, student, reference_BTV = sample(
      state, batch, probe, sample_key
    )
    scene = Scene(samples, info, probe, teacher, student, reward_key)
    values = evaluate(terms, scene)
    metrics = {}
    for name, value_BT in values.items():
      value_B = value_BT.sum(axis=1)
      metrics[f'reward/{name}'] = value_B.mean()
      wrong_B = ~jnp.isfinite(value_B)
      metrics[f'sample/{name}'] = jnp.where(
        wrong_B.any(), wrong_B.argmax(), -1
      ).astype(jnp.float32)
    reward_B = sum(values.values()).sum(axis=1)
    multipliers = {}
    for c in constraints:
      new, added_B, rate = c.update(state.multipliers[c.name], scene)
      multipliers[c.name] = new
      reward_B += added_B
      metrics |= {f'multiplier/{c.name}': new, f'rate/{c.name}': rate}
    if config.divergence == 'k1':
      apart_BT = _apart(
        config, samples, None, reference_BTV, samples.logprobs_BT
      )
      reward_B -= config.divergence_weight * apart_BT.sum(axis=1)
    group = advantages(
      reward_B.reshape(-1, config.group), baseline=config.baseline,
      scale=config.scale,
    )  # fmt: skip
    rows = (
      samples, info, teacher, reference_BTV, group.values_PG.reshape(-1)
    )  # fmt: skip

    def improve(carry, rows):
      trained, opt_state = carry
      (value, aux), gradient = jax.value_and_grad(loss, has_aux=True)(
        trained, probe, rows, batch, reward_key
      )
      updates, opt_state = optimizer.update(gradient, opt_state, trained)
      trained = optax.apply_updates(trained, updates)
      norm = optax.tree.norm(gradient)
      return (trained, opt_state), {**aux, 'loss': value, 'grad_norm': norm}

    carry = (state.params, state.opt_state)
    parts = training.split_batch(rows, config.minibatches)
    (trained, opt_state), learned = jax.lax.scan(improve, carry, parts)
    metrics |= {k: v.mean() for k, v in learned.items() if k != 'ratio'}
    metrics |= {
      'ratio': learned['ratio'].max(),
      'reward': reward_B.mean(),
      'informative': group.informative_P.mean(),
      'length': samples.sampled_BT.sum(axis=1).mean(),
      'pressure': float(pressure(terms)),
    }
    reference = state.reference
    if config.reset_reference_every:
      now = (state.step + 1) % config.reset_reference_every == 0
      reference = jax.tree.map(
        lambda old, new: jnp.where(now, new, old), reference, trained
      )
    new = PolicyState(
      state.step + 1, trained, opt_state, state.key, multipliers, reference
    )
    return new, {k: jnp.asarray(v, jnp.float32) for k, v in metrics.items()}

  return jax.jit(step, donate_argnums=0)


def _apart(config, samples: Samples, logits_BTV, reference_BTV, logprobs_BT):
  """Divergence from the reference at each token, 0 for the first."""
  if config.divergence == 'exact':
    apart_BT = divergence.exact(logits_BTV[:, :-1], reference_BTV[:, :-1])
    return jnp.pad(apart_BT, ((0, 0), (1, 0)))
  reference_BT = token_logprobs(reference_BTV, samples.tokens_BT)
  if config.divergence == 'k1':
    apart_BT = divergence.k1(logprobs_BT, reference_BT)
  else:
    apart_BT = divergence.k3(logprobs_BT, reference_BT, samples.logprobs_BT)
  return jnp.where(samples.sampled_BT, apart_BT, 0)


def retain_prompts(
  observe: Observe,
) -> Callable[[Any, Any, Mapping[str, Array]], Float[Array, '']]:
  """`KL(frozen || policy)` on `batch['retain']`, the mean over its tokens.

  `batch['retain']` `[R, T]` are texts of what is to stay as it was,
  `batch['retain_mask']` their real tokens.
  """

  def retain(params, frozen, batch):
    tokens, mask = batch['retain'], batch['retain_mask']
    view = lambda p: observe(p, tokens, mask).logits_BTV
    apart_BT = divergence.exact(
      jax.lax.stop_gradient(view(jax.lax.stop_gradient(frozen))), view(params)
    )
    return jnp.sum(jnp.where(mask, apart_BT, 0)) / jnp.maximum(mask.sum(), 1)

  return retain
