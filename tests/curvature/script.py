"""What the tests of streams share; run as two processes, writes factors."""

import hashlib
import sys

import jax
import numpy as np

from idesign import curvature
from idesign import models
from idesign import training

KERNELS = 'blocks/mlp/.*/kernel'
FISHER = curvature.Fisher(num_samples=2)
MODEL = models.transformer(
  models.TransformerConfig(
    vocab_size=11, d_model=16, d_ff=32, n_heads=2, n_layers=3, gated=False
  )
)


def setting(mesh=None):
  """Parameters, and numbered batches of this process's rows."""
  params = MODEL.init(jax.random.key(0))
  random = np.random.default_rng(0)
  rows = {
    'inputs': random.integers(0, 11, (64, 6), dtype=np.int32),
    'mask': random.random((64, 6)) < 0.8,
  }
  return params, training.Batches(rows, 16, seed=1, mesh=mesh)


def stream(mesh, *, shards=8):
  return curvature.FactorStream(
    MODEL.apply, KERNELS, FISHER, mesh, num_shards=shards
  )


def whole(factors) -> list[np.ndarray]:
  """All arrays on the host, gathered where rows are split."""
  everywhere = jax.sharding.NamedSharding(
    factors.count.sharding.mesh, jax.sharding.PartitionSpec()
  )
  factors = jax.jit(lambda f: f, out_shardings=everywhere)(factors)
  return [np.asarray(x) for x in jax.tree.leaves(factors)]


def main(file: str):
  jax.config.update('jax_disable_most_optimizations', True)
  training.initialize_distributed()
  mesh = training.make_mesh(4, 2)
  params, numbered = setting(mesh)
  factors = stream(mesh).collect(params, numbered, 6, key=jax.random.key(3))
  spectra = curvature.spectra(factors)
  for name, spectrum in spectra.items():
    assert spectrum.input_residual.max() < 1e-12, name
    assert spectrum.output_residual.max() < 1e-12, name
  values = b''.join(s.input_values.tobytes() for s in spectra.values())
  if jax.process_index() == 0:
    np.savez(file, *whole(factors))
  else:
    whole(factors)
  print(hashlib.sha256(values).hexdigest())


if __name__ == '__main__':
  with jax.numpy_dtype_promotion('strict'):
    main(sys.argv[1])
