"""Per-example gradients equal `vmap(grad)`, for every module system."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idesign import sites
from tests.sites import zoo

# Sums of about 100 products in float32: a few dozen roundings of the largest
# entry. In bfloat16 the reference itself is rounded, but sums are not.
ROUNDINGS = {jnp.float32: 32, jnp.bfloat16: 2}


def reference(case, batch):
  grads = sites.vmap_grad(case.loss, case.params, batch)
  return dict(zip(sites.leaf_paths(grads), jax.tree.leaves(grads)))


def assert_close(actual, expected, dtype):
  expected = np.asarray(expected, np.float64)
  error = np.abs(np.asarray(actual, np.float64) - expected).max()
  scale = np.abs(expected).max()
  assert scale > 0
  assert error <= ROUNDINGS[dtype] * float(jnp.finfo(dtype).eps) * scale


@pytest.mark.parametrize('name', zoo.CASES)
@pytest.mark.parametrize('framework', zoo.FRAMEWORKS)
def test_per_example_gradients(framework, name):
  case, batch = zoo.FRAMEWORKS[framework](name), zoo.batch()
  dtype = jnp.bfloat16 if name == 'bf16' else jnp.float32
  expected = reference(case, batch)
  selected = sites.match_paths(case.select, list(expected))
  gradients = jax.jit(sites.per_example_gradients(case.loss, case.select))
  actual = gradients(case.params, batch)
  assert set(actual) == set(selected)
  for path in selected:
    assert_close(actual[path], expected[path], dtype)


@pytest.mark.parametrize('name', zoo.CASES)
@pytest.mark.parametrize('framework', zoo.FRAMEWORKS)
def test_squared_norms(framework, name):
  """One value per example and layer; right also where the weight is shared."""
  case, batch = zoo.FRAMEWORKS[framework](name), zoo.batch()
  dtype = jnp.bfloat16 if name == 'bf16' else jnp.float32
  expected = reference(case, batch)
  read = sites.collect(
    case.loss, {'n': sites.per_example_squared_norm}, case.select
  )
  actual = jax.jit(read)(case.params, batch).values['n']
  assert set(actual) == set(sites.match_paths(case.select, list(expected)))
  for path, norms in actual.items():
    g = expected[path].astype(jnp.float32)
    layers = (1,) if norms.ndim == 2 else ()
    axes = tuple(range(1 + len(layers), g.ndim))
    assert_close(norms.T, jnp.sum(g**2, axes), dtype)


def test_the_table_covers_what_it_says():
  """Guards the zoo itself: each case has the structure it is named after."""
  batch = zoo.batch()
  for framework, build in zoo.FRAMEWORKS.items():
    found = {
      name: sites.find_sites(case.loss, case.params, batch, case.select).sites
      for name in zoo.CASES
      for case in [build(name)]
    }
    assert all(s.stack == (zoo.L,) for n in ('scan', 'remat') for s in found[n])
    assert all(s.shared for s in found['tied']), framework
    assert any(s.product.weight_first for s in found['left']), framework
    assert all(not s.shared for s in found['loop']), framework
