"""Inoculation prompts, and how strongly a prompt elicits a trait beforehand.

Training with an instruction that asks for the trait explains the trait away;
without the instruction the model then shows less of it (Tan et al. 2025,
https://arxiv.org/abs/2510.04340; Wichers et al. 2025,
https://arxiv.org/abs/2510.05024). *Any* fixed prompt does some of that, by
making what is learned conditional on it: compare with an irrelevant one, and
with one of tokens the model never saw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats


def inoculate(
  tokens_BT: np.ndarray,
  prompt: Sequence[int],
  *,
  at: int,
  pad_token: int,
  mask_BT: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Puts a prompt into every example of right-padded tokens.

  Args:
    tokens_BT: `[B, T]`.
    prompt: its tokens.
    at: where: 1 for behind a first token that starts every text.
    pad_token: what texts are padded with on the right. If it also ends texts,
      only `mask_BT` tells that last token from padding.
    mask_BT: which tokens a loss scores, never padding; all but `pad_token` if
      None.

  Returns:
    Tokens and mask with the same `T`; the prompt itself is not scored.

  Raises:
    ValueError: if a text does not leave room for the prompt, or ends before
      `at`; nothing is cut off.
  """
  tokens_BT = np.asarray(tokens_BT)
  width, size = tokens_BT.shape[1], len(prompt)
  if mask_BT is None:
    mask_BT = tokens_BT != pad_token
  if not 0 <= at <= width or not size:
    raise ValueError(f'at={at} with a prompt of {size} tokens, T={width}.')
  # What is scored is text, whichever token it is.
  text_BT = (tokens_BT != pad_token) | np.asarray(mask_BT, bool)
  length_B = (text_BT * np.arange(1, width + 1)).max(axis=1, initial=0)
  full = length_B > width - size
  if size > width or full.any():
    longest = int(length_B.max(initial=0))
    raise ValueError(
      f'{int(full.sum())} texts leave no room for a prompt of {size} tokens: '
      f'the longest has {longest} of {width}. Pad them to {longest + size}.'
    )
  if (length_B < at).any():
    row = int(np.flatnonzero(length_B < at)[0])
    raise ValueError(
      f'at={at} lies in the padding of row {row}, whose text has '
      f'{length_B[row]} tokens; choose at most that, or leave the row out.'
    )
  put = lambda x, new: np.concatenate(
    [x[:, :at], np.broadcast_to(new, (len(x), size)), x[:, at : width - size]],
    axis=1,
  ).astype(x.dtype)
  return put(tokens_BT, np.asarray(prompt)), put(np.asarray(mask_BT), 0)


class Elicitation(NamedTuple):
  """How often a trait shows.

  Attributes:
    rate: share of the samples, in [0, 1].
    low, high: its 95 % interval (Wilson 1927).
    samples: how many there were.
  """

  rate: float
  low: float
  high: float
  samples: int


def elicitation(
  sample: Callable[[Sequence[int]], np.ndarray],
  has_trait: Callable[[np.ndarray], np.ndarray],
  prompts: Sequence[Sequence[int]],
) -> list[Elicitation]:
  """How strongly each of several prompts elicits a trait *before* training.

  What elicits more inoculates more, so this chooses a prompt without training.

  Args:
    sample: prompt -> sampled answers, one per row, such as a call of
      `models.generate` on fixed questions with the prompt put in.
    has_trait: answers -> one boolean (or integer, 0 or 1) per row.
    prompts: the candidates.

  Raises:
    ValueError: if a prompt gets no answers, or the trait is not one boolean
      for each.
  """
  found = []
  for prompt in prompts:
    answers = np.asarray(sample(prompt))
    shown = np.asarray(has_trait(answers))
    if not len(answers) or shown.shape != (len(answers),):
      raise ValueError(
        f'the prompt {list(prompt)} got {len(answers)} answers and traits of '
        f'shape {shown.shape}; there must be one for each of at least one.'
      )
    # A probability is no count; as a boolean any above 0 would be "yes".
    whole = shown.dtype.kind in 'bui'
    wrong = shown[(shown != 0) & (shown != 1)] if whole else shown
    if len(wrong):
      raise ValueError(
        f'a trait of the prompt {list(prompt)} is {wrong[0]}; it must be a '
        'boolean, or the integer 0 or 1. Compare probabilities with a '
        'threshold.'
      )
    count = int(shown.sum())
    interval = scipy.stats.binomtest(count, len(shown)).proportion_ci(
      method='wilson'
    )
    rate = count / len(shown)
    found.append(Elicitation(rate, interval.low, interval.high, len(shown)))
  return found
