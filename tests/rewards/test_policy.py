"""The step: its gradient by hand, its randomness, resuming, and devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from idesign import models, probes, rewards, training
from idesign.probes import Pressure
from tests import processes

CONFIG = models.TransformerConfig(
  vocab_size=11, d_model=8, d_ff=16, n_heads=2, n_layers=2, max_len=8
)
LM = models.transformer(CONFIG)
OBSERVE = probes.observer(LM.apply, ['resid_post[0:1]'])
PROBE = probes.ProbeConfig(kind='mlp', d_in=8, hidden=4)
STOP = 2
BASE = dict(group=4, max_new_tokens=3, stop_tokens=(STOP,))
LEARNING_RATE = 0.1


@functools.cache
def frozen():
  return probes.freeze(
    LM.init(jax.random.key(0)),
    probes.init_probe(PROBE, jax.random.key(1)),
    observe=OBSERVE,
    config=PROBE,
    quality=probes.ProbeQuality(0.95, 0.02, 500, 500, 100),
  )


def likes(token):
  """How often a token was said, of those that were sampled."""
  return rewards.Term(
    name='likes',
    value=lambda s: jnp.sum(
      (s.samples.tokens_BT == token) & s.samples.sampled_BT, axis=1
    ).astype(jnp.float32),
  )


def said(score, **kwargs):
  return rewards.Term(
    **{'name': 'probe', 'value': lambda s: score(s)} | kwargs
  )


FROZEN = said(
  lambda s: s.probe.scores(s.teacher, s.samples.sampled_BT),
  pressure=Pressure.FROZEN,
)


def make_batch(seed=0, prompts=4):
  tokens = jax.random.randint(jax.random.key(seed), (prompts, 3), 3, 11)
  return {
    'prompts': tokens,
    'mask': jnp.ones(tokens.shape, bool).at[0, 0].set(False),
    'truth': jnp.arange(prompts),
  }


def make(terms=(likes(5), FROZEN), optimizer=None, **kwargs):
  optimizer = optimizer or optax.sgd(LEARNING_RATE)
  extra = {
    k: kwargs.pop(k) for k in ('constraints', 'lift', 'retain') if k in kwargs
  }
  objective = kwargs.pop('objective', rewards.reinforce())
  config = rewards.PolicyConfig(**BASE | kwargs)
  step = rewards.make_policy_step(
    LM.apply, CONFIG, OBSERVE, optimizer, terms, objective, config, **extra
  )
  state = rewards.init_policy(
    frozen().params, optimizer, jax.random.key(7), config,
    extra.get('constraints', ()),
  )  # fmt: skip
  return step, state


def run(step, state, batches, probe=None):
  out = []
  for batch in batches:
    state, metrics = step(state, batch, probe=probe or frozen())
    out.append({k: float(v) for k, v in metrics.items()})
  return state, out


def changed(a, b):
  return any(
    (np.asarray(x) != np.asarray(y)).any()
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))
  )


def test_one_step_is_the_policy_gradient():
  """Against the same samples, scored and differentiated by hand."""
  step, state = make(divergence_weight=0.3, scale='none')
  batch = make_batch()
  params = jax.tree.map(jnp.copy, state.params)
  key = jax.random.split(jax.random.fold_in(state.key, 0))[0]
  samples = rewards.sample_groups(
    LM.apply, params, batch['prompts'], batch['mask'], config=CONFIG, group=4,
    max_new_tokens=3, key=key, stop_tokens=(STOP,),
  )  # fmt: skip
  tokens, mask = samples.tokens_BT, samples.mask_BT
  probe = frozen()
  reward = jnp.sum((tokens == 5) & samples.sampled_BT, axis=1)
  reward += probe.scores(probe.read(tokens, mask), samples.sampled_BT)
  reward = np.asarray(reward).reshape(4, 4)
  advantage = (reward - reward.mean(1, keepdims=True)) * 4 / 3

  def loss(params):
    logits = LM.apply(params, tokens, mask_BT=mask)
    old = LM.apply(probe.params, tokens, mask_BT=mask)
    total = 0.0
    for b, t in zip(*np.nonzero(samples.sampled_BT)):
      logp = jax.nn.log_softmax(logits[b, t - 1])
      logq = jax.nn.log_softmax(old[b, t - 1])
      total -= advantage.reshape(-1)[b] * logp[tokens[b, t]]
      total += 0.3 * jnp.sum(jnp.exp(logp) * (logp - logq))
    return total / tokens.size

  want = jax.tree.map(
    lambda p, g: p - LEARNING_RATE * g, params, jax.grad(loss)(params)
  )
  state, (metrics,) = run(step, state, [batch])
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    state.params, want,
  )  # fmt: skip
  np.testing.assert_allclose(metrics['reward'], reward.mean(), rtol=1e-5)
  assert metrics['ratio'] == pytest.approx(1, abs=1e-5)
  assert metrics['length'] == samples.sampled_BT.sum() / 16


def test_what_is_rewarded_becomes_common():
  step, state = make(
    [likes(5)], optax.adam(3e-2), divergence_weight=0.0, group=16
  )
  _, metrics = run(step, state, [make_batch(i) for i in range(25)])
  assert metrics[-1]['reward'] > metrics[0]['reward'] + 1


def test_a_reward_that_says_nothing_changes_nothing():
  nothing = rewards.Term(name='nothing', value=lambda s: jnp.full(16, 0.7))
  step, state = make([nothing], divergence_weight=0.0)
  before = jax.tree.map(jnp.copy, state.params)
  state, (metrics,) = run(step, state, [make_batch()])
  assert not changed(state.params, before)
  assert metrics['informative'] == 0


def test_the_frozen_reward_has_no_gradient():
  """As a weighted part of the loss it would change what is learned."""
  live = lambda allow: said(
    lambda s: s.probe.live_scores(
      s.student, s.samples.sampled_BT, allow_gradient=allow
    ),
    pressure=Pressure.GRADIENT if allow else Pressure.LIVE,
  )
  ends = {}
  for name, term in (('frozen', FROZEN), ('live', live(False)),
                     ('gradient', live(True))):  # fmt: skip
    step, state = make([likes(5), term])
    state, (metrics,) = run(step, state, [make_batch()])
    ends[name] = state.params
    assert metrics['pressure'] == Pressure[name.upper()]
  # At the first step both read the same model: live is frozen.
  assert not changed(ends['frozen'], ends['live'])
  assert changed(ends['frozen'], ends['gradient'])


def test_what_a_step_refuses():
  """Before anything is sampled."""
  held = rewards.RateConstraint(
    name='held', event=lambda s: s.samples.mask_BT[:, 0], target=0.5
  )
  step, state = make([likes(5)])
  batch = make_batch()
  lacks = {k: v for k, v in batch.items() if k != 'mask'}
  with pytest.raises(ValueError, match=r"no \['mask'\]; it has"):
    run(step, state, [lacks])
  state = state._replace(multipliers={'held': jnp.zeros(())})
  with pytest.raises(ValueError, match=r"step: \[\], of the state: \['he"):
    run(step, state, [batch])
  step, state = make([likes(5)], constraints=[held])
  state = state._replace(multipliers={})
  with pytest.raises(ValueError, match=r"of the step: \['held'\], of the st"):
    run(step, state, [batch])


def test_the_policy_is_seen_as_the_probe_reads():
  live = said(
    lambda s: s.probe.live_scores(s.student, s.samples.sampled_BT),
    pressure=Pressure.LIVE,
  )
  step, state = make([live])
  other = dataclasses.replace(
    frozen(), observe=probes.observer(LM.apply, ['resid_post[1:2]'])
  )
  with pytest.raises(ValueError, match='pass `probe.observe`'):
    step(state, make_batch(), probe=other)


@pytest.mark.parametrize(
  'allow,pressure,needed',
  [(True, 'LIVE', 'GRADIENT'), (True, 'FROZEN', 'GRADIENT'),
   (False, 'FROZEN', 'LIVE')],
)  # fmt: skip
def test_a_reward_that_presses_harder_than_it_says(allow, pressure, needed):
  """The run would be marked as gentler than it is."""
  term = said(
    lambda s: s.probe.live_scores(
      s.student, s.samples.sampled_BT, allow_gradient=allow
    ),
    pressure=Pressure[pressure],
  )
  # Something that asks for the policy's activations.
  step, state = make([likes(5), term, said(
    lambda s: s.probe.live_scores(s.student, s.samples.sampled_BT),
    name='live', pressure=Pressure.LIVE,
  )])  # fmt: skip
  with pytest.raises(probes.PressureError, match=f'{pressure}.*{needed}'):
    run(step, state, [make_batch()])


@pytest.mark.parametrize(
  'average,each', [('constant', False), ('token', True), ('sequence', False)]
)
def test_the_path_of_a_reward_weighs_as_much_as_its_advantages(average, each):
  """Of a reward that samples do not change: there are no advantages."""

  def first(view):  # A prediction at a prompt's last token.
    return view.logits_BTV[:, 2, 3]

  def value(scene):
    value_B = first(scene.student)
    where = jnp.arange(scene.samples.tokens_BT.shape[1]) == 2
    return jnp.where(where, value_B[:, None], 0) if each else value_B

  term = rewards.Term(
    name='first', value=value, weight=-1.5, pressure=Pressure.GRADIENT
  )
  step, state = make(
    [term], divergence_weight=0.0, scale='none', average=average
  )
  batch, params = make_batch(), jax.tree.map(jnp.copy, state.params)
  key = jax.random.split(jax.random.fold_in(state.key, 0))[0]
  samples = rewards.sample_groups(
    LM.apply, params, batch['prompts'], batch['mask'], config=CONFIG, group=4,
    max_new_tokens=3, key=key, stop_tokens=(STOP,),
  )  # fmt: skip
  length_B = samples.sampled_BT.sum(axis=1)
  share_B = {
    'constant': jnp.full(16, 1 / samples.tokens_BT.size),
    'token': jnp.full(16, 1 / length_B.sum()),
    'sequence': 1 / length_B / 16,
  }[average]
  gradient = jax.grad(
    lambda p: share_B
    @ first(OBSERVE(p, samples.tokens_BT, samples.mask_BT)) * -1.5
  )(params)
  state, (metrics,) = run(step, state, [batch])
  assert metrics['informative'] == 0
  jax.tree.map(
    lambda new, old, g: np.testing.assert_allclose(
      new, old + LEARNING_RATE * g, atol=1e-6
    ),
    state.params, params, gradient,
  )  # fmt: skip


@pytest.mark.parametrize('divergence', ['exact', 'k1', 'k3'])
def test_divergence_holds_the_policy_near(divergence):
  apart = {}
  for weight in (0.0, 5.0):
    step, state = make(
      [likes(5)], optax.adam(1e-2), divergence=divergence,
      divergence_weight=weight, group=8, baseline='mean',
    )  # fmt: skip
    _, metrics = run(step, state, [make_batch(i) for i in range(12)])
    apart[weight] = metrics[-1]['divergence']
  assert abs(apart[5.0]) < abs(apart[0.0]) / 2


@pytest.mark.parametrize('divergence', ['exact', 'k1', 'k3'])
def test_at_any_temperature_the_frozen_model_is_where_it_is(divergence):
  step, state = make([likes(5)], temperature=2.0, divergence=divergence)
  _, (metrics,) = run(step, state, [make_batch()])
  assert metrics['divergence'] == pytest.approx(0, abs=1e-6)
  assert metrics['ratio'] == pytest.approx(1, abs=1e-5)


def test_the_reference_is_reset():
  step, state = make(reset_reference_every=2, divergence_weight=0.5)
  first = jax.tree.map(jnp.copy, state.reference)
  batches = [make_batch(i) for i in range(3)]
  state, one = run(step, state, batches[:1])
  assert not changed(state.reference, first)
  state, two = run(step, state, batches[1:2])
  assert not changed(state.reference, state.params)
  state, three = run(step, state, batches[2:])
  assert changed(state.reference, state.params)
  # Of the policy before each step from what it is held near to.
  apart = [m[0]['divergence'] for m in (one, two, three)]
  assert apart[1] > 1e-5 > max(abs(apart[0]), abs(apart[2]))


def test_minibatches_are_steps_that_grow_old():
  step, state = make(minibatches=4, objective=rewards.cispo())
  state, (metrics,) = run(step, state, [make_batch()])
  assert int(state.step) == 1 and metrics['ratio'] != 1
  with pytest.raises(ValueError, match='3 parts must divide 16 rows'):
    step, state = make(minibatches=3)
    run(step, state, [make_batch()])


def test_constraints_are_carried():
  often = rewards.RateConstraint(
    name='stops',
    event=lambda s: jnp.any(s.samples.tokens_BT == STOP, axis=1),
    target=1.0,
    gain=0.5,
  )
  step, state = make(constraints=[often])
  state, metrics = run(step, state, [make_batch(i) for i in range(2)])
  assert state.multipliers['stops'] < 0
  assert metrics[1]['multiplier/stops'] <= metrics[0]['multiplier/stops'] < 0


def test_adapters_learn_and_the_frozen_model_does_not():
  config = rewards.PolicyConfig(**BASE)
  adapters = rewards.init_lora(
    frozen().params, '.*/kernel', rank=2, key=jax.random.key(3)
  )
  optimizer = optax.sgd(LEARNING_RATE)
  step = rewards.make_policy_step(
    LM.apply, CONFIG, OBSERVE, optimizer, [likes(5)], rewards.reinforce(),
    config, lift=lambda trained, base: rewards.merge_lora(base, trained),
  )  # fmt: skip
  state = rewards.init_policy(adapters, optimizer, jax.random.key(7), config)
  state, _ = run(step, state, [make_batch()])
  assert changed(state.params, adapters)


def test_retained_prompts_are_held():
  batch = make_batch() | {
    'retain': jnp.arange(12).reshape(2, 6) % 11,
    'retain_mask': jnp.ones((2, 6), bool),
  }
  retain = rewards.retain_prompts(OBSERVE)
  base = frozen().params
  assert retain(base, base, batch) == pytest.approx(0, abs=1e-6)
  moved = {}
  held = {'retain': lambda *a: 20 * retain(*a)}
  for name, extra in (('free', {}), ('held', held)):
    step, state = make([likes(5)], optax.adam(1e-2), group=8, **extra)
    state, _ = run(step, state, [batch] * 10)
    moved[name] = float(retain(state.params, base, batch))
  assert moved['held'] < moved['free'] / 3


def test_a_reward_that_is_not_a_number_is_named():
  bad = said(
    lambda s: jnp.where(
      jnp.arange(16) == 6, jnp.nan, jnp.ones(16)
    )
  )
  step, state = make([likes(5), bad])
  _, (metrics,) = run(step, state, [make_batch()])
  assert np.isnan(metrics['reward/probe']) and metrics['sample/probe'] == 6
  assert metrics['sample/likes'] == -1


def test_it_compiles_once():
  step, state = make()
  run(step, state, [make_batch(i) for i in range(3)])
  assert step._cache_size() == 1


class Prompts:
  """Batches by number, for `training.fit`."""

  def batch(self, step):
    return {k: np.asarray(v) for k, v in make_batch(step).items()}

  def position(self, step):
    return {'step': step}


def fitted(folder, steps):
  step, state = make(
    [likes(5), FROZEN], optax.adam(1e-2), reset_reference_every=2,
    minibatches=2,
  )  # fmt: skip
  with training.Checkpointer(folder, {'a': 1}) as checkpointer:
    return training.fit(
      state, step, Prompts(), num_steps=steps, checkpointer=checkpointer,
      save_every=2, extra=lambda state, batch: {'probe': frozen()},
    )  # fmt: skip


def test_resuming_gives_the_same_bits(tmp_path):
  whole = fitted(tmp_path / 'whole', 6)
  fitted(tmp_path / 'parts', 2)
  parts = fitted(tmp_path / 'parts', 6)
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts)):
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
      a, b = jax.random.key_data(a), jax.random.key_data(b)
    np.testing.assert_array_equal(a, b)


def test_a_bad_reward_stops_the_run_and_leaves_the_last_good_checkpoint(
  tmp_path,
):
  class Numbered(Prompts):
    def batch(self, step):
      return super().batch(step) | {'number': np.full(4, step)}

  bad = said(
    lambda s: jnp.where(
      (s.info['number'] == 2) & (jnp.arange(16) >= 5), jnp.nan, 0.0
    )
  )
  step, state = make([likes(5), bad])
  with training.Checkpointer(tmp_path, {'a': 1}) as checkpointer:
    with pytest.raises(
      rewards.RewardError, match="'probe' is nan at step 3, first in sample 5"
    ):
      training.fit(
        state, step, Numbered(), num_steps=6, checkpointer=checkpointer,
        save_every=1, extra=lambda state, batch: {'probe': frozen()},
        watch=rewards.make_watch(),
      )  # fmt: skip
    checkpointer.wait()
    assert checkpointer.latest_step == 2


def test_a_collapsed_policy_is_reported():
  watch = rewards.make_watch(patience=2)
  watch(1, {'informative': 0.0})
  watch(2, {'informative': 0.5})
  watch(3, {'informative': 0.0})
  with pytest.raises(rewards.CollapsedPolicyError, match='step 4'):
    watch(4, {'informative': 0.0})
  with pytest.raises(ValueError, match='patience=0'):
    rewards.make_watch(0)


def test_eight_devices_give_the_same_numbers():
  batch = make_batch(prompts=8)
  mesh = training.make_mesh(data=8)
  step, state = make()
  one, (metrics,) = run(step, state, [batch])
  step, state = make()
  eight, (sharded,) = run(step, state, [training.shard_batch(batch, mesh)])
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    one.params, eight.params,
  )  # fmt: skip
  for name, value in metrics.items():
    np.testing.assert_allclose(sharded[name], value, rtol=1e-4, atol=1e-5)


def test_two_processes_give_the_same_numbers(tmp_path):
  from tests.rewards import script  # It imports this module.

  file = tmp_path / 'two.npz'
  said = processes.run_two('tests.rewards.script', str(file))
  assert all('2 8' in lines for lines in said)
  two = dict(np.load(file))
  leaves, metrics = script.learn(training.make_mesh())
  assert len(metrics) == script.STEPS
  np.testing.assert_array_equal(two['read'], np.arange(13) * 9.0 + 3)
  for i, leaf in enumerate(leaves):
    np.testing.assert_allclose(two[f'arr_{i}'], leaf, rtol=1e-4, atol=1e-6)
  for i, values in enumerate(metrics):
    for name, value in values.items():
      np.testing.assert_allclose(
        two[f'{i}/{name}'], value, rtol=1e-4, atol=1e-5
      )


@pytest.mark.parametrize(
  'kwargs,message',
  [
    ({'group': 1}, 'group=1'),
    ({'temperature': 0.0}, 'temperature=0'),
    ({'divergence': 'k2'}, "divergence='k2'"),
    ({'minibatches': 0}, 'minibatches=0'),
    ({'reset_reference_every': 0}, 'reset_reference_every=0'),
  ],
)
def test_bad_config(kwargs, message):
  with pytest.raises(ValueError, match=message):
    rewards.PolicyConfig(**BASE | kwargs)


def test_a_prompt_longer_than_the_context():
  batch = {
    'prompts': jnp.ones((2, 6), int), 'mask': jnp.ones((2, 6), bool),
  }  # fmt: skip
  step, state = make()
  with pytest.raises(ValueError, match='max_len=8'):
    run(step, state, [batch])
