"""Probes: what activations say, how surely, and read from where."""

from idesign.probes.architectures import (
  ProbeConfig,
  ProbeParams,
  apply_probe,
  init_probe,
  token_logits,
)
from idesign.probes.calibration import (
  ProbeQuality,
  Reliability,
  quality,
  reliability,
  threshold_at,
)
from idesign.probes.fit import (
  FitConfig,
  calibrate,
  fit_probe,
  probe_logits,
  shuffled_null,
  split_entities,
)
from idesign.probes.frozen import (
  FrozenProbe,
  Pressure,
  PressureError,
  WeakProbeError,
  declared,
  freeze,
  score_spans,
)
from idesign.probes.reading import (
  Observation,
  Observe,
  observer,
  read_spans,
  token_logprobs,
)
from idesign.probes.spans import (
  Span,
  align_span,
  find_spans,
  span_mask,
  span_masks,
  tag_spans,
)
