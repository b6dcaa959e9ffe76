"""The judge without a language model: concepts against clauses' examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxtyping import Float
import numpy as np
import scipy.stats

from idesign.judges.objective import Objective, ObjectiveError
from idesign.judges.verdict import Evidence, Verdict

# One clause's examples -> each concept's activation on each, pooled over the
# positions of the text.
Activations = Callable[[Sequence[str]], Float[np.ndarray, 'N F']]


class Contrast(NamedTuple):
  """How well each concept tells one decision's examples from the others'.

  There are several groups of other examples (those of each other decision);
  each statistic is that of the group told apart worst, so that a concept which
  is merely about what two groups share does not stand out.

  Attributes:
    auroc: probability that a random example of the clause activates it more
      than a random other one, ties counting half, `[F]`.
    effect_size: Cohen's d, `(m1 - m2) / sqrt((v1 + v2) / 2)`; plus or minus
      infinity where both groups are constant and differ.
    selectivity: of its mean activation, `m1 / (m1 + m2)`; 0.5 if never active.
    p_value: one-sided, of the area under random relabellings of the examples.
    q_value: the same with the false-discovery rate controlled over concepts
      (Benjamini and Hochberg 1995).
  """

  auroc: np.ndarray
  effect_size: np.ndarray
  selectivity: np.ndarray
  p_value: np.ndarray
  q_value: np.ndarray


def contrast(
  present: Float[np.ndarray, 'N F'],
  others: Sequence[Float[np.ndarray, 'M F']],
  *,
  permutations: int = 10_000,
  seed: int = 0,
) -> Contrast:
  """Compares activations on examples of one clause with each other group.

  Args:
    present: on the examples where the concept should be present.
    others: on those of each other group, at least one.
    permutations: relabellings; the smallest p is `1 / (permutations + 1)`.
    seed: of the relabellings.

  Raises:
    ValueError: for fewer than two examples in a group, groups with different
      concepts, or activations that are not finite.
  """
  groups = [np.asarray(g, np.float64) for g in (present, *others)]
  for g in groups:
    if g.ndim != 2 or len(g) < 2 or g.shape[1:] != groups[0].shape[1:]:
      raise ValueError(
        f'activations {[x.shape for x in groups]} must be [examples, concepts] '
        'with at least two examples each and the same concepts.'
      )
    if not np.isfinite(g).all():
      raise ValueError('an activation is not finite.')
  if len(groups) < 2:
    raise ValueError('there is no other group to compare with.')
  random = np.random.default_rng(seed)
  a = groups[0]
  parts = [_one(a, b, permutations, random) for b in groups[1:]]
  auroc, effect, selectivity = (
    np.min([p[i] for p in parts], axis=0) for i in range(3)
  )
  p = np.max([p[3] for p in parts], axis=0)
  q = scipy.stats.false_discovery_control(p)
  return Contrast(auroc, effect, selectivity, p, q)


def _one(a, b, permutations, random):
  n, m = len(a), len(b)
  ranks = scipy.stats.rankdata(np.concatenate([a, b]), axis=0)
  area = lambda rank_sum: (rank_sum - n * (n + 1) / 2) / (n * m)
  observed = ranks[:n].sum(0)
  # A relabelling is a row of n ones: all rank sums are one product.
  at_least = np.zeros(a.shape[1])
  for start in range(0, permutations, 1000):
    rows = np.zeros((min(1000, permutations - start), n + m), np.float32)
    for row in rows:
      row[random.choice(n + m, n, replace=False)] = 1
    # Rank sums are multiples of a half: the slack only absorbs rounding.
    drawn = rows @ ranks.astype(np.float32)
    at_least += (drawn >= observed - 0.25).sum(0)
  mean_a, mean_b = a.mean(0), b.mean(0)
  spread = np.sqrt((a.var(0, ddof=1) + b.var(0, ddof=1)) / 2)
  with np.errstate(divide='ignore', invalid='ignore'):
    effect = np.where(mean_a == mean_b, 0.0, (mean_a - mean_b) / spread)
    share = np.where(mean_a + mean_b > 0, mean_a / (mean_a + mean_b), 0.5)
  return area(observed), effect, share, (at_least + 1) / (permutations + 1)


class ContrastiveJudge:
  """Decides by the examples of the objective alone.

  A concept is the decision's own (`amplify` or `suppress`) if its area under
  the curve is significant at false-discovery rate `q`, its effect size at
  least `min_effect` and its selectivity at least `min_selectivity`, against
  the examples of *each* other decision. A concept that passes for both is
  `unsure`; one that passes for neither is `allow`ed.

  The evidence is not looked at: the verdict on a concept is always the same,
  and so is its strength, 1.

  Attributes:
    contrasts: decision -> `Contrast`.
  """

  def __init__(
    self,
    objective: Objective,
    activations: Activations,
    *,
    min_effect: float = 0.5,
    min_selectivity: float = 0.8,
    q: float = 0.05,
    permutations: int = 10_000,
    seed: int = 0,
  ):
    """Reads all concepts on all examples.

    Args:
      objective: needs examples for at least two decisions.
      activations: texts -> `[texts, concepts]`, at least 0, pooled over a
        text's positions (the maximum, as a rule).
      min_effect: see above.
      min_selectivity: see above.
      q: see above.
      permutations: see `contrast`.
      seed: see `contrast`.

    Raises:
      ObjectiveError: if there are too few examples, or no concept tells a
        decision's examples from the others', with the best statistic found.
      ValueError: as `contrast`.
    """
    groups = {
      d: objective.examples(d) for d in ('amplify', 'allow', 'suppress')
    }
    groups = {d: texts for d, texts in groups.items() if texts}
    wanted = [
      d for d in ('amplify', 'suppress')
      if any(c.decision == d for c in objective.clauses)
    ]  # fmt: skip
    few = [d for d in {*wanted, *groups} if len(groups.get(d, ())) < 2]
    if few or len(groups) < 2:
      raise ObjectiveError(
        'the contrastive judge needs at least two examples for every decision '
        'and two decisions to compare; there are '
        f'{ {d: len(t) for d, t in groups.items()} }.'
      )
    read = {d: np.asarray(activations(list(t))) for d, t in groups.items()}
    for d, f in read.items():
      if f.ndim != 2 or len(f) != len(groups[d]):
        raise ValueError(
          f'activations returned {f.shape} for {len(groups[d])} texts; it must '
          'be [texts, concepts].'
        )
    self.contrasts: dict[str, Contrast] = {}
    self._own: dict[str, np.ndarray] = {}
    self._clauses = {c.decision: c.id for c in reversed(objective.clauses)}
    for d in wanted:
      c = contrast(
        read[d],
        [f for other, f in read.items() if other != d],
        permutations=permutations,
        seed=seed,
      )
      own = (
        (c.q_value <= q)
        & (c.effect_size >= min_effect)
        & (c.selectivity >= min_selectivity)
      )
      if not own.any():
        best = int(np.argmax(c.auroc))
        raise ObjectiveError(
          f'the examples to {d} cannot be told from the others: of '
          f'{len(own)} concepts the best, {best}, has AUROC '
          f'{c.auroc[best]:.3f} (q = {c.q_value[best]:.3g}, d = '
          f'{c.effect_size[best]:.2f}, selectivity {c.selectivity[best]:.2f}; '
          f'needed are q <= {q}, d >= {min_effect}, selectivity >= '
          f'{min_selectivity}). Write more examples, or ones that differ in '
          'nothing else.'
        )
      self.contrasts[d], self._own[d] = c, own

  def __call__(self, step: int, evidence: Sequence[Evidence]) -> list[Verdict]:
    """The verdicts; `step` makes no difference."""
    del step
    return [self._verdict(e.concept) for e in evidence]

  def _verdict(self, concept: int) -> Verdict:
    own = [d for d, mine in self._own.items() if mine[concept]]
    reason = '; '.join(
      f'{d}: AUROC {c.auroc[concept]:.3f}, d {c.effect_size[concept]:.2f}, '
      f'selectivity {c.selectivity[concept]:.2f}, q {c.q_value[concept]:.2g}'
      for d, c in self.contrasts.items()
    )
    if len(own) > 1:
      return Verdict(concept, 'unsure', 0.0, 0.0, '', reason)
    if not own:
      return Verdict(concept, 'allow', 0.0, 1.0, '', reason)
    confidence = 1 - float(self.contrasts[own[0]].q_value[concept])
    return Verdict(
      concept, own[0], 1.0, confidence, self._clauses[own[0]], reason
    )
