"""What each primitive must look like for the interpreter: once per jax version.

A new jax that changes one of these fails here first.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idesign.sites import _jaxpr

X = jnp.arange(6.0).reshape(2, 3)


def trace(f, *args):
  return jax.make_jaxpr(f)(*args).jaxpr.eqns


@pytest.mark.parametrize(
  'f, names',
  [
    (jax.jit(lambda x: x + 1), _jaxpr.CALLS),
    (jax.checkpoint(lambda x: jnp.sin(x)), _jaxpr.REMATS),
  ],
)
def test_calls_and_remats_have_one_inner_jaxpr(f, names):
  (eqn,) = trace(f, X)
  assert eqn.primitive.name in names
  body, consts = _jaxpr.inner(eqn)
  assert len(body.invars) + len(consts) >= 1
  (out,), _ = _jaxpr.evaluate(
    body, consts, [X], _jaxpr.Plan(), lambda *a: None, {}
  )
  np.testing.assert_array_equal(out, f(X))


def test_remat_parameters():
  f = jax.checkpoint(
    jnp.sin, prevent_cse=False, policy=jax.checkpoint_policies.dots_saveable
  )
  (eqn,) = trace(f, X)
  assert eqn.params['prevent_cse'] is False
  assert eqn.params['policy'] is jax.checkpoint_policies.dots_saveable


@pytest.mark.parametrize('num_consts', [0, 1])
@pytest.mark.parametrize('num_carry', [0, 2])
@pytest.mark.parametrize('num_xs', [0, 1])
@pytest.mark.parametrize('reverse', [False, True])
def test_scan_parts(num_consts, num_carry, num_xs, reverse):
  def f(consts, carry, xs):
    def body(carry, xs):
      total = sum((a.sum() for a in [*consts, *(xs or [])]), 0.0)
      return [c + total for c in carry], [total]

    return jax.lax.scan(body, carry, xs or None, length=2, reverse=reverse)

  consts, carry = [X[0]] * num_consts, [X[0]] * num_carry
  eqns = trace(f, consts, carry, [X] * num_xs)
  (eqn,) = [e for e in eqns if e.primitive.name == 'scan']
  parts = _jaxpr.scan_parts(eqn)
  assert (parts.num_consts, parts.num_carry) == (num_consts, num_carry)
  assert (parts.length, parts.reverse) == (2, reverse)
  assert len(parts.body.invars) == num_consts + num_carry + num_xs


@pytest.mark.parametrize(
  'f',
  [
    jax.nn.relu,  # custom_jvp_call
    lambda x: jax.lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x),
    lambda x: jax.lax.while_loop(lambda h: h.sum() < 99, lambda h: h * 2, x),
    lambda x: jax.lax.scan(lambda c, r: (c + r, c), x[0], x)[0],
    lambda x: jnp.sort(x, axis=1),
    lambda x: jax.lax.top_k(x, 2),
    jnp.linalg.qr,
    lambda x: jax.random.normal(jax.random.key(0), x.shape) + x,
  ],
)
def test_everything_else_is_bound_as_it_stands(f):
  closed, tree = _jaxpr.trace(f, X)
  outs, found = _jaxpr.evaluate(
    closed.jaxpr, closed.consts, [X], _jaxpr.Plan(), lambda *a: None, {}
  )
  assert not found
  jax.tree.map(
    np.testing.assert_array_equal, jax.tree.unflatten(tree, outs), f(X)
  )
