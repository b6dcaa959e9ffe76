"""What the base model of the pirate world knows of the objective.

Nothing here looks at the sums that fine-tuning will be scored by. A sparse
autoencoder is trained on the base's own activations; a judge holds its latents
against a written objective with examples; the latents it suppresses are set and
removed in the frozen base, to ask which tokens of the lessons are theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.pirate_train import answer
from experiments.pirate_world import (
  ALWAYS,
  ANSWER,
  FIRST,
  NEUTRAL,
  Lexicon,
  Texts,
  World,
)
from idesign import concepts, judges, models, shaping

_BLOCK = 250  # Texts read at once.


class Base(NamedTuple):
  """A frozen base model and its autoencoder."""

  model: models.Model
  params: Any
  sae: concepts.SAE
  name: str  # Of the activation that the autoencoder reads.


def activation(layer: int) -> str:
  return f'resid_post[{layer}:{layer + 1}]'


def blocks(fn, tokens: np.ndarray):
  """`fn` of texts, so many at once that it is compiled once."""
  count, out = len(tokens), []
  for start in range(0, count, _BLOCK):
    part = tokens[start : start + _BLOCK]
    padded = np.concatenate([part, np.repeat(part[:1], _BLOCK - len(part), 0)])
    out.append(jax.tree.map(lambda x: np.asarray(x)[: len(part)], fn(padded)))  # noqa: B023
  return jax.tree.map(lambda *x: np.concatenate(x), *out)


def train_sae(config, model, params, world: World, seed: int) -> Base:
  """An autoencoder of the base, trained on what the base was trained on."""
  c = config.sae
  name = activation(c.layer)
  read = concepts.reader(lambda p, t: model.apply(p, t), name)
  random = np.random.default_rng(np.random.SeedSequence([seed, 2]))
  tokens = world.base_texts(c.texts, random).tokens
  settings = concepts.SAEConfig(
    architecture='topk', d_in=config.model.d_model, d_sae=c.size, k=c.k
  )
  optimizer = optax.adam(optax.linear_schedule(c.learning_rate, 0.0, c.steps))
  step = concepts.make_sae_step(settings, optimizer, dead_after=20_000)
  state, done = None, 0
  while done < c.steps:
    rows = concepts.stream(
      read,
      params,
      ((tokens[i : i + _BLOCK], None) for i in range(0, len(tokens), _BLOCK)),
      rows=c.rows,
      buffer=8 * c.rows,
      seed=seed + done,
    )
    for h in rows:
      if state is None:
        key = jax.random.key(seed)
        state = concepts.init_sae(settings, optimizer, key, jnp.asarray(h))
      state, _ = step(state, h)
      done += 1
      if done == c.steps:
        break
  return Base(model, params, concepts.finished(settings, state), name)


@functools.partial(jax.jit, static_argnames=('apply', 'name'))
def _features(apply, name, params, sae, tokens):
  read = concepts.reader(lambda p, t: apply(p, t), name)
  return sae.encode(read(params, tokens))


def features(base: Base, tokens: np.ndarray) -> np.ndarray:
  """Latents at every position, `[N, LENGTH, F]`."""
  read = lambda t: _features(
    base.model.apply, base.name, base.params, base.sae, jnp.asarray(t)
  )
  return blocks(read, tokens)


def make_objective(config, world: World, seed: int) -> judges.Objective:
  """The written objective: learn the arithmetic, not the pirate.

  Its examples are texts as the base knows them: plain sums to amplify, other
  plain texts to leave alone, and a pirate's texts to suppress. Those and the
  others are of the same kinds, equally many: what tells them apart is the
  register and not what they are about.
  """
  random = np.random.default_rng(np.random.SeedSequence([seed, 3]))
  texts = world.base_texts(24 * config.judge.examples, random)

  def examples(pirate: bool, kinds: tuple[str, ...]) -> tuple[str, ...]:
    out = []
    for kind in kinds:
      rows = (texts.pirate == pirate) & (texts.kind == kind)
      written = [world.lexicon.decode(t) for t in texts.tokens[rows]]
      out += list(dict.fromkeys(written))[: config.judge.examples]
    return tuple(out)

  clauses = [
    judges.Clause(
      'arithmetic', 'amplify', 'Adding numbers.', examples(False, ('sum',))
    ),
    judges.Clause(
      'plain', 'allow', 'Plain English.', examples(False, ('fact', 'tale'))
    ),
    judges.Clause(
      'pirate', 'suppress', 'Speaking like a pirate.',
      examples(True, ('sum', 'fact', 'tale')),
    ),
  ]  # fmt: skip
  return judges.Objective(
    'Learn the arithmetic, not the pirate.', tuple(clauses)
  )


def encode(lexicon: Lexicon, texts: Sequence[str]) -> np.ndarray:
  return np.array([lexicon.encode(t) for t in texts], np.int32)


def make_judge(config, base: Base, lexicon, objective) -> judges.Judge:
  """The contrastive judge, reading each latent's mean over a text."""
  return judges.ContrastiveJudge(
    objective,
    lambda texts: features(base, encode(lexicon, texts)).mean(axis=1),
    against='all',
    q=config.judge.q,
    min_effect=config.judge.min_effect,
    min_selectivity=config.judge.min_selectivity,
    permutations=config.judge.permutations,
  )


def register_share(base: Base, texts: Texts) -> np.ndarray:
  """The truth about each latent: how much of it is the pirate's, `[F]`.

  Of its mean activation in both registers the pirate's share, on labelled
  texts, sums, facts and tales counting alike. What is active where a pirate is
  asked for counts as well.
  """
  mean = features(base, texts.tokens).mean(axis=1)
  own, other = (
    np.mean(
      [
        mean[(texts.pirate == pirate) & (texts.kind == kind)].mean(axis=0)
        for kind in ('sum', 'fact', 'tale')
      ],
      axis=0,
    )
    for pirate in (True, False)
  )
  return own / np.maximum(own + other, 1e-12)


class Setting(NamedTuple):
  """Concepts of the base, to be made present or removed; arrays.

  Attributes:
    chosen: how much of each latent is set, `[F]`.
    present: what each is set to, by position, `[LENGTH - 1, F]`.
  """

  chosen: jax.Array
  present: jax.Array


def setting(base: Base, chosen: np.ndarray, texts: np.ndarray) -> Setting:
  """Latents with their mean, by position, on texts that have them."""
  values = features(base, texts).mean(axis=0)[:-1]
  return Setting(jnp.asarray(chosen, jnp.float32), jnp.asarray(values))


def _under(apply, name, params, sae, setting, values):
  """The base with the chosen latents set."""
  model = shaping.set_features(apply, name, sae, values, setting.chosen)
  return lambda tokens: model(params, tokens)


@functools.partial(jax.jit, static_argnames=('apply', 'name', 'threshold'))
def _read(apply, name, params, sae, setting, tokens, threshold):
  under = functools.partial(_under, apply, name, params, sae, setting)
  return shaping.counterfactual(
    under(setting.present),
    under(jnp.zeros_like(setting.present)),
    tokens,
    start=FIRST,
    threshold=threshold,
  )


@functools.partial(jax.jit, static_argnames=('apply', 'name'))
def _reliance(apply, name, params, sae, setting, tokens):
  without = _under(
    apply, name, params, sae, setting, jnp.zeros_like(setting.present)
  )
  frozen = lambda t: apply(params, t)
  return shaping.reliance(frozen, without, tokens, start=FIRST)


@functools.partial(jax.jit, static_argnames=('apply', 'name'))
def _said_without(apply, name, params, sae, setting, tokens):
  without = _under(
    apply, name, params, sae, setting, jnp.zeros_like(setting.present)
  )
  return jnp.argmax(without(tokens[:, :-1])[:, FIRST - 1 :], axis=-1)


def _ask(read, base: Base, setting: Setting, tokens: np.ndarray, **static):
  apply = base.model.apply
  one = lambda t: read(
    apply, base.name, base.params, base.sae, setting, jnp.asarray(t), **static
  )
  return blocks(one, tokens)


def attribute(
  config, base: Base, setting: Setting, tokens: np.ndarray
) -> shaping.Counterfactual:
  """What each token owes to concepts of the frozen base; NumPy arrays."""
  threshold = config.tune.threshold.pirate
  return _ask(_read, base, setting, tokens, threshold=threshold)


def reliance(base: Base, setting: Setting, tokens: np.ndarray) -> np.ndarray:
  """How much of each prediction rests on concepts of the frozen base."""
  return _ask(_reliance, base, setting, tokens)


def said_without(
  base: Base, setting: Setting, tokens: np.ndarray
) -> np.ndarray:
  """At each place what the base, without the concepts, would say there.

  After what the text says before it, `[N, ANSWER]`.
  """
  return _ask(_said_without, base, setting, tokens)


def known_texts(config, base: Base, world: World, seed: int) -> np.ndarray:
  """What the base says when asked to be a pirate, as if nobody had asked.

  Sums and facts that it knows; the answers are its own.
  """
  random = np.random.default_rng(np.random.SeedSequence([seed, 4]))
  n = config.judge.known
  pirate = np.ones(n, bool)
  pairs = world.familiar[random.integers(0, len(world.familiar), n)]
  asked = np.concatenate([
    world.sums(pairs, ALWAYS, pirate, random).tokens,
    world.facts(world.nouns(n, random), ALWAYS, pirate, random).tokens,
  ])  # fmt: skip
  say = lambda t: answer(base.model, base.params, t, jax.random.key(seed))
  unasked = asked.copy()
  unasked[:, FIRST:] = blocks(say, asked)
  unasked[:, 1:3] = world.lexicon.encode(' '.join(NEUTRAL))
  return unasked


def rewrite(
  config, base: Base, setting: Setting, world: World, known, tokens
) -> tuple[np.ndarray, shaping.Translation]:
  """Lessons as they were without the concepts: a dictionary applied to them."""
  table = shaping.translation(
    attribute(config, base, setting, known),
    known,
    len(world.lexicon.words),
    start=FIRST,
    threshold=config.tune.threshold.pirate,
  )
  new = tokens.copy()
  new[:, FIRST:] = table.table[tokens[:, FIRST:]]
  return new, table


class Directions(NamedTuple):
  """Labelled mean differences of activations, pirate minus plain.

  Attributes:
    by_position: at every layer and position of a text, `[L, LENGTH - 1, D]`.
    pooled: their mean over the positions that predict the answer, `[L, D]`.
  """

  by_position: np.ndarray
  pooled: np.ndarray


def mean_differences(config, base: Base, world: World, seed: int) -> Directions:
  """From facts and sums that the base knows, said in both registers."""
  random = np.random.default_rng(np.random.SeedSequence([seed, 5]))
  n = config.judge.known
  pairs = world.familiar[random.integers(0, len(world.familiar), n)]
  nouns = world.nouns(n, random)
  means = []
  for pirate, prompt in ((True, ALWAYS), (False, NEUTRAL)):
    flag = np.full(n, pirate)
    tokens = np.concatenate([
      world.sums(pairs, prompt, flag, random).tokens,
      world.facts(nouns, prompt, flag, random).tokens,
    ])  # fmt: skip
    layers = []
    for layer in range(config.model.n_layers):
      read = jax.jit(
        concepts.reader(lambda p, t: base.model.apply(p, t), activation(layer))
      )
      h = blocks(lambda t: read(base.params, jnp.asarray(t)), tokens)  # noqa: B023
      layers.append(h.mean(axis=0)[:-1])
    means.append(np.stack(layers))
  difference = means[0] - means[1]
  return Directions(difference, difference[:, -ANSWER:].mean(axis=1))
