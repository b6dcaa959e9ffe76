"""What a judge is shown and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import hashlib
import json
import math
from typing import Any, Protocol, get_args

import numpy as np

from idesign.judges.objective import Decision

DECISIONS: tuple[str, ...] = get_args(Decision)


def plain_number(value: Any) -> float | None:
  """As a number of JSON, to four digits; None for what is no finite number."""
  try:
    number = float(value)
  except (TypeError, ValueError, OverflowError):
    return None
  return float(f'{number:.4g}') if math.isfinite(number) else None


@dataclasses.dataclass(frozen=True)
class Evidence:
  """What is known of a concept when it is judged.

  Nothing here comes from evaluation: no labels, no names of experiments.

  Attributes:
    concept: its index.
    label: a short description, from its top activating texts.
    spans: texts in which it is most active.
    promoted: tokens whose logits its direction raises most.
    score: what the update does to it, the predicted change.
    low, high: 95 % interval of the score.
    share: of the update's movement of the activation, if known.
    sign_agreement: between random halves of the probes.
  """

  concept: int
  label: str = ''
  spans: tuple[str, ...] = ()
  promoted: tuple[str, ...] = ()
  score: float = 0.0
  low: float = 0.0
  high: float = 0.0
  share: float | None = None
  sign_agreement: float | None = None

  def sha256(self) -> str:
    """Tells evidence apart: all texts, and numbers to four digits."""
    numbers = (
      self.score, self.low, self.high, self.share, self.sign_agreement
    )  # fmt: skip
    text = json.dumps([
      int(self.concept), str(self.label), [str(s) for s in self.spans],
      [str(t) for t in self.promoted], [plain_number(x) for x in numbers],
    ])  # fmt: skip
    return hashlib.sha256(text.encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Verdict:
  """A judge's answer for one concept.

  Attributes:
    concept: its index.
    decision: what to do with it; `unsure` does nothing.
    strength: how much of it, in [0, 1].
    confidence: of the judge in itself, in [0, 1]; only recorded.
    clause: id of the clause of the objective it rests on, or ''.
    rationale: in words or numbers.

  Raises:
    ValueError: for a decision that is none, or numbers out of range. So there
      is no verdict that was not validated.
  """

  concept: int
  decision: Decision
  strength: float = 1.0
  confidence: float = 1.0
  clause: str = ''
  rationale: str = ''

  def __post_init__(self):
    if self.decision not in DECISIONS:
      raise ValueError(
        f'decision {self.decision!r:.60} of concept {self.concept}; choose '
        f'from {DECISIONS}.'
      )
    for name in ('strength', 'confidence'):
      value = getattr(self, name)
      if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f'{name} {value!r:.60} is no number.')
      if not 0 <= value <= 1:  # False for NaN.
        raise ValueError(f'{name} {value} is not in [0, 1].')


class Judge(Protocol):
  """Anything that answers for a list of concepts.

  A judge never raises because of what it is shown or because it cannot
  decide: that is the verdict `unsure`.
  """

  def __call__(
    self, step: int, evidence: Sequence[Evidence]
  ) -> list[Verdict]: ...


def gates(
  verdicts: Sequence[Verdict], num_concepts: int, *, boost: float = 1.0
) -> np.ndarray:
  """One gate per concept: 1 leaves it, 0 removes it, above 1 amplifies it.

    suppress   1 - strength
    amplify    1 + boost * strength
    allow, unsure, not judged    1

  Args:
    verdicts: in any order, at most one per concept.
    num_concepts: F.
    boost: how much the strongest amplification adds.

  Returns:
    Float32 `[F]`.

  Raises:
    ValueError: for a negative or infinite boost, a concept out of range, or
      two verdicts on one.
  """
  if not 0 <= boost < np.inf:
    raise ValueError(f'boost={boost} must be finite and not negative.')
  out = np.ones(num_concepts, np.float32)
  seen: set[int] = set()
  for v in verdicts:
    if not 0 <= v.concept < num_concepts or v.concept in seen:
      raise ValueError(
        f'a verdict on concept {v.concept}: there are {num_concepts}, and one '
        'verdict for each.'
      )
    seen.add(v.concept)
    if v.decision == 'suppress':
      out[v.concept] = 1 - v.strength
    elif v.decision == 'amplify':
      out[v.concept] = 1 + boost * v.strength
  return out
