"""Factors and edits on disk: what is read is what was written, or an error."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idesign import curvature
from idesign import models
from idesign import sites
from idesign import training
from tests.curvature import script

LLAMA = models.TransformerConfig(
  vocab_size=11, d_model=16, d_ff=32, n_heads=2, n_layers=3, max_len=16
)


def factors_of(params):
  read = curvature.kfac_factors(script.MODEL.apply, script.KERNELS)
  x = jnp.arange(12).reshape(2, 6) % 11
  return jax.jit(read)(params, x, key=jax.random.key(0))


def identity(params, **changes):
  fields = {
    'model': training.fingerprint(params), 'data': 'counting', 'tokens': 12,
    'fisher': vars(curvature.Fisher()),
  }  # fmt: skip
  return curvature.Identity(**(fields | changes))


def saved(tmp_path):
  params, _ = script.setting()
  factors = factors_of(params)
  curvature.save_sums(tmp_path / 'factors', factors, identity(params))
  return params, factors, tmp_path / 'factors'


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)
  shapes = lambda tree: jax.tree.map(np.shape, tree)
  assert shapes(a) == shapes(b)


def test_factors_come_back(tmp_path):
  params, factors, folder = saved(tmp_path)
  expect = {'model': training.fingerprint(params), 'data': 'counting'}
  back = curvature.load_sums(folder, curvature.Factors, expect=expect)
  same(back, jax.device_get(factors))
  name = 'blocks/mlp/up/kernel'
  part = curvature.load_sums(
    folder, curvature.Factors, expect=expect, select=[name]
  )
  assert list(part.inputs) == [name]
  manifest = json.loads((folder / 'manifest.json').read_text())
  assert manifest['identity']['tokens'] == 12
  assert manifest['identity']['fisher']['labels'] == 'model'


def test_eigenvalues_say_in_which_bases_they_are(tmp_path):
  params, factors, _ = saved(tmp_path)
  bases = curvature.as_bases(curvature.spectra(factors))
  read = curvature.ekfac_eigenvalues(script.MODEL.apply, script.KERNELS)
  x = jnp.arange(12).reshape(2, 6) % 11
  values = read(params, x, bases, key=jax.random.key(0))
  mark = curvature.hash_arrays(np.asarray(b) for b in jax.tree.leaves(bases))
  of = identity(params, bases=mark)
  curvature.save_sums(tmp_path / 'values', values, of)
  expect = {'model': of.model, 'bases': mark}
  back = curvature.load_sums(
    tmp_path / 'values', curvature.Eigenvalues, expect=expect
  )
  same(back, jax.device_get(values))
  with pytest.raises(curvature.FileError, match='bases'):
    curvature.load_sums(
      tmp_path / 'values', curvature.Eigenvalues,
      expect={**expect, 'bases': 'others'},
    )  # fmt: skip


def test_factors_of_something_else_are_refused(tmp_path):
  params, _, folder = saved(tmp_path)
  model = training.fingerprint(params)
  load = lambda kind=curvature.Factors, **expect: curvature.load_sums(
    folder, kind, expect=expect
  )
  other = training.fingerprint(jax.tree.map(lambda p: p + 1, params))
  with pytest.raises(
    curvature.FileError, match=f"model: '{model}' -> '{other}'"
  ):
    load(model=other)
  with pytest.raises(curvature.FileError, match="data: 'counting' -> 'pile'"):
    load(model=model, data='pile')
  with pytest.raises(curvature.FileError, match='holds .Factors.'):
    load(curvature.Eigenvalues, model=model)
  with pytest.raises(ValueError, match='which model'):
    load(data='counting')
  with pytest.raises(curvature.FileError, match=r"nothing of \['head'\]"):
    curvature.load_sums(
      folder, curvature.Factors, expect={'model': model}, select=['head']
    )


def test_damaged_files_are_named(tmp_path):
  params, _, folder = saved(tmp_path)
  expect = {'model': training.fingerprint(params)}
  file = folder / 'site-001.safetensors'
  file.write_bytes(file.read_bytes()[:-7])
  with pytest.raises(curvature.FileError, match='site-001.safetensors'):
    curvature.load_sums(folder, curvature.Factors, expect=expect)
  (folder / 'manifest.json').write_text('{')
  with pytest.raises(curvature.FileError, match='manifest.json'):
    curvature.load_sums(folder, curvature.Factors, expect=expect)


def test_what_is_not_finite_is_not_written(tmp_path):
  params, _ = script.setting()
  factors = factors_of(params)
  broken = jax.tree.map(lambda a: a * jnp.nan, factors.inputs)
  with pytest.raises(FloatingPointError, match='inputs of .blocks/mlp'):
    curvature.save_sums(
      tmp_path / 'f', factors._replace(inputs=broken), identity(params)
    )
  assert not list(tmp_path.iterdir())


def make_edit(model, params):
  x = jnp.arange(12).reshape(2, 6) % 11
  loss = lambda p, x: model.apply(p, x).sum((1, 2))
  at = sites.find_sites(loss, params, x, script.KERNELS).by_name
  read = curvature.kfac_factors(model.apply, script.KERNELS)
  spectra = curvature.spectra(jax.jit(read)(params, x, key=jax.random.key(0)))
  return curvature.keep_high_curvature(
    params, at, spectra, share=0.3, layers={'blocks/mlp/up/kernel': [1]}
  )


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_edits_come_back_from_either_side(tmp_path, dtype):
  model = models.transformer(LLAMA)
  cast = lambda p: jax.tree.map(lambda a: a.astype(dtype), p)
  params = cast(model.init(jax.random.key(0)))
  edit = make_edit(model, params)
  curvature.save_edit(tmp_path / 'edit', edit)
  edited = edit.apply(params)
  for given in (params, edited):
    back = curvature.load_edit(tmp_path / 'edit', given)
    same(back.apply(params), edited)
    same(back.revert(edited), params)
    assert back.kept == edit.kept
  other = cast(model.init(jax.random.key(1)))
  with pytest.raises(curvature.FileError, match='neither what the edit'):
    curvature.load_edit(tmp_path / 'edit', other)
  wrong = jax.tree.map(lambda a: a.astype('float16'), params)
  with pytest.raises(curvature.FileError, match=f'in {dtype}, not float16'):
    curvature.load_edit(tmp_path / 'edit', wrong)


def test_an_edited_folder(tmp_path):
  model = models.transformer(LLAMA)
  models.save_pretrained(tmp_path / 'hf', model, model.init(jax.random.key(0)))
  (tmp_path / 'hf' / 'tokenizer.json').write_text('{}')
  model, params = models.load_pretrained(tmp_path / 'hf')
  edit = make_edit(model, params)
  curvature.save_edit(tmp_path / 'edit', edit)
  curvature.edit_folder(tmp_path / 'hf', tmp_path / 'edit', tmp_path / 'new')
  _, found = models.load_pretrained(tmp_path / 'new')
  same(found, edit.apply(params))
  assert (tmp_path / 'new' / 'tokenizer.json').read_text() == '{}'
  with pytest.raises(curvature.FileError, match='already'):
    curvature.edit_folder(tmp_path / 'new', tmp_path / 'edit', tmp_path / 'n2')
  assert not pathlib.Path(tmp_path / 'n2').exists()
