"""What editing a pretrained model takes, said before it begins."""

from __future__ import annotations

from collections.abc import Sequence
import math
import re
from typing import NamedTuple

import jax

from idesign import curvature, models, sites
from idesign.rewards.plan import forward_flops
from idesign.sites import selection

GIB = 2**30
# Of what a device could do, so much do whole models.
EFFICIENCY = 0.4


class DoesNotFitError(ValueError):
  """More memory is needed than there is."""


class Plan(NamedTuple):
  """Memory of each device, passes over the data, and time.

  Attributes:
    params_gib: the model's parameters, of one device.
    activations_gib: of a batch, one layer at a time, and its logits.
    factors_gib: the sums of the largest group, three copies.
    host_gib: spectra of all layers in float64, on every host.
    limit_gib: memory of a device.
    groups: selection patterns of each pass.
    tokens: of a pass.
    flops: of all passes.
    pass_hours: of all passes, None where the speed is not given.
    eigen_hours: of the eigendecompositions, on one host core.
  """

  params_gib: float
  activations_gib: float
  factors_gib: float
  host_gib: float
  limit_gib: float
  groups: list[list[str]]
  tokens: int
  flops: float
  pass_hours: float | None
  eigen_hours: float

  def __str__(self) -> str:
    used = self.params_gib + self.activations_gib + self.factors_gib
    hours = 'time not known (config.hardware.tflops)'
    if self.pass_hours is not None:
      hours = f'about {self.pass_hours:.2g} h'
    passes = '\n'.join(
      f'  pass {i}: {", ".join(g)}' for i, g in enumerate(self.groups)
    )
    return (
      f'memory of a device: {used:.2f} of {self.limit_gib:.2f} GiB '
      f'(parameters {self.params_gib:.2f}, a batch {self.activations_gib:.2f}, '
      f'factors {self.factors_gib:.2f}); of a host {self.host_gib:.2f} GiB\n'
      f'{len(self.groups)} passes over {self.tokens:,} tokens: '
      f'{self.flops:.3g} FLOP, {hours}; then eigendecompositions, '
      f'about {self.eigen_hours:.2g} h of one core\n{passes}'
    )


def make_plan(
  config, model_config: models.TransformerConfig, params,
  found: Sequence[sites.Site], *, data: int, model: int,
) -> Plan:  # fmt: skip
  """Groups of layers that fit beside the model, and what the passes take.

  Args:
    config: `batch`, `length`, `num_batches`, `hardware.gib` (memory of a
      device) and `hardware.tflops` (of a device; 0: not known).
    model_config: of the model.
    params: arrays or their shapes.
    found: the weights to be edited.
    data: devices over which a batch is split.
    model: devices over which parameters and rows of factors are.

  Raises:
    DoesNotFitError: the model and a batch alone do not fit.
    ValueError: the factors of one layer do not fit beside them, naming it.
  """
  leaves = jax.tree.leaves(params)
  held = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves) / model
  rows = config.batch // data
  tokens = rows * config.length
  c = model_config
  # With rematerialisation: each layer's input, one layer's inside, and logits
  # with their gradient in float32.
  inside = tokens * 4 * (8 * c.d_model + 4 * c.d_ff)
  inputs = c.n_layers * tokens * 4 * c.d_model
  logits = 3 * tokens * 4 * c.vocab_size / model
  activations = inside + inputs + logits
  limit = config.hardware.gib * GIB
  left = limit - held - activations
  if left <= 0:
    raise DoesNotFitError(
      f'The model ({held / GIB:.2f} GiB of each device) and a batch '
      f'({activations / GIB:.2f} GiB) do not fit into {limit / GIB:.2f} GiB: '
      'split the model over more devices (config.mesh.model), or take a '
      f'smaller batch than {config.batch} or shorter rows than '
      f'{config.length}.'
    )
  groups = curvature.plan_groups(found, left, model_axis=model)
  layers = lambda s: math.prod(s.stack)
  sums = lambda s: 3 * 4 * (s.d_in**2 + s.d_out**2) / model
  of_groups = []
  for group in groups:
    bytes_ = 0.0
    for pattern in group:
      parsed = selection.parse(pattern)
      site = next(s for s in found if re.fullmatch(parsed.name, s.path))
      count = layers(site)
      if parsed.layers is not None:
        start, stop = parsed.layers.start, parsed.layers.stop
        count = stop - start
      bytes_ += count * sums(site)
    of_groups.append(bytes_)
  total = config.num_batches * config.batch * config.length
  # A forward and a backward pass (again forward, with rematerialisation), and
  # the moments.
  of_model = 4 * forward_flops(c, config.length) * total
  moments = sum(layers(s) * 2 * (s.d_in**2 + s.d_out**2) for s in found) * total
  flops = len(groups) * of_model + moments
  hours = None
  if config.hardware.tflops:
    speed = config.hardware.tflops * 1e12 * data * model * EFFICIENCY
    hours = flops / speed / 3600
  spectra = sum(layers(s) * 8 * (s.d_in**2 + s.d_out**2) for s in found)
  # Of a symmetric matrix in float64: some 9 n^3, at 10 GFLOP a second.
  eigen = sum(layers(s) * 9 * (s.d_in**3 + s.d_out**3) for s in found) / 1e10
  return Plan(
    held / GIB, activations / GIB, max(of_groups) / GIB, spectra / GIB,
    limit / GIB, groups, total, flops, hours, eigen / 3600,
  )  # fmt: skip
