"""The same small network in four module systems and several shapes of code.

Every entry is a loss `loss(params, batch) -> [B]`, its parameters and the
pattern that selects its matrices.
"""

from typing import Any, NamedTuple

import equinox as eqx
from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp

B, T, D, F, H, L = 4, 5, 8, 12, 2, 3


class Case(NamedTuple):
  loss: Any
  params: Any
  select: str


def batch():
  x, y = jax.random.normal(jax.random.key(7), (2, B, T, D))
  return {'x': x, 'y': y}


def _loss(forward):
  def loss(params, batch):
    error = forward(params, batch['x']).astype(jnp.float32) - batch['y']
    return jnp.sum(error**2, axis=(1, 2))

  return loss


# Plain functions.


def _plain_init(key, out=F):
  up, down = jax.random.split(key)
  return {
    'up': jax.random.normal(up, (D, out)) / D**0.5,
    'down': jax.random.normal(down, (out, D)) / out**0.5,
  }


def _plain_block(p, h, dtype=jnp.float32):
  h = h.astype(dtype)
  up, down = p['up'].astype(dtype), p['down'].astype(dtype)
  return h + jnp.tanh(h @ up) @ down


def plain(case):
  one = _plain_init(jax.random.key(0))
  stack = jax.vmap(_plain_init)(jax.random.split(jax.random.key(0), L))
  layers = {str(i): jax.tree.map(lambda a, i=i: a[i], stack) for i in range(L)}

  def loop(p, h):
    for i in range(L):
      h = _plain_block(p[str(i)], h)
    return h

  def scan(p, h, block=_plain_block):
    return jax.lax.scan(lambda h, w: (block(w, h), None), h, p)[0]

  def heads(p, h):
    q = jnp.einsum('btd,dhk->bthk', h, p['up'].reshape(D, H, F // H))
    return jnp.einsum('bthk,hkd->btd', jnp.tanh(q), p['down'].reshape(H, -1, D))

  def left(p, h):
    z = jnp.tanh(jnp.einsum('df,btd->fbt', p['up'], h))
    z = jnp.moveaxis(z, 0, -1)
    return jnp.moveaxis(p['down'].T @ z.swapaxes(1, 2), 1, 2)

  forward, params = {
    'loop': (loop, layers),
    'scan': (scan, stack),
    'remat': (lambda p, h: scan(p, h, jax.checkpoint(_plain_block)), stack),
    'jit': (jax.jit(_plain_block), one),
    'tied': (lambda p, h: jnp.tanh(h @ p['up']) @ p['up'].T, one),
    'left': (left, one),
    'heads': (heads, one),
    'bf16': (lambda p, h: _plain_block(p, h, jnp.bfloat16), one),
  }[case]
  if case == 'tied':
    params = {'up': one['up']}
  return Case(_loss(forward), params, '.*')


# Flax Linen.


class _LinenBlock(nn.Module):
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, h, _=None):
    z = jnp.tanh(nn.Dense(F, dtype=self.dtype, name='up')(h))
    h = h.astype(self.dtype) + nn.Dense(D, dtype=self.dtype, name='down')(z)
    return (h, None) if _ is not None else h


class _LinenStack(nn.Module):
  remat: bool = False

  @nn.compact
  def __call__(self, h):
    block = nn.remat(_LinenBlock) if self.remat else _LinenBlock
    stack = nn.scan(
      block,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      length=L,
    )
    return stack(name='blocks')(h, jnp.zeros(L))[0]


class _LinenLoop(nn.Module):
  block: Any = _LinenBlock
  same: bool = False

  @nn.compact
  def __call__(self, h):
    shared = self.block(name='block') if self.same else None
    for i in range(L):
      h = shared(h) if self.same else self.block(name=f'block_{i}')(h)
    return h


class _LinenLeft(nn.Module):
  @nn.compact
  def __call__(self, h):
    w = self.param('kernel', nn.initializers.lecun_normal(), (D, D))
    return jnp.moveaxis(jnp.tensordot(w, h, (1, 2)), 0, -1)


class _LinenHeads(nn.Module):
  @nn.compact
  def __call__(self, h):
    q = nn.DenseGeneral((H, D // H), name='q')(h)
    return nn.DenseGeneral(D, axis=(-2, -1), name='o')(jnp.tanh(q))


def linen(case):
  module = {
    'loop': _LinenLoop(),
    'scan': _LinenStack(),
    'remat': _LinenStack(remat=True),
    'jit': _LinenLoop(block=nn.jit(_LinenBlock)),
    'tied': _LinenLoop(same=True),
    'left': _LinenLeft(),
    'heads': _LinenHeads(),
    'bf16': _LinenBlock(dtype=jnp.bfloat16),
  }[case]
  params = module.init(jax.random.key(0), jnp.zeros((B, T, D)))
  return Case(_loss(module.apply), params, '.*kernel')


# Flax NNX.


class _NNXBlock(nnx.Module):
  def __init__(self, rngs, dtype=jnp.float32):
    self.up = nnx.Linear(D, F, dtype=dtype, rngs=rngs)
    self.down = nnx.Linear(F, D, dtype=dtype, rngs=rngs)

  def __call__(self, h):
    z = self.down(jnp.tanh(self.up(h)))
    return h.astype(z.dtype) + z


class _NNXLoop(nnx.Module):
  def __init__(self, rngs, call=lambda block, h: block(h), same=False):
    blocks = [_NNXBlock(rngs) for _ in range(1 if same else L)]
    self.blocks = nnx.List(blocks)
    self.call, self.same = call, same

  def __call__(self, h):
    for i in range(L):
      h = self.call(self.blocks[0 if self.same else i], h)
    return h


class _NNXStack(nnx.Module):
  def __init__(self, rngs, call=lambda block, h: block(h)):
    make = nnx.split_rngs(splits=L)(nnx.vmap(_NNXBlock))
    self.blocks = make(rngs)
    self.call = call

  def __call__(self, h):
    step = nnx.scan(
      lambda h, block: self.call(block, h),
      in_axes=(nnx.Carry, 0),
      out_axes=nnx.Carry,
    )
    return step(h, self.blocks)


class _NNXLeft(nnx.Module):
  def __init__(self, rngs):
    self.kernel = nnx.Param(jax.random.normal(rngs(), (D, D)) / D**0.5)

  def __call__(self, h):
    return jnp.moveaxis(jnp.tensordot(self.kernel[...], h, (1, 2)), 0, -1)


class _NNXHeads(nnx.Module):
  def __init__(self, rngs):
    self.q = nnx.LinearGeneral(D, (H, D // H), rngs=rngs)
    self.o = nnx.LinearGeneral((H, D // H), D, axis=(-2, -1), rngs=rngs)

  def __call__(self, h):
    return self.o(jnp.tanh(self.q(h)))


def nnx_models(case):
  rngs = nnx.Rngs(0)
  rematted = nnx.remat(lambda block, h: block(h))
  jitted = nnx.jit(lambda block, h: block(h))
  module = {
    'loop': lambda: _NNXLoop(rngs),
    'scan': lambda: _NNXStack(rngs),
    'remat': lambda: _NNXStack(rngs, rematted),
    'jit': lambda: _NNXLoop(rngs, jitted),
    'tied': lambda: _NNXLoop(rngs, same=True),
    'left': lambda: _NNXLeft(rngs),
    'heads': lambda: _NNXHeads(rngs),
    'bf16': lambda: _NNXBlock(rngs, jnp.bfloat16),
  }[case]()
  graphdef, params, rest = nnx.split(module, nnx.Param, ...)
  forward = lambda p, h: nnx.merge(graphdef, p, rest)(h)
  return Case(_loss(forward), nnx.to_pure_dict(params), '.*kernel')


# Equinox: modules act on one vector, so the weight stands on the left.


class _EqxBlock(eqx.Module):
  up: eqx.nn.Linear
  down: eqx.nn.Linear

  def __init__(self, key):
    up, down = jax.random.split(key)
    self.up = eqx.nn.Linear(D, F, key=up)
    self.down = eqx.nn.Linear(F, D, key=down)

  def __call__(self, h):
    return h + self.down(jnp.tanh(self.up(h)))


def equinox(case):
  over_all = lambda module: jax.vmap(jax.vmap(module))
  keys = jax.random.split(jax.random.key(0), L)
  one, stack = _EqxBlock(keys[0]), eqx.filter_vmap(_EqxBlock)(keys)
  blocks = [_EqxBlock(k) for k in keys]

  def loop(p, h, call=lambda block, h: over_all(block)(h)):
    for block in p:
      h = call(block, h)
    return h

  def scan(p, h, call=lambda block, h: over_all(block)(h)):
    return jax.lax.scan(lambda h, block: (call(block, h), None), h, p)[0]

  remat = eqx.filter_checkpoint(lambda block, h: over_all(block)(h))
  jitted = eqx.filter_jit(lambda block, h: over_all(block)(h))

  def heads(p, h):
    q = jnp.einsum('hkd,btd->bthk', p.up.weight.reshape(H, F // H, D), h)
    w = p.down.weight.reshape(D, H, F // H)
    return jnp.einsum('dhk,bthk->btd', w, jnp.tanh(q))

  def bf16(p, h):
    cast = lambda a: a.astype(jnp.bfloat16)
    return over_all(jax.tree.map(cast, p))(cast(h))

  forward, params = {
    'loop': (loop, blocks),
    'scan': (scan, stack),
    'remat': (lambda p, h: scan(p, h, remat), stack),
    'jit': (lambda p, h: loop(p, h, jitted), blocks),
    'tied': (lambda p, h: loop([p, p], h), one),
    'left': (lambda p, h: over_all(p)(h), one),
    'heads': (heads, one),
    'bf16': (bf16, one),
  }[case]
  return Case(_loss(forward), params, '.*weight')


FRAMEWORKS = {
    'plain': plain, 'linen': linen, 'nnx': nnx_models, 'equinox': equinox,
}  # fmt: skip
CASES = ('loop', 'scan', 'remat', 'jit', 'tied', 'left', 'heads', 'bf16')
