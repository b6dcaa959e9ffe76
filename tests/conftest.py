"""Eight virtual CPU devices, so that every sharded path runs on a laptop.

Most of a test's time is compilation, so XLA is asked to optimise little; no
test here is about speed.
"""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
)

import jax  # pylint: disable=g-import-not-at-top
import pytest  # pylint: disable=g-import-not-at-top

jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_disable_most_optimizations', True)


@pytest.fixture(scope='module', autouse=True)
def forget_programs():
  """Each compiled program holds memory maps, of which Linux gives a process
  65,530; the programs of the whole suite are more than that."""
  yield
  jax.clear_caches()
