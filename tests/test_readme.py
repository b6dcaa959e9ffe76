"""The README's code runs as it stands, from top to bottom."""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_the_code_of_the_readme_runs():
  blocks = re.findall(
    r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.S
  )
  # One needs a folder that is not here.
  here = [block for block in blocks if 'path/to' not in block]
  assert len(here) == 7 and len(blocks) == 8
  checks = """
import numpy as np
expected = sites.vmap_grad(loss, params, batch)['layer_0']['kernel']
np.testing.assert_allclose(
  values['layer_0/kernel'], (expected ** 2).sum((1, 2)), rtol=1e-4
)
jax.tree.map(np.testing.assert_array_equal, edit.revert(edited), params)
assert out.tokens_BN.shape == (2, 32)
assert report.table(5).count('\\n') >= 6 and report.score.shape == (256,)
np.testing.assert_allclose(metrics['removed'], 1 / 7, rtol=1e-4)
assert metrics['ignored'] == 0
# Nothing was ever said that would not be doubted a little.
assert -1 < learned['reward'] < 0 and learned['informative'] == 1
assert abs(learned['divergence']) < 1e-6 and quality.entities == 30
"""
  run = subprocess.run(
    [sys.executable, '-c', '\n'.join([*here, checks])],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert run.returncode == 0, run.stderr[-3000:]
