"""What a model of the small language still knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.recitation_world import (
  ANSWER, CONTEXT, FACTS_IN_A_ROW, LENGTH, PAD, PREFIX, QUERIES, RULES, SIZES,
  SUFFIX, SUMS_IN_A_ROW, World, exam_rows, recitations,
)  # fmt: skip
from idesign import curvature, models

# What is kept if the edit is good; sums apart, which factors may leave out.
RETAINED = (*RULES, 'book')
FACTS = ('frequent facts', 'rare facts')
SHORT = 5  # Tokens of the shortest rule's answer.
_PARTS = {
  **{rule: (1, SIZES[rule]) for rule in RULES},
  'book': (QUERIES, 1),
  'sums': (SUMS_IN_A_ROW, 2),
  **{name: (FACTS_IN_A_ROW, 1) for name in FACTS},
}  # Kind -> answers of a row, and tokens of an answer.


def weighted_losses(model: models.Model) -> Callable[[Any, Any], jax.Array]:
  """`loss(params, rows) -> [B]`: answers count 1, what leads to them 0.1."""
  weights = jnp.array([0.0, 0.1, 1.0])

  def loss(params, batch):
    tokens = batch['tokens'].astype(jnp.int32)
    logits = model.apply(params, tokens[:, :-1])
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.sum(nll * weights[batch['role'][:, 1:]], axis=1)

  return loss


def answer_losses(
  model: models.Model, temperature: float = 1.0
) -> Callable[[Any, Any], jax.Array]:
  """`loss(params, rows) -> [B]` over answers alone, summed."""

  def loss(params, batch):
    tokens = batch['tokens'].astype(jnp.int32)
    logits = model.apply(params, tokens[:, :-1]) / temperature
    mask = batch['role'][:, 1:] == ANSWER
    return curvature.negative_log_likelihood(logits, tokens[:, 1:], mask)

  return loss


class Exam:
  """Asks everything of a model; `exam(params)` is in percent.

  Whole answers have to be right, but for `tokens`. Recitation is teacher-forced
  (each token given the right ones before it), as published, and `free`: said on
  and on from the prefix. `five`: the first five tokens alone, as long as the
  shortest rule's answer.
  """

  def __init__(self, model: models.Model, world: World, count: int):
    self._model = model
    self._rows = exam_rows(world, count)
    self._tokens = np.concatenate([r.tokens for r in self._rows.values()])
    self._predict = jax.jit(
      lambda params, tokens: jnp.argmax(model.apply(params, tokens), axis=-1)
    )
    prompts = self._rows['recite'].tokens[:, : 1 + PREFIX].astype(np.int32)
    cache = models.init_cache(model.config, batch=len(prompts), slots=LENGTH)
    self._say = jax.jit(
      lambda params: models.generate(
        model.apply, params, prompts, jnp.ones(prompts.shape, bool),
        key=jax.random.key(0), max_new_tokens=SUFFIX, cache=cache,
        temperature=0.0,
      ).tokens_BN
    )  # fmt: skip

  def hits(self, params) -> dict[str, np.ndarray]:
    """Kind -> whether each answer's tokens are right, `[answers, tokens]`."""
    tokens = self._tokens.astype(np.int32)
    said = np.asarray(self._predict(params, tokens[:, :-1]))
    right = said == tokens[:, 1:]
    out, start = {}, 0
    for kind, rows in self._rows.items():
      mine = right[start : start + len(rows.tokens)]
      start += len(rows.tokens)
      answers = mine[rows.role[:, 1:] == ANSWER]
      size = _PARTS[kind][1] if kind in _PARTS else SUFFIX
      out[kind] = answers.reshape(-1, size)
    return out

  def __call__(self, params) -> dict[str, float]:
    hits = self.hits(params)
    percent = lambda x: 100 * float(np.mean(x))
    recited = hits['recite']
    free = np.asarray(self._say(params))[:, -SUFFIX:]
    whole = self._rows['recite'].tokens[:, -SUFFIX:]
    half = len(recited) // 2
    return {
      'recited': percent(recited.all(1)),
      'recited_told': percent(recited[:half].all(1)),
      'recited_untold': percent(recited[half:].all(1)),
      'five': percent(recited[:, :SHORT].all(1)),
      'tokens': percent(recited),
      'free': percent((free == whole).all(1)),
      **{kind: percent(hits[kind].all(1)) for kind in _PARTS},
    }


def kept_share(row, base, kinds) -> float:
  """Of its own mean accuracy in some kinds, what a model keeps, in percent.

  Zero for what was never learned: there is nothing to be proud of.
  """
  before = np.mean([base[k] for k in kinds])
  after = np.mean([row[k] for k in kinds])
  return float(100 * after / before) if before else 0.0


def worst_kept(row, base, kinds=RETAINED) -> float:
  """The least of those shares over kinds, each by itself."""
  return min(kept_share(row, base, [k]) for k in kinds)


def relearning(
  model: models.Model, world: World, params, *, rate: float, steps: int,
  every: int,
) -> dict[str, list[float]]:  # fmt: skip
  """How fast an edited model learns its sequences again, beside new ones.

  What was erased is learned like what was never known; what is only broken
  comes back at once.

  Returns:
    Kind -> percent recited after `0, every, 2 every, ...` full-batch steps.
  """
  random = np.random.default_rng(np.random.SeedSequence([world.seed, 2]))
  kinds = {
    'recited before': recitations(world.recited),
    'never seen': world.rows('strangers', len(world.recited), random),
  }
  optimizer = optax.adam(rate)
  loss = weighted_losses(model)

  @jax.jit
  def learn(params, batch):
    tokens = batch['tokens'].astype(jnp.int32)
    suffix = batch['role'][:, 1:] == ANSWER

    def look(params):
      said = jnp.argmax(model.apply(params, tokens[:, :-1]), axis=-1)
      right = (said == tokens[:, 1:]) | ~suffix
      return 100 * jnp.mean(right.all(axis=1))

    def step(carry, _):
      params, state = carry
      grads = jax.grad(lambda p: loss(p, batch).mean())(params)
      updates, state = optimizer.update(grads, state, params)
      return (optax.apply_updates(params, updates), state), None

    def chunk(carry, _):
      carry, _ = jax.lax.scan(step, carry, None, length=every)
      return carry, look(carry[0])

    carry = params, optimizer.init(params)
    _, curve = jax.lax.scan(chunk, carry, None, length=steps // every)
    return jnp.concatenate([look(params)[None], curve])

  return {
    kind: np.asarray(learn(params, rows._asdict())).tolist()
    for kind, rows in kinds.items()
  }


def factor_rows(world: World, count: int, stream: int, *, answers, without=()):
  """Rows as `curvature.FactorStream` takes them.

  Args:
    world: of the language.
    count: of rows.
    stream: number of the random stream; not those of training or the exam.
    answers: whether factors are of positions before an answer alone, or of all
      but padding.
    without: tasks that are left out.
  """
  tokens, role = world.corpus(count, stream, without=without)
  after = role[:, 1:]
  return {
    'inputs': tokens[:, :-1].astype(np.int32),
    'labels': np.where(tokens[:, 1:] == PAD, 0, tokens[:, 1:]).astype(np.int32),
    'mask': after == ANSWER if answers else after >= CONTEXT,
  }
