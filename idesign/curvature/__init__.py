"""Loss curvature: what is shared by many examples, and what belongs to few."""

from idesign.curvature.baselines import (
  Singular,
  keep_random,
  keep_singular,
  singular,
)
from idesign.curvature.edit import (
  Edit,
  curvature_masks,
  keep_components,
  keep_high_curvature,
)
from idesign.curvature.kfac import (
  Factors,
  Fisher,
  kfac_factors,
  negative_log_likelihood,
)
from idesign.curvature.spectrum import (
  Spectrum,
  keep_count,
  keep_mass,
  spectra,
  staircase,
)
