"""Rewards from probes, and policies that learn from them."""

from idesign.rewards import divergence
from idesign.rewards.advantages import Advantages, advantages
from idesign.rewards.interventions import (
  CORRECT,
  MAINTAIN,
  MALFORMED,
  RETRACT,
  Counts,
  Reductions,
  best_of_n,
  intervention_reward,
  reductions,
)
from idesign.rewards.lora import LoRA, init_lora, merge_lora
from idesign.rewards.monitor import (
  RewardParts,
  Texts,
  by_label,
  make_monitor,
  reward_parts,
)
from idesign.rewards.objectives import (
  Objective,
  cispo,
  clipped,
  mean_loss,
  reinforce,
)
from idesign.rewards.plan import DoesNotFitError, Plan, forward_flops, plan_run
from idesign.rewards.policy import (
  PolicyConfig,
  PolicyState,
  init_policy,
  make_policy_step,
  retain_prompts,
)
from idesign.rewards.rollout import Samples, sample_groups
from idesign.rewards.terms import (
  RateConstraint,
  Scene,
  Term,
  evaluate,
  last_sampled,
  pressure,
)
from idesign.rewards.watch import CollapsedPolicyError, RewardError, make_watch
