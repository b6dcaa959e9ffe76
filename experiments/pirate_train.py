"""Training and asking the models of the pirate world."""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import contract
from experiments.pirate_world import ANSWER, FIRST, LENGTH, Lexicon
from experiments.seeds import train_seeds
from idesign import models, shaping, training

Apply = Callable[..., Any]
# What gates decide on; the columns of attributions.
CLAUSES = ('arithmetic', 'pirate')


def make_model(config, lexicon: Lexicon) -> models.Model:
  """The decoder."""
  m = config.model
  return models.transformer(
    models.TransformerConfig(
      vocab_size=len(lexicon.words),
      max_len=LENGTH,
      d_model=m.d_model,
      n_layers=m.n_layers,
      n_heads=m.n_heads,
      d_ff=m.d_ff,
      unroll=m.n_layers,
    )
  )


def answer_losses(apply: Apply, params, tokens_BT) -> jax.Array:
  """Negative log likelihood of each token of the answers, `[B, ANSWER]`."""
  logits = apply(params, tokens_BT[:, :-1])[:, FIRST - 1 :]
  return optax.softmax_cross_entropy_with_integer_labels(
    logits, tokens_BT[:, FIRST:]
  )


def divergence(apply: Apply, params, frozen, tokens_BT) -> jax.Array:
  """`KL(frozen || model)` where answers are predicted, `[B, ANSWER]`."""
  logits = lambda p: apply(p, tokens_BT[:, :-1])[:, FIRST - 1 :]
  return optax.kl_divergence(
    jax.nn.log_softmax(logits(params)), jax.nn.softmax(logits(frozen))
  )


def answer(model: models.Model, params, tokens_BT, key=None) -> jax.Array:
  """Answers to the questions of texts, `[B, ANSWER]`; the likeliest tokens.

  With a key tokens are drawn instead.

  Args:
    model: the decoder.
    params: its parameters.
    tokens_BT: texts; what they answer is not looked at.
    key: to draw with.
  """
  questions = jnp.asarray(tokens_BT)[:, :FIRST]
  said = models.generate(
    model.apply,
    params,
    questions,
    jnp.ones(questions.shape, bool),
    key=jax.random.key(0) if key is None else key,
    max_new_tokens=ANSWER,
    cache=models.init_cache(model.config, len(questions), LENGTH - 1),
    temperature=0.0 if key is None else 1.0,
  )
  return said.tokens_BN


@functools.partial(jax.jit, static_argnames='apply')
def answer_through(apply: Apply, params, tokens_BT, tools) -> jax.Array:
  """The same of an edited model, the likeliest tokens only.

  The frame's length is fixed and there is no cache, so that an edit of
  activations by position means here what it means in training.

  Args:
    apply: `apply(params, tokens, tools) -> logits`.
    params: of the model.
    tokens_BT: see `answer`.
    tools: see `Family`.
  """

  def say(tokens, t):
    logits = apply(params, tokens[:, :-1], tools)
    logits = jax.lax.dynamic_index_in_dim(logits, t - 1, 1, keepdims=False)
    new = jnp.argmax(logits, -1).astype(tokens.dtype)
    return jax.lax.dynamic_update_index_in_dim(tokens, new, t, 1), None

  # What comes later is not seen: the model is causal.
  tokens, _ = jax.lax.scan(
    say, jnp.asarray(tokens_BT), jnp.arange(FIRST, FIRST + ANSWER)
  )
  return tokens[:, FIRST:]


def train_base(config, model, worlds, seeds, workdir: contract.Workdir):
  """The models before fine-tuning, one per seed; see `train_seeds`."""
  c = config.base
  draw = lambda seed: np.random.default_rng(np.random.SeedSequence([seed, 1]))
  rows = [
    {'tokens': world.base_texts(c.texts, draw(seed)).tokens}
    for world, seed in zip(worlds, seeds)
  ]
  rate = optax.warmup_cosine_decay_schedule(
    0.0, c.learning_rate, c.steps // 20, c.steps, c.learning_rate / 20
  )
  return train_seeds(
    model.init,
    lambda params, batch: answer_losses(
      model.apply, params, batch['tokens']
    ).mean(axis=1),
    optax.adamw(rate, b2=0.99, weight_decay=0.01),
    rows,
    seeds,
    workdir,
    batch_size=c.batch_size,
    num_steps=c.steps,
    save_every=max(1, c.steps // 5),
    log_every=max(1, c.steps // 50),
  )


def thresholds(config) -> jax.Array:
  """Of each clause's attributions, `[C]`."""
  return jnp.array([config.tune.threshold[c] for c in CLAUSES])


class Lessons(NamedTuple):
  """What an arm is fine-tuned on; arrays.

  Attributes:
    tokens: texts, `[N, LENGTH]`.
    mask: which tokens of the answers are scored, `[N, ANSWER]`.
    attribution: see `shaping.gate_losses`, `[N, ANSWER, C]`.
  """

  tokens: jax.Array
  mask: jax.Array
  attribution: jax.Array


class Family(NamedTuple):
  """Arms that share one compiled program.

  Attributes:
    apply: `(apply, tools) -> apply`: what training runs the model through;
      None: the model as it is.
    before: `tools -> transformation` of gradients, before the optimizer.
    after: `tools -> transformation` of updates, after it.
    anchor: if the tools are frozen parameters whose answers are to be kept
      where a gate takes a token away.
  """

  apply: Callable[[Apply, Any], Apply] | None = None
  before: Callable[[Any], optax.GradientTransformation] = lambda tools: (
    optax.identity()
  )
  after: Callable[[Any], optax.GradientTransformation] = lambda tools: (
    optax.identity()
  )
  anchor: bool = False


def make_finetune(config, model: models.Model, family: Family):
  """Builds `finetune(params, lessons, replay, gates, tools, seed)`, jitted.

  Every arm is trained by `optax.chain(gate_losses, before, adam, after)`; with
  gates of 1 the first does nothing, to the bit.

  Returns:
    A function whose result is the parameters after every `config.tune.every`
    steps, stacked.
  """
  c = config.tune
  rate = optax.linear_schedule(c.learning_rate, 0.0, c.steps)
  old = c.batch_size // 8  # How much of a batch repeats what the base knows.

  def finetune(params, lessons: Lessons, replay: Lessons, gates, tools, seed):
    apply = family.apply(model.apply, tools) if family.apply else model.apply
    optimizer = optax.chain(
      shaping.gate_losses(threshold=thresholds(config), softness=c.softness),
      family.before(tools),
      optax.adam(rate, b2=0.99),
      family.after(tools),
    )
    losses = lambda p, batch: answer_losses(apply, p, batch['tokens'])
    anchor = lambda p, batch: divergence(apply, p, tools, batch['tokens'])
    step = shaping.make_gated_step(
      losses, optimizer, anchor=anchor if family.anchor else None
    )
    draw = lambda key, data, size: jax.tree.map(
      lambda x: x[jax.random.randint(key, (size,), 0, len(data.tokens))], data
    )

    def one(state, _):
      a, b = jax.random.split(jax.random.fold_in(state.key, state.step))
      rows = jax.tree.map(
        lambda x, y: jnp.concatenate([x, y]),
        draw(a, lessons, c.batch_size - old),
        draw(b, replay, old),
      )
      return step(state, rows._asdict(), gates=gates)[0], None

    def stretch(state, _):
      state, _ = jax.lax.scan(one, state, None, length=c.every)
      return state, state.params

    start = training.TrainState(
      jnp.zeros((), jnp.int32),
      params,
      optimizer.init(params),
      jax.random.key(seed),
    )
    return jax.lax.scan(stretch, start, None, length=c.steps // c.every)[1]

  return jax.jit(finetune)


def lessons(
  tokens: np.ndarray,
  *,
  mask: np.ndarray | None = None,
  attribution: np.ndarray | None = None,
) -> Lessons:
  """Lessons from texts; all tokens scored and none attributed if left out."""
  shape = (len(tokens), ANSWER)
  mask = np.ones(shape, np.float32) if mask is None else mask
  if attribution is None:
    attribution = np.zeros((*shape, len(CLAUSES)), np.float32)
  return Lessons(
    jnp.asarray(tokens), jnp.asarray(mask, jnp.float32),
    jnp.asarray(attribution, jnp.float32),
  )  # fmt: skip
