"""A complete training script on `idesign.training`, as a user would write it.

The tests run it as a process of its own, kill it, resume it and spread it over
processes: `python -m tests.training.script WORKDIR [--data=2 --model=4 ...]`.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax

from idesign import training

VOCAB, WIDTH, HIDDEN, TIME = 32, 16, 512, 6
BATCH = 16

RULES = (
  ('embed/table', P()),
  ('mlp/up/kernel', P(None, 'model')),
  ('mlp/up/bias', P('model')),
  ('mlp/down/kernel', P('model', None)),
)


def init(key):
  keys = jax.random.split(key, 3)
  normal = lambda key, *shape: jax.random.normal(key, shape) / shape[0] ** 0.5
  return {
    'embed': {'table': normal(keys[0], VOCAB, WIDTH)},
    'mlp': {
      'up': {
        'kernel': normal(keys[1], WIDTH, HIDDEN),
        'bias': jnp.zeros(HIDDEN),
      },
      'down': {'kernel': normal(keys[2], HIDDEN, VOCAB)},
    },
  }


def loss(params, batch):
  """Next-token cross-entropy per example, `[B]`, with dropout."""

  def example(tokens_T, mask_T, key):
    h_TD = params['embed']['table'][tokens_T[:-1]]
    up = params['mlp']['up']
    h_TH = jax.nn.relu(h_TD @ up['kernel'] + up['bias'][None])
    h_TH = h_TH * jax.random.bernoulli(key, 0.9, h_TH.shape)
    logits_TV = h_TH @ params['mlp']['down']['kernel']
    nll_T = optax.softmax_cross_entropy_with_integer_labels(
      logits_TV, tokens_T[1:]
    )
    mask_T = mask_T[1:].astype(nll_T.dtype)
    return jnp.sum(nll_T * mask_T) / jnp.sum(mask_T)

  return jax.vmap(example)(batch['tokens'], batch['mask'], batch['key'])


def rows(num_rows=70):
  rng = np.random.default_rng(0)
  start = rng.integers(VOCAB, size=(num_rows, 1))
  tokens = (start + 3 * np.arange(TIME)) % VOCAB
  mask = np.arange(TIME) < rng.integers(3, TIME + 1, size=(num_rows, 1))
  return {
    'tokens': tokens.astype(np.int32),
    'mask': mask,
    'weight': rng.integers(1, 4, size=num_rows).astype(np.float32),
  }


def optimizer():
  return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))


def run(workdir, *, mesh, num_steps, save_every=5, accumulate=1, seed=0):
  """Trains to `num_steps`, resuming from `workdir` if it was started there."""
  config = {'num_steps': num_steps, 'seed': seed, 'width': WIDTH}
  with training.Checkpointer(workdir, config) as checkpointer:
    state = training.init_state(
      init, optimizer(), jax.random.key(seed), mesh=mesh, rules=RULES
    )
    step = training.make_train_step(
      loss,
      optimizer(),
      accumulate=accumulate,
      shardings=training.state_shardings(state, mesh, RULES),
    )
    data = training.Batches(rows(), BATCH, seed=seed, mesh=mesh)
    path = checkpointer.workdir / 'metrics.jsonl'
    with training.MetricsWriter(path) as writer:
      return training.fit(
        state,
        step,
        data,
        num_steps=num_steps,
        mesh=mesh,
        checkpointer=checkpointer,
        save_every=save_every,
        writer=writer,
      )


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('workdir', type=pathlib.Path)
  parser.add_argument('--meshes', nargs='+', default=['1x1'])
  parser.add_argument('--num_steps', type=int, default=10)
  parser.add_argument('--save_every', type=int, default=5)
  args = parser.parse_args()
  training.initialize_distributed()
  for name in args.meshes:
    data, model = map(int, name.split('x'))
    mesh = training.make_mesh(data, model)
    state = run(
      args.workdir / name,
      mesh=mesh,
      num_steps=args.num_steps,
      save_every=args.save_every,
    )
    np.save(
      args.workdir / name / f'rows_{jax.process_index()}.npy',
      training.process_rows(mesh, BATCH),
    )
    if jax.process_count() == 1:
      np.savez(
        args.workdir / name / 'final.npz',
        *jax.tree.leaves((state.params, state.opt_state)),
        key=jax.random.key_data(state.key),
      )


if __name__ == '__main__':
  main()
