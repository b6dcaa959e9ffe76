"""Concepts: sparse autoencoders, and what an update does to their features."""

from idesign.concepts.activations import reader, stream, token_mean
from idesign.concepts.decompose import (
  ChangeStatistics,
  Decomposition,
  Shares,
  change_statistics,
  decompose,
  predicted_change,
  realised_change,
  shares,
)
from idesign.concepts.directions import (
  RankOne,
  concept_scores,
  dense,
  jvp_scores,
  rank_one_directions,
)
from idesign.concepts.label import (
  Span,
  Spans,
  label,
  promoted_tokens,
  render,
  top_spans,
)
from idesign.concepts.report import (
  ConceptReport,
  Description,
  describe,
  make_report,
  report,
)
from idesign.concepts.sae import SAE, SAEConfig, make_sae, sae_shardings
from idesign.concepts.sae_formats import SAEFileError
from idesign.concepts.sae_io import LoadedSAE, load_sae, save_sae
from idesign.concepts.sae_metrics import (
  Fit,
  LossRecovered,
  evaluate_sae,
  loss_recovered,
)
from idesign.concepts.sae_train import (
  SAEState,
  finished,
  init_sae,
  make_sae_step,
)
