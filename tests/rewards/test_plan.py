"""What a run will take: FLOPs by XLA's count, memory, and what does not fit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from idesign import models, probes, rewards, training
from idesign.rewards.plan import local_bytes

CONFIG = models.TransformerConfig(
  vocab_size=48, d_model=64, d_ff=128, n_heads=4, n_kv_heads=2, n_layers=2,
  max_len=64, unroll=2,
)  # fmt: skip


@pytest.mark.parametrize('gated', [True, False])
def test_flops_are_those_that_xla_counts(gated):
  config = dataclasses.replace(CONFIG, gated=gated)
  model = models.transformer(config)
  params = jax.eval_shape(model.init, jax.random.key(0))
  tokens = jax.ShapeDtypeStruct((3, 40), jnp.int32)
  counted = jax.jit(model.apply).lower(params, tokens).compile()
  ours = 3 * 40 * rewards.forward_flops(config, 40)
  # What is elementwise is counted there and not here.
  assert 1 <= counted.cost_analysis()['flops'] / ours < 1.15


def plan(group=4, abstract=False, **kwargs):
  model = models.transformer(CONFIG)
  observe = probes.observer(model.apply, ['resid_post[0:1]'])
  kind = probes.ProbeConfig(kind='mlp', d_in=64)
  probe = probes.freeze(
    model.init(jax.random.key(0)), probes.init_probe(kind, jax.random.key(1)),
    observe=observe, config=kind,
    quality=probes.ProbeQuality(0.95, 0.02, 500, 500, 100),
  )  # fmt: skip
  config = rewards.PolicyConfig(group=group, max_new_tokens=8)
  optimizer = optax.adam(1e-3)
  term = rewards.Term(
    name='long', value=lambda s: s.samples.sampled_BT.sum(axis=1)
  )
  step = rewards.make_policy_step(
    model.apply, CONFIG, observe, optimizer, [term], rewards.reinforce(), config
  )
  state = rewards.init_policy(
    probe.params, optimizer, jax.random.key(2), config
  )
  batch = {
    'prompts': np.ones((4, 6), np.int32), 'mask': np.ones((4, 6), bool)
  }  # fmt: skip
  if abstract:
    # Nothing is there yet but shapes, and where they will be.
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state, probe = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
        jnp.shape(x), jnp.result_type(x), sharding=here
      ),
      (state, probe),
    )
  return rewards.plan_run(
    step, state, batch, probe, model=CONFIG, policy=config, steps=100, **kwargs
  )


def test_what_stays_is_policy_optimizer_and_frozen_model():
  small, large = plan(group=4), plan(group=16)
  model = models.transformer(CONFIG)
  leaves = jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0)))
  params = sum(x.size * 4 for x in leaves) / 2**20
  # Parameters, two moments, and the frozen model's.
  assert small.state_mib == pytest.approx(4 * params, rel=0.02)
  assert large.state_mib == pytest.approx(small.state_mib, rel=1e-3)
  assert 2 < large.temporary_mib / small.temporary_mib < 5
  assert large.learning_flops == pytest.approx(4 * small.learning_flops)
  assert small.sampling_seconds > 0
  assert '100 steps' in str(small)


def test_shapes_are_enough():
  assert plan(abstract=True)[:5] == plan()[:5]


def test_a_device_reads_its_part_of_what_is_split():
  mesh = training.make_mesh(data=2, model=4)
  x = np.zeros((8, 6), np.float32)
  place = lambda *axes: jax.device_put(
    x, jax.NamedSharding(mesh, jax.P(*axes))
  )
  assert local_bytes([place()]) == 8 * 6 * 4
  assert local_bytes([place('model'), place(None, 'data')]) == (
    2 * 6 * 4 + 8 * 3 * 4
  )


def test_what_does_not_fit_is_refused_before_it_runs():
  needed = plan()
  whole = needed.state_mib + needed.temporary_mib
  assert plan(limit_mib=1.01 * whole).limit_mib == 1.01 * whole
  with pytest.raises(rewards.DoesNotFitError, match='group smaller than 4'):
    plan(limit_mib=0.99 * whole)
