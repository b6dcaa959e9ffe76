"""What three published formats call the parts of a sparse autoencoder.

A reader takes the settings and tensors of a file and a list to which it adds
what it had to assume; it returns a function that makes the `SAEConfig`, and
this library's arrays. A writer takes a config, arrays and metadata and returns
settings and tensors. Neither touches a file.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from idesign.concepts.sae import SAEConfig

# Here and in SAELens. A batch's TopK has one threshold afterwards, and so is
# published as JumpReLU.
_SAELENS = {
  'relu': 'standard',
  'topk': 'topk',
  'batchtopk': 'jumprelu',
  'jumprelu': 'jumprelu',
  'gated': 'gated',
}
# The release whose settings these are. Without one SAELens takes a file for one
# of an old release, and rewrites its settings.
_SAELENS_VERSION = '6.0.0'


class SAEFileError(ValueError):
  """A file of an autoencoder that cannot be read or written as asked."""


def _take(tensors, *names: str) -> dict[str, np.ndarray]:
  for name in sorted(set(tensors) ^ set(names)):
    problem = 'is missing' if name in names else 'is not known'
    raise SAEFileError(f'{name} {problem}; the arrays are {sorted(tensors)}.')
  return dict(tensors)


def _whole(name: str, value: Any) -> int:
  """An integer, which JSON may spell 3.0."""
  if isinstance(value, float) and value.is_integer():
    return int(value)
  if isinstance(value, bool) or not isinstance(value, int):
    raise SAEFileError(f'cfg.json has {name}={value!r}; it must be an integer.')
  return value


def _flag(name: str, value: Any) -> bool:
  """A boolean; the string "False" would be true."""
  if not isinstance(value, bool):
    raise SAEFileError(
      f'cfg.json has {name}={value!r}; it must be true or false.'
    )
  return value


def _rows(name, matrix, rows: int, columns: int, assumed) -> np.ndarray:
  """The matrix as `[rows, columns]`, whichever way it was written."""
  if rows == columns and matrix.shape == (rows, columns):
    assumed.append(
      f'{name} is square: taken to be written as its format does it.'
    )
  elif matrix.shape == (columns, rows):
    assumed.append(
      f'{name} is {matrix.shape}: taken to be the transpose of '
      f'{(rows, columns)}.'
    )
    return matrix.T
  if matrix.shape != (rows, columns):
    raise SAEFileError(
      f'{name} has shape {matrix.shape}; it must be {(rows, columns)}.'
    )
  return matrix


def read_saelens(raw, tensors, assumed):
  kind = raw.get('architecture')
  if kind is None:
    kind = 'standard'
    assumed.append('cfg.json names no architecture: taken to be standard.')
  function = raw.get('activation_fn', raw.get('activation_fn_str', 'relu'))
  settings = raw.get('activation_fn_kwargs') or {}
  if not isinstance(settings, dict):
    raise SAEFileError(
      f'cfg.json has activation_fn_kwargs={settings!r}; it must be an object.'
    )
  k = raw.get('k', settings.get('k'))
  k = None if k is None else _whole('k', k)
  if kind == 'standard' and function == 'topk':  # As SAELens wrote it once.
    kind = 'topk'
  elif kind == 'standard' and function != 'relu':
    raise SAEFileError(f'activation_fn={function!r} is not supported.')
  ours = {'standard': 'relu', 'topk': 'topk'} | {
    name: name for name in ('jumprelu', 'gated')
  }
  if kind not in ours:
    raise SAEFileError(
      f'architecture={kind!r} is not supported; supported are {sorted(ours)}.'
    )
  scaled = raw.get('normalize_activations', 'none')
  if scaled in (True, 'expected_average_only_in'):
    assumed.append(
      'The autoencoder was trained on activations scaled to mean norm '
      'sqrt(d_in); unless input_scale was given, it must be fed such.'
    )
  elif scaled not in (None, False, 'none'):
    raise SAEFileError(f'normalize_activations={scaled!r} is not supported.')
  if raw.get('reshape_activations', 'none') not in ('none', 'hook_z'):
    shape = raw['reshape_activations']
    raise SAEFileError(f'reshape_activations={shape!r} is not supported.')
  centered = raw.get('apply_b_dec_to_input')
  if centered is None:
    centered = True
    assumed.append(
      'cfg.json has no apply_b_dec_to_input: b_dec is taken to be subtracted.'
    )
  centered = _flag('apply_b_dec_to_input', centered)
  names = {
    'relu': ('b_enc',),
    'topk': ('b_enc',),
    'jumprelu': ('b_enc', 'threshold'),
    'gated': ('b_gate', 'b_mag', 'r_mag'),
  }[ours[kind]]
  if 'log_threshold' in tensors:  # Of a checkpoint in the middle of training.
    tensors = dict(tensors)
    tensors['threshold'] = np.exp(tensors.pop('log_threshold'))
  arrays = _take(tensors, 'W_enc', 'W_dec', 'b_dec', *names)
  rescaled = raw.get('rescale_acts_by_decoder_norm') or False
  if kind == 'topk' and _flag('rescale_acts_by_decoder_norm', rescaled):
    # Selecting and scaling by the norm of the decoder's row is an encoder that
    # is larger by it and a decoder of unit rows.
    norms = np.linalg.norm(arrays['W_dec'], axis=1)
    arrays['W_enc'] = arrays['W_enc'] * norms[None]
    arrays['b_enc'] = arrays['b_enc'] * norms
    arrays['W_dec'] = arrays['W_dec'] / norms[:, None]
  d_in, d_sae = (_whole(n, raw.get(n)) for n in ('d_in', 'd_sae'))
  make = lambda: SAEConfig(
    architecture=ours[kind], d_in=d_in, d_sae=d_sae, k=k, centered=centered
  )
  return make, arrays


def write_saelens(config: SAEConfig, arrays, metadata):
  raw = {
    'architecture': _SAELENS[config.architecture],
    'd_in': config.d_in,
    'd_sae': config.d_sae,
    'dtype': 'float32',
    'device': 'cpu',
    'apply_b_dec_to_input': config.centered,
    'normalize_activations': 'none',
    'reshape_activations': 'none',
    'metadata': {'sae_lens_version': _SAELENS_VERSION} | metadata,
  }
  if config.architecture == 'topk':
    raw |= {'k': config.k, 'rescale_acts_by_decoder_norm': False}
  return raw, arrays


def read_gemma_scope(tensors, assumed):
  # Some files spell the matrices w_enc and w_dec.
  tensors = {n.replace('w_', 'W_'): a for n, a in tensors.items()}
  scale = tensors.pop('scaling_factor', None)
  if scale is not None and not np.all(scale == 1):
    raise SAEFileError('scaling_factor, of transcoders, is not supported.')
  arrays = _take(tensors, 'W_enc', 'W_dec', 'b_enc', 'b_dec', 'threshold')
  features, width = arrays['b_enc'].size, arrays['b_dec'].size
  arrays['W_enc'] = _rows('W_enc', arrays['W_enc'], width, features, assumed)
  arrays['W_dec'] = _rows('W_dec', arrays['W_dec'], features, width, assumed)
  assumed.append('The npz has no settings: a JumpReLU that reads h itself.')
  make = lambda: SAEConfig(
    architecture='jumprelu', d_in=width, d_sae=features, centered=False
  )
  return make, arrays


def write_gemma_scope(config: SAEConfig, arrays, metadata):
  if config.architecture not in ('jumprelu', 'batchtopk'):
    raise SAEFileError(
      f'Gemma Scope files hold JumpReLU, not {config.architecture}; save it as '
      'saelens.'
    )
  if metadata:
    raise SAEFileError('Gemma Scope files hold no metadata; leave it out.')
  if config.centered:
    wide = {n: a.astype(np.float64) for n, a in arrays.items()}
    moved = wide['b_enc'] - wide['b_dec'] @ wide['W_enc']
    arrays['b_enc'] = moved.astype(np.float32)
  return {}, arrays


def read_sparsify(raw, tensors, assumed):
  # `signed` keeps the k largest in size, whatever their sign.
  for key in ('transcode', 'skip_connection', 'matching_pursuit', 'signed'):
    if raw.get(key):
      raise SAEFileError(f'{key}={raw[key]!r} is not supported.')
  if raw.get('activation', 'topk') != 'topk':
    raise SAEFileError(f'activation={raw["activation"]!r} is not supported.')
  tensors = _take(tensors, 'encoder.weight', 'encoder.bias', 'W_dec', 'b_dec')
  features, width = tensors['encoder.bias'].size, tensors['b_dec'].size
  rows = lambda name: _rows(name, tensors[name], features, width, assumed)
  arrays = {
    'W_enc': rows('encoder.weight').T,
    'b_enc': tensors['encoder.bias'],
    'W_dec': rows('W_dec'),
    'b_dec': tensors['b_dec'],
  }
  k = _whole('k', raw.get('k'))
  make = lambda: SAEConfig(architecture='topk', d_in=width, d_sae=features, k=k)
  return make, arrays


def write_sparsify(config: SAEConfig, arrays, metadata):
  if config.architecture != 'topk' or not config.centered:
    raise SAEFileError(
      'sparsify files hold TopK that subtracts b_dec; save this '
      f'{config.architecture} as saelens.'
    )
  raw = {
    'activation': 'topk',
    'd_in': config.d_in,
    'num_latents': config.d_sae,
    'expansion_factor': max(1, config.d_sae // config.d_in),
    'k': config.k,
    'normalize_decoder': True,
    'multi_topk': False,
    'skip_connection': False,
    'transcode': False,
  }
  if metadata:
    raw['metadata'] = metadata
  tensors = {
    'encoder.weight': arrays['W_enc'].T,
    'encoder.bias': arrays['b_enc'],
    'W_dec': arrays['W_dec'],
    'b_dec': arrays['b_dec'],
  }
  return raw, tensors
