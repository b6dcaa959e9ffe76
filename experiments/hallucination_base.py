"""The model before reinforcement learning, and sampling from it and others."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int
import numpy as np
import optax

from experiments.hallucination_grammar import (
  ANSWER, EOS, LONG, PAD, Questions, learned,
)  # fmt: skip
from experiments.hallucination_world import World
from idesign import models, probes, training


def make_model(config, vocabulary: int) -> models.Model:
  """The decoder."""
  m = config.model
  return models.transformer(
    models.TransformerConfig(
      vocab_size=vocabulary,
      max_len=LONG + ANSWER,
      d_model=m.d_model,
      n_layers=m.n_layers,
      n_heads=m.n_heads,
      d_ff=m.d_ff,
      gated=False,
      activation='gelu',
    )  # fmt: skip
  )


class Corpus:
  """Batches of what the base is trained on, new texts at every step."""

  def __init__(self, config, world: World, seed: int):
    self._config, self._world, self._seed = config, world, seed

  def batch(self, step: int) -> dict[str, np.ndarray]:
    """Each row has several short texts and a list."""
    c = self._config
    random = np.random.default_rng(
      np.random.SeedSequence([self._seed, 1, step])
    )
    short = self._world.short_texts(c.rows * c.short_texts, random)
    lists = self._world.lists(self._world.spoken(c.rows, random), random)
    return {'short': short.reshape(c.rows, c.short_texts, -1), 'list': lists}

  def position(self, step: int) -> dict[str, Any]:
    return {'seed': self._seed, 'step': step}


def train_base(config, model, world: World, seed: int, workdir):
  """Parameters of a base model; goes on from its last checkpoint."""
  c = config.base

  def nll(params, tokens):
    logprobs = probes.token_logprobs(model.apply(params, tokens), tokens)
    mask = learned(tokens)
    return -jnp.where(mask, logprobs, 0).sum(axis=1), mask.sum(axis=1)

  def loss(params, batch):
    rows = len(batch['list'])
    short, count = nll(
      params, batch['short'].reshape(-1, batch['short'].shape[-1])
    )
    lists, more = nll(params, batch['list'])
    per_row = lambda x: x.reshape(rows, -1).sum(axis=1)
    # A token weighs the same wherever it stands.
    total = count.sum() + more.sum()
    return (per_row(short) + lists) * rows / total

  rate = optax.warmup_cosine_decay_schedule(
    0.0, c.learning_rate, c.steps // 30, c.steps
  )
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.01)
  )
  folder = workdir.path / 'bases' / str(seed)
  with (
    training.Checkpointer(
      folder, workdir.config, ignore=['environment']
    ) as checkpointer,
    training.MetricsWriter(folder / 'metrics.jsonl') as writer,
  ):
    state = training.fit(
      training.init_state(model.init, optimizer, jax.random.key(seed)),
      training.make_train_step(loss, optimizer),
      Corpus(c, world, seed),
      num_steps=c.steps,
      checkpointer=checkpointer,
      save_every=max(1, c.steps // 4),
      writer=writer,
      log_every=max(1, c.steps // 50),
    )
  return state.params


@functools.partial(jax.jit, static_argnames=('model', 'new_tokens', 'greedy'))
def _say(model, params, prompts, mask, key, *, new_tokens, greedy):
  said = models.generate(
    model.apply, params, prompts, mask, key=key, max_new_tokens=new_tokens,
    cache=models.init_cache(
      model.config, len(prompts), prompts.shape[1] + new_tokens
    ),
    stop_tokens=(EOS,), pad_token=PAD, temperature=0.0 if greedy else 1.0,
  )  # fmt: skip
  return jnp.concatenate([prompts, said.tokens_BN], axis=1)


def say(
  model: models.Model, params, prompts: Int[Array, 'N T'], key, *,
  new_tokens: int = ANSWER, greedy: bool = False, batch: int = 1024,
) -> Int[np.ndarray, 'N T+n']:  # fmt: skip
  """Prompts and what a model says to them, a batch at a time.

  Args:
    model: the decoder.
    params: its parameters.
    prompts: padded with `PAD` on the left.
    key: to draw with; batch `i` draws with `fold_in(key, i)`.
    new_tokens: of each answer.
    greedy: the likeliest tokens instead.
    batch: prompts at a time; the last are filled up to a power of four, so that
      little is compiled twice.
  """
  prompts = np.asarray(prompts)
  out = []
  for i, start in enumerate(range(0, len(prompts), batch)):
    part = prompts[start : start + batch]
    count = len(part)
    size = min(batch, 4 ** math.ceil(math.log(count, 4)))
    part = np.resize(part, (size, part.shape[1]))
    texts = _say(
      model, params, part, part != PAD, jax.random.fold_in(key, i),
      new_tokens=new_tokens, greedy=greedy,
    )  # fmt: skip
    out.append(np.asarray(texts)[:count])
  return np.concatenate(out)


def grade(world: World, texts, questions: Questions):
  """`Answers` of texts that answer questions, on the host."""
  info = {
    k: getattr(questions, k) for k in ('kind', 'attribute', 'value', 'true')
  }
  return world.grammar.grade(np.asarray(texts), info)
