"""What is claimed of the hallucination experiment's arms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from experiments import contract
from idesign import rewards

FORMATS = {'asked': 'asked', 'chosen': 'where the model chooses'}
PLACEBOS = ('none', 'shuffled', 'random direction')
Row = tuple[str, str, Any, str, float, str]


class Table(contract.Table):
  """One number per seed, by arm."""

  def get(self, arm: str, *path: str) -> np.ndarray:
    """A number of every seed; NaN where there is nothing to measure."""
    out = []
    for row in self.arm(arm):
      for key in path:
        row = row[key]
      out.append(np.nan if row is None else row)
    return np.array(out, float)

  def reduction(self, arm: str, form: str) -> np.ndarray:
    """Of made-up claims per question, share of the base's."""
    return 1 - self.relative(arm, form, 'made up')

  def relative(self, arm: str, form: str, what: str) -> np.ndarray:
    return self.get(arm, form, what) / np.maximum(
      self.get('base', form, what), 1e-3
    )

  def reductions(self, arm: str, mode: str) -> list[rewards.Reductions]:
    """Of the pipeline, where they come from."""
    return [
      rewards.reductions(
        base['pipeline']['alone']['made_up'],
        row['pipeline']['alone']['made_up'],
        rewards.Counts(
          **{k: row['pipeline'][mode][k] for k in rewards.Counts._fields}
        ),
      )
      for base, row in zip(self.arm('base'), self.arm(arm))
    ]


def make_claims(
  config, results: Mapping[str, Any], seeds: Sequence[int]
) -> list[contract.Claim]:
  """Judges the arms that were run."""
  t = Table(results, seeds)
  rows = [
    *_probe(t), *_frozen(t), *_live(t), *_placebos(t), *_best_of(t),
    *_pipeline(t),
  ]  # fmt: skip
  prefix = config.kind
  return [
    contract.claim(
      f'{prefix}_{id_}', f'{prefix}: {text}', samples, comparator, target,
      seeds=seeds, reference=reference,
    )
    for id_, text, samples, comparator, target, reference in rows
  ]  # fmt: skip


def _probe(t: Table) -> Iterator[Row]:
  why = 'target of this project'
  claims = ('base', 'probe', 'quality', 'claims')
  yield ('probe_auroc', 'AUROC of the probe on claims about unseen subjects',
         t.get(*claims, 'auroc'), '>=', 0.9, why)  # fmt: skip
  yield ('probe_ece', 'its expected calibration error',
         t.get(*claims, 'ece'), '<=', 0.05, why)  # fmt: skip
  for kind, what in (
    ('lists', 'claims in lists'), ('corrections', 'what claims are changed to')
  ):  # fmt: skip
    yield (f'probe_{kind}', f'AUROC of the same probe on {what}',
           t.get('base', 'probe', 'quality', kind, 'auroc'), '>=', 0.9,
           'it is rewarded as well')  # fmt: skip
  null = [np.mean(r['probe']['null']) for r in t.arm('base')]
  yield ('probe_null', 'AUROC of probes fitted on shuffled labels',
         null, '<=', 0.6, 'control')  # fmt: skip


def _frozen(t: Table) -> Iterator[Row]:
  target, arm = 'target of this project', 'frozen'
  for form, least in (('chosen', 60), ('asked', 50)):
    where = FORMATS[form]
    yield (f'frozen_{form}', 'fewer made-up claims under the frozen probe, '
           f'{where}, %', 100 * t.reduction(arm, form), '>=', least,
           target)  # fmt: skip
    share = of_oracle(t.reduction(arm, form), t.reduction('oracle', form))
    yield (f'frozen_{form}_of_oracle', f'the same, {where}, % of what the '
           'truth as the reward reaches', 100 * share, '>=', 85,
           target)  # fmt: skip
  claims = 100 * t.relative(arm, 'chosen', 'claims')
  yield ('frozen_claims_low', 'claims where the model chooses, % of the '
         'base\'s', claims, '>=', 95, target)  # fmt: skip
  yield 'frozen_claims_high', 'the same', claims, '<=', 105, target
  yield ('frozen_supported', 'true claims where asked, % of the base\'s',
         100 * t.relative(arm, 'asked', 'right'), '>=', 95, target)  # fmt: skip
  yield ('oracle_supported', 'the same after the truth as the reward, %',
         100 * t.relative('oracle', 'asked', 'right'), '>=', 95,
         target)  # fmt: skip
  for name in t.arm('base')[0]['capabilities']:
    apart = t.get(arm, 'capabilities', name) - t.get(
      'base', 'capabilities', name
    )
    yield (f'frozen_{name}', f'{name}, outside of any reward, held near to the '
           'frozen model: apart from the base on what is new, points',
           np.abs(apart), '<=', 1, target)  # fmt: skip
  # Where nothing true is doubted nothing is shown.
  kept = [
    np.nan_to_num(t.get(a, 'doubted', 'kept of true'), nan=worst)
    for a, worst in ((arm, 0.0), ('base', 1.0))
  ]
  yield ('frozen_kept', 'true claims that are doubted by mistake: more of them '
         'kept than by the base, points', 100 * (kept[0] - kept[1]), '>=', 0,
         'RLFR, table 13: there from .4 to 0')  # fmt: skip
  for key, what, most in (
    ('auroc', 'the original probe', 0.03),
    ('refitted_auroc', 'a new probe', 0.02),
  ):
    area = lambda name, key=key: t.get(name, 'fixed texts', key)
    yield (f'frozen_{key}', f'AUROC of {what} on the policy\'s activations, on '
           'fixed texts: below that after the truth as the reward',
           area('oracle') - area(arm), '<=', most, target)  # fmt: skip


def of_oracle(own: np.ndarray, oracle: np.ndarray) -> np.ndarray:
  """Share of the oracle's reduction; 0 where that reduces nothing."""
  return np.where(oracle > 0, own / np.where(oracle > 0, oracle, 1), 0)


def _live(t: Table) -> Iterator[Row]:
  arm = 'live, gradient'
  why = 'https://arxiv.org/abs/2602.15515: a gradient through the probe evades'
  for form, where in FORMATS.items():
    # Of nothing made up there is no score, and nothing is shown.
    score = lambda k, worst, form=form: np.nan_to_num(
      t.get(arm, form, f'{k} score of made up'), nan=worst
    )
    live, frozen = score('live', 1.0), score('frozen', 0.0)
    yield (f'gradient_live_{form}', 'live probe with a gradient: its score of '
           f'made-up claims, {where}', live, '<=', 0.1, why)  # fmt: skip
    yield (f'gradient_frozen_{form}', 'the frozen model\'s score of the same, '
           f'{where}', frozen, '>=', 0.5, why)  # fmt: skip
    yield (f'gradient_{form}', f'and fewer made-up claims, {where}, %',
           100 * t.reduction(arm, form), '<=', 20, why)  # fmt: skip


def _placebos(t: Table) -> Iterator[Row]:
  for arm in filter(t.has, PLACEBOS):
    for form, where in FORMATS.items():
      yield (f'{arm.replace(" ", "_")}_{form}', f'{arm}: change of made-up '
             f'claims, {where}, either way, %',
             np.abs(100 * t.reduction(arm, form)), '<=', 20,
             'placebo')  # fmt: skip


def _best_of(t: Table) -> Iterator[Row]:
  """Without training: of several answers the one the probe doubts least."""
  most = max(map(int, t.arm('base')[0]['best of']))
  for form, where in FORMATS.items():
    best = lambda n, key, form=form: t.get('base', 'best of', str(n), form, key)
    fewer = 1 - best(most, 'made up') / np.maximum(best(1, 'made up'), 1e-3)
    yield (f'best_of_{form}', f'the base, untrained: fewer made-up claims by '
           f'the best of {most} answers than by one, {where}, % (target set '
           'afterwards)', 100 * fewer, '>=', 10,
           'best of n scales')  # fmt: skip
    yield (f'best_of_{form}_right', f'true claims of the best of {most}, % of '
           f'those of one, {where}',
           100 * best(most, 'right') / best(1, 'right'), '>=', 95,
           'to say nothing is no skill')  # fmt: skip


def _pipeline(t: Table) -> Iterator[Row]:
  for arm in filter(t.has, ('frozen', 'frozen, doubts only')):
    name = arm.replace(',', '').replace(' ', '_')
    parts = t.reductions(arm, 'in line, 1')
    gap = [
      abs(sum(r[:3]) - 1 + row['pipeline']['in line, 1']['recounted']
          / base['pipeline']['alone']['recounted'])
      for r, base, row in zip(parts, t.arm('base'), t.arm(arm))
    ]  # fmt: skip
    yield (f'{name}_adds_up', f'{arm}: policy, in-context and direct '
           'reductions, apart from what is less wrong in the texts themselves',
           gap, '<=', 1e-9, 'each claim is counted once')  # fmt: skip
    yield (f'{name}_overall', f'{arm}: fewer made-up claims in lists under the '
           'monitor, in line, one answer, %', [100 * r.overall for r in parts],
           '>=', 56.6, 'RLFR, table 1: 56.6 % on Gemma-3-12B')  # fmt: skip
  most = max(
    int(m.split(', ')[1]) for m in t.arm('base')[0]['pipeline'] if ', ' in m
  )
  for arm in filter(t.has, ('base', 'frozen, doubts only')):
    mended = lambda mode, arm=arm: np.array(
      [_mended(r['pipeline'][mode]) for r in t.arm(arm)]
    )
    name = arm.replace(',', '').replace(' ', '_')
    for suffix, how in (
      ('', 'among those that most agree with'), (', no vote', 'of all')
    ):  # fmt: skip
      more = mended(f'in line, {most}{suffix}') - mended('in line, 1')
      yield (f'{name}_best_of{"_all" if suffix else ""}', f'{arm}: more of the '
             f'caught claims fixed or taken back by the best of {most} answers '
             f'{how}, than by one, points', 100 * more, '>=', 0,
             'best of n scales')  # fmt: skip


def _mended(counts: Mapping[str, float]) -> float:
  """Share of caught claims that are fixed or taken back."""
  return (counts['fixed'] + counts['retracted']) / max(counts['caught'], 1e-9)
