"""Runs in an environment with JAX Privacy and what this library needs.

  python theirs.py FOLDER [PROGRAM]

JAX Privacy's `clipped_fun` maps a function over examples and hands back what it
returns for each: here the products of the example's gradient with all
directions. Once for the whole batch at once, which is its default, and once
in microbatches of 8, which is what it offers against running out of memory.
Without PROGRAM it runs itself once for each, in a process of its own.
"""

import json
import pathlib

import clock
import jax
import jax.numpy as jnp
from jax_privacy import clipping
import numpy as np
import problem
import records

from experiments.benchmarks import subject
from idesign import models


def leaf(tree, path):
  for key in path.split('/'):
    tree = tree[key]
  return tree


def run(folder: pathlib.Path, name: str) -> None:
  model, params = models.load_pretrained(folder / 'model')
  tokens, directions = jax.tree.map(jnp.asarray, problem.load(folder))
  loss = subject.loss_of(model)
  projections = {path: leaf(params, path) for path in directions}

  def with_projections(projections):
    """The parameters, of which only these are differentiated."""
    out = jax.tree.map(lambda x: x, params)
    for path, value in projections.items():
      *parents, last = path.split('/')
      leaf(out, '/'.join(parents))[last] = value
    return out

  def one(projections, directions, batch):
    objective = lambda p: loss(with_projections(p), batch).sum()
    gradient = jax.grad(objective)(projections)
    products = [
      jnp.einsum('cli,clo,lio->c', *directions[path], gradient[path])
      for path in directions
    ]
    return jnp.zeros(()), sum(products)

  scores = clipping.clipped_fun(
    one,
    has_aux=True,
    batch_argnums=2,
    l2_clip_norm=1.0,
    microbatch_size=problem.PROGRAMS[name],
  )
  arguments = (projections, directions, tokens)

  def prepare():
    compiled = jax.jit(lambda *a: scores(*a)[1]).lower(*arguments).compile()
    return lambda: jax.block_until_ready(compiled(*arguments))

  measured = clock.measure(prepare)
  np.save(folder / f'{name}.npy', np.asarray(prepare()()))
  (folder / f'{name}.json').write_text(json.dumps(measured), 'utf-8')


if __name__ == '__main__':
  records.answer(run, problem.PROGRAMS, ('jax-privacy', 'jax', 'numpy'))
