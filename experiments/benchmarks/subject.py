"""The model that benchmarks measure, and its size on their command line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from absl import flags

from experiments.benchmarks import command
from idesign import curvature
from idesign import models
from idesign import sites

_BATCH = flags.DEFINE_integer('batch', 64, 'Sequences.')
_TIME = flags.DEFINE_integer('time', 128, 'Tokens per sequence.')
_LAYERS = flags.DEFINE_integer('layers', 6, 'Layers.')

D_MODEL, D_FF, N_HEADS, VOCAB = 256, 704, 4, 2048
PROJECTIONS = 'blocks/(attn|mlp)/.*/kernel'


def decoder(layers: int, *, unroll: bool) -> models.Model:
  return models.transformer(
    models.TransformerConfig(
      vocab_size=VOCAB,
      max_len=1024,
      d_model=D_MODEL,
      d_ff=D_FF,
      n_heads=N_HEADS,
      n_layers=layers,
      tie_embeddings=True,
      unroll=layers if unroll else 1,
    )
  )


def loss_of(model: models.Model) -> sites.Loss:
  def loss(params, tokens):
    logits = model.apply(params, tokens[:, :-1])
    return curvature.negative_log_likelihood(logits, tokens[:, 1:])

  return loss


def run(
  measure: Callable[[int, int, int, int], dict[str, Any]],
  markdown: Callable[[dict[str, Any]], str],
) -> None:
  """Measures, prints the table and writes `--out`.

  Args:
    measure: of batch, time, layers and repeats.
    markdown: the table of what it returns.
  """

  command.run(
    lambda repeats: measure(_BATCH.value, _TIME.value, _LAYERS.value, repeats),
    markdown,
  )
