"""The model that benchmarks measure, and the command line that they share."""

from __future__ import annotations

from collections.abc import Callable
import json
import pathlib
from typing import Any

from absl import app
from absl import flags

from experiments.contract import write_text
from idesign import curvature
from idesign import models
from idesign import sites

_BATCH = flags.DEFINE_integer('batch', 64, 'Sequences.')
_TIME = flags.DEFINE_integer('time', 128, 'Tokens per sequence.')
_LAYERS = flags.DEFINE_integer('layers', 6, 'Layers.')
_REPEATS = flags.DEFINE_integer('repeats', 7, 'Timed repeats of each program.')
_OUT = flags.DEFINE_string('out', None, 'JSON file to write.')

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

  def main(argv):
    if len(argv) > 1:
      raise app.UsageError(f'Unknown arguments: {argv[1:]}.')
    out = _OUT.value and pathlib.Path(_OUT.value)
    if out and not out.parent.is_dir():
      raise app.UsageError(f'--out={out}: there is no folder {out.parent}.')
    result = measure(_BATCH.value, _TIME.value, _LAYERS.value, _REPEATS.value)
    print(markdown(result))
    if out:
      write_text(out, json.dumps(result, indent=2) + '\n')

  app.run(main)
