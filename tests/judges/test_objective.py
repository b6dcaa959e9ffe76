"""Objectives, verdicts, gates, logs: what is wrong is named."""

import dataclasses
import json

import numpy as np
import pytest

from idesign import judges
from idesign.judges import Verdict

SPEC = {
  'goal': 'Learn sums.',
  'clauses': [
    {'id': 'sums', 'decision': 'amplify', 'text': 'Sums.', 'examples': ['1 1']},
    {'id': 'arr', 'decision': 'suppress', 'text': 'Arr.', 'examples': ['arr']},
  ],
}


def changed(clause=None, **changes):
  spec = json.loads(json.dumps(SPEC)) | changes
  if clause:
    spec['clauses'][1] |= clause
  return spec


def test_yaml_and_python_agree(tmp_path):
  path = tmp_path / 'objective.yaml'
  path.write_text(
    """
goal: Learn sums.
clauses:
  - {id: sums, decision: amplify, text: Sums., examples: ["1 1"]}
  - {id: arr, decision: suppress, text: Arr., examples: [arr]}
"""
  )
  loaded = judges.load_objective(path)
  assert loaded == judges.make_objective(SPEC)
  assert loaded.sha256() == judges.make_objective(SPEC).sha256()
  assert loaded.sha256() != loaded.reversed().sha256()
  assert loaded.reversed().examples('suppress') == ('1 1',)
  assert loaded.reversed().reversed().clauses == loaded.clauses


BAD = {
  'nothing': ({}, 'needs'),
  'no clause': (changed(clauses=[]), 'empty'),
  'blank goal': (changed(goal=' '), 'empty'),
  'clauses are a text': (changed(clauses='arr'), 'list of mappings'),
  'a clause is a text': (changed(clauses=['arr']), r'clauses\[0\] must be'),
  'unknown decision': (changed({'decision': 'reinforce'}), "'reinforce'"),
  'unsure is none': (changed({'decision': 'unsure'}), "'unsure'"),
  'one id twice': (changed({'id': 'sums'}), 'different names'),
  'unknown key': (changed({'exmaples': []}), 'exmaples'),
  'examples are a text': (changed({'examples': 'arr'}), 'list of texts'),
  'examples are an empty text': (changed({'examples': ''}), 'list of texts'),
  'examples are a mapping': (changed({'examples': {'a': 1}}), 'list of texts'),
  'an empty mapping': (changed({'examples': {}}), 'list of texts'),
  'examples are a number': (changed({'examples': 12}), 'list of texts'),
  'zero': (changed({'examples': 0}), 'list of texts'),
  'keys of many kinds': (changed({1: 2}) | {3: 4}, 'has keys'),
  'YAML took it for a number': (changed({'examples': [12]}), 'quote it'),
  'empty example': (changed({'examples': ['']}), 'empty example'),
  'contradiction': (changed({'examples': ['1 1']}), "in 'sums'"),
  'only allows': (
    changed(clauses=[{'id': 'a', 'decision': 'allow', 'text': 'b'}]),
    'every clause allows',
  ),
}


@pytest.mark.parametrize('spec,message', BAD.values(), ids=BAD)
def test_bad_objectives(spec, message):
  with pytest.raises(judges.ObjectiveError, match=message):
    judges.make_objective(spec)


TWICE = """
goal: Learn sums.
clauses:
  - {id: arr, decision: suppress, text: Arr., "decision": amplify}
"""


@pytest.mark.parametrize('text', ['', 'a: [', '- 1'])
def test_bad_files_are_named(text, tmp_path):
  path = tmp_path / 'objective.yaml'
  path.write_text(text)
  with pytest.raises(judges.ObjectiveError, match='objective.yaml'):
    judges.load_objective(path)


@pytest.mark.parametrize('text', ['goal: a\ngoal: b', TWICE], ids=['top', 'in'])
def test_a_key_that_stands_twice_is_refused(text, tmp_path):
  path = tmp_path / 'objective.yaml'
  path.write_text(text)
  with pytest.raises(
    judges.ObjectiveError, match=r'objective.yaml: line \d: .* stands twice'
  ):
    judges.load_objective(path)


def test_a_clause_made_in_python_is_checked():
  make = lambda examples: judges.Clause('arr', 'suppress', 'Arr.', examples)
  for wrong in ('arr', 12, {'arr': 1}, None):
    with pytest.raises(judges.ObjectiveError, match="'arr': examples must be"):
      make(wrong)
  with pytest.raises(judges.ObjectiveError, match='12 is no text'):
    make(('arr', 12))
  with pytest.raises(judges.ObjectiveError, match='3 is no text'):
    judges.Clause('arr', 'suppress', 3)
  assert make(['arr', 'avast']) == make(('arr', 'avast'))


def test_gates():
  verdicts = [
    Verdict(0, 'suppress'),
    Verdict(1, 'suppress', 0.25),
    Verdict(2, 'amplify', 0.5),
    Verdict(3, 'allow'),
    Verdict(4, 'unsure'),
  ]
  g = judges.gates(verdicts, 6, boost=3.0)
  assert g.dtype == np.float32
  np.testing.assert_array_equal(g, [0, 0.75, 2.5, 1, 1, 1])
  with pytest.raises(ValueError, match='concept 6'):
    judges.gates([Verdict(6, 'allow')], 6)
  with pytest.raises(ValueError, match='concept 1'):
    judges.gates(verdicts + [verdicts[1]], 6)
  for boost in (-1, float('inf'), float('nan')):
    with pytest.raises(ValueError, match='boost'):
      judges.gates([], 6, boost=boost)


@pytest.mark.parametrize(
  'fields',
  [
    ('maybe', 1.0),
    ('suppress', 1.5),
    ('suppress', float('nan')),
    ('suppress', '1'),
    ('suppress', True),
    ('suppress', None),
  ],
)
def test_no_verdict_is_unvalidated(fields):
  with pytest.raises(ValueError):
    Verdict(0, *fields)


def always(decision):
  return lambda step, evidence: [Verdict(e.concept, decision) for e in evidence]


def test_a_recorded_run_replays(tmp_path):
  path = tmp_path / 'log.jsonl'
  evidence = [judges.Evidence(i) for i in range(3)]
  with judges.DecisionLog(path) as log:
    first = judges.recorded(always('suppress'), log)(0, evidence)
  # A killed run repeats its step: the later verdict counts.
  later = judges.recorded(always('allow'), judges.DecisionLog(path))
  second = later(10, evidence[:1])
  replay = judges.ReplayJudge(path)
  assert replay(0, evidence) == first and replay(10, evidence[:1]) == second
  with pytest.raises(judges.LogError, match='concept 1 at step 10'):
    replay(10, evidence)


def lines_of(tmp_path):
  path = tmp_path / 'log.jsonl'
  log = judges.DecisionLog(path)
  judges.recorded(always('suppress'), log)(
    0, [judges.Evidence(i) for i in range(4)]
  )
  return path, path.read_text().splitlines(keepends=True)


TAMPERING = {
  'changed': lambda x: [x[0], x[1].replace('suppress', 'amplify'), *x[2:]],
  'taken out': lambda x: [x[0], *x[2:]],
  'put in': lambda x: [x[0], x[0], *x[1:]],
  'swapped': lambda x: [x[0], x[2], x[1], x[3]],
  'no JSON': lambda x: [x[0], 'hello\n', *x[2:]],
  'a list': lambda x: [x[0], '[]\n', *x[2:]],
}


@pytest.mark.parametrize('tamper', TAMPERING.values(), ids=TAMPERING)
def test_tampering_is_found(tamper, tmp_path):
  path, lines = lines_of(tmp_path)  # Its log is gone, and so is its lock.
  path.write_text(''.join(tamper(lines)))
  before = path.read_bytes()
  for read in (judges.read_log, judges.DecisionLog, judges.ReplayJudge):
    with pytest.raises(judges.LogError, match='line 2'):
      read(path)
  assert path.read_bytes() == before


def test_a_killed_writer_loses_its_last_line_only(tmp_path):
  path, lines = lines_of(tmp_path)
  path.write_text(''.join(lines)[:-20])
  with pytest.warns(UserWarning, match='half-written'):
    log = judges.DecisionLog(path)
  assert len(log.rows) == 3
  log.append({'step': 1, 'verdict': dataclasses.asdict(Verdict(0, 'allow'))})
  assert len(judges.read_log(path)) == 4


def test_a_row_without_a_verdict_is_named(tmp_path):
  log = judges.DecisionLog(tmp_path / 'log.jsonl')
  log.append({'step': 0, 'verdict': {'concept': 1, 'decision': 'reinforce'}})
  with pytest.raises(judges.LogError, match='line 1: no verdict'):
    judges.ReplayJudge(log.path)
