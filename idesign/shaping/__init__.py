"""Shaping what training teaches: gates, prompts, steering, routing."""

from idesign.shaping.attribution import (
  Counterfactual,
  Translation,
  by_token,
  counterfactual,
  reliance,
  translation,
)
from idesign.shaping.gate import (
  GateState,
  gate_aggregator,
  gate_losses,
  gate_metrics,
  gate_weights,
  make_gated_step,
)
from idesign.shaping.projection import (
  ConfineState,
  block_activation_gradient,
  confine_movement,
  hold_concepts,
  movement,
  orthonormal,
  project_out,
)
from idesign.shaping.prompts import Elicitation, elicitation, inoculate
from idesign.shaping.routing import (
  Adapter,
  adapt,
  init_adapter,
  route_gradients,
)
from idesign.shaping.steering import ablate, set_features, steer
