"""The same on a real model: any instruct model, long answers, graded claims.

The base's graded answers (`hallucination_text`) fit two probes of the frozen
model: where a claim is made, and how likely it is made up. A policy, LoRA
adapters, then answers prompts; each answer is worth the mean over its claims of
`1 - weight * doubt`, and a constraint keeps as many answers at the base's
median number of claims as there were. What nobody has graded is not claimed to
be true: results say what the frozen probe makes of it, and answers are written
down in the format of graded texts, for graders.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np

from experiments import contract, hallucination_full_figures
from experiments.hallucination_full_claims import make_claims
from experiments.hallucination_full_lab import ARMS, Lab, Prompts
from experiments.hallucination_full_probe import (
  Reader, fit_reader, make_observe,
)  # fmt: skip
from experiments.hallucination_text import (
  Asked, Chat, read_graded, read_prompts,
)  # fmt: skip
from idesign import models, rewards, training

# Of a block's products the hidden axis is split, of embeddings the vocabulary.
RULES = (
  (r'blocks/(attn/[qkv]|mlp/(gate|up))/kernel', P(None, None, 'model')),
  (r'blocks/(attn/o|mlp/down)/kernel', P(None, 'model', None)),
  ('embed/embedding', P('model', None)),
  ('lm_head/kernel', P(None, 'model')),
  ('.*', P()),
)


def load(config, mesh) -> tuple[models.Model, models.Params]:
  """The base, split over the mesh as it is read."""

  def sharding(path):
    spec = next(s for pattern, s in RULES if re.fullmatch(pattern, path))
    return NamedSharding(mesh, spec)

  dtype = jnp.dtype(config.model.dtype)
  model, params = models.load_pretrained(
    config.model.path,
    dtypes=models.DTypePolicy(dtype, dtype, jnp.float32),
    shardings=sharding,
  )
  needed = config.lengths.prompt + config.lengths.completion
  if needed > model.config.max_len:
    raise ValueError(
      f'lengths.prompt + lengths.completion = {needed} tokens, and '
      f'{config.model.path} has a context of {model.config.max_len}.'
    )
  again = dataclasses.replace(model.config, remat=config.model.remat)
  return models.transformer(again), params


def run(config, folder: pathlib.Path) -> None:
  """Reads, fits the probes, plans, and trains every arm; resumes by arm."""
  unknown = sorted(set(config.arms) - set(ARMS))
  if unknown:
    raise ValueError(f'arms: {unknown[0]!r} is none of {list(ARMS)}.')
  chat = Chat(config.model.path)
  lengths = config.lengths
  asked = read_prompts(config.prompts, chat, lengths.prompt)
  graded = read_graded(config.graded, chat, lengths.prompt + lengths.completion)
  held = config.exam.prompts
  if len(asked.texts) < held + config.rl.prompts:
    raise ValueError(
      f'{len(asked.texts)} prompts: {held} are held out and a batch has '
      f'{config.rl.prompts}. Give more, or lower --config.exam.prompts.'
    )
  order = np.random.default_rng(config.seed).permutation(len(asked.texts))
  held_out, asked = asked.rows(order[:held]), asked.rows(order[held:])
  mesh = training.make_mesh(config.mesh.data, config.mesh.model)
  model, params = load(config, mesh)
  observe = make_observe(config, model)
  workdir = contract.Workdir(
    folder,
    config,
    contract.fingerprint(
      held_out.tokens, asked.tokens, graded.tokens, graded.label
    ),
  )

  def plan(untrained: Reader) -> None:
    lab = Lab(config, chat, model, params, mesh, untrained)
    print(_plan(lab, asked), flush=True)

  reader = fit_reader(config, observe, model, params, graded, workdir, plan)
  params = reader.probe.params  # One copy is enough.
  lab = Lab(config, chat, model, params, mesh, reader)
  exam = lambda adapters, name: {
    'answers': lab.exam(adapters, held_out, workdir.path / f'{name}.jsonl'),
    'audit': reader.audit(lab.lift(adapters, params)),
  }
  # Trained or restored, they lie alike and are read to the same bits.
  whole = lambda adapters: lab.everywhere(lambda x: x, adapters)

  def look(state):
    seen = reader.audit(lab.lift(whole(state.params), params))
    return {f'audit/{k}': v for k, v in seen.items()}

  base = workdir.arm('base', lambda: exam(lab.adapters(), 'base'))
  counts = np.array(base['answers']['claims'])
  median = float(np.median(counts))
  share = float((counts >= median).mean())
  prompts = Prompts(asked, config.rl.prompts, config.seed)

  def train(arm: str):
    # Each arm has checkpoints of its own: it goes on where it was.
    inside = workdir.path / arm
    logged = {k: v for k, v in config.to_dict().items() if k != 'arms'}
    with (
      training.Checkpointer(inside, {**logged, 'arm': arm}) as saved,
      training.MetricsWriter(inside / 'metrics.jsonl') as writer,
    ):
      state = training.fit(
        lab.start(), lab.make_step(arm, median, share), prompts,
        num_steps=config.rl.steps, mesh=mesh, checkpointer=saved,
        save_every=config.rl.save_every, writer=writer,
        evaluate=look, evaluate_every=config.rl.audit_every,
        watch=rewards.make_watch(),
        extra=lambda state, batch: {'probe': reader.probe},
      )  # fmt: skip
    rows = training.read_metrics(inside / 'metrics.jsonl')
    kept = ('reward/claims', 'rate/enough', 'divergence', 'length')
    seen = [
      [r['step'], {k: v for k, v in r.items() if k.startswith('audit/')}]
      for r in rows
    ]
    return exam(whole(state.params), arm) | {
      'audits': [row for row in seen if row[1]],
      'pressure': ARMS[arm].name,
      'training': [[r['step'], {k: r[k] for k in kept}] for r in rows],
    }

  for arm in config.arms:
    workdir.arm(arm, lambda arm=arm: train(arm))
  contract.save_claims(
    workdir.path / 'claims.json', make_claims(config, workdir.results)
  )
  if jax.process_index() == 0:
    hallucination_full_figures.draw(workdir.path)


def _plan(lab: Lab, asked: Asked) -> rewards.Plan:
  """What training will take."""
  c = lab.config.rl
  batch = Prompts(asked, c.prompts, lab.config.seed).batch(0)
  return rewards.plan_run(
    lab.make_step('frozen', 1.0, 0.5), lab.start(),
    training.shard_batch(batch, lab.mesh), lab.reader.probe,
    model=lab.model.config, policy=lab.policy, steps=c.steps,
  )  # fmt: skip
