"""Published formats: what is written is read, and what is wrong is named.

`data/sae_lens` was written by SAELens, trained for some updates, with its own
output beside it: what `KEEP=FOLDER scripts/peers sae-lens` leaves in
`FOLDER/theirs`.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from idesign import concepts
from tests.concepts.test_sae import ARCHITECTURES, D, EPS, F, K, random_sae

EXPRESSIBLE = [('saelens', a) for a in ARCHITECTURES] + [
  ('gemma_scope', 'jumprelu'),
  ('gemma_scope', 'batchtopk'),
  ('sparsify', 'topk'),
]
H = jax.random.normal(jax.random.key(7), (50, D))
ROOT = pathlib.Path(__file__).resolve().parents[2]
SAELENS = pathlib.Path(__file__).parent / 'data/sae_lens'


@pytest.mark.parametrize('centered', [True, False])
@pytest.mark.parametrize('format,architecture', EXPRESSIBLE)
def test_round_trip(format, architecture, centered, tmp_path):
  sae = random_sae(architecture, centered=centered)
  save = lambda: concepts.save_sae(tmp_path / 'sae', sae, format=format)
  if format == 'sparsify' and not centered:
    with pytest.raises(concepts.SAEFileError, match='subtracts b_dec'):
      save()
    assert not list(tmp_path.iterdir())
    return
  save()
  loaded = concepts.load_sae(tmp_path / 'sae')
  assert loaded.format == format
  # Folding b_dec into b_enc rounds; nothing else does.
  folded = format == 'gemma_scope' and centered
  for ours, theirs in (
    (sae.encode(H), loaded.sae.encode(H)),
    (sae(H), loaded.sae(H)),
  ):
    if folded:
      near = 16 * D * EPS * float(jnp.abs(ours).max())
      np.testing.assert_allclose(ours, theirs, rtol=0, atol=near)
    else:
      np.testing.assert_array_equal(ours, theirs)


def test_the_layouts_are_those_of_the_formats(tmp_path):
  sae = random_sae('topk')
  concepts.save_sae(
    tmp_path / 'a', sae, metadata={'hook_name': 'blocks.3.hook_resid_post'}
  )
  tensors = load_file(tmp_path / 'a/sae_weights.safetensors')
  shapes = {name: t.shape for name, t in tensors.items()}
  assert shapes == {
    'W_enc': (D, F),
    'W_dec': (F, D),
    'b_enc': (F,),
    'b_dec': (D,),
  }
  config = json.loads((tmp_path / 'a/cfg.json').read_text())
  assert (config['architecture'], config['k']) == ('topk', K)
  loaded = concepts.load_sae(tmp_path / 'a')
  assert loaded.metadata['hook_name'] == 'blocks.3.hook_resid_post'
  # Without it SAELens would take the file for one of an old release.
  assert int(loaded.metadata['sae_lens_version'].split('.')[0]) >= 6
  assert loaded.assumed == ()
  concepts.save_sae(tmp_path / 'b', sae, format='sparsify')
  tensors = load_file(tmp_path / 'b/sae.safetensors')
  np.testing.assert_array_equal(
    tensors['encoder.weight'], sae.params['W_enc'].T
  )
  np.testing.assert_array_equal(tensors['W_dec'], sae.params['W_dec'])


def rewrite(folder, change_config=None, change_tensors=None):
  path = next(folder.glob('*.safetensors'))
  tensors = load_file(path)
  config = json.loads((folder / 'cfg.json').read_text())
  if change_tensors:
    tensors = change_tensors(tensors)
  if change_config:
    change_config(config)
  save_file({n: np.ascontiguousarray(t) for n, t in tensors.items()}, path)
  (folder / 'cfg.json').write_text(json.dumps(config))


def test_a_transposed_decoder_is_read_and_said(tmp_path):
  sae = random_sae('topk')
  concepts.save_sae(tmp_path / 'a', sae, format='sparsify')
  rewrite(tmp_path / 'a', None, lambda t: dict(t, W_dec=t['W_dec'].T))
  loaded = concepts.load_sae(tmp_path / 'a')
  np.testing.assert_array_equal(loaded.sae(H), sae(H))
  assert 'W_dec is (8, 24): taken to be the transpose' in loaded.assumed[0]
  square = random_sae('topk', d_sae=D)
  concepts.save_sae(tmp_path / 'b', square, format='sparsify')
  assert 'W_dec is square' in concepts.load_sae(tmp_path / 'b').assumed[1]


def test_old_and_unfinished_saelens_files_are_read(tmp_path):
  sae = random_sae('topk')
  concepts.save_sae(tmp_path / 'old', sae)

  def old(config):
    for key in ('architecture', 'k', 'apply_b_dec_to_input'):
      del config[key]
    config['activation_fn_str'] = 'topk'
    config['activation_fn_kwargs'] = {'k': K}

  rewrite(tmp_path / 'old', old)
  loaded = concepts.load_sae(tmp_path / 'old')
  np.testing.assert_array_equal(loaded.sae(H), sae(H))
  assert len(loaded.assumed) == 2
  jump = random_sae('jumprelu')
  positive = dict(jump.params, threshold=jnp.exp(jump.params['threshold']))
  concepts.save_sae(tmp_path / 'log', concepts.SAE(positive, jump.config))

  def logarithm(tensors):
    tensors['log_threshold'] = np.asarray(jump.params['threshold'])
    del tensors['threshold']
    return tensors

  rewrite(tmp_path / 'log', None, logarithm)
  found = concepts.load_sae(tmp_path / 'log').sae.params['threshold']
  np.testing.assert_allclose(found, positive['threshold'], rtol=4 * EPS)


def test_activations_rescaled_by_decoder_norms_are_folded(tmp_path):
  sae = random_sae('topk')
  concepts.save_sae(tmp_path / 'a', sae)
  rewrite(tmp_path / 'a', lambda c: c.update(rescale_acts_by_decoder_norm=True))
  # As SAELens computes it.
  p = {n: np.asarray(a, np.float64) for n, a in sae.params.items()}
  norms = np.linalg.norm(p['W_dec'], axis=1)
  z = ((np.asarray(H) - p['b_dec']) @ p['W_enc'] + p['b_enc']) * norms
  f = np.maximum(z, 0)
  for row, order in zip(f, np.argsort(-z, axis=1)):
    row[order[K:]] = 0
  expected = (f / norms) @ p['W_dec'] + p['b_dec']
  got = concepts.load_sae(tmp_path / 'a').sae
  near = 16 * F * EPS
  np.testing.assert_allclose(
    got.encode(H), f, rtol=0, atol=near * np.abs(f).max()
  )
  np.testing.assert_allclose(
    got(H), expected, rtol=0, atol=near * np.abs(expected).max()
  )


@pytest.mark.parametrize(
  'name,architecture,assumed',
  [
    # A checkpoint: decoder rows of other norms than 1, and it says to use them.
    ('topk-rescaled-checkpoint', 'topk', 0),
    # The same without saying so: SAELens reads it as not to be used.
    ('topk-rescaled-unsaid', 'topk', 0),
    ('batchtopk', 'jumprelu', 0),
    ('jumprelu', 'jumprelu', 0),
    ('gated', 'gated', 0),
  ],
)
def test_what_saelens_wrote_computes_what_it_does_there(
  name, architecture, assumed
):
  loaded = concepts.load_sae(SAELENS / name)
  assert loaded.format == 'saelens'
  assert loaded.sae.config.architecture == architecture
  assert len(loaded.assumed) == assumed
  assert loaded.metadata['sae_lens_version']
  theirs = np.load(SAELENS / name / 'outputs.npz')
  assert 0 < (theirs['features'] > 0).mean() < 0.9
  features = loaded.sae.encode(jnp.asarray(theirs['inputs']))
  for ours, expected in (
    (features, theirs['features']),
    (loaded.sae.decode(features), theirs['reconstruction']),
  ):
    near = 4 * (D + F) * EPS * np.abs(expected).max()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=near)


def test_whether_to_rescale_makes_a_difference():
  """Otherwise the two fixtures would not tell one default from the other."""
  said, unsaid = (
    np.load(SAELENS / f'topk-rescaled-{name}' / 'outputs.npz')
    for name in ('checkpoint', 'unsaid')
  )
  np.testing.assert_array_equal(said['inputs'], unsaid['inputs'])
  apart = np.abs(said['reconstruction'] - unsaid['reconstruction']).max()
  assert apart > 0.1 * np.abs(said['reconstruction']).max()


def test_the_committed_comparison_is_with_the_locked_saelens():
  report = json.loads((ROOT / 'results/peers/sae-lens.json').read_text())
  rows = (
    *report['written_by_them_read_by_us'].values(),
    *report['written_by_us_read_by_them'].values(),
  )
  worst = max(row['difference'] for row in rows)
  assert report['largest_difference'] == worst <= report['bound'] == 1e-5
  assert report['passed']
  lock = (ROOT / 'locks/peers/sae-lens.txt').read_text().splitlines()
  for name, version in report['theirs']['packages'].items():
    assert f'{name}=={version.split("+")[0]}' in lock


def test_the_scale_of_training_is_folded(tmp_path):
  sae = random_sae('relu')
  concepts.save_sae(tmp_path / 'a', sae)
  rewrite(
    tmp_path / 'a',
    lambda c: c.update(normalize_activations='expected_average_only_in'),
  )
  plain = concepts.load_sae(tmp_path / 'a')
  assert 'mean norm sqrt(d_in)' in plain.assumed[0]
  np.testing.assert_array_equal(plain.sae(H), sae(H))
  folded = concepts.load_sae(tmp_path / 'a', input_scale=0.25).sae
  # A power of two: nothing is rounded.
  np.testing.assert_array_equal(folded.encode(H), sae.encode(H / 4))
  np.testing.assert_array_equal(folded(H), sae(H / 4) * 4)


def _truncate(path):
  path.write_bytes(path.read_bytes()[:-40])


def test_gemma_scope_files_may_spell_the_matrices_small(tmp_path):
  sae = random_sae('jumprelu', centered=False)
  concepts.save_sae(tmp_path / 'a', sae, format='gemma_scope')
  path = tmp_path / 'a/params.npz'
  with np.load(path) as file:
    arrays = {name.replace('W_', 'w_'): file[name] for name in file.files}
  assert {'w_enc', 'w_dec'} < set(arrays)
  np.savez(path, scaling_factor=np.ones(()), **arrays)
  np.testing.assert_array_equal(concepts.load_sae(path).sae(H), sae(H))
  np.savez(path, scaling_factor=np.full((), 2.0), **arrays)
  with pytest.raises(concepts.SAEFileError, match='npz: scaling_factor'):
    concepts.load_sae(path)


@pytest.mark.parametrize(
  'key', ['signed', 'transcode', 'skip_connection', 'matching_pursuit']
)
def test_what_is_no_plain_topk_of_sparsify_is_refused(key, tmp_path):
  concepts.save_sae(tmp_path / 'a', random_sae('topk'), format='sparsify')
  rewrite(tmp_path / 'a', lambda c: c.update({key: False}))
  assert concepts.load_sae(tmp_path / 'a').sae.config.k == K
  rewrite(tmp_path / 'a', lambda c: c.update({key: True}))
  with pytest.raises(concepts.SAEFileError, match=f'{key}=True is not'):
    concepts.load_sae(tmp_path / 'a')


@pytest.mark.parametrize('format', ['saelens', 'sparsify'])
def test_k_is_an_integer_however_json_spells_it(format, tmp_path):
  concepts.save_sae(tmp_path / 'a', random_sae('topk'), format=format)
  rewrite(tmp_path / 'a', lambda c: c.update(k=float(K), d_in=float(D)))
  sae = concepts.load_sae(tmp_path / 'a').sae
  assert sae.config.k == K and type(sae.config.k) is int
  assert type(sae.config.d_in) is int
  assert sae.encode(H).shape == (50, F)
  for wrong in (3.5, True, '3', float('nan')):
    rewrite(tmp_path / 'a', lambda c, wrong=wrong: c.update(k=wrong))
    with pytest.raises(
      concepts.SAEFileError, match=f'k={wrong!r}; it must be an integer'
    ):
      concepts.load_sae(tmp_path / 'a')


def test_an_npz_that_is_none_is_named(tmp_path):
  path = tmp_path / 'params.npz'
  path.touch()
  with pytest.raises(concepts.SAEFileError, match='params.npz is truncated'):
    concepts.load_sae(path)
  with path.open('wb') as file:
    np.save(file, np.ones(3))
  with pytest.raises(concepts.SAEFileError, match='params.npz is truncated'):
    concepts.load_sae(path)


@pytest.mark.parametrize(
  'damage,message',
  [
    (lambda f: (f / 'cfg.json').unlink(), 'cfg.json cannot be read'),
    (lambda f: (f / 'cfg.json').write_text('[1]'), 'holds a list'),
    (lambda f: _truncate(f / 'sae_weights.safetensors'), 'truncated'),
    (lambda f: (f / 'sae_weights.safetensors').unlink(), 'has none of'),
    (lambda f: (f / 'params.npz').touch(), 'must have exactly one'),
    (
      lambda f: rewrite(f, lambda c: c.update(d_sae=F + 1)),
      r'sae_weights.*W_enc has shape \(8, 24\)',
    ),
    (lambda f: rewrite(f, lambda c: c.update(d_in=None)), 'd_in=None'),
    (lambda f: rewrite(f, lambda c: c.update(k=0)), 'k=0 must be in'),
    (
      lambda f: rewrite(f, lambda c: c.update(architecture='transcoder')),
      "architecture='transcoder'",
    ),
    (
      lambda f: rewrite(
        f, lambda c: c.update(normalize_activations='layer_norm')
      ),
      "normalize_activations='layer_norm'",
    ),
    (
      lambda f: rewrite(f, lambda c: c.update(activation_fn_kwargs=[1])),
      r'sae_weights.*activation_fn_kwargs=\[1\]; it must be an object',
    ),
    (
      lambda f: rewrite(f, lambda c: c.update(metadata='abc')),
      "cfg.json has metadata='abc'; it must be an object",
    ),
    (
      lambda f: rewrite(f, lambda c: c.update(apply_b_dec_to_input='False')),
      "apply_b_dec_to_input='False'; it must be true or false",
    ),
    (
      lambda f: rewrite(
        f, lambda c: c.update(rescale_acts_by_decoder_norm='False')
      ),
      "rescale_acts_by_decoder_norm='False'; it must be true or false",
    ),
    (
      lambda f: rewrite(f, None, lambda t: dict(t, W_skip=t['W_enc'])),
      'W_skip is not known',
    ),
    (
      lambda f: rewrite(f, None, lambda t: dict(t, b_dec=t['b_dec'] * np.nan)),
      'b_dec holds NaN',
    ),
  ],
)
def test_bad_files_are_named(damage, message, tmp_path):
  concepts.save_sae(tmp_path / 'a', random_sae('topk'))
  damage(tmp_path / 'a')
  with pytest.raises(concepts.SAEFileError, match=message):
    concepts.load_sae(tmp_path / 'a')


def test_what_a_format_cannot_hold_is_not_written(tmp_path):
  save = lambda sae, **kwargs: concepts.save_sae(tmp_path / 'a', sae, **kwargs)
  for sae, format, message in (
    (random_sae('gated'), 'gemma_scope', 'hold JumpReLU, not gated'),
    (random_sae('relu'), 'sparsify', 'hold TopK'),
    (random_sae('relu'), 'pickle', "format='pickle'"),
  ):
    with pytest.raises(concepts.SAEFileError, match=message):
      save(sae, format=format)
  with pytest.raises(concepts.SAEFileError, match='no metadata'):
    save(random_sae('jumprelu'), format='gemma_scope', metadata={'layer': 3})
  assert not list(tmp_path.iterdir())
  save(random_sae('relu'))
  before = (tmp_path / 'a/cfg.json').read_bytes()
  with pytest.raises(concepts.SAEFileError, match='not an empty folder'):
    save(random_sae('topk'))
  assert (tmp_path / 'a/cfg.json').read_bytes() == before
  pickled = tmp_path / 'params.npz'
  np.savez(pickled, W_enc=np.array([{}], object))
  with pytest.raises(concepts.SAEFileError, match='npz of plain arrays'):
    concepts.load_sae(pickled)
