"""The hallucination experiment: rewards by hand, exams, claims, every path."""

import copy
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import hallucination as config_lib
from experiments import (
  contract,
  hallucination,
  hallucination_arms,
  hallucination_base,
  hallucination_claims,
  hallucination_measure,
  hallucination_pipeline,
  hallucination_probe,
)
from experiments import hallucination_grammar as hg
from experiments.hallucination_arms import ARMS, Arm, make_terms
from experiments.hallucination_people import People
from idesign import probes, rewards
from idesign.probes import Pressure

CONFIG = config_lib.get_config('smoke')
WORLD = People(CONFIG.world, 3)
WIDTH = hg.PROMPT + hg.ANSWER


def truth(person, attribute):
  return WORLD.grammar.token(attribute, WORLD.value[person, attribute])


def wrong(person, attribute):
  first = WORLD.grammar.values[attribute]
  return first + (truth(person, attribute) - first + 1) % 16


def scene(rows, doubts):
  """Texts of questions and answers, read by a probe with these doubts."""
  parts, said = [], []
  for kind, attribute, value, answer in rows:
    parts.append(WORLD.questions(
      np.array([0]), kind, np.random.default_rng(0),
      attribute=np.array([attribute]), value=np.array([value]),
    ))  # fmt: skip
    said.append(list(answer) + [hg.PAD] * (hg.ANSWER - len(answer)))
  questions = hg.Questions(*map(np.concatenate, zip(*parts)))
  tokens = np.concatenate([questions.prompts, said], axis=1)
  info = questions._asdict()
  # What a probe says of a span: the doubt at its last token.
  score = lambda seen, at: jnp.sum(jnp.where(at, seen, 0), axis=1)
  probe = types.SimpleNamespace(
    scores=score, live_scores=lambda seen, at, **kw: score(seen, at)
  )
  return types.SimpleNamespace(
    samples=types.SimpleNamespace(tokens_BT=jnp.asarray(tokens)), info=info,
    probe=probe, teacher=jnp.asarray(doubts), student=jnp.asarray(doubts) / 2,
    key=jax.random.key(0),
  )  # fmt: skip


A = 1
RIGHT, WRONG = int(truth(0, A)), int(wrong(0, A))
ROWS = (
  (hg.ASKED, A, 0, (RIGHT, hg.EOS)),
  (hg.ASKED, A, 0, (WRONG, hg.EOS)),
  (hg.ASKED, A, 0, (hg.IDK, hg.EOS)),
  (hg.ASKED, A, 0, (hg.EOS,)),
  (hg.CHOSEN, A, 0, (hg.ATTRIBUTE + A, RIGHT, hg.EOS)),
  (hg.CHOSEN, A, 0, (hg.ATTRIBUTE + A, WRONG, hg.EOS)),
  (hg.DOUBTED, A, RIGHT, (hg.MAINTAIN, hg.EOS)),
  (hg.DOUBTED, A, WRONG, (hg.MAINTAIN, hg.EOS)),
  (hg.DOUBTED, A, WRONG, (hg.RETRACT, hg.EOS)),
  (hg.DOUBTED, A, WRONG, (hg.CORRECT, RIGHT)),
  (hg.DOUBTED, A, WRONG, (hg.EOS,)),
)
# Doubts about what is claimed, and for corrections about the new value.
P = np.zeros((len(ROWS), WIDTH))
for i, (kind, *_) in enumerate(ROWS):
  P[i, hg.PROMPT if kind == hg.ASKED else hg.PROMPT + 1] = 0.1 + 0.02 * i
  if kind == hg.DOUBTED:
    P[i, hg.PROMPT - 2] = 0.8
    P[i, hg.PROMPT + 1] = 0.3


def values(arm, rows=ROWS, doubts=P):
  (term,) = make_terms(CONFIG, arm, WORLD.grammar)
  return np.asarray(term.value(scene(rows, doubts))), term.pressure


def expected(claim, draft, new):
  """By the docstring, from doubts."""
  c = CONFIG.rl
  worth = lambda i, bonus: c.assertion + bonus - c.weight * claim[i]
  mend = c.intervention
  return np.array([
    worth(0, 0), worth(1, 0), 0, -1, worth(4, c.bonus), worth(5, c.bonus),
    mend * (1 - draft[6]), mend * (1 - draft[7]), mend * c.retraction,
    mend * (1 - new[9]), mend * -0.2,
  ])  # fmt: skip


def test_rewards_by_hand():
  n = len(ROWS)
  claim = 0.1 + 0.02 * np.arange(n)
  draft, new = np.full(n, 0.8), np.full(n, 0.3)
  got, pressure = values(Arm('frozen'))
  np.testing.assert_allclose(got, expected(claim, draft, new), rtol=1e-5)
  assert pressure is Pressure.FROZEN
  got, pressure = values(Arm('live'))
  np.testing.assert_allclose(
    got, expected(claim / 2, draft / 2, new / 2), rtol=1e-5
  )
  assert pressure is Pressure.LIVE
  got, pressure = values(Arm('none'))
  zero = np.zeros(n)
  np.testing.assert_allclose(got, expected(zero, zero, zero), rtol=1e-5)
  assert pressure is Pressure.NONE
  # The truth: of rows 1, 5 and the drafts of 7 to 10 it is against.
  false = np.isin(np.arange(n), [1, 5, 7, 8, 9, 10]) * 1.0
  got, _ = values(Arm('truth'))
  np.testing.assert_allclose(got, expected(false, false, zero), rtol=1e-5)


def test_shuffled_scores_are_those_of_the_same_kind():
  rows = ROWS[:1] * 40 + ROWS[4:5] * 40
  doubts = np.zeros((80, WIDTH))
  doubts[:40, hg.PROMPT] = np.linspace(0, 0.4, 40)
  doubts[40:, hg.PROMPT + 1] = np.linspace(0.5, 1, 40)
  own, _ = values(Arm('frozen'), rows, doubts)
  got, _ = values(Arm('shuffled'), rows, doubts)
  for half in (slice(40), slice(40, 80)):
    np.testing.assert_allclose(np.sort(got[half]), np.sort(own[half]))
    assert abs(np.corrcoef(got[half], own[half])[0, 1]) < 0.5


def test_shuffled_scores_of_claims_are_those_of_claims():
  """What is read where nothing is claimed goes to no claim."""
  rows = (ROWS[0], ROWS[2]) * 40 + (ROWS[6], ROWS[9]) * 40
  doubts = np.zeros((160, WIDTH))
  doubts[0:80:2, hg.PROMPT] = np.linspace(0, 0.4, 40)
  doubts[1:80:2, hg.PROMPT] = 0.9
  # Of doubts about the same draft: what is said in its place.
  doubts[80:, hg.PROMPT + 1] = np.tile([0.9, 0.2], 40)
  own, _ = values(Arm('frozen'), rows, doubts)
  got, _ = values(Arm('shuffled'), rows, doubts)
  np.testing.assert_allclose(np.sort(got[0:80:2]), np.sort(own[0:80:2]))
  assert (got[0:80:2] != own[0:80:2]).any()
  np.testing.assert_allclose(got[81::2], own[81::2])


def test_only_claims_are_caught_by_a_gradient():
  task, caught = make_terms(CONFIG, ARMS['live, gradient'], WORLD.grammar)
  assert task.pressure is Pressure.LIVE
  assert caught.pressure is Pressure.GRADIENT and caught.weight < 0
  got = np.asarray(caught.value(scene(ROWS, P)))
  claims = np.isin(np.arange(len(ROWS)), [0, 1, 4, 5])
  np.testing.assert_allclose(
    got, np.where(claims, 0.05 + 0.01 * np.arange(len(ROWS)), 0), rtol=1e-5
  )
  # And nowhere else: of a claim the task is what it is without a doubt.
  got = np.asarray(task.value(scene(ROWS, P)))
  asked = np.array([kind != hg.DOUBTED for kind, *_ in ROWS])
  for rows, arm in ((asked, 'none'), (~asked, 'live')):
    np.testing.assert_allclose(got[rows], values(Arm(arm))[0][rows], rtol=1e-6)


def script(monkeypatch, module, answer):
  """Replaces a model: `answer(prompts, new_tokens) -> tokens`."""

  def say(model, params, prompts, key, *, new_tokens=hg.ANSWER, **kw):
    prompts = np.asarray(prompts)
    said = np.full((len(prompts), new_tokens), hg.PAD)
    for i, prompt in enumerate(prompts):
      tokens = answer([int(t) for t in prompt if t != hg.PAD])[:new_tokens]
      said[i, : len(tokens)] = tokens
    return np.concatenate([prompts, said], axis=1)

  monkeypatch.setattr(module, 'say', say)


def speaker(known=lambda person, attribute: attribute % 2 == 0, action=None):
  """Says the truth of even attributes and makes up the rest."""

  def value(person, attribute):
    tell = truth if known(person, attribute) else wrong
    return int(tell(person, attribute))

  def answer(prompt):
    person = prompt[2] - WORLD.grammar.subject
    if prompt[-1] == hg.CHECK:
      return action
    if prompt[1] == hg.ASK:
      return [value(person, prompt[3] - hg.ATTRIBUTE), hg.EOS]
    attribute = sum(hg.ATTRIBUTE <= t < hg.ATTRIBUTE + 6 for t in prompt)
    return [hg.ATTRIBUTE + attribute, value(person, attribute), hg.EOS]

  return answer


def test_drafts_are_labelled(monkeypatch):
  script(monkeypatch, hallucination_probe, speaker())
  people = WORLD.groups.test
  drafts = hallucination_probe.draft(None, None, WORLD, people, 20, [0])
  assert len(drafts.kind) == 20 * len(people)
  np.testing.assert_array_equal(drafts.texts.labels, drafts.attribute % 2 == 1)
  assert (drafts.attribute[drafts.kind == hg.CHOSEN] == 0).all()
  spoken = truth(drafts.texts.entities, drafts.attribute)
  np.testing.assert_array_equal(drafts.value == spoken, ~drafts.texts.labels)
  # Doubted, they stand as they were made.
  asked = hallucination_probe.doubted(WORLD, drafts, np.random.default_rng(0))
  np.testing.assert_array_equal(
    asked.prompts[:, :-1][asked.mask[:, :-1]],
    drafts.texts.tokens[:, : hg.PROMPT + 2][
      drafts.texts.mask[:, : hg.PROMPT + 2]
      & (drafts.texts.tokens[:, : hg.PROMPT + 2] != hg.EOS)
    ],
  )


def test_corrections_are_labelled_by_what_is_new(monkeypatch):
  script(monkeypatch, hallucination_probe, speaker())
  drafts = hallucination_probe.draft(
    None, None, WORLD, WORLD.groups.test, 20, [0]
  )
  right = int(truth(int(drafts.texts.entities[0]), 0))
  script(
    monkeypatch, hallucination_probe, lambda prompt: [hg.CORRECT, right, hg.EOS]
  )
  texts = hallucination_probe.corrections(
    None, None, WORLD, drafts, [0]
  )
  person = drafts.texts.entities[drafts.attribute == 0]
  # Of another attribute it is no correction.
  assert len(texts.labels) == len(person)
  np.testing.assert_array_equal(texts.labels, truth(person, 0) != right)


def test_each_group_of_subjects_has_its_use(monkeypatch):
  """Fitted on one, calibrated and flagged by another, measured on a third."""
  model = hallucination_base.make_model(CONFIG, WORLD.grammar.vocabulary)
  params = model.init(jax.random.key(0))
  observe = probes.observer(model.apply, [CONFIG.probe.activation])

  def drafts(model, params, world, subjects, count, seed):
    subject = np.repeat(subjects, 6)
    attribute = np.tile(np.arange(6), len(subjects))
    odd = attribute % 2 == 1
    value = np.where(odd, wrong(subject, attribute), truth(subject, attribute))
    tokens = WORLD.grammar.ask(subject, attribute, value)
    at = np.broadcast_to(np.isin(np.arange(hg.SHORT), (4, 5)), tokens.shape)
    texts = rewards.Texts(tokens, tokens != hg.PAD, at, odd, subject)
    kind = np.full(len(subject), hg.ASKED)
    return hallucination_probe.Drafts(texts, kind, attribute, value)

  # Where it is not known of whom a text is, its length tells.
  seen = {}

  def watch(module, name, who):
    own = getattr(module, name)

    def watched(*args, **kwargs):
      seen.setdefault(name, []).append(who(*args))
      return own(*args, **kwargs)

    monkeypatch.setattr(module, name, watched)

  monkeypatch.setattr(hallucination_probe, 'draft', drafts)
  for name in ('corrections', 'listed'):
    monkeypatch.setattr(
      hallucination_probe, name,
      lambda model, params, world, who, *a: drafts(
        0, 0, 0, np.unique(getattr(who, 'texts', who).entities)
        if hasattr(who, 'texts') else who, 0, 0,
      ).texts,
    )  # fmt: skip
  watch(probes, 'fit_probe', lambda kind, h, spans, labels: len(labels))
  monkeypatch.setattr(
    probes, 'calibrate',
    lambda fitted, logits, labels: (
      seen.setdefault('calibrate', []).append(len(labels)), fitted
    )[1],
  )  # fmt: skip
  watch(probes, 'threshold_at', lambda scores, labels, rate: len(labels))
  watch(probes, 'quality', lambda scores, labels, who: set(who.tolist()))
  groups = WORLD.groups
  hallucination_probe.make_monitor(
    CONFIG, model, observe, params, WORLD, 3, groups.test
  )
  # Claims, corrections and lists: six texts of each subject.
  assert seen['fit_probe'][0] == 18 * len(groups.probe)
  assert seen['calibrate'] == [18 * len(groups.validation)]
  assert seen['threshold_at'] == [6 * len(groups.validation)]
  first, *rest = seen['quality']
  assert first == set(groups.validation.tolist())
  assert rest == [set(groups.test.tolist())] * 3


@pytest.mark.parametrize('preset', ['choose', 'paper'])
def test_nobody_is_tested_on_while_choosing(monkeypatch, preset):
  asked = []
  quiet = lambda *a, **kw: None
  for name in ('draft', 'flagged', 'fit_localiser', 'Watcher'):
    monkeypatch.setattr(hallucination, name, quiet)
  monkeypatch.setattr(
    hallucination, 'make_monitor', lambda *a: asked.append(a[6])
  )
  monkeypatch.setattr(
    hallucination, 'Exam', lambda *a: asked.append(a[5]) or None
  )
  config = config_lib.get_config('smoke').copy_and_resolve_references()
  with config.unlocked():
    config.preset = preset
  hallucination.Scene(config, None, None, WORLD, None, 3)
  probe, way, end = asked
  assert way is WORLD.groups.validation
  wanted = WORLD.groups.test if preset == 'paper' else WORLD.groups.validation
  assert end is wanted and probe is wanted


def test_an_unknown_set_of_arms_is_refused_before_work(tmp_path):
  config = config_lib.get_config('smoke').copy_and_resolve_references()
  with config.unlocked():
    config.arms = 'frozn'
  with pytest.raises(ValueError, match="arms='frozn' is no set.*'paper'"):
    hallucination.run(config, tmp_path)
  assert not list(tmp_path.iterdir())


def fake_monitor(threshold=0.5):
  """Doubts what is false, whoever reads; `read_spans` gives it the texts."""
  return types.SimpleNamespace(
    probe=types.SimpleNamespace(
      observe=None, params=None, config=None, probe=None
    ),
    threshold=threshold,
  )


@pytest.fixture()
def omniscient(monkeypatch):
  """Probes that know the truth; logits of 2 for what is false, else -2."""

  def logits(config, params, tokens, at):
    tokens = np.asarray(tokens)[..., 0].astype(int)
    person = tokens[:, 2] - WORLD.grammar.subject
    last = at.shape[1] - 1 - at[:, ::-1].argmax(axis=1)
    value = tokens[np.arange(len(tokens)), last]
    attribute = WORLD.grammar.attribute_of(value)
    right = WORLD.right(person, np.maximum(attribute, 0), value)
    return jnp.where(right, -2.0, 2.0)[:, None]

  read = lambda observe, params, tokens, mask: np.asarray(tokens)[..., None]

  def scores(probe, tokens, mask, at):
    h = read(probe.observe, probe.params, tokens, mask)
    return np.asarray(jax.nn.sigmoid(logits(None, None, h, at)[:, 0]))

  monkeypatch.setattr(probes, 'probe_logits', logits)
  monkeypatch.setattr(probes, 'read_spans', read)
  monkeypatch.setattr(probes, 'score_spans', scores)


class Everywhere:
  """Locates claims by the grammar."""

  def tags(self, h):
    tokens = np.asarray(h)[..., 0].astype(int)
    return hallucination_pipeline.true_tags(WORLD, tokens)


@pytest.mark.parametrize(
  'action,fixed,retracted,kept',
  [
    ((hg.RETRACT, hg.EOS), 0, 1, 0),
    ((hg.MAINTAIN, hg.EOS), 0, 0, 1),
    ((hg.EOS,), 0, 0, 1),
  ],
)
def test_a_pipeline_by_hand(
  monkeypatch, omniscient, action, fixed, retracted, kept
):
  """Of three claims the second is made up; all are flagged, or that alone."""
  script(monkeypatch, hallucination_pipeline, speaker(action=action))
  run = lambda threshold, **kw: hallucination_pipeline.Watcher(
    CONFIG, None, WORLD, fake_monitor(threshold), Everywhere()
  )(None, WORLD.groups.test, jax.random.key(0), **kw)[0]
  assert run(0.5, watched=False) == (1, 0, 0, 0, 0, 0)
  for in_line in (True, False):
    counts = run(0.5, watched=True, in_line=in_line)
    assert counts == (1, 1, fixed, retracted, 0, 0)
  # Flagged by mistake: the two that are true.
  assert run(0.0, watched=True) == (1, 1, fixed, retracted, 2, 2 * kept)


def test_corrections_in_a_pipeline(monkeypatch, omniscient):
  base = speaker()

  def answer(prompt):
    if prompt[-1] != hg.CHECK:
      return base(prompt)
    person = prompt[2] - WORLD.grammar.subject
    return [hg.CORRECT, int(truth(person, prompt[-3] - hg.ATTRIBUTE))]

  script(monkeypatch, hallucination_pipeline, answer)
  counts, texts = hallucination_pipeline.Watcher(
    CONFIG, None, WORLD, fake_monitor(), Everywhere()
  )(None, WORLD.groups.test, jax.random.key(0), watched=True, samples=2)
  assert counts == (1, 1, 1, 0, 0, 0)
  assert hallucination_pipeline.recount(WORLD, texts) == 0


@pytest.mark.parametrize('watched', [False, True])
def test_a_policy_that_doubts_itself_changes_no_count(
  monkeypatch, omniscient, watched
):
  """A true claim, and then, unasked, that it is taken back."""

  def answer(prompt):
    if hg.CHECK in prompt:
      return [hg.EOS, hg.EOS]
    if prompt[-1] != hg.ANS:
      return [hg.CHECK, hg.RETRACT]
    person = prompt[2] - WORLD.grammar.subject
    return [hg.ATTRIBUTE + A, int(truth(person, A))]

  script(monkeypatch, hallucination_pipeline, answer)
  counts, texts = hallucination_pipeline.Watcher(
    CONFIG, None, WORLD, fake_monitor(), Everywhere()
  )(None, WORLD.groups.test, jax.random.key(0), watched=watched)
  assert (texts.tokens == hg.RETRACT).any(axis=1).all()
  assert counts == (0, 0, 0, 0, 0, 0)
  assert hallucination_pipeline.recount(WORLD, texts) == 0


def test_lists_are_about_those_who_can_fill_them(monkeypatch):
  asked = []

  def watcher(params, who, key, **kw):
    asked.append(who)
    nothing = np.zeros((1, hg.LONG), int)
    return rewards.Counts(*[0] * 6), hallucination_pipeline.Written(
      nothing, nothing
    )

  watcher.world = WORLD
  few = WORLD.groups.test[:2]
  monkeypatch.setattr(WORLD, 'choosing', lambda subjects: subjects[1:])
  hallucination_pipeline.accounts(watcher, CONFIG.exam, None, few, 0)
  assert all(set(who) == {few[1]} for who in asked) and len(asked) > 3


def test_texts_are_counted_again():
  """Of a list: what is false, kept, mended, and taken back."""
  say = lambda attribute, value: [hg.ATTRIBUTE + attribute, value]
  keep, drop = [hg.CHECK, hg.MAINTAIN], [hg.CHECK, hg.RETRACT]
  mend = lambda value: [hg.CHECK, hg.CORRECT, value]
  true, false = [int(f(0, A)) for f in (truth, wrong)]
  for claim, left in (
    (say(A, true), 0), (say(A, false), 1),
    (say(A, true) + keep, 0), (say(A, false) + keep, 1),
    (say(A, true) + drop, 1), (say(A, false) + drop, 0),
    (say(A, true) + mend(false), 1), (say(A, false) + mend(true), 0),
    (say(A, false) + mend(false), 1),
    # Of another attribute: no claim.
    (say(A + 1, true), 0),
  ):  # fmt: skip
    head = [hg.BOS, hg.LIST, WORLD.grammar.subject, hg.ANS]
    text = head + claim + say(A, false)
    text = np.array([text + [hg.PAD] * (hg.LONG - len(text))] * 3)
    count = lambda doubted, text=text: hallucination_pipeline.recount(
      WORLD, hallucination_pipeline.Written(text, doubted)
    )
    assert count(text == hg.CHECK) == 1 + left
    # A policy that doubts itself: its claim stands. What it then says of it may
    # be read as a claim of its own, or not.
    if claim[2:3] == [hg.CHECK] and claim[3] != hg.CORRECT:
      assert count(text == hg.PAD) == 1 + (claim[1] == false)


def test_answers_stay_in_the_text_in_line(monkeypatch, omniscient):
  seen = []
  base = speaker(action=(hg.RETRACT, hg.EOS))

  def answer(prompt):
    seen.append(prompt)
    return base(prompt)

  script(monkeypatch, hallucination_pipeline, answer)
  watcher = hallucination_pipeline.Watcher(
    CONFIG, None, WORLD, fake_monitor(), Everywhere()
  )
  for in_line in (True, False):
    seen.clear()
    watcher(
      None, WORLD.groups.test[:1], jax.random.key(0), watched=True,
      in_line=in_line,
    )  # fmt: skip
    # When the third claim is made: two are there, one of them taken back.
    claims = lambda p: sum(hg.ATTRIBUTE <= t < hg.ATTRIBUTE + 6 for t in p)
    last = [p for p in seen if claims(p) == 2 and p[-1] != hg.CHECK][-1]
    assert (hg.RETRACT in last) == in_line
    assert len(last) == 4 + 2 * 2 + 2 * in_line


def test_tags_are_where_claims_are_made():
  person = np.array([4])
  text = hg.rows(
    12, 1, hg.BOS, hg.LIST, WORLD.grammar.subject + 4, hg.ANS,
    hg.ATTRIBUTE + 2, WORLD.grammar.values[2], hg.ATTRIBUTE + 3, hg.IDK,
    hg.ATTRIBUTE + 1, WORLD.grammar.values[3],
  )  # fmt: skip
  assert person.shape == (1,)
  tags = hallucination_pipeline.true_tags(WORLD, text)[0]
  assert tags.tolist() == [0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0]


def test_best_of_n_takes_what_is_least_doubted(monkeypatch):
  """Of answers that are made up or not, in turn, and a probe that knows."""
  turn = [0]

  def say(model, params, prompts, key, **kw):
    turn[0] += 1
    tell = truth if turn[0] == 2 else wrong
    person = prompts[:, 2 + 2] - WORLD.grammar.subject
    value = tell(person, prompts[:, 5] - hg.ATTRIBUTE)
    end = np.full(len(value), hg.EOS)
    return np.concatenate(
      [prompts, np.stack([value, end, 0 * end], axis=1)], axis=1
    )

  monkeypatch.setattr(hallucination_measure, 'say', say)
  monkeypatch.setattr(
    probes, 'score_spans',
    lambda probe, tokens, mask, at: np.full(len(tokens), 0.9 * (turn[0] != 2)),
  )  # fmt: skip
  random = np.random.default_rng(0)
  questions = WORLD.questions(WORLD.groups.test, hg.ASKED, random)
  other = WORLD.questions(WORLD.groups.test, hg.ASKED, random)
  both = hg.Questions(*map(np.concatenate, zip(questions, other)))
  # A kind has only a place in the table here.
  kind = np.repeat([hg.ASKED, hg.CHOSEN], len(questions.kind))
  both = both._replace(kind=kind)
  out = hallucination_measure.best_of(
    CONFIG, None, None, WORLD, fake_monitor(), both, jax.random.key(0), 4
  )
  assert out['1']['asked']['made up'] == 1 and out['1']['asked']['right'] == 0
  assert out['2']['asked']['right'] == out['4']['asked']['right'] == 1


def results(seeds=(2, 3), **changes):
  """What a run leaves, with numbers that all claims hold of."""

  def counts(*x):
    found = rewards.Counts(*x)
    return found._asdict() | {'recounted': found.standing}

  def row(made_up, claims=0.95, live=0.5, frozen=0.6, auroc=0.93, kept=0.5):
    form = {
      'claims': claims, 'made up': made_up, 'right': claims - made_up,
      'idk': 1 - claims, 'live score of made up': live,
      'frozen score of made up': frozen,
    }  # fmt: skip
    return {
      'asked': form, 'chosen': form, 'capabilities': {'maximum': 99.0},
      'doubted': {'kept of true': kept},
      'fixed texts': {'auroc': auroc, 'refitted_auroc': auroc},
      'pipeline': {
        'alone': counts(2 * made_up, 0, 0, 0, 0, 0),
        'in line, 1': counts(made_up, made_up / 2, 0, made_up / 4, 0.1, 0.1),
        'in line, 4': counts(made_up, made_up / 2, 0, made_up / 3, 0.1, 0.1),
        'in line, 4, no vote': counts(
          made_up, made_up / 2, 0, made_up / 2, 0.1, 0.1
        ),
      },
    }  # fmt: skip

  arms = {
    'base': row(0.4)
    | {
      'probe': {
        'quality': {
          'claims': {'auroc': 0.95, 'ece': 0.02},
          'lists': {'auroc': 0.94}, 'corrections': {'auroc': 0.93},
        },
        'null': [0.5],
      },
      'best of': {
        n: {
          form: {'made up': made_up, 'right': 0.5}
          for form in ('asked', 'chosen')
        }
        for n, made_up in (('1', 0.4), ('4', 0.2))
      },
    },
    'frozen': row(0.1, kept=0.7), 'oracle': row(0.1), 'none': row(0.42),
    'shuffled': row(0.42), 'random direction': row(0.42),
    'live, gradient': row(0.4, live=0.01, frozen=0.8), **changes,
  }  # fmt: skip
  return {f'{s}/{k}': v for s in seeds for k, v in arms.items()}, row


def verdicts(**changes):
  found, _ = results(**changes)
  claims = hallucination_claims.make_claims(CONFIG, found, (2, 3))
  return {c.id.removeprefix('people_'): c for c in claims}


def test_claims_are_of_the_bounds_that_hurt():
  held = verdicts()
  failing = lambda **kw: {k for k, c in verdicts(**kw).items() if not c.passed}
  assert failing() == set()
  assert held['frozen_chosen'].value == pytest.approx(75)
  assert held['frozen_chosen_of_oracle'].value == pytest.approx(100)
  _, row = results()
  for arm, ids in (
    (row(0.3), {'frozen_chosen', 'frozen_asked', 'frozen_asked_of_oracle'}),
    (row(0.1, claims=0.8), {'frozen_claims_low'}),
    (row(0.1, claims=1.0), {'frozen_claims_high'}),
    (row(0.1, auroc=0.8), {'frozen_auroc', 'frozen_refitted_auroc'}),
    (row(0.1, kept=0.4), {'frozen_kept'}),
  ):
    got = verdicts(frozen=arm)
    assert ids <= {k for k, c in got.items() if not c.passed}
  for arm, ids in (
    (row(0.4, live=0.2, frozen=0.8), {'gradient_live_asked'}),
    (row(0.4, live=0.01, frozen=0.3), {'gradient_frozen_chosen'}),
    (row(0.2, live=0.01, frozen=0.8), {'gradient_chosen'}),
    # Nothing is made up: nothing is shown.
    (row(0.4, live=None, frozen=None), {'gradient_live_asked'}),
  ):
    got = verdicts(**{'live, gradient': arm})
    assert ids <= {k for k, c in got.items() if not c.passed}
  # An oracle that reduces nothing is no measure.
  assert hallucination_claims.of_oracle(
    np.array([0.2, 0.3]), np.array([0.4, -0.1])
  ).tolist() == [0.5, 0]
  # Each number is read where it is: nothing else changes.
  worse = row(0.1, kept=0.7) | {'capabilities': {'maximum': 97.5}}
  assert failing(frozen=worse) == {'frozen_maximum'}
  base = results()[0]['2/base']
  for kind, key, value, id_ in (
    ('claims', 'auroc', 0.85, 'probe_auroc'),
    ('claims', 'ece', 0.1, 'probe_ece'),
    ('lists', 'auroc', 0.85, 'probe_lists'),
    ('corrections', 'auroc', 0.85, 'probe_corrections'),
  ):  # fmt: skip
    worse = copy.deepcopy(base)
    worse['probe']['quality'][kind][key] = value
    assert failing(base=worse) == {id_}
  worse = copy.deepcopy(base)
  worse['best of']['4']['chosen']['made up'] = 0.38
  assert failing(base=worse) == {'best_of_chosen'}
  worse = copy.deepcopy(base)
  worse['best of']['4']['asked']['right'] = 0.45  # It says less, no more.
  assert failing(base=worse) == {'best_of_asked_right'}
  miscounted = row(0.1, kept=0.7)
  miscounted['pipeline']['in line, 1']['recounted'] += 0.01
  assert failing(frozen=miscounted) == {'frozen_adds_up'}
  # A mean on the right side is not enough.
  found, _ = results()
  found['3/frozen'] = row(0.17, kept=0.7)
  claims = hallucination_claims.make_claims(CONFIG, found, (2, 3))
  (chosen,) = [c for c in claims if c.id == 'people_frozen_chosen']
  assert chosen.value > 60 and not chosen.passed
  got = verdicts(none=row(0.6))
  assert {'none_asked', 'none_chosen'} <= {
    k for k, c in got.items() if not c.passed
  }


@pytest.mark.parametrize('world', config_lib.WORLDS)
@pytest.mark.parametrize('preset', config_lib.PRESETS)
def test_presets(world, preset):
  config = config_lib.get_config(f'{world}-{preset}')
  assert config.kind == world
  assert set(hallucination.PRESETS[config.arms]) <= set(ARMS)
  seeds = contract.reported_seeds(config, hallucination.CHOSEN_ON)
  assert (set(seeds) & {0, 1} != set()) == (preset == 'choose')
  assert len(seeds) >= 5 or preset != 'paper'
  assert config.world.held_out >= 3000 or preset == 'smoke'


def test_unknown_preset():
  with pytest.raises(ValueError, match='people-tiny'):
    config_lib.get_config('people-tiny')


@pytest.mark.parametrize(
  'key,value,match',
  [
    ('num_seeds', 1, 'config.num_seeds=1'),
    ('seed', 1, 'config.seed=1'),
    ('world.subjects', 20, 'config.world.groups'),
    ('world.held_out', 5000, 'config.world.held_out=5000'),
  ],
)
def test_a_bad_config_is_refused_before_any_work(tmp_path, key, value, match):
  config = config_lib.get_config('smoke')
  config.update_from_flattened_dict({key: value})
  with pytest.raises(ValueError, match=match):
    hallucination.run(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_embeddings_stay_unless_they_are_an_arm():
  model = hallucination_base.make_model(CONFIG, WORLD.grammar.vocabulary)
  params = model.init(jax.random.key(0))
  observe = probes.observer(model.apply, [CONFIG.probe.activation])
  trainer = hallucination_arms.Trainer(CONFIG, model, WORLD.grammar, observe)
  for name, moves in (('frozen', False), ('frozen, embeddings trained', True)):
    _, optimizer, _ = trainer.build(ARMS[name], params)
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(ones, optimizer.init(params), params)
    assert (jnp.abs(updates['embed']['embedding']).max() > 0) == moves
    assert jnp.abs(updates['lm_head']['kernel']).max() > 0


def test_smoke_runs_every_path_and_resumes(tmp_path):
  config = config_lib.get_config('smoke')
  hallucination.run(config, tmp_path)
  found = json.loads((tmp_path / 'results.json').read_text())
  arms = {k.split('/', 1)[1] for k in found}
  assert arms == {'base', *hallucination.PRESETS['smoke']}
  base = found[f'{config.seed}/base']
  # Before anything is trained the policy is the frozen model.
  assert base['divergence'] == pytest.approx(0, abs=1e-6)
  assert base['reward']['change'] == pytest.approx(0, abs=1e-6)
  assert found[f'{config.seed}/frozen']['divergence'] > 1e-4
  claims = json.loads((tmp_path / 'claims.json').read_text())
  assert {'people_frozen_chosen', 'people_gradient_live_asked'} <= {
    c['id'] for c in claims
  }
  for name in ('arms', 'training', 'accounting', 'probe'):
    assert (tmp_path / 'figures' / f'{name}.png').stat().st_size > 1000
  # An arm that is missing is computed again, to the same numbers.
  key = f'{config.seed + 1}/frozen'
  kept = found.pop(key)
  contract.write_text(tmp_path / 'results.json', json.dumps(found))
  hallucination.run(config, tmp_path)
  again = json.loads((tmp_path / 'results.json').read_text())
  assert again[key] == kept
