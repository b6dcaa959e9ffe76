"""Streams of factors: interrupted, sharded, refused, and what is not finite."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idesign import curvature
from idesign import sites
from idesign import training
from tests import processes
from tests.curvature import script

BATCHES = 6


def collect(mesh=None, workdir=None, *, shards=8, batches=BATCHES, **changes):
  params, numbered = script.setting(mesh)
  stream = script.stream(mesh, shards=shards)
  options = {'key': jax.random.key(3), 'save_every': 2, **changes}
  params = options.pop('params', params)
  return stream.collect(params, numbered, batches, workdir=workdir, **options)


@functools.cache
def whole():
  return collect()


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(
    lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)),
    a, b,
  )  # fmt: skip


def nearly_same(actual, expected):
  """Up to the order of sums."""
  eps = float(jnp.finfo(jnp.float32).eps)
  pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
  for a, b in pairs:
    scale = float(np.abs(b).max())
    assert scale > 0
    np.testing.assert_allclose(a, b, atol=64 * eps * scale, rtol=0)


def test_a_stream_adds_up_what_batches_give():
  params, numbered = script.setting()
  factors = collect(shards=1)
  read = jax.jit(
    curvature.kfac_factors(script.MODEL.apply, script.KERNELS, script.FISHER)
  )
  total = None
  for n in range(BATCHES):
    batch = numbered.batch(n)
    key = jax.random.fold_in(jax.random.key(3), n)
    keys = jax.random.split(key, len(batch['inputs']))
    part = read(params, batch['inputs'], key=keys, mask=batch['mask'])
    total = part if total is None else total + part
  nearly_same(factors, total)


@pytest.mark.parametrize('cut', [1, 4])
def test_an_interrupted_stream_goes_on_to_the_same_bits(tmp_path, cut):
  collect(workdir=tmp_path, batches=cut)
  same(collect(workdir=tmp_path), whole())


def test_a_stream_killed_between_checkpoints_loses_only_what_came_after(
  tmp_path, monkeypatch
):
  params, numbered = script.setting()
  batch = numbered.batch

  def killed(n):
    if n == 5:
      raise KeyboardInterrupt
    return batch(n)

  monkeypatch.setattr(numbered, 'batch', killed)
  stream = script.stream(None)
  arguments = {'key': jax.random.key(3), 'save_every': 2}
  with pytest.raises(KeyboardInterrupt):
    stream.collect(params, numbered, BATCHES, workdir=tmp_path, **arguments)
  steps = [int(p.name) for p in (tmp_path / 'checkpoints').iterdir()]
  assert steps == [4]
  same(collect(workdir=tmp_path), whole())


@pytest.mark.parametrize('data, model', [(8, 1), (2, 4)])
def test_eight_devices_give_what_one_does(data, model):
  mesh = training.make_mesh(data, model)
  factors, alone = collect(mesh), whole()
  up = 'blocks/mlp/up/kernel'
  spec = factors.outputs[up].sharding.spec
  assert model == 1 or spec[-2] == 'model'
  nearly_same(factors, alone)
  same(factors.count, alone.count)
  same(factors.positions, alone.positions)


def test_shards_do_not_speak_to_each_other_before_the_end():
  mesh = training.make_mesh(8)
  params, numbered = script.setting(mesh)
  stream = script.stream(mesh)
  batch = training.shard_batch(numbered.batch(0), mesh)
  params = jax.device_put(
    params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  )
  state = stream.init(params, batch, jax.random.key(3))
  text = stream.lower(state, params, batch).compile().as_text()
  for collective in (
    'all-reduce',
    'all-gather',
    'reduce-scatter',
    'all-to-all',
  ):
    assert collective not in text


def test_two_processes_give_what_one_does(tmp_path):
  said = processes.run_two('tests.curvature.script', str(tmp_path / 'f.npz'))
  # Each decomposed its share, and both have all.
  digests = [text.strip().splitlines()[-1] for text in said]
  assert len(digests[0]) == 64 and digests[0] == digests[1]
  with np.load(tmp_path / 'f.npz') as file:
    nearly_same([file[name] for name in file.files], whole())


def test_a_workdir_of_something_else_is_refused(tmp_path):
  collect(workdir=tmp_path, batches=2)
  params, _ = script.setting()
  other = jax.tree.map(lambda x: x * 1.5, params)
  with pytest.raises(ValueError, match='another config.*model'):
    collect(workdir=tmp_path, params=other)
  with pytest.raises(ValueError, match='another config.*key'):
    collect(workdir=tmp_path, key=jax.random.key(4))
  with pytest.raises(ValueError, match='another config.*shards'):
    collect(workdir=tmp_path, shards=4)


@pytest.mark.parametrize('layer', [0, 2])
def test_what_is_not_finite_is_named(layer):
  params, _ = script.setting()
  up = params['blocks']['mlp']['up']['kernel']
  params['blocks']['mlp']['up']['kernel'] = up.at[layer, 0, 0].set(jnp.inf)
  # The first input that is spoiled is that of what comes after the weight.
  with pytest.raises(
    FloatingPointError,
    match=f"input of 'blocks/mlp/down/kernel', layer {layer}",
  ):
    collect(params=params)


def test_sums_of_more_batches_are_refused(tmp_path):
  collect(workdir=tmp_path, batches=4)
  with pytest.raises(ValueError, match='has 4 batches in its sums'):
    collect(workdir=tmp_path, batches=2)


def test_shards_that_do_not_divide_raise():
  with pytest.raises(ValueError, match='num_shards=3 is not a multiple'):
    script.stream(training.make_mesh(8), shards=3)
  with pytest.raises(ValueError, match='16 examples does not divide over 3'):
    collect(shards=3)
  with pytest.raises(ValueError, match='num_batches must be at least 1'):
    collect(batches=0)


def found():
  params, numbered = script.setting()
  loss = lambda p, x: script.MODEL.apply(p, x).sum((1, 2))
  x = numbered.batch(0)['inputs']
  return (
    params,
    loss,
    x,
    sites.find_sites(loss, params, x, script.KERNELS).sites,
  )


@pytest.mark.parametrize('layers_that_fit', [1, 2, 3, 7])
def test_groups_cover_every_layer_once(layers_that_fit):
  params, loss, x, every = found()
  layer = max(4 * 3 * (s.d_in**2 + s.d_out**2) for s in every)
  groups = curvature.plan_groups(every, layers_that_fit * layer)
  expected = {(s.path, i) for s in every for i in range(s.stack[0])}
  seen = []
  for group in groups:
    part = sites.find_sites(loss, params, x, group).sites
    seen += [
      (s.path, i) for s in part for i in range(*(s.layers or (0, s.stack[0])))
    ]
    size = sum(4 * 3 * (s.d_in**2 + s.d_out**2) * (s.stack[0]) for s in part)
    assert size <= layers_that_fit * layer
  assert len(seen) == len(expected)
  assert set(seen) == expected
  assert layers_that_fit < 7 or len(groups) < 3


def test_a_layer_that_does_not_fit_is_named():
  *_, every = found()
  with pytest.raises(ValueError, match="factors of 'blocks/mlp/up/kernel'"):
    curvature.plan_groups(every, 10.0)
  split = curvature.plan_groups(every, 4e4, model_axis=2)
  assert len(curvature.plan_groups(every, 4e4)) > len(split)
