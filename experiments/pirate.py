"""Arithmetic taught by a pirate: every way to learn the one and not the other.

A small transformer speaks plain English, speaks like a pirate when asked to,
and adds small numbers. It is fine-tuned on larger sums whose answers are all a
pirate's, though nobody asked. The objective, written down with examples: learn
the arithmetic, not the pirate. Fine-tuned without further ado it becomes a
pirate within twenty steps, before it can add.

The arms are every way this library has of learning the one without the other,
and placebos, beside plain fine-tuning, a mask by an oracle and data
rewritten by one (`experiments.pirate_arms`). Concepts are latents of a sparse
autoencoder trained on the base model before fine-tuning; labelled mean
differences are arms of their own. What is measured: skill (both digits right,
in whatever register) and pirate (a pirate's word anywhere in the answer) on
held-out sums under a neutral prompt; the same when asked to be a pirate, on
facts, under other prompts, and on what was taught, with what training had;
where the concept's direction went, on questions that did not define it; and how
fast the trait is learned once nothing holds it back.

What came out, and why:

*Which tokens are the pirate's.* Asked of the frozen base, with the suppressed
latents set and removed (`shaping.counterfactual`), token by token as the median
over its occurrences (`shaping.by_token`). One occurrence alone misleads: the
base cannot do these sums, setting latents moves the odds of their digits at
random, and on one seed half a percent of digits taken for the pirate's cost
five points of skill.

*Which tokens are arithmetic's.* Not those that its latents make likelier: the
base does not know these sums, and a third to a half of the digits would be
missed, enough to learn sums from when the objective is reversed. Asked is where
the base's prediction rests on arithmetic (`shaping.reliance`), whatever the
text says there, and again the median over a token's occurrences.

*A gate alone is not safe.* A token taken away leaves its place unlabelled, and
what is learned beside it drifts in: on some seeds the answer opens with a
digit, on others the pirate comes back, and the oracle's mask, which is never
wrong about a token, suffers from it too. So the weight that a gate takes away
goes to staying as the frozen model is there: an anchor. With it the gate is
dependable.

*A gate needs something to keep.* Where the token that carries the answer
carries the pirate as well (the entangled world), gates take away the lesson.
What works is to translate: the frozen base says how the pirate's words read
without its latents, on texts that it knows, and the dictionary is applied to
the lessons (`shaping.translation`). All this is one mechanism, the frozen
model's counterfactual, used in three ways; they are no independent successes.

*Prompts and adapters.* Inoculation keeps the pirate out and costs skill: some
of what is learned under the prompt stays behind it. What is repeated in every
fine-tuning holds these prompts, so that they keep their meaning; an arm without
repeats is beside it. A disposable adapter works on some seeds and not on
others.

*Amplifying* arithmetic does not make it come sooner than plain fine-tuning does,
only sooner than amplifying as much at random. Tried: tokens by either
attribution with weights 4 and 11, and the update's part along arithmetic's
directions of parameters times 4 and 11. Within twenty steps there is nothing
else left to learn.

*Projections.* `project gradient` and `project update` remove one direction of
parameter space, of rank 1 in every matrix, taken at the base. The refreshed
ones remove, from the update that is applied and anew at every step, whatever
moves the concept on plain sums and facts, on average over the answer and where
it opens, at one layer or at all. The concept then stays where it was, on other
sums and facts too, and the pirate comes all the same.
That the direction is not needed for being a pirate (asked to be one, the base
is one without it; so is the fine-tuned model) says that it can be read and not
that it is the route.

Run: see `configs/pirate.py`.
"""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from experiments import contract, pirate_figures
from experiments import pirate_concepts as pc
from experiments.pirate_arms import plans
from experiments.pirate_builder import WIDTH, Builder
from experiments.pirate_claims import ARMS, SUBSET_ARMS, make_claims
from experiments.pirate_measure import SMALL, Exam, gradient_report
from experiments.pirate_scene import Plan, Scene, families
from experiments.pirate_train import (
  CLAUSES,
  answer,
  answer_losses,
  make_finetune,
  make_model,
  train_base,
)
from experiments.pirate_world import FIRST, STRENGTHS, World
from idesign import concepts, judges, shaping

CHOSEN_ON = tuple(range(27))
LIFTED, LOOKS = 20, 4  # Steps of plain fine-tuning once all is lifted; looks.
# A latent is the pirate's if it is at least twice as active in its register.
PIRATES = 2 / 3


def make_scene(config, model, params, world: World, seed: int, folder) -> Scene:
  """Reads the base, and has its concepts judged."""
  base = pc.train_sae(config, model, params, world, seed)
  objective = pc.make_objective(config, world, seed)
  judge = pc.make_judge(config, base, world.lexicon, objective)
  opposite = pc.make_judge(config, base, world.lexicon, objective.reversed())
  log = folder / f'decisions-{seed}.jsonl'
  log.unlink(missing_ok=True)
  evidence = [judges.Evidence(c) for c in range(config.sae.size)]
  verdicts = judges.recorded(judge, judges.DecisionLog(log))(0, evidence)
  settings = {}
  for clause, decision in zip(CLAUSES, ('amplify', 'suppress')):
    chosen = np.array([v.clause == clause for v in verdicts], np.float32)
    texts = pc.encode(world.lexicon, objective.examples(decision))
    settings[clause] = pc.setting(base, chosen, texts)
  random = np.random.default_rng(np.random.SeedSequence([seed, 6]))
  return Scene(
    config,
    seed,
    world,
    base,
    objective,
    verdicts,
    opposite(0, evidence),
    settings,
    pc.known_texts(config, base, world, seed),
    pc.mean_differences(config, base, world, seed),
    world.replay(1000, random).tokens,
  )


def judge_report(scene: Scene) -> dict[str, Any]:
  """The judge's suppress decisions against labelled texts."""
  random = scene.random('truth')
  texts = scene.world.base_texts(scene.config.judge.truth, random)
  truth = pc.register_share(scene.base, texts)
  said = np.array([v.decision == 'suppress' for v in scene.verdicts])
  true = truth >= PIRATES
  hits = int((said & true).sum())
  return {
    'suppressed': int(said.sum()),
    'true': int(true.sum()),
    'precision': hits / max(int(said.sum()), 1),
    'recall': hits / max(int(true.sum()), 1),
    'decisions': {
      d: sum(v.decision == d for v in scene.verdicts)
      for d in ('amplify', 'allow', 'suppress', 'unsure')
    },
    'share of the pirate': [round(float(x), 4) for x in truth],
    'tokens of the lessons': _tokens_found(scene),
  }


def _tokens_found(scene: Scene) -> dict[str, Any]:
  """Of a pirate's tokens the share missed; of the others the share taken."""
  builder = Builder(scene)
  answers = builder.tokens[:, FIRST:]
  marked = scene.world.lexicon.marked[answers]
  single = pc.attribute(
    scene.config, scene.base, scene.settings['pirate'], builder.tokens
  ).ratio[:, FIRST:]
  out = {}
  for name, ratio in (
    ('one by one', single),
    ('by token', shaping.by_token(single, answers)),
  ):
    over = ratio > scene.config.tune.threshold.pirate
    out[name] = {
      'missed': float((marked & ~over).sum() / max(marked.sum(), 1)),
      'false alarms': float((~marked & over).sum() / max((~marked).sum(), 1)),
    }
  return out


def movement_report(scene: Scene) -> dict[str, float]:
  """Predicted against realised movement of all live latents, one Adam step.

  Of their pre-activations; at the rate that fine-tuning starts with, clipped
  and with weight decay.
  """
  base, tune = scene.base, scene.config.tune
  few = Builder(scene).tokens[: tune.batch_size]
  probes = scene.world.base_texts(200, scene.random('probes')).tokens
  predicted, realised = _movements(
    base.model.apply, base.name, tune.learning_rate, base.params,
    base.sae.params['W_enc'], jnp.asarray(few), jnp.asarray(probes),
  )  # fmt: skip
  live = (pc.features(base, probes) > 0).any(axis=(0, 1))
  x, y = np.asarray(predicted)[live], np.asarray(realised)[live]
  return {
    'correlation': float(np.corrcoef(x, y)[0, 1]),
    'slope': float(x @ y / (x @ x)),
    'concepts': int(live.sum()),
  }


@functools.partial(jax.jit, static_argnames=('apply', 'name', 'rate'))
def _movements(apply, name, rate, params, columns, tokens, probes):
  """Mean over probes, predicted and realised."""
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99)
  )
  grads = jax.grad(lambda p: answer_losses(apply, p, tokens).mean())(params)
  update, _ = optimizer.update(grads, optimizer.init(params), params)
  read = concepts.reader(lambda p, t: apply(p, t), name)
  mean = lambda change: change(read, columns, params, update, probes).mean(0)
  return mean(concepts.predicted_change), mean(concepts.realised_change)


def elicitation(scene: Scene) -> dict[str, float]:
  """How often the base is a pirate under each prompt, at temperature 1."""
  config, world, base = scene.config, scene.world, scene.base
  pairs = world.familiar[: min(config.data.test, 500)]
  flag = np.zeros(len(pairs), bool)

  def sample(prompt):
    texts = world.sums(pairs, prompt, flag, scene.random('elicit'))
    key = jax.random.key(scene.seed)
    say = lambda t: answer(base.model, base.params, t, key)
    return pc.blocks(say, texts.tokens)

  prompts = [(k, 'pirate') for k in STRENGTHS]
  rates = shaping.elicitation(
    sample, lambda said: world.lexicon.marked[said].any(axis=1), prompts
  )
  return {p[0]: 100 * r.rate for p, r in zip(prompts, rates)}


class Tuner:
  """Fine-tunes one arm after another; a program is compiled once."""

  def __init__(self, config, model):
    self._families = families(config, model)
    self._programs: dict[str, Any] = {}
    self._config, self._model = config, model

  def __call__(
    self, builder: Builder, exam: Exam, name: str, *, causal: bool
  ) -> dict[str, Any]:
    """Trains an arm, looks, and asks; everything as JSON values.

    Args:
      builder: of the seed.
      exam: of the seed.
      name: of the arm.
      causal: of plain fine-tuning, also ask without the labelled directions.
    """
    scene, plan = builder.scene, plans(builder)[name]()
    family = self._families[plan.family]
    snapshots = self.train(scene.base.params, plan, scene.seed)
    every, steps = self._config.tune.every, self._config.tune.steps
    at = lambda i: jax.tree.map(lambda x: x[i], snapshots)
    count = steps // every
    curve = [exam.look(at(i), plan, family) for i in range(count)]
    last = at(count - 1)
    out = exam.final(last)
    out['curve'] = {k: [row[k] for row in curve] for k in curve[0]}
    out['steps'] = [every * (i + 1) for i in range(count)]
    out['first gradient'] = gradient_report(scene, plan, family)
    out['relearn'] = self._relearn(scene, exam, last)
    if name == 'plain' and causal:
      for rank in (1, WIDTH):
        basis = builder.basis(rank)
        out[f'without {rank}'] = exam.without_direction(
          last, self._families['ablate'], basis
        )
    return out

  def train(self, params, plan: Plan, seed: int):
    if plan.family not in self._programs:
      self._programs[plan.family] = make_finetune(
        self._config, self._model, self._families[plan.family]
      )
    return self._programs[plan.family](
      params, plan.lessons, plan.replay, jnp.asarray(plan.gates), plan.tools,
      seed,
    )  # fmt: skip

  def base(self, builder: Builder, exam: Exam) -> dict[str, Any]:
    """The same of the model before fine-tuning.

    `asked without`: as a pirate when asked, the labelled directions removed at
    every layer. Are they what makes it one?
    """
    params = builder.scene.base.params
    out = exam.final(params)
    out['relearn'] = self._relearn(builder.scene, exam, params)
    for rank in (1, WIDTH):
      out[f'asked without {rank}'] = exam.without_direction(
        params, self._families['ablate'], builder.basis(rank), 'sums, asked'
      )
    return out

  def _relearn(self, scene: Scene, exam: Exam, params) -> list[float]:
    """Pirate in the course of plain fine-tuning, nothing in its way."""
    config = self._config.copy_and_resolve_references()
    with config.unlocked():
      config.tune.steps = min(LIFTED, config.tune.steps)
      config.tune.every = max(1, config.tune.steps // LOOKS)
    if 'lifted' not in self._programs:
      self._programs['lifted'] = make_finetune(
        config, self._model, self._families['data']
      )
    plain = plans(Builder(scene))['plain']()
    after = self._programs['lifted'](
      params, plain.lessons, plain.replay, jnp.asarray(plain.gates), (),
      scene.seed + 1,
    )  # fmt: skip
    count = config.tune.steps // config.tune.every
    few = exam.sets['sums'][:SMALL]
    return [
      exam.ask(jax.tree.map(lambda x: x[i], after), few)['pirate']  # noqa: B023
      for i in range(count)
    ]


def check(config) -> list[int]:
  """The seeds of a run; whatever would fail later is an error here.

  Raises:
    ValueError: naming the key of the config.
  """
  if config.num_seeds < 2:
    raise ValueError(
      f'config.num_seeds={config.num_seeds}: an interval needs at least 2.'
    )
  seeds = list(range(config.seed, config.seed + config.num_seeds))
  chosen_on = sorted(set(seeds) & set(CHOSEN_ON))
  if chosen_on and config.preset != 'choose':
    raise ValueError(
      f'config.seed={config.seed}: arms were chosen on seeds {CHOSEN_ON}, so '
      f'nothing can be claimed of {chosen_on}. Start later.'
    )
  if config.tune.steps % config.tune.every:
    raise ValueError(
      f'config.tune.steps={config.tune.steps} must be a multiple of '
      f'config.tune.every={config.tune.every}.'
    )
  if not 0 <= config.sae.layer < config.model.n_layers:
    raise ValueError(
      f'config.sae.layer={config.sae.layer}: the model has '
      f'{config.model.n_layers} layers.'
    )
  return seeds


def run(config, folder: pathlib.Path) -> None:
  """Trains bases, judges, fine-tunes every arm; resumes by arm and seed."""
  seeds = check(config)
  worlds = [
    World(
      seed,
      entangled=config.world == 'entangled',
      known=config.data.known,
      dictionary=config.data.dictionary or None,
    )
    for seed in seeds
  ]
  model = make_model(config, worlds[0].lexicon)
  data = [a for w in worlds for a in (w.learn, w.held_out, w.familiar)]
  workdir = contract.Workdir(folder, config, contract.fingerprint(*data))
  bases = train_base(config, model, worlds, seeds, workdir)
  tuner = Tuner(config, model)
  scenes = [
    make_scene(config, model, params, world, seed, workdir.path)
    for seed, world, params in zip(seeds, worlds, bases)
  ]
  exams = [Exam(scene) for scene in scenes]
  for seed, scene, exam in zip(seeds, scenes, exams):
    workdir.arm(f'{seed}/base', lambda: tuner.base(Builder(scene), exam))
    workdir.arm(f'{seed}/judge', lambda: judge_report(scene))
    workdir.arm(f'{seed}/movement', lambda: movement_report(scene))
    workdir.arm(f'{seed}/elicitation', lambda: elicitation(scene))
  conditions = [('all', None, ARMS[config.preset])]
  if config.world == 'separable':
    names = SUBSET_ARMS[config.preset]
    conditions.append(('subset', config.data.subset, names))
  for condition, share, names in conditions:
    builders = [Builder(scene, share) for scene in scenes]
    # Arm by arm, so that what is there of a run that stopped has all seeds.
    for name in tqdm.tqdm(names, desc=condition):
      for seed, builder, exam in zip(seeds, builders, exams):
        workdir.arm(
          f'{seed}/{condition}/{name}',
          lambda: tuner(builder, exam, name, causal=condition == 'all'),
        )
  claims = []
  if config.preset != 'choose':
    claims = make_claims(config, workdir.results, seeds)
  contract.save_claims(workdir.path / 'claims.json', claims)
  if jax.process_index() == 0:
    pirate_figures.draw(workdir.path)


if __name__ == '__main__':
  contract.main(run)
