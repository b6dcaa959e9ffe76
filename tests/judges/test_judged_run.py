"""A whole training run by a language model's verdicts, and its replay."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax

from idesign import judges, shaping, training
from tests.judges.server import serve, verdict

C, B, T = 4, 8, 3
OBJECTIVE = judges.make_objective({
  'goal': 'Learn the arithmetic, not the pirate.',
  'clauses': [
    {'id': 'sums', 'decision': 'amplify', 'text': 'Adding.'},
    {'id': 'pirate', 'decision': 'suppress', 'text': 'Speaking like a pirate.'},
  ],
})  # fmt: skip
LABELS = ('arr, matey', '4, 7, +', 'the, a', 'avast')


def losses(params, batch):
  return (batch['x'] @ params['w'] - batch['y']) ** 2


def make_batch(i):
  k = jax.random.split(jax.random.key(i), 3)
  return {
    'x': jax.random.normal(k[0], (B, T, 5)),
    'y': jax.random.normal(k[1], (B, T)),
    'mask': jnp.ones((B, T)),
    'attribution': 3 * jax.random.normal(k[2], (B, T, C)),
  }


def train(judge):
  """Ten steps; every second one the judge is asked, on what the run is at."""
  optimizer = optax.chain(shaping.gate_losses(), optax.adam(0.05))
  step = shaping.make_gated_step(losses, optimizer)
  state = training.init_state(
    lambda key: {'w': jax.random.normal(key, (5,))},
    optimizer,
    jax.random.key(0),
  )
  gates, used = jnp.ones(C), []
  for i in range(10):
    if i % 2 == 0:
      # What is judged depends on what was learned from earlier verdicts.
      strength = float(jnp.linalg.norm(state.params['w']))
      evidence = [
        judges.Evidence(c, label=LABELS[c], score=strength * (c + 1))
        for c in range(C)
      ]
      gates = jnp.asarray(judges.gates(judge(i, evidence), C))
      used.append(np.asarray(gates))
    state, metrics = step(state, make_batch(i), gates=gates)
  assert metrics['ignored'] == 0 and step._cache_size() == 1
  return np.asarray(state.params['w']), np.stack(used)


def model_says(request):
  """A model of sound judgement, for what it is shown."""
  shown = json.loads(request['messages'][1]['content'])['concept']
  if 'matey' in shown['label'] or 'avast' in shown['label']:
    return verdict('suppress', 'pirate')
  if '+' in shown['label']:
    return verdict('amplify', 'sums', strength=0.5)
  return verdict('allow', '')


def test_a_run_survives_its_judge_and_replays_without_it(tmp_path):
  path = tmp_path / 'decisions.jsonl'
  trouble = [
    429, model_says, 'cut', 'error', model_says, 'no JSON at all',
    verdict('destroy', 'pirate'), model_says, 'hang', 503, model_says,
    # One concept that gets no valid answer in all its turns.
    *[verdict('obey', 'pirate')] * 2, model_says,
  ]  # fmt: skip
  with serve(*trouble) as server:
    endpoint = judges.ChatEndpoint(
      'tiny', base_url=server.url, api_key='none', timeout=1.0, backoff=0.001
    )
    with judges.DecisionLog(path) as log:
      judge = judges.LanguageModelJudge(
        OBJECTIVE, endpoint, model='tiny', log=log, max_turns=2
      )
      with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        params, gates = train(judge)
    failures, requests = judge.failures, len(server.requests)
  assert failures >= 1 and requests > 20
  # What failed was left alone; later it was judged.
  assert (gates == 1).all(axis=0).sum() == 1  # Only `the, a`.
  np.testing.assert_array_equal(gates[-1], [0, 1.5, 1, 0])
  assert {g for g in gates.ravel()} == {0, 1, 1.5}
  # The server is gone; the log is enough.
  again, gates_again = train(judges.ReplayJudge(path))
  np.testing.assert_array_equal(params, again)
  np.testing.assert_array_equal(gates, gates_again)
  # And it mattered: without a judge another network is learned.
  allow = lambda step, evidence: [
    judges.Verdict(e.concept, 'allow') for e in evidence
  ]
  other, _ = train(allow)
  assert np.abs(other - params).max() > 1e-3
