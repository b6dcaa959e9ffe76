"""Loss curvature: what is shared by many examples, and what belongs to few."""

from idesign.curvature.baselines import (
  Singular,
  keep_magnitude,
  keep_random,
  keep_salient,
  keep_singular,
  singular,
)
from idesign.curvature.classify import (
  MEMORIZATION,
  SHARED,
  UNDECIDED,
  Classes,
  classify,
  kept_edges,
  null_edges,
  weight_scores,
)
from idesign.curvature.decay import Shield, decay_components, shields
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
from idesign.curvature.files import (
  FileError,
  Identity,
  edit_folder,
  hash_arrays,
  load_edit,
  load_sums,
  save_edit,
  save_sums,
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
  mixture,
)
from idesign.curvature.krylov import (
  Density,
  Lanczos,
  Trace,
  hutchpp_trace,
  lanczos,
  spectral_density,
)
from idesign.curvature.moments import (
  Moments,
  band_shares,
  component_moments,
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
from idesign.curvature.subnet import BalancedSubnet, SubnetConfig, SubnetState
from idesign.curvature.tied import merge_uses
