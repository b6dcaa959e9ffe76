"""Looking inside any JAX model: statistics at weights, capture and edit.

A *weight site* is a product of a selected parameter with data. `collect` reads
statistics of the layer's input and its output's cotangent there, in one
ordinary backward pass. An *activation site* is a value that the model marks
with `jax.ad_checkpoint.checkpoint_name`; `capture` returns it and `edit`
replaces it. Both work on the jaxpr of a user's function, so that no model has
to change.
"""

from idesign.sites._find import UnsupportedUseError
from idesign.sites._site import Site, Sites, Use
from idesign.sites.activations import capture, edit, list_activations
from idesign.sites.collect import (
  Loss,
  Readout,
  SharedWeightError,
  UnreadUseError,
  collect,
  find_sites,
  per_example_gradients,
  vmap_grad,
)
from idesign.sites.selection import SelectionError, leaf_paths, match_paths
from idesign.sites.statistics import (
  Statistic,
  direction_product,
  direction_product_by_position,
  input_moment,
  output_moment,
  per_example_gradient,
  per_example_squared_norm,
  rotated_square,
)
