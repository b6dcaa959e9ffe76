"""What a server, a text or an inspector does never raises, and what a judge
remembers is what it was told."""

import json
import types
import warnings

import numpy as np
import pytest

from idesign import judges
from idesign.judges import language_model
from tests.judges.server import ask, verdict
from tests.judges.test_language_model import EVIDENCE, OBJECTIVE, Lookup


class Scripted:
  """Replies one after the other, the last again; exceptions are raised."""

  def __init__(self, *replies, model='fake'):
    self.replies, self.model, self.asked = list(replies), model, []

  def __call__(self, messages, schema):
    self.asked.append([m['content'] for m in messages])
    reply = self.replies[0]
    if len(self.replies) > 1:
      del self.replies[0]
    if isinstance(reply, Exception):
      raise reply
    return judges.Completion(reply, self.model)


def make(complete, tmp_path, inspector=None, *, objective=OBJECTIVE, **options):
  log = judges.DecisionLog(tmp_path / 'decisions.jsonl')
  options = {'model': 'fake'} | options
  return judges.LanguageModelJudge(
    objective, complete, log=log, inspector=inspector or Lookup(), **options
  )


def judged(judge, evidence=(EVIDENCE,), step=0):
  """Verdicts, and their rows of the log, which must be sound."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    verdicts = judge(step, evidence)
  rows = judges.read_log(judge._log.path)
  return verdicts, rows[len(rows) - len(evidence) :]


@pytest.mark.parametrize('model', [float('nan'), None, 7, ['x'], 'x' * 9999])
def test_any_name_of_the_model_can_be_logged(model, tmp_path):
  (v,), (row,) = judged(make(Scripted(verdict(), model=model), tmp_path))
  assert v.decision == 'suppress'
  assert isinstance(row['model'], str) and len(row['model']) <= 200


@pytest.mark.parametrize('text', [None, 7, b'{}', {'action': 'verdict'}])
def test_a_reply_of_no_text_is_unsure(text, tmp_path):
  judge = make(Scripted(text), tmp_path)
  (v,), (row,) = judged(judge)
  assert v.decision == 'unsure' and judge.failures == 1
  assert 'no text' in row['failure']


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_numbers_that_are_none_are_shown_as_null(value, tmp_path):
  complete = Scripted(verdict())
  e = judges.Evidence(7, score=value, low=value, high=value, share=value,
                      sign_agreement=value)  # fmt: skip
  (v,), _ = judged(make(complete, tmp_path), [e])
  assert v.decision == 'suppress'
  shown = json.loads(complete.asked[0][1])['concept']
  assert shown['share_of_update'] is None and shown['interval'] == [None, None]


def test_integers_of_numpy_are_integers(tmp_path):
  judge = make(Scripted(verdict()), tmp_path)
  e = judges.Evidence(np.int64(7), score=np.float32(0.25))
  (v,), (row,) = judged(judge, [e], np.int32(3))
  assert v.concept == 7 and type(v.concept) is int and row['step'] == 3
  replay = judges.ReplayJudge(judge._log.path)
  assert replay(np.int64(3), [e]) == [v]


class Broken:
  def spans(self, concept, count):
    raise KeyError(concept)

  def neighbours(self, concept, count):
    return [('near', 0.5, 'ahoy')]

  def activation(self, concept, text):
    return 'loud'


def test_an_inspector_that_raises_is_unsure(tmp_path):
  judge = make(Scripted(ask('spans')), tmp_path, Broken())
  evidence = [judges.Evidence(i) for i in range(4)]
  verdicts, rows = judged(judge, evidence)
  assert [v.decision for v in verdicts] == 4 * ['unsure']
  assert judge.failures == 4 and judge.asked == 4  # The endpoint did answer.
  assert rows[3]['failure'] == 'KeyError: 3'
  judge = make(Scripted(ask('neighbours')), tmp_path / 'b', Broken())
  (v,), _ = judged(judge)
  assert v.decision == 'unsure' and judge.failures == 1


def test_an_activation_that_is_no_number_is_null(tmp_path):
  complete = Scripted(ask('activation', 'arr'), verdict())
  inspector = types.SimpleNamespace(activation=lambda c, t: float('nan'))
  (v,), _ = judged(make(complete, tmp_path, inspector))
  assert v.decision == 'suppress'
  assert complete.asked[1][-1] == '{"activation": null}'


def test_whatever_complete_raises_is_no_answer(tmp_path):
  judge = make(Scripted(RuntimeError('boom')), tmp_path)
  verdicts, rows = judged(judge, [judges.Evidence(i) for i in range(5)])
  assert judge.failures == 5 and judge.asked == 2
  assert rows[0]['failure'] == 'RuntimeError: boom'


HOSTILE = '\x1b[2J\u202e\ud800\n' + 'x' * 999


def test_spans_and_rationale_are_cleaned(tmp_path):
  inspector = types.SimpleNamespace(spans=lambda c, n: 99 * [HOSTILE])
  complete = Scripted(ask('spans'), verdict(rationale=HOSTILE))
  (v,), _ = judged(make(complete, tmp_path, inspector))
  spans = json.loads(complete.asked[1][-1])['spans']
  assert len(spans) == 12
  for text in (*spans, v.rationale):
    assert text.isprintable() and len(text) == 301


# What is remembered.


def test_failures_are_not_remembered(tmp_path):
  complete = Scripted(judges.EndpointError('down'), verdict())
  judge = make(complete, tmp_path)
  assert judged(judge)[0][0].decision == 'unsure'
  assert judged(judge)[0][0].decision == 'suppress'
  del judge
  complete = Scripted(judges.EndpointError('down'), verdict())
  for expected in ('unsure', 'allow'):  # The log is read again each time.
    complete.replies[-1] = verdict('allow', '')
    judge = make(complete, tmp_path, model='other')
    assert judged(judge)[0][0].decision == expected
    del judge


CHANGES = {
  'nothing': {},
  'model': {'model': 'other'},
  'objective': {
    'objective': judges.Objective('Another goal.', OBJECTIVE.clauses)
  },
  'turns': {'max_turns': 2},
  'instructions': '_INSTRUCTIONS',
  'schema': 'SCHEMA',
}


@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES)
def test_what_a_verdict_depends_on_is_part_of_its_key(
  change, tmp_path, monkeypatch
):
  judged(make(Scripted(verdict()), tmp_path))
  if isinstance(change, str):
    value = getattr(language_model, change)
    value = value + ' Please.' if isinstance(value, str) else value | {'a': 1}
    monkeypatch.setattr(language_model, change, value)
  options = change if isinstance(change, dict) else {}
  complete = Scripted(verdict())
  judged(make(complete, tmp_path, **options))
  assert len(complete.asked) == bool(change)


def test_the_objective_counts_beyond_what_is_shown(tmp_path):
  more = judges.Clause('sums', 'amplify', 'Adding numbers.', ('1 1',))
  other = judges.Objective(OBJECTIVE.goal, (more, *OBJECTIVE.clauses[1:]))
  judged(make(Scripted(verdict()), tmp_path))
  complete = Scripted(verdict())
  judged(make(complete, tmp_path, objective=other))
  assert len(complete.asked) == 1


def test_rows_of_another_judge_are_not_remembered(tmp_path):
  with judges.DecisionLog(tmp_path / 'decisions.jsonl') as log:
    for row in (
      {'key': ['x'], 'verdict': {}},
      {'key': 'x', 'verdict': None},
      {'key': 'x', 'verdict': {'concept': 1, 'decision': 'reinforce'}},
    ):
      log.append(row)
  (v,), _ = judged(make(Scripted(verdict()), tmp_path))
  assert v.decision == 'suppress'


# Patience.

DOWN = judges.EndpointError('down')


def patient(tmp_path, script, known=(), count=6):
  """Which of `count` concepts are asked about, those `known` being cached."""
  evidence = [judges.Evidence(i) for i in range(count)]
  if known:
    judged(make(Scripted(verdict()), tmp_path), [evidence[i] for i in known])
  complete = Scripted(*script)
  verdicts, rows = judged(make(complete, tmp_path), evidence)
  for i in known:
    assert verdicts[i].decision == 'suppress' and rows[i]['cached']
  assert all('silent' not in row for row in rows)
  return [
    i for i, row in enumerate(rows)
    if 'cached' not in row and 'not asked' not in row.get('failure', '')
  ]  # fmt: skip


def test_patience_ends_with_silence_in_a_row(tmp_path):
  assert patient(tmp_path / 'a', [DOWN]) == [0, 1]
  # An answer in between starts the count anew.
  script = [DOWN, verdict(), DOWN, DOWN, verdict()]
  assert patient(tmp_path / 'b', script) == [0, 1, 2, 3]


def test_what_was_known_before_is_no_answer(tmp_path):
  assert patient(tmp_path / 'a', [DOWN], known=[1, 3]) == [0, 2]
  # Once given up, it stays so.
  script = [DOWN, DOWN, verdict()]
  assert patient(tmp_path / 'b', script, known=[2]) == [0, 1]
