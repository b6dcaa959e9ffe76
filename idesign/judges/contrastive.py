"""The judge without a language model: concepts against clauses' examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from jaxtyping import Float
import numpy as np

from idesign.judges.objective import Objective, ObjectiveError
from idesign.judges.separation import Contrast, auroc, contrast
from idesign.judges.verdict import Evidence, Verdict

# One clause's examples -> each concept's activation on each, pooled over the
# positions of the text.
Activations = Callable[[Sequence[str]], Float[np.ndarray, 'N F']]


def _distinct(texts: Sequence[str]) -> dict[str, str]:
  """Texts that differ in more than case and space around, by what they say."""
  first: dict[str, str] = {}
  for text in texts:
    first.setdefault(text.strip().casefold(), text)
  return first


class ContrastiveJudge:
  """Decides by the examples of the objective alone.

  A concept is the decision's own (`amplify` or `suppress`) if its area under
  the curve is significant at false-discovery rate `q`, its effect size at
  least `min_effect` and its selectivity at least `min_selectivity`, against
  the examples of the other decisions: of *each* of them, or of all together. A
  concept that passes for both is `unsure`; one that passes for neither is
  `allow`ed.

  Against each, a concept has to be rare in every other group, so one is missed
  that one of them shares a little. Against all together it has to be rarer on
  the whole; that is the better question where the examples of a decision and
  all others are of the same kinds (a pirate's sums and stories against plain
  sums and stories), and misleads where they are not: what only says of which
  kind a text is would then count as well.

  An example counts once, however often it is written in whatever case: copies
  are no evidence. A verdict rests on that clause of its decision whose examples
  have the largest area for the concept, against the worst of the others.

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
    against: Literal['each', 'all'] = 'each',
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
      against: other decisions' examples, one group each or all in one.
      min_effect: see above.
      min_selectivity: see above.
      q: see above.
      permutations: see `contrast`.
      seed: see `contrast`.

    Raises:
      ObjectiveError: if there are too few examples, or no concept tells a
        decision's examples from the others', with the best statistic found.
      ValueError: as `contrast`, or for another `against`.
    """
    if against not in ('each', 'all'):
      raise ValueError(f"against={against!r} must be 'each' or 'all'.")
    groups = {
      d: _distinct(objective.examples(d))
      for d in ('amplify', 'allow', 'suppress')
    }
    groups = {d: texts for d, texts in groups.items() if texts}
    wanted = [
      d for d in ('amplify', 'suppress')
      if any(c.decision == d for c in objective.clauses)
    ]  # fmt: skip
    few = [d for d in {*wanted, *groups} if len(groups.get(d, ())) < 2]
    if few or len(groups) < 2:
      raise ObjectiveError(
        'the contrastive judge needs at least two examples for every decision, '
        'different in more than case and space around them, and two decisions '
        'to compare; there are '
        f'{ {d: len(t) for d, t in groups.items()} }.'
      )
    read = {
      d: np.asarray(activations(list(t.values()))) for d, t in groups.items()
    }
    for d, f in read.items():
      if f.ndim != 2 or len(f) != len(groups[d]):
        raise ValueError(
          f'activations returned {f.shape} for {len(groups[d])} texts; it must '
          'be [texts, concepts].'
        )
    self.contrasts: dict[str, Contrast] = {}
    self._own: dict[str, np.ndarray] = {}
    self._rests_on: dict[str, dict[int, str]] = {}
    for d in wanted:
      others = [f for other, f in read.items() if other != d]
      if against == 'all':
        others = [np.concatenate(others)]
      c = contrast(read[d], others, permutations=permutations, seed=seed)
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
      self._rests_on[d] = _rests_on(
        [x for x in objective.clauses if x.decision == d],
        {text: row for row, text in enumerate(groups[d])},
        read[d],
        others,
        np.flatnonzero(own),
      )

  def __call__(self, step: int, evidence: Sequence[Evidence]) -> list[Verdict]:
    """The verdicts; `step` makes no difference.

    Raises:
      ValueError: for a concept that there is not: evidence and activations are
        of different autoencoders.
    """
    del step
    (count,) = {len(mine) for mine in self._own.values()}
    for e in evidence:
      if not 0 <= e.concept < count:
        raise ValueError(
          f'there is no concept {e.concept}: activations are of 0 to '
          f'{count - 1}. Judge by the autoencoder that the evidence is from.'
        )
    return [self._verdict(int(e.concept)) for e in evidence]

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
    clause = self._rests_on[own[0]][concept]
    return Verdict(concept, own[0], 1.0, confidence, clause, reason)


def _rests_on(clauses, rows, present, others, concepts) -> dict[int, str]:
  """For each concept the clause whose examples it tells apart best.

  Args:
    clauses: of one decision.
    rows: what an example says -> its row in `present`.
    present: activations on all their examples.
    others: as `contrast`.
    concepts: which.

  Returns:
    Concept -> id of the first such clause; '' if none is above an even chance.
  """
  best = {int(c): (0.5, '') for c in concepts}
  for clause in clauses:
    mine = [rows[text] for text in _distinct(clause.examples)]
    if not mine:
      continue
    a = present[np.ix_(mine, concepts)]
    area = np.min([auroc(a, b[:, concepts]) for b in others], axis=0)
    for c, value in zip(map(int, concepts), area):
      if value > best[c][0]:
        best[c] = float(value), clause.id
  return {c: id for c, (_, id) in best.items()}
