"""What judges are shown of concepts, and what they may look up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from idesign import concepts as concepts_lib
from idesign.judges.verdict import Evidence


def evidence(
  report: concepts_lib.ConceptReport, concepts: Iterable[int]
) -> list[Evidence]:
  """What a report says of some concepts, in their order.

  Args:
    report: holds them.
    concepts: their indices, such as `report.concept[report.rows(20)]`.

  Raises:
    ValueError: for a concept that the report does not hold, or one twice: it
      would get two verdicts.
  """
  row = {int(c): i for i, c in enumerate(report.concept)}
  shown: dict[int, Evidence] = {}
  for c in map(int, concepts):
    if c not in row or c in shown:
      problem = 'is asked for twice' if c in shown else 'is not in the report'
      raise ValueError(f'concept {c} {problem}, which holds {len(row)}.')
    i = row[c]
    shown[c] = Evidence(
      concept=c,
      label=report.label[i],
      spans=report.spans[i],
      promoted=report.promoted[i],
      score=float(report.score[i]),
      low=float(report.low[i]),
      high=float(report.high[i]),
      share=None if report.share is None else float(report.share[i]),
      sign_agreement=float(report.sign_agreement[i]),
    )
  return list(shown.values())


class ConceptInspector:
  """Looks up the features of an autoencoder: an `Inspector`."""

  def __init__(
    self,
    read: Callable[[Any, Any], Any],
    params: Any,
    sae: concepts_lib.SAE,
    encode: Callable[[str], tuple[Any, np.ndarray | None]],
    descriptions: Sequence[concepts_lib.Description],
  ):
    """Sets up; nothing is read yet.

    Args:
      read: `read(params, batch) -> [1, T, D]`, from `concepts.reader`; jitted
        here.
      params: of the model.
      sae: whose features are the concepts.
      encode: any text -> what `read` takes, for that one text, and a mask
        `[1, T]` or None. It cuts off what is too long for the model; padding
        to few lengths saves compilations.
      descriptions: of every feature, from `concepts.describe`.

    Raises:
      ValueError: if there are not as many descriptions as features.
    """
    if len(descriptions) != sae.config.d_sae:
      raise ValueError(
        f'there are {len(descriptions)} descriptions of {sae.config.d_sae} '
        'features; describe all of them.'
      )
    rows_FD = np.asarray(sae.directions, np.float32)
    norms_F1 = np.linalg.norm(rows_FD, axis=1, keepdims=True)
    self._unit_FD = rows_FD / np.where(norms_F1 > 0, norms_F1, 1)
    self._read, self._params, self._sae = jax.jit(read), params, sae
    self._encode, self._descriptions = encode, descriptions

  def spans(self, concept: int, count: int) -> Sequence[str]:
    """The spans on which it is most active, at most those described."""
    return self._described(concept).spans[:count]

  def neighbours(self, concept: int, count: int) -> Sequence[tuple[float, str]]:
    """Cosine of the decoder rows, and label, of the most similar others."""
    self._described(concept)
    cosine_F = self._unit_FD @ self._unit_FD[concept]
    order = np.argsort(-cosine_F, kind='stable')
    return [
      (float(cosine_F[c]), self._descriptions[c].label)
      for c in order[order != concept][:count]
    ]

  def activation(self, concept: int, text: str) -> float:
    """Its largest activation on a text; 0 where no position counts."""
    self._described(concept)
    batch, mask = self._encode(text)
    f_BTF = self._sae.encode(self._read(self._params, batch))
    f_N = np.asarray(f_BTF[..., concept]).ravel()
    if mask is not None:
      f_N = f_N[np.asarray(mask, bool).ravel()]
    return float(f_N.max(initial=0))

  def _described(self, concept: int) -> concepts_lib.Description:
    if not 0 <= concept < len(self._descriptions):  # -1 would be the last.
      raise ValueError(
        f'there is no concept {concept}: they are 0 to '
        f'{len(self._descriptions) - 1}.'
      )
    return self._descriptions[concept]
