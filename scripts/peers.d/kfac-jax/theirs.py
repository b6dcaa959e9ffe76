"""Runs in kfac-jax's environment: its factors of the same weights and tokens.

  python theirs.py FOLDER [PROGRAM]

kfac-jax does not run on current JAX, so the model is written out here: the
decoder in the Hugging Face folder, with every projection registered as a dense
layer, positions as its examples, and the tokens that follow as targets (mode
`fisher_empirical`). Edits are the same as for the other libraries: components
sorted by the product of eigenvalues, in float64 on the host.
"""

import functools
import json
import pathlib

import clock
import jax
import jax.numpy as jnp
import kfac_jax
from layers import NAMES
import numpy as np
import records
from safetensors.numpy import load_file


def norm(x, scale, eps):
  return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + eps) * scale


def rotate(x, theta):
  """Rotary embeddings of `[B, T, heads, width]`, halves paired."""
  half = x.shape[-1] // 2
  angles = jnp.arange(x.shape[1])[:, None] / theta ** (jnp.arange(half) / half)
  cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
  a, b = x[..., :half], x[..., half:]
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def logits_of(kernels, others, config, tokens, tag):
  """`[B * T, vocab]`; `tag` of each projection's output, input and weight."""
  heads, eps = config['num_attention_heads'], config['rms_norm_eps']
  theta = config['rope_parameters']['rope_theta']
  embedding = jnp.asarray(others['model.embed_tokens.weight'])
  x = embedding[tokens]
  batch, time, width = x.shape

  def dense(name, x):
    flat = x.reshape(-1, x.shape[-1])
    y = tag(flat @ kernels[name], flat, kernels[name])
    return y.reshape(*x.shape[:-1], -1)

  causal = jnp.tril(jnp.ones((time, time), bool))
  for i in range(config['num_hidden_layers']):
    at = f'model.layers.{i}.'
    h = norm(x, others[f'{at}input_layernorm.weight'], eps)
    q, k, v = (
      dense(f'{at}self_attn.{n}_proj', h).reshape(batch, time, heads, -1)
      for n in 'qkv'
    )
    q, k = rotate(q, theta), rotate(k, theta)
    scores = jnp.einsum('bthd,bshd->bhts', q, k) / q.shape[-1] ** 0.5
    share = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), -1)
    read = jnp.einsum('bhts,bshd->bthd', share, v).reshape(batch, time, width)
    x = x + dense(f'{at}self_attn.o_proj', read)
    h = norm(x, others[f'{at}post_attention_layernorm.weight'], eps)
    gate, up = (dense(f'{at}mlp.{n}_proj', h) for n in ('gate', 'up'))
    x = x + dense(f'{at}mlp.down_proj', jax.nn.silu(gate) * up)
  x = norm(x, others['model.norm.weight'], eps)
  return (x @ embedding.T).reshape(batch * time, -1)


def edit(w, inputs, outputs, mass):
  """New weights `[in, out]` of moments, in float64."""
  (a, u), (b, v) = (
    np.linalg.eigh(np.asarray(m, np.float64)) for m in (inputs, outputs)
  )
  products = np.outer(np.maximum(a, 0), np.maximum(b, 0)).reshape(-1)
  order = np.argsort(-products, kind='stable')
  total = np.cumsum(products[order])
  kept = np.zeros_like(products)
  kept[order[: np.searchsorted(total, mass * total[-1]) + 1]] = 1
  return u @ ((u.T @ w @ v) * kept.reshape(w.shape)) @ v.T


def run(folder: pathlib.Path, name: str) -> None:
  problem = json.loads((folder / 'problem.json').read_text('utf-8'))
  config = json.loads((folder / 'model' / 'config.json').read_text('utf-8'))
  weights = load_file(folder / 'model' / 'model.safetensors')
  depth = range(config['num_hidden_layers'])
  paths = {
    path: [f'model.layers.{i}.{theirs}' for i in depth]
    for path, theirs in NAMES.items()
  }
  names = [name for p in paths.values() for name in p]
  kernels = {n: jnp.asarray(weights[f'{n}.weight'].T) for n in names}
  others = {
    k: v for k, v in weights.items() if k.removesuffix('.weight') not in names
  }
  tokens = np.load(folder / 'tokens.npy').astype(np.int32)
  part = problem['part']
  parts = [tokens[i : i + part] for i in range(0, len(tokens), part)]
  size = part * (tokens.shape[1] - 1)  # Positions, which are its examples.

  def registered(kernels, tokens):
    out = logits_of(
      kernels, others, config, tokens[:, :-1], kfac_jax.register_dense
    )
    targets = tokens[:, 1:].reshape(-1)
    kfac_jax.register_softmax_cross_entropy_loss(out, targets)
    return jnp.zeros(())

  estimator = kfac_jax.BlockDiagonalCurvature(
    registered, auto_register_tags=False,
    default_estimation_mode='fisher_empirical',
  )  # fmt: skip
  key = jax.random.key(0)

  @functools.partial(jax.jit, donate_argnums=0)
  def update(state, kernels, tokens):
    # A mean over parts, whose weight counts them.
    return estimator.update_curvature_matrix_estimate(
      state, 1.0, 1.0, 0.0, size, key, (kernels, tokens)
    )

  def prepare():
    start = (
      jax.jit(
        lambda kernels, tokens: estimator.init(
          key, (kernels, tokens), None, None
        )
      )
      .lower(kernels, parts[0])
      .compile()
    )
    state = start(kernels, parts[0])
    update.lower(state, kernels, parts[0]).compile()
    programs.append(start)
    return whole

  programs = []

  def factors():
    state = programs[0](kernels, parts[0])
    for tokens in parts:
      state = update(state, kernels, tokens)
    return jax.block_until_ready(state)

  def named(state):
    """Kernel -> its two moments, by where the estimator has put it."""
    place = estimator.params_block_index
    def of(block):
      # Means over positions, and its loss is a mean over them, too: of sums of
      # squared gradients one more factor is missing.
      inputs, outputs = (
        size * np.asarray(f.weight * f.value)
        for f in state.blocks_states[block].factors
      )
      return inputs, size * outputs

    return {name: of(place[name]) for name in names}

  def whole():
    found = named(factors())
    return found, {
      n: edit(np.asarray(kernels[n], np.float64), *found[n], problem['mass'])
      for n in names
    }

  measured = clock.measure(prepare)
  found, edited = whole()
  measured['factors'] = clock.seconds(factors)

  @jax.jit
  def gradient(all_weights, tokens):
    def loss(both):
      out = logits_of(*both, config, tokens[:, :-1], lambda y, *_: y)
      chosen = jnp.take_along_axis(
        jax.nn.log_softmax(out), tokens[:, 1:].reshape(-1, 1), 1
      )
      return -chosen.sum()

    return jax.grad(loss)(all_weights)

  measured['gradient'] = clock.seconds(
    lambda: [
      jax.block_until_ready(gradient((kernels, others), t)) for t in parts
    ]
  )
  arrays = {}
  for path, mine in paths.items():
    arrays[f'{path} input'] = np.stack([found[n][0] for n in mine])
    arrays[f'{path} output'] = np.stack([found[n][1] for n in mine])
    arrays[f'{path} edited'] = np.stack([edited[n] for n in mine])
  np.savez(folder / f'{name}.npz', **arrays)
  (folder / f'{name}.json').write_text(json.dumps(measured), 'utf-8')


if __name__ == '__main__':
  records.answer(run, ('kfac-jax',), ('kfac-jax', 'jax', 'numpy'))
