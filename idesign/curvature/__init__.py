"""Loss curvature: what is shared by many examples, and what belongs to few."""

from idesign.curvature.baselines import (
  Singular,
  keep_magnitude,
  keep_random,
  keep_salient,
  keep_singular,
  singular,
)
from idesign.curvature.edit import (
  Edit,
  curvature_masks,
  keep_components,
  keep_high_curvature,
  score_masks,
  soft_masks,
  union,
)
from idesign.curvature.exact import (
  directional_curvature,
  fisher_product,
  gauss_newton_product,
  hessian,
  hessian_product,
)
from idesign.curvature.fisher import (
  Fisher,
  negative_log_likelihood,
  softmax_middle,
)
from idesign.curvature.kfac import (
  Eigenvalues,
  Factors,
  ekfac_eigenvalues,
  kfac_factors,
)
from idesign.curvature.krylov import (
  Density,
  Lanczos,
  Trace,
  hutchpp_trace,
  lanczos,
  spectral_density,
)
from idesign.curvature.selection import (
  keep_count,
  keep_mass,
  largest_count,
  largest_mass,
  staircase,
)
from idesign.curvature.spectrum import (
  EigenError,
  Spectrum,
  as_bases,
  domain_mass,
  spectra,
  spread,
)
from idesign.curvature.stream import (
  FactorStream,
  StreamState,
  plan_groups,
)
