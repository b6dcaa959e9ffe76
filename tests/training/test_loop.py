"""`fit`: what it writes, when it saves, how it stops and goes on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from idesign.training import (
  Batches,
  Checkpointer,
  fit,
  init_state,
  make_train_step,
  MetricsWriter,
  read_metrics,
)

ROWS = {'x': np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)}
OPTIMIZER = optax.adam(0.1)


def loss(params, batch):
  return jnp.sum(jnp.square(batch['x'] - params['m'][None]), axis=-1)


STEP = make_train_step(loss, OPTIMIZER)


def new_state():
  init = lambda key: {'m': jnp.ones(3)}
  return init_state(init, OPTIMIZER, jax.random.key(0))


def run(workdir, num_steps, *, seed=0, data=None, step=STEP, **options):
  data = Batches(ROWS, 4, seed=seed) if data is None else data
  with Checkpointer(workdir, {}, keep=9) as checkpointer:
    with MetricsWriter(workdir / 'metrics.jsonl') as writer:
      state = fit(
        new_state(),
        step,
        data,
        num_steps=num_steps,
        checkpointer=checkpointer,
        writer=writer,
        **options,
      )
    return state, checkpointer.steps


def steps(workdir):
  return [r['step'] for r in read_metrics(workdir / 'metrics.jsonl')]


@pytest.mark.parametrize(
  'options, saved, logged',
  [
    ({'save_every': 4}, [4, 8, 10], list(range(1, 11))),
    ({'save_every': 5, 'log_every': 3}, [5, 10], [3, 6, 9, 10]),
    ({}, [10], list(range(1, 11))),
  ],
)
def test_saves_and_logs_when_due(tmp_path, options, saved, logged):
  state, kept = run(tmp_path, 10, **options)
  assert int(state.step) == 10
  assert kept == saved and steps(tmp_path) == logged


def test_a_run_in_pieces_equals_a_whole_one(tmp_path):
  whole, _ = run(tmp_path / 'whole', 9)
  (tmp_path / 'pieces').mkdir()
  for num_steps in (2, 2, 7, 9, 9):
    pieces, _ = run(tmp_path / 'pieces', num_steps)
  assert (
    np.asarray(pieces.params['m']).tobytes()
    == np.asarray(whole.params['m']).tobytes()
  )
  assert read_metrics(tmp_path / 'pieces' / 'metrics.jsonl') == read_metrics(
    tmp_path / 'whole' / 'metrics.jsonl'
  )


def test_works_alone():
  state = fit(new_state(), STEP, Batches(ROWS, 4, seed=0), num_steps=3)
  assert int(state.step) == 3


def test_the_given_state_is_consumed_on_resume(tmp_path):
  run(tmp_path, 2)
  given = new_state()
  with Checkpointer(tmp_path, {}) as checkpointer:
    state = fit(
      given,
      STEP,
      Batches(ROWS, 4, seed=0),
      num_steps=2,
      checkpointer=checkpointer,
    )
  assert int(state.step) == 2
  assert all(x.is_deleted() for x in jax.tree.leaves(given))


class Poisoned(Batches):
  """NaN in one batch."""

  def __init__(self, bad):
    super().__init__(ROWS, 4, seed=0)
    self.bad = bad
    self.asked = []

  def batch(self, step):
    self.asked.append(step)
    batch = super().batch(step)
    if step + 1 == self.bad:
      batch = {'x': batch['x'] * np.float32('nan')}
    return batch


@pytest.mark.parametrize('bad', [1, 4, 5, 6, 10])
def test_stops_at_a_loss_that_is_not_finite(tmp_path, bad):
  data = Poisoned(bad)
  with pytest.raises(FloatingPointError, match=f'^step {bad}: .*loss=nan'):
    run(tmp_path, 10, data=data, save_every=5)
  # One step late at most, and not before a save.
  assert max(data.asked) + 1 in (bad, bad + 1)
  with Checkpointer(tmp_path, {}) as checkpointer:
    assert checkpointer.steps == [5] * (bad > 5)
  records = read_metrics(tmp_path / 'metrics.jsonl')
  assert [r['step'] for r in records] == list(range(1, bad + 1))
  assert np.isnan(records[-1]['loss'])
  # Repaired, the run goes on from what was saved.
  state, _ = run(tmp_path, 10)
  assert int(state.step) == 10 and steps(tmp_path) == list(range(1, 11))


def test_the_device_is_one_step_ahead_of_the_host(tmp_path):
  """Step n is dispatched before the metrics of step n - 1 are read."""
  events = []

  class Metric:
    def __init__(self, step):
      self.step = step

    def __float__(self):
      events.append(f'read {self.step}')
      return 1.0

  def step(state, batch):
    n = int(state.step) + 1
    events.append(f'dispatch {n}')
    return state._replace(step=state.step + 1), {'loss': Metric(n)}

  fit(new_state(), step, Batches(ROWS, 4, seed=0), num_steps=3)
  assert events == [
    'dispatch 1',
    'dispatch 2',
    'read 1',
    'dispatch 3',
    'read 2',
    'read 3',
  ]


def test_evaluate_and_extra(tmp_path):
  def update(updates, state, params=None, *, gate, **extra):
    return jax.tree.map(lambda u: u * gate, updates), state

  gated = optax.chain(
    OPTIMIZER,
    optax.GradientTransformationExtraArgs(
      lambda params: optax.EmptyState(), update
    ),
  )
  seen = []

  def extra(state, batch):
    seen.append((int(state.step), batch['x'].shape))
    return {'gate': jnp.float32(0)}

  state = init_state(lambda key: {'m': jnp.ones(3)}, gated, jax.random.key(0))
  with MetricsWriter(tmp_path / 'm') as writer:
    state = fit(
      state,
      make_train_step(loss, gated),
      Batches(ROWS, 4, seed=0),
      num_steps=5,
      writer=writer,
      log_every=5,
      extra=extra,
      evaluate=lambda state: {'m0': state.params['m'][0]},
      evaluate_every=2,
    )
  np.testing.assert_array_equal(state.params['m'], np.ones(3))
  assert seen == [(n, (4, 3)) for n in range(5)]
  records = read_metrics(tmp_path / 'm')
  assert [r['step'] for r in records] == [2, 4, 5]
  assert all(r['m0'] == 1.0 and 'loss' in r for r in records)


@pytest.mark.parametrize(
  'data, match',
  [
    (Batches(ROWS, 4, seed=1), 'seed: 0 -> 1'),
    (Batches(ROWS, 3, seed=0), 'batch_size: 4 -> 3'),
    (Batches({'x': ROWS['x'][:10]}, 4, seed=0), 'num_rows: 12 -> 10'),
  ],
)
def test_other_data_is_refused(tmp_path, data, match):
  run(tmp_path, 4)
  before = (tmp_path / 'metrics.jsonl').read_bytes()
  with pytest.raises(ValueError, match=f'other data.*{match}'):
    run(tmp_path, 8, data=data)
  assert (tmp_path / 'metrics.jsonl').read_bytes() == before


def test_a_shorter_run_is_refused(tmp_path):
  run(tmp_path, 4)
  with pytest.raises(ValueError, match='already made 4 updates.*num_steps=3'):
    run(tmp_path, 3)
  assert steps(tmp_path) == [1, 2, 3, 4]


@pytest.mark.parametrize('name', ['save_every', 'log_every', 'evaluate_every'])
def test_every_must_be_positive(name):
  with pytest.raises(ValueError, match=f'{name}=0'):
    fit(new_state(), STEP, Batches(ROWS, 4, seed=0), num_steps=1, **{name: 0})
