"""A pretrained model is planned for, edited and examined; resumes."""

import json
import os
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import memorization
from experiments import recitation_plan as plan_lib
from experiments import recitation_pretrained as pretrained
from idesign import curvature
from idesign import models
from idesign import sites

ROOT = pathlib.Path(__file__).resolve().parents[2]
DATA = pathlib.Path(
  os.environ.get('IDESIGN_DATA', ROOT.parent / 'shared' / 'data')
)
CONFIG = runpy.run_path(str(ROOT / 'configs' / 'memorization.py'))


def get_config(preset):
  return CONFIG['get_config'](preset).copy_and_resolve_references()


def subject():
  model = models.transformer(
    models.TransformerConfig(
      vocab_size=32, d_model=16, d_ff=64, n_heads=2, n_layers=4
    )
  )
  params = jax.eval_shape(model.init, jax.random.key(0))
  loss = lambda p, x: model.apply(p, x).sum((1, 2))
  tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
  found = sites.find_sites(loss, params, tokens, 'blocks/mlp/(gate|up)/kernel')
  return model, params, found.sites


def make(gib, **changes):
  config = get_config('pretrained-smoke')
  with config.unlocked():
    config.hardware.gib = gib
    config.update_from_flattened_dict(changes)
  model, params, found = subject()
  return plan_lib.make_plan(
    config, model.config, params, found, data=1, model=1
  )


def test_a_plan_has_as_many_passes_as_fit():
  whole = make(8.0)
  assert len(whole.groups) == 1
  # Three copies of 16^2 + 64^2 floats for each of eight weights.
  assert whole.factors_gib * 2**30 == 8 * 3 * 4 * (16**2 + 64**2)
  needed = whole.params_gib + whole.activations_gib
  tight = make(needed + whole.factors_gib / 2)
  assert len(tight.groups) == 2
  assert tight.flops > 1.5 * whole.flops
  assert tight.factors_gib == pytest.approx(whole.factors_gib / 2)
  assert '2 passes over 512 tokens' in str(tight)
  assert whole.pass_hours is None and 'time not known' in str(whole)
  timed = make(8.0, **{'hardware.tflops': 2.0})
  assert timed.pass_hours == pytest.approx(
    timed.flops / (2e12 * plan_lib.EFFICIENCY) / 3600
  )


def test_a_plan_that_does_not_fit_says_what_to_change():
  whole = make(8.0)
  with pytest.raises(plan_lib.DoesNotFitError, match='config.mesh.model'):
    make(whole.params_gib)
  with pytest.raises(ValueError, match="factors of 'blocks/mlp/gate/kernel'"):
    make(whole.params_gib + whole.activations_gib + 1e-6)


def test_groups_are_joined_in_the_order_of_layers():
  layers = lambda *values: curvature.Factors(
    {'w': np.array(values)}, {'w': np.array(values)}, np.float32(2),
    {'w': np.float32(3)},
  )  # fmt: skip
  whole = pretrained.join([layers(1.0, 2.0), layers(3.0)])
  assert whole.inputs['w'].tolist() == [1.0, 2.0, 3.0]
  assert whole.count == 2 and whole.positions['w'] == 3


@pytest.mark.skipif(not DATA.is_dir(), reason='set IDESIGN_DATA to the data')
def test_smoke_runs_and_resumes(tmp_path, monkeypatch):
  config = get_config('pretrained-smoke')
  text = (str(DATA / 'text_tinystories' / 'tinystories_sample.txt'),)
  with config.unlocked():
    config.model.path = str(DATA / 'lm_stories260K' / 'hf')
    config.factors.text, config.perplexity.stories = text, text
    config.factors.other = (str(DATA / 'text_shakespeare' / 'input.txt'),)
  plan = pretrained.make_plan

  def tight(config, *arguments, **sizes):
    """Room for half of the factors, so that passes have to be joined."""
    config.hardware.gib = 8.0
    whole = plan(config, *arguments, **sizes)
    config.hardware.gib = (
      whole.params_gib + whole.activations_gib + whole.factors_gib / 2
    )
    return plan(config, *arguments, **sizes)

  monkeypatch.setattr(pretrained, 'make_plan', tight)
  memorization.run(config, tmp_path)
  results = json.loads((tmp_path / 'results.json').read_text())
  assert set(results) == {
    'unedited', 'kfac/0.9', 'svd/0.5', 'random/0.9', 'kfac with other/0.9'
  }  # fmt: skip
  assert results['kfac/0.9'] != results['kfac with other/0.9']
  passes = [p for p in (tmp_path / 'factors' / 'text').iterdir()
            if not p.name.endswith('running')]  # fmt: skip
  assert len(passes) > 1
  # The edited folder is the model with the edit that was saved.
  _, params = models.load_pretrained(config.model.path)
  _, edited = models.load_pretrained(tmp_path / 'model')
  edit = curvature.load_edit(tmp_path / 'edit', params)
  jax.tree.map(np.testing.assert_array_equal, edit.apply(params), edited)
  (tmp_path / 'results.json').unlink()
  memorization.run(config, tmp_path)
  assert json.loads((tmp_path / 'results.json').read_text()) == results
