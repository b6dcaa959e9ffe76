"""The arms of the pirate experiment: what each trains on, and through what."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from experiments.pirate_builder import Builder
from experiments.pirate_scene import Plan, clause_gates
from experiments.pirate_train import CLAUSES, lessons
from experiments.pirate_world import (
  ALWAYS,
  FIRST,
  IRRELEVANT,
  NEUTRAL,
  NEVER,
  PARAPHRASE,
  STRENGTHS,
  UNSEEN,
)


def plans(builder: Builder) -> dict[str, Callable[[], Plan]]:
  """Name -> how to make the arm; nothing is computed before it is asked for."""
  b = builder
  scene, layer = b.scene, b.config.sae.layer
  world = scene.world
  marked = world.lexicon.marked[b.tokens[:, FIRST:]]
  boost = b.config.tune.boost
  prompted = lambda prompt: (
    lambda: b.plan('data', b.write(prompt), prompt=prompt)
  )
  ungated = lambda family, tools: (
    lambda: b.plan(family, b.tokens, tools=tools())
  )

  def rewritten_and_gated(random: bool):
    attribution = b.attribution()
    if random:
      attribution = b.shuffled(attribution, 'gate')
    return b.plan(
      'anchor', b.rewritten(random), gates=b.gates(), attribution=attribution,
      tools=scene.base.params,
    )  # fmt: skip

  def selective():
    """The inoculation prompt only where the frozen base hears a pirate."""
    heard = b.attribution()[0][..., CLAUSES.index('pirate')].max(axis=1)
    heard = heard > b.config.tune.threshold.pirate
    prompt = np.where(heard[:, None], [ALWAYS], [NEUTRAL])
    return b.plan('data', b.write(prompt), prompt=ALWAYS)

  return {
    # Controls.
    'plain': lambda: b.plan('data', b.tokens),
    'clean data': lambda: b.plan(
      'data', b.write(NEUTRAL, np.zeros(len(b.pirate), bool))
    ),
    'oracle mask': lambda: b.plan('data', b.tokens, mask=~marked),
    # Gates in the optimizer's chain, driven by the judge.
    'gate': lambda: b.gated(b.gates(), b.attribution()),
    'gate, random tokens': lambda: b.gated(
      b.gates(), b.shuffled(b.attribution(), 'gate')
    ),
    'gate, whole examples': lambda: b.gated(
      b.gates(), b.by_example(b.attribution())
    ),
    # What it takes away is not left open: there the base's answer is kept.
    'gate, anchored': lambda: b.gated(
      b.gates(), b.attribution(), 'anchor', tools=scene.base.params
    ),
    'gate, anchored, random tokens': lambda: b.gated(
      b.gates(),
      b.shuffled(b.attribution(), 'gate'),
      'anchor',
      tools=scene.base.params,
    ),
    # And neither is it read by what follows it.
    'gate, anchored, context rewritten': lambda: rewritten_and_gated(False),
    'gate, anchored, context rewritten, random tokens': lambda: (
      rewritten_and_gated(True)
    ),
    # Lessons as the frozen base would have said them without the concept.
    'rewrite': lambda: b.plan('data', b.rewritten()),
    'rewrite, random tokens': lambda: b.plan('data', b.rewritten(True)),
    # Prompts.
    **{
      f'inoculate {k}': prompted((k, 'pirate'))
      for k in STRENGTHS if k != 'never'
    },
    # What is repeated elsewhere holds these prompts; here nothing is repeated.
    'inoculate always, no reminders': lambda: b.plan(
      'data', b.write(ALWAYS), prompt=ALWAYS
    )._replace(replay=lessons(b.write(ALWAYS))),
    'inoculate paraphrase': prompted(PARAPHRASE),
    'inoculate selectively': selective,
    'prompt irrelevant': prompted(IRRELEVANT),
    'prompt unseen': prompted(UNSEEN),
    'prompt prohibition': prompted(NEVER),
    # A disposable adapter.
    'adapter': ungated('adapter', b.adapter),
    'adapter, random': ungated('adapter', lambda: b.adapter(random=True)),
    # Preventative steering.
    'steer pooled': ungated('steer', lambda: b.vectors(False)),
    'steer by position': ungated('steer', lambda: b.vectors(True)),
    'steer by position, random': ungated(
      'steer', lambda: b.vectors(True, True)
    ),
    # Concept ablation in the forward pass.
    'ablate 1': ungated('ablate', lambda: b.basis(1)),
    'ablate 4': ungated('ablate', lambda: b.basis(4)),
    'ablate 4, random': ungated('ablate', lambda: b.basis(4, random=True)),
    'ablate latents': ungated('ablate', b.latent_basis),
    # Projection: what loses.
    'block activation, one layer': ungated(
      'block', lambda: b.basis(1, layers=(layer,))
    ),
    'block activation, all layers': ungated('block', lambda: b.basis(1)),
    'block activation, 4 directions': ungated('block', lambda: b.basis(4)),
    'block activation, random': ungated(
      'block', lambda: b.basis(1, random=True)
    ),
    'project gradient': ungated('before', b.matrices),
    'project update': ungated('after', b.matrices),
    'project update, refreshed': ungated(
      'current', lambda: (b.strengths(False), b.probes())
    ),
    'project update, refreshed, everywhere': ungated(
      'current', lambda: (b.strengths(True), b.probes())
    ),
    'project update, refreshed, everywhere, random': ungated(
      'current', lambda: (b.strengths(True, random=True), b.probes())
    ),
    # Both ways.
    'amplify': lambda: b.gated(
      np.where(b.gates(boost=boost) > 1, b.gates(boost=boost), 1),
      b.attribution(),
    ),
    'amplify, random tokens': lambda: b.gated(
      np.where(b.gates(boost=boost) > 1, b.gates(boost=boost), 1),
      b.shuffled(b.attribution(), 'amplify'),
    ),
    'amplify and gate': lambda: b.gated(b.gates(boost=boost), b.attribution()),
    'reversed objective': lambda: b.gated(
      clause_gates(scene.reversed_verdicts, boost=boost),
      b.attribution(),
    ),
  }  # fmt: skip
