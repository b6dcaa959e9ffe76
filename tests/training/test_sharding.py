"""Meshes, rules over paths, and shardings that follow the parameters."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
import numpy as np
import optax
import pytest

from idesign.training import (
  follow_shardings,
  init_state,
  make_mesh,
  process_rows,
  shard_batch,
  state_shardings,
  tree_shardings,
)

PARAMS = {
  'blocks': {'up': {'kernel': jnp.ones((8, 16)), 'bias': jnp.ones(16)}},
  'head': {'kernel': jnp.ones((16, 6))},
}
RULES = [
  ('blocks/.*/kernel', P(None, 'model')),
  ('blocks/up/bias', P('model')),
  ('.*', P()),
]


@pytest.mark.parametrize(
  'sizes, expected',
  [
    ({}, (8, 1)),
    ({'model': 4}, (2, 4)),
    ({'data': 2, 'model': -1}, (2, 4)),
    ({'data': 4, 'model': 2}, (4, 2)),
  ],
)
def test_make_mesh(sizes, expected):
  mesh = make_mesh(**sizes)
  assert mesh.axis_names == ('data', 'model')
  assert mesh.devices.shape == expected
  assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)


@pytest.mark.parametrize(
  'sizes, match',
  [
    ({'data': 3}, 'a mesh of data=3 x model=1 needs 3 devices'),
    ({'model': 3}, '8 devices cannot be divided into a mesh with model=3'),
    ({'data': 5, 'model': -1}, 'with data=5'),
    ({'data': -1, 'model': -1}, 'cannot both be -1'),
    ({'data': 0}, 'data=0 must be positive'),
    ({'data': 2, 'model': -2}, 'model=-2 must be positive'),
  ],
)
def test_make_mesh_refuses(sizes, match):
  with pytest.raises(ValueError, match=match):
    make_mesh(**sizes)


def test_first_matching_rule_decides():
  shardings = tree_shardings(PARAMS, make_mesh(2, 4), RULES)
  specs = jax.tree.map(lambda s: s.spec, shardings)
  assert specs == {
    'blocks': {'up': {'kernel': P(None, 'model'), 'bias': P('model')}},
    'head': {'kernel': P()},
  }


@pytest.mark.parametrize(
  'rules, match',
  [
    (RULES[:2], "no sharding rule covers the parameter 'head/kernel'"),
    # Patterns match whole paths: `kernel` alone covers nothing.
    ([('kernel', P()), ('blocks.*', P())], "'head/kernel'"),
    (
      [('head/kernel', P(None, 'model')), ('.*', P())],
      r'dimension 1 of head/kernel, shape \(16, 6\).*4 parts.*axis model',
    ),
    (
      [('head/kernel', P(None, ('data', 'model'))), ('.*', P())],
      '8 parts over mesh axis dataxmodel',
    ),
    ([('blocks/up/bias', P(None, 'model')), ('.*', P())], 'more entries'),
    ([('.*', P('rows'))], "names the mesh axis 'rows'"),
  ],
)
def test_rules_that_do_not_fit(rules, match):
  with pytest.raises(ValueError, match=match):
    tree_shardings(PARAMS, make_mesh(2, 4), rules)


OPTIMIZERS = {
  'sgd': optax.sgd(0.1),
  'adamw': optax.adamw(0.1),
  'chain': optax.chain(optax.clip(1.0), optax.adam(0.1), optax.ema(0.9)),
  'adafactor': optax.adafactor(0.1, min_dim_size_to_factor=4),
  'injected': optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
  'every second': optax.MultiSteps(
    optax.adam(0.1), 2
  ).gradient_transformation(),
  'by label': optax.multi_transform(
    {'a': optax.adam(0.1), 'b': optax.set_to_zero()},
    {'blocks': 'a', 'head': 'b'},
  ),
}


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_optimizer_state_follows_parameters(name):
  """Each moment of `up/kernel` is split as it is; the state is born so."""
  optimizer = OPTIMIZERS[name]
  state = init_state(
    lambda key: PARAMS,
    optimizer,
    jax.random.key(0),
    mesh=make_mesh(2, 4),
    rules=RULES,
  )
  alone = optimizer.init(PARAMS)
  leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
  moments = 0
  for (path, leaf), value in zip(leaves, jax.tree.leaves(alone)):
    np.testing.assert_array_equal(leaf, value)
    last = jax.tree_util.keystr(path[-2:])
    if last == "['up']['kernel']" and leaf.shape == (8, 16):
      assert leaf.sharding.spec == P(None, 'model')
      moments += 1
    elif last == "['up']['bias']" and leaf.shape == (16,):
      assert leaf.sharding.spec == P('model')
    else:
      assert leaf.sharding.spec == P(), path
  others = {'sgd': 0, 'adafactor': 0, 'chain': 3, 'every second': 3}
  assert moments == others.get(name, 2)


def test_a_parameter_that_is_the_whole_tree():
  mesh = make_mesh(2, 4)
  params = jnp.ones((4, 8))
  shardings = tree_shardings(params, mesh, [('', P('data', 'model'))])
  state = optax.adam(0.1).init(params)
  followed = follow_shardings(state, params, shardings, mesh)
  assert followed[0].mu.spec == P('data', 'model')
  assert followed[0].count.spec == P()


def test_state_shardings_allocate_nothing():
  """Shapes alone decide: a model far larger than memory can be laid out."""

  def init(key):
    return {'w': jax.random.normal(key, (2**20, 2**20))}

  build = lambda key: init_state(init, optax.adam(0.1), key)
  abstract = jax.eval_shape(build, jax.random.key(0))
  rules = [('w', P('data', 'model'))]
  shardings = state_shardings(abstract, make_mesh(2, 4), rules)
  assert shardings.opt_state[0].nu['w'].spec == P('data', 'model')
  assert shardings.step.spec == shardings.key.spec == P()


def test_mesh_and_rules_come_together():
  with pytest.raises(ValueError, match='together'):
    init_state(
      lambda key: PARAMS,
      optax.sgd(0.1),
      jax.random.key(0),
      mesh=make_mesh(2, 4),
    )


@pytest.mark.parametrize('size', [0, 3, 7])
def test_batch_must_divide_over_data(size):
  with pytest.raises(ValueError, match=f'batch_size={size} .*data=2'):
    process_rows(make_mesh(2, 4), size)


@pytest.mark.parametrize('array', [np.ones(3), np.float32(1)])
def test_shard_batch_refuses(array):
  with pytest.raises(ValueError, match=r"batch\['x'\] has shape"):
    shard_batch({'x': array}, make_mesh(2, 4))
