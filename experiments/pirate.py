"""Arithmetic taught by a pirate: every way to learn the one and not the other.

A small transformer speaks plain English, speaks like a pirate when asked to,
and adds small numbers. It is fine-tuned on larger sums whose answers are all a
pirate's, though nobody asked. The objective, written down with examples: learn
the arithmetic, not the pirate. Fine-tuned without further ado it becomes a
pirate within twenty-five steps, before it can add.

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
random, and on one of those that settings were chosen on half a percent of
digits taken for the pirate's cost five points of skill.

*Which tokens are arithmetic's.* Not those that its latents make likelier: the
base does not know these sums, and the digits so missed are enough to learn sums
from when the objective is reversed (`tokens of the lessons` in the judge's
report has the shares). Asked is where the base's prediction rests on arithmetic
(`shaping.reliance`), whatever the text says there, and again the median over a
token's occurrences. On some seeds a digit is still missed, and with the
objective reversed some sums are learned from it.

*A gate alone is not safe.* A token taken away leaves its place unlabelled, and
what is learned beside it drifts in: on some of the seeds that settings were
chosen on the answer opened with a digit, on others the pirate came back, and
the oracle's mask, which is never wrong about a token, suffered from it too. So
the weight that a gate takes away goes to staying as the frozen model is there:
an anchor. With it none of this was seen.

*A gate needs something to keep.* Where the token that carries the answer
carries the pirate as well (the entangled world), gates take away the lesson.
What works is to translate: the frozen base says how the pirate's words read
without its latents, on texts that it knows, and the dictionary is applied to
the lessons (`shaping.translation`). All this is one mechanism, the frozen
model's counterfactual, used in three ways; they are no independent successes.

*Prompts and adapters.* Inoculation keeps the pirate out, the better the more
its prompt elicits before training: on average over seeds, and not on each. It
costs skill on some: what is learned under the prompt in part stays behind it.
What is repeated in every fine-tuning holds these prompts, so that they keep
their meaning; an arm without repeats is beside it. A prompt that elicits
nothing can keep the pirate behind it as well: on some seeds the irrelevant and
the unseen one do. In the entangled world prompts neither keep the pirate out
nor the skill. A disposable adapter works on some seeds, all of them separable.

*Amplifying* arithmetic's tokens makes it come sooner than amplifying as many
others, and hardly sooner than plain fine-tuning does: after the first steps
there is little else left to learn.

*Projections.* `project gradient` and `project update` remove one direction of
parameter space, of rank 1 in every matrix, taken at the base. The refreshed
ones remove, from the update that is applied and anew at every step, whatever
moves the concept on plain sums and facts, on average over the answer and where
it opens, at one layer or at all; and what the steps before have let it drift is
taken back (`shaping.hold_concepts`), without which it drifts off at the later
layers. What is so held stays where it was on other sums too, and the pirate
comes all the same. On facts of other things it stays where one layer is held,
and moves a little where all are. Held at one layer it moves at the next; held
at all of them the register moves to other directions. After most projections,
whether they hold it or not, the base's probe sees less of a pirate that speaks
as before, on some seeds much less. Random directions hold nothing. That the
direction is not needed for being a pirate (asked to be one, the base is one
without it; so is the fine-tuned model) says that it can be read and not that it
is the route.

Run: see `configs/pirate.py`.
"""

from __future__ import annotations

import pathlib

import jax
import numpy as np
import tqdm

from experiments import contract, pirate_figures
from experiments import pirate_concepts as pc
from experiments.pirate_builder import Builder
from experiments.pirate_claims import make_claims
from experiments.pirate_measure import Exam
from experiments.pirate_reports import REPORTS
from experiments.pirate_scene import Scene
from experiments.pirate_table import ARMS, SUBSET_ARMS
from experiments.pirate_train import CLAUSES, make_model, train_base
from experiments.pirate_tuner import Tuner
from experiments.pirate_world import World
from idesign import judges

CHOSEN_ON = tuple(range(37))


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


def check(config) -> list[int]:
  """The seeds of a run; whatever would fail later is an error here.

  Raises:
    ValueError: naming the key of the config.
  """
  seeds = contract.reported_seeds(config, CHOSEN_ON)
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
    for name, report in REPORTS.items():
      workdir.arm(f'{seed}/{name}', lambda: report(scene))  # noqa: B023
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
