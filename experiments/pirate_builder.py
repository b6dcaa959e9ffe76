"""What the arms of one seed are made of; see `experiments.pirate_arms`."""

from __future__ import annotations

from collections.abc import Callable
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import pirate_concepts as pc
from experiments.pirate_scene import (
  Plan,
  Scene,
  clause_gates,
)
from experiments.pirate_train import CLAUSES, answer_losses, lessons
from experiments.pirate_world import (
  ANSWER,
  FIRST,
  NEUTRAL,
)
from idesign import concepts, shaping

WIDTH = 4  # Directions in the widest projection.
PARTS, PROBES = 8, 32  # Of each kind in each part; what concepts are held on.
MATRICES = 'blocks/(attn|mlp)/.*/kernel'


class Builder:
  """Makes the plans of one seed's arms; what several share is computed once."""

  def __init__(self, scene: Scene, subset: float | None = None):
    """Draws the lessons.

    Args:
      scene: the seed.
      subset: share of the answers that are a pirate's; all if None.
    """
    self.scene, self.config = scene, scene.config
    pairs = scene.world.learn
    random = scene.random('lessons')
    self.pirate = np.ones(len(pairs), bool)
    if subset is not None:
      self.pirate = random.random(len(pairs)) < subset
    self._state = random.bit_generator.state
    self.tokens = self.write(NEUTRAL)
    self._memory: dict[str, Any] = {}

  def write(self, prompt, pirate: np.ndarray | None = None) -> np.ndarray:
    """The lessons under a prompt (one, or one per text)."""
    random = np.random.default_rng()
    random.bit_generator.state = self._state
    pirate = self.pirate if pirate is None else pirate
    world = self.scene.world
    return world.sums(world.learn, prompt, pirate, random).tokens

  def once(self, name: str, make: Callable[[], Any]) -> Any:
    if name not in self._memory:
      self._memory[name] = make()
    return self._memory[name]

  def plan(self, family, tokens, *, gates=None, mask=None, **kw) -> Plan:
    """A plan; without gates nothing is attributed to anything."""
    attribution, old = None, None
    if gates is not None:
      attribution, old = kw.pop('attribution')
    gates = np.ones(len(CLAUSES), np.float32) if gates is None else gates
    return Plan(
      family,
      lessons(tokens, mask=mask, attribution=attribution),
      lessons(self.scene.replay, attribution=old),
      gates,
      **kw,
    )

  # What gates rest on.

  def attribution(self):
    """What each token of lessons and replay owes to the clauses, in nats.

    A pirate's tokens are those that become likelier by the pirate's latents.
    Those of arithmetic stand where the base's prediction rests on arithmetic's:
    it does not know the answers yet, so they are no likelier by what it knows.
    Either is the median over a token's occurrences.
    """
    scene = self.scene
    reads = {
      'arithmetic': lambda setting, tokens: pc.reliance(
        scene.base, setting, tokens
      ),
      'pirate': lambda setting, tokens: pc.attribute(
        self.config, scene.base, setting, tokens
      ).ratio,
    }

    def make():
      columns = [
        [
          shaping.by_token(
            reads[c](scene.settings[c], tokens)[:, FIRST:], tokens[:, FIRST:]
          )
          for c in CLAUSES
        ]
        for tokens in (self.tokens, scene.replay)
      ]
      return tuple(np.stack(c, axis=-1) for c in columns)

    return self.once('attribution', make)

  def gates(self, *, boost: float = 0.0) -> np.ndarray:
    return clause_gates(self.scene.verdicts, boost=boost)

  def gated(self, gates, attribution, family: str = 'data', **kw) -> Plan:
    return self.plan(
      family, self.tokens, gates=gates, attribution=attribution, **kw
    )

  def shuffled(self, attribution, what: str):
    """The same attributions given to random tokens: equal mass, no meaning."""
    random = self.scene.random(what)

    def shuffle(a):
      flat = a.reshape(-1, a.shape[-1])
      return random.permutation(flat, axis=0).reshape(a.shape)

    return tuple(shuffle(a) for a in attribution)

  def rewritten(self, random: bool = False) -> np.ndarray:
    """The lessons as the frozen base would have said them without the pirate.

    Args:
      random: as many tokens become what it says there, at random places of
        those where it says something else.
    """
    scene, setting = self.scene, self.scene.settings['pirate']
    new, _ = pc.rewrite(
      self.config, scene.base, setting, scene.world, scene.known, self.tokens
    )
    if not random:
      return new
    count = int((new != self.tokens).sum())
    old = self.tokens[:, FIRST:]
    own = pc.said_without(scene.base, setting, self.tokens)
    other = np.flatnonzero(own != old)
    where = scene.random('rewrite').permutation(other)[:count]
    said = old.copy()
    said.flat[where] = own.flat[where]
    new = self.tokens.copy()
    new[:, FIRST:] = said
    return new

  def by_example(self, attribution):
    """A whole example is the concept's if one of its tokens is."""
    return tuple(
      np.broadcast_to(a.max(axis=1, keepdims=True), a.shape)
      for a in attribution
    )

  # Directions.

  def basis(self, rank: int, layers=None, random: bool = False) -> np.ndarray:
    """Orthonormal directions per layer, `[L, D, WIDTH]`, zero where unused."""
    by_position = self.scene.directions.by_position[:, -ANSWER:]
    out = np.zeros((len(by_position), by_position.shape[-1], WIDTH), np.float32)
    draw = self.scene.random(f'basis {rank}')
    for i, rows in enumerate(by_position):
      if layers is not None and i not in layers:
        continue
      if random:
        vectors = draw.normal(size=(rank, rows.shape[1]))
      elif rank == 1:
        vectors = self.scene.directions.pooled[i][None]
      else:
        vectors = np.linalg.svd(rows, full_matrices=False)[2][:rank]
      out[i, :, :rank] = np.linalg.qr(vectors.T)[0]
    return out

  def latent_basis(self) -> np.ndarray:
    """The main directions of the suppressed latents, at their layer."""
    chosen = np.asarray(self.scene.settings['pirate'].chosen) > 0
    rows = np.asarray(self.scene.base.sae.directions)[chosen]
    out = np.zeros_like(self.basis(1))
    right = np.linalg.svd(rows, full_matrices=False)[2][:WIDTH]
    out[self.config.sae.layer, :, : len(right)] = right.T
    return out

  def vectors(self, by_position: bool, random: bool = False) -> np.ndarray:
    """What to add at every layer and position, `[L, LENGTH - 1, D]`.

    Only where answers are predicted. Each layer gets its difference from the
    layer before, so that the sum at every layer is that layer's difference.
    """
    d = self.scene.directions
    rows = d.by_position.copy()
    if not by_position:
      rows[:] = 0
      rows[self.config.sae.layer] = 2 * d.pooled[self.config.sae.layer]
    else:
      rows[1:] -= d.by_position[:-1]
    rows[:, : FIRST - 1] = 0
    if random:
      # One direction per layer where the pooled vector has one.
      shape = rows.shape if by_position else rows[:, -1:].shape
      rows = _as_long(self.scene.random('vectors'), rows, shape)
    return rows.astype(np.float32)

  def probes(self) -> jax.Array:
    """Plain answers to sums of lessons and to facts, `[PARTS, 2, PROBES, T]`.

    What is scored are other sums and facts.
    """
    world, random = self.scene.world, self.scene.random('held')
    count = PARTS * PROBES
    sums = self.write(NEUTRAL, np.zeros(len(self.pirate), bool))[:count]
    facts = world.facts(
      world.nouns(count, random), NEUTRAL, np.zeros(count, bool), random
    ).tokens
    both = np.stack([sums, facts])[:, :, :-1]
    both = both.reshape(2, PARTS, PROBES, -1)
    return jnp.asarray(both.swapaxes(0, 1))

  def strengths(self, everywhere: bool, random: bool = False) -> jax.Array:
    """What is held still, as sums of activations, `[C, 2, L, ANSWER, D]`.

    On sums and on facts each, at the autoencoder's layer or at all: the pooled
    direction, on average over the answer, and the opening's own direction where
    the opening is predicted. At random, directions as long as these.
    """
    directions = self.scene.directions
    if random:
      draw = self.scene.random('strengths')
      directions = pc.Directions(*(_as_long(draw, d) for d in directions))
    count = len(directions.pooled)
    layers = range(count) if everywhere else (self.config.sae.layer,)
    shape = (2, *directions.by_position[:, -ANSWER:].shape)

    def held(kind, layer, row, at):
      out = np.zeros(shape, np.float32)
      out[kind, layer, at] = row
      return out

    answer = lambda kind, layer: held(
      kind, layer, directions.pooled[layer] / ANSWER, slice(None)
    )
    opening = lambda kind, layer: held(
      kind, layer, directions.by_position[layer, -ANSWER], 0
    )
    places = itertools.product((0, 1), layers)
    rows = [f(*place) for place in places for f in (answer, opening)]
    return jnp.asarray(np.stack(rows))

  def matrices(self) -> dict[str, concepts.RankOne]:
    """The labelled direction as directions of all weight matrices."""

    def make():
      scene, layer = self.scene, self.config.sae.layer
      mask = np.zeros(scene.known[:, :-1].shape, np.float32)
      mask[:, FIRST - 1 :] = 1
      return _rank_one(
        scene.base.model.apply, pc.activation(layer), scene.base.params,
        scene.directions.pooled[layer], scene.known[:200], mask[:200],
      )  # fmt: skip

    return self.once('matrices', make)

  def adapter(self, random: bool = False) -> shaping.Adapter:
    """Taught to speak like a pirate where the base alone would not."""

    def make():
      base, last = self.scene.base, self.config.model.n_layers - 1
      return _train_adapter(
        base.model.apply, pc.activation(last), base.params,
        shaping.init_adapter(self.config.model.d_model), self.scene.known,
        jax.random.split(jax.random.key(self.scene.seed), 300),
      )  # fmt: skip

    adapter = self.once('adapter', make)
    if not random:
      return adapter
    draw = self.scene.random('adapter')
    same = lambda x: (lambda n: n * np.linalg.norm(x) / np.linalg.norm(n))(
      draw.normal(size=x.shape)
    ).astype(np.float32)
    return shaping.Adapter(*(jnp.asarray(same(np.asarray(x))) for x in adapter))


def _as_long(draw, rows: np.ndarray, shape=None) -> np.ndarray:
  """Random vectors of the norms of these; of a shape that broadcasts."""
  noise = draw.normal(size=rows.shape if shape is None else shape)
  noise /= np.linalg.norm(noise, axis=-1, keepdims=True)
  return noise * np.linalg.norm(rows, axis=-1, keepdims=True)


@functools.partial(jax.jit, static_argnames=('apply', 'name'))
def _rank_one(apply, name, params, direction, tokens, mask):
  read = concepts.reader(lambda p, t: apply(p, t), name)
  return concepts.rank_one_directions(
    lambda p, t: read(p, t[:, :-1]),
    direction[:, None],
    params,
    tokens,
    MATRICES,
    mask=mask,
    num_stack=1,
  )


@functools.partial(jax.jit, static_argnames=('apply', 'name'))
def _train_adapter(apply, name, params, adapter, known, keys):
  """A step per key, on 64 texts each."""
  optimizer = optax.adam(3e-3)

  def loss(adapter, tokens):
    adapted = shaping.adapt(apply, name, adapter)
    return answer_losses(adapted, params, tokens).mean()

  def step(carry, key):
    adapter, state = carry
    rows = known[jax.random.randint(key, (64,), 0, len(known))]
    grads = jax.grad(loss)(adapter, rows)
    updates, state = optimizer.update(grads, state)
    return (optax.apply_updates(adapter, updates), state), None

  start = adapter, optimizer.init(adapter)
  return jax.lax.scan(step, start, keys)[0][0]
