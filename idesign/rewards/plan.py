"""What a run will take, before it starts: memory as allotted, time roughly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from idesign import models
from idesign.probes import FrozenProbe
from idesign.rewards.policy import PolicyConfig, PolicyState

# Of what a plain product and a plain copy reach, so much do whole models.
EFFICIENCY = 0.5
_MIB = 2**20


class DoesNotFitError(ValueError):
  """A step needs more memory than its devices have."""


class Plan(NamedTuple):
  """What a step takes of each device, and a run of time.

  Attributes:
    state_mib: what stays between steps: policy, optimizer, frozen model, batch.
    temporary_mib: what a step needs besides.
    limit_mib: memory of a device; None where that is not known.
    sampling_flops: of a step, all devices together.
    learning_flops: likewise, the frozen model's pass included.
    sampling_seconds: of a step, estimated.
    learning_seconds: of a step, estimated.
    steps: of the run.
  """

  state_mib: float
  temporary_mib: float
  limit_mib: float | None
  sampling_flops: float
  learning_flops: float
  sampling_seconds: float
  learning_seconds: float
  steps: int

  def __str__(self) -> str:
    seconds = self.sampling_seconds + self.learning_seconds
    flops = self.sampling_flops + self.learning_flops
    known = '' if self.limit_mib is None else f' of {self.limit_mib:,.0f} MiB'
    return (
      f'memory of a device: {self.state_mib:,.0f} MiB stay, '
      f'{self.temporary_mib:,.0f} MiB come and go{known}\n'
      f'a step: {flops / 1e12:.3g} TFLOP, about {seconds:.2g} s, of which '
      f'sampling {self.sampling_seconds:.2g} s\n'
      f'{self.steps} steps: about {seconds * self.steps / 3600:.2g} h'
    )


def plan_run(
  step: Callable[..., Any],
  state: PolicyState,
  batch: Mapping[str, Any],
  probe: FrozenProbe,
  *,
  model: models.TransformerConfig,
  policy: PolicyConfig,
  steps: int,
  limit_mib: float | None = None,
) -> Plan:
  """Compiles a step without running it, and says what it takes.

  Memory is XLA's own account of the compiled step. Time is FLOPs (`2` for each
  weight and token, and attention's, forward; twice that backward) over half of
  the speed that a plain product has here just now, and for each token sampled
  at least the time to read the parameters once; what `retain` costs is left
  out. Of a small model on two cores steps took twice as long as that, and the
  sampling among it 1.4 to 3.5 times.

  Args:
    step: from `make_policy_step`.
    state: its state, or `ShapeDtypeStruct`s with shardings.
    batch: likewise.
    probe: likewise.
    model: config of the model.
    policy: config of the policy.
    steps: of the run.
    limit_mib: memory of a device; None: what the device says of itself.

  Raises:
    DoesNotFitError: naming what is needed, what there is, and what to change.
  """
  compiled = step.lower(state, batch, probe=probe).compile()
  memory = compiled.memory_analysis()
  kept = memory.argument_size_in_bytes + (
    memory.output_size_in_bytes - memory.alias_size_in_bytes
  )
  leaves = jax.tree.leaves(probe.params)
  devices = len(leaves[0].sharding.device_set)
  if limit_mib is None:
    limit_mib = _device_memory()
  prompts, before = batch['prompts'].shape
  rows, length = prompts * policy.group, before + policy.max_new_tokens
  forward = rows * length * forward_flops(model, length)
  product, copy = _speeds(model.dtypes.compute)
  product, copy = EFFICIENCY * product * devices, EFFICIENCY * copy
  again = 1 if model.remat else 0
  plan = Plan(
    state_mib=kept / _MIB,
    temporary_mib=memory.temp_size_in_bytes / _MIB,
    limit_mib=limit_mib,
    sampling_flops=forward,
    learning_flops=(4 + again) * forward,
    sampling_seconds=max(
      forward / product, policy.max_new_tokens * local_bytes(leaves) / copy
    ),
    learning_seconds=(4 + again) * forward / product,
    steps=steps,
  )
  needed = plan.state_mib + plan.temporary_mib
  if limit_mib is not None and needed > limit_mib:
    raise DoesNotFitError(
      f'a step needs {needed:,.0f} MiB of each device and there are '
      f'{limit_mib:,.0f}: {plan.state_mib:,.0f} stay (use more devices, LoRA, '
      f'or smaller dtypes) and {plan.temporary_mib:,.0f} come and go (fewer '
      f'prompts than {prompts}, a group smaller than {policy.group}, fewer new '
      f'tokens than {policy.max_new_tokens}, or remat).'
    )
  return plan


def forward_flops(config: models.TransformerConfig, length: int) -> float:
  """Of one token's forward pass in a text of `length` tokens.

  Two for each weight of the products, the head's included, and for scores and
  their mixing `4 length d_q` of each layer; masked scores are computed, too.
  """
  d_q = config.n_heads * config.head_dim
  d_kv = config.n_kv_heads * config.head_dim
  attention = config.d_model * (2 * d_q + 2 * d_kv)
  mlp = (2 + config.gated) * config.d_model * config.d_ff
  head = config.d_model * config.vocab_size
  weights = config.n_layers * (attention + mlp) + head
  return 2.0 * weights + 4.0 * config.n_layers * length * d_q


def local_bytes(arrays: Sequence[Any]) -> int:
  """What each device holds of arrays: all of a copy, its part of a split."""
  shape = lambda x: x.sharding.shard_shape(x.shape)
  return sum(math.prod(shape(x)) * x.dtype.itemsize for x in arrays)


def _device_memory() -> float | None:
  stats = jax.local_devices()[0].memory_stats() or {}
  limit = stats.get('bytes_limit')
  return None if limit is None else limit / _MIB


def _speeds(dtype) -> tuple[float, float]:
  """FLOPs and bytes a second of one device, of a plain product and a copy."""
  large = jax.default_backend() != 'cpu'
  n = 4096 if large else 512
  x = jnp.ones((n, n), dtype)
  long = jnp.ones((2 ** (28 if large else 22),), jnp.float32)
  product = _fastest(jax.jit(lambda x: x @ x), x)
  copy = _fastest(jax.jit(lambda x: x + 1), long)
  return 2 * n**3 / product, 2 * long.nbytes / copy


def _fastest(call, argument) -> float:
  jax.block_until_ready(call(argument))
  seconds = []
  for _ in range(5):
    start = time.perf_counter()
    jax.block_until_ready(call(argument))
    seconds.append(time.perf_counter() - start)
  return min(seconds)
