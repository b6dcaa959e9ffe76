"""A base model, its reader, and the policies that are made of them."""

from __future__ import annotations

import json
import pathlib

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np
import optax

from experiments import contract
from experiments.hallucination_full_probe import Reader
from experiments.hallucination_text import Asked, Chat
from idesign import rewards
from idesign.probes import Pressure

ANSWERS = 2  # To each prompt that is held out.
ARMS = {
  'none': Pressure.NONE,
  'frozen': Pressure.FROZEN,
  'live': Pressure.LIVE,
}


class Prompts:
  """Batches of prompts, in an order that is a function of the seed."""

  def __init__(self, asked: Asked, count: int, seed: int):
    self._asked, self._count, self._seed = asked, count, seed

  def batch(self, step: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(np.random.SeedSequence([self._seed, step]))
    rows = random.choice(len(self._asked.texts), self._count, replace=False)
    tokens, mask, _ = self._asked.rows(rows)
    return {'prompts': tokens, 'mask': mask}

  def position(self, step: int) -> dict[str, int]:
    return {'seed': self._seed, 'step': step}


class Lab:
  """A base, its reader, and what policies are made of."""

  def __init__(self, config, chat: Chat, model, params, mesh, reader: Reader):
    self.config, self.chat, self.model = config, chat, model
    self.params, self.mesh, self.reader = params, mesh, reader
    c = config.rl
    self.policy = rewards.PolicyConfig(
      group=c.group, max_new_tokens=config.lengths.completion,
      stop_tokens=chat.stop_tokens, pad_token=chat.pad_token,
      divergence=c.divergence, divergence_weight=c.divergence_weight,
      minibatches=c.minibatches,
    )  # fmt: skip
    self.optimizer = optax.chain(
      optax.clip_by_global_norm(1.0), optax.adam(c.learning_rate)
    )
    self._sample = jax.jit(
      lambda adapters, params, tokens, mask, key: rewards.sample_groups(
        model.apply,
        self.lift(adapters, params),
        tokens,
        mask,
        config=model.config,
        group=ANSWERS,
        key=key,
        max_new_tokens=config.lengths.completion,
        stop_tokens=chat.stop_tokens,
        pad_token=chat.pad_token,
      )  # fmt: skip
    )
    self._look = jax.jit(self._seen)

  def lift(self, adapters, params):
    scale = self.config.rl.alpha / self.config.rl.rank
    return rewards.merge_lora(params, adapters, scale=scale)

  def everywhere(self, make, *arguments):
    """What `make` returns, whole on every device of every process."""
    whole = NamedSharding(self.mesh, P())
    return jax.jit(make, out_shardings=whole)(*arguments)

  def adapters(self):
    """New ones."""
    c = self.config.rl
    key = jax.random.key(self.config.seed)
    return self.everywhere(
      lambda params: rewards.init_lora(params, c.adapted, rank=c.rank, key=key),
      self.params,
    )

  def make_step(self, arm: str, median: float, share: float):
    """The step of an arm.

    Args:
      arm: of `ARMS`.
      median: of the base's numbers of claims.
      share: of the base's answers that have as many.
    """
    c = self.config.rl
    pressure = ARMS[arm]

    def worth(scene):
      count_B, doubts_BM, there_BM = self._claims(scene, pressure)
      value = jnp.where(there_BM, 1 - c.weight * doubts_BM, 0).sum(axis=1)
      return value / jnp.maximum(count_B, 1)

    term = rewards.Term(name='claims', value=worth, pressure=pressure)
    return rewards.make_policy_step(
      self.model.apply, self.model.config, self.reader.probe.observe,
      self.optimizer, [term], rewards.reinforce(c.cap), self.policy,
      lift=self.lift, constraints=[self._enough(median, share)],
    )  # fmt: skip

  def start(self) -> rewards.PolicyState:
    """The state before the first step."""
    key = jax.random.key(self.config.seed + 1)
    held = [self._enough(0.0, 0.5)]
    return self.everywhere(
      lambda adapters: rewards.init_policy(
        adapters, self.optimizer, key, self.policy, held
      ),
      self.adapters(),
    )

  def _enough(self, median: float, share: float) -> rewards.RateConstraint:
    """As many answers with `median` claims as there were."""
    return rewards.RateConstraint(
      name='enough',
      event=lambda scene: self._claims(scene, Pressure.NONE)[0] >= median,
      target=share,
      gain=self.config.rl.gain,
    )

  def _claims(self, scene: rewards.Scene, pressure: Pressure):
    said_BT = scene.samples.sampled_BT
    spans_BMT = self.reader.locate(scene.teacher, said_BT)
    there_BM = spans_BMT.any(axis=2)
    score = lambda spans: scene.probe.scores(scene.teacher, spans)
    if pressure is Pressure.LIVE:
      score = lambda spans: scene.probe.live_scores(scene.student, spans)
    if pressure is Pressure.NONE:
      score = lambda spans: jnp.zeros(len(spans))
    doubts_BM = jax.vmap(score, in_axes=1, out_axes=1)(spans_BMT)
    return there_BM.sum(axis=1), doubts_BM, there_BM

  def _seen(self, adapters, probe, samples: rewards.Samples):
    """What the frozen model and the policy make of answers, `[B]` each."""
    frozen = probe.read(samples.tokens_BT, samples.mask_BT)
    params = self.lift(adapters, probe.params)
    live = probe.observe(params, samples.tokens_BT, samples.mask_BT)
    spans_BMT = self.reader.locate(frozen, samples.sampled_BT)
    there_BM = spans_BMT.any(axis=2)
    over = lambda score, view: jax.vmap(
      lambda s: score(view, s), in_axes=1, out_axes=1
    )(spans_BMT)
    doubts_BM = over(probe.scores, frozen)
    sum_ = lambda x_BM: jnp.where(there_BM, x_BM, 0).sum(axis=1)
    apart_BT = rewards.divergence.exact(live.logits_BTV, frozen.logits_BTV)
    apart_BT = jnp.where(samples.sampled_BT[:, 1:], apart_BT[:, :-1], 0)
    return {
      'claims': there_BM.sum(axis=1),
      'doubted': sum_(doubts_BM >= self.reader.threshold),
      'doubt': sum_(doubts_BM),
      'live doubt': sum_(over(probe.live_scores, live)),
      'tokens': samples.sampled_BT.sum(axis=1),
      'divergence': apart_BT.sum(axis=1),
    }

  def exam(self, adapters, asked: Asked, file: pathlib.Path) -> dict:
    """Answers to prompts, of each: claims and doubts; written down, too."""
    parts, lines = [], []
    size = self.config.exam.batch
    for i, start in enumerate(range(0, len(asked.texts), size)):
      rows = np.arange(start, min(start + size, len(asked.texts)))
      filled = np.resize(rows, size)
      key = jax.random.fold_in(jax.random.key(self.config.seed + 2), i)
      tokens, mask, texts = asked.rows(filled)
      samples = self._sample(adapters, self.params, tokens, mask, key)
      seen = self._look(adapters, self.reader.probe, samples)
      kept = ANSWERS * len(rows)
      parts.append({k: np.asarray(v)[:kept] for k, v in seen.items()})
      said = np.asarray(samples.tokens_BT)[:kept]
      where = np.asarray(samples.sampled_BT)[:kept]
      for answer, at, text in zip(said, where, np.repeat(texts, ANSWERS)):
        answer = self.chat.text(answer[at].tolist())
        lines.append(
          json.dumps(
            # What a grader fills in is the spans.
            {'prompt': text, 'completion': answer, 'entity': text, 'spans': []}
          )
        )
    contract.write_text(file, '\n'.join(lines) + '\n')
    return {
      k: np.concatenate([p[k] for p in parts]).astype(float).tolist()
      for k in parts[0]
    }
