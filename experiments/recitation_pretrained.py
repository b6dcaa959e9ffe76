"""What a pretrained language model recites, removed by curvature.

After Merullo et al. 2025 (arXiv 2510.24256): K-FAC factors of a model's MLP
projections, of labels that it samples itself, on text; the components that hold
a share of the curvature mass (published: 0.6, of three late layers' gate and up
projections) are kept. Before and after: recitation of passages, perplexity, and
questions (BoolQ, BBH). With it the controls of the same size: rank truncation,
random components, and mixed factors that also see text of a second domain, such
as arithmetic, which without it is lost.

What memory and time it takes is printed before it begins; layers are split into
passes that fit. Factors, the edit and the edited model stay in the workdir:

  factors/PASS, edit, model

Worlds: `pretrained` runs on the small model and the texts that are named in the
config; `full` is for a real one, such as OLMo-2-7B on a TPU slice.

Run: see `configs/memorization.py`.
"""

from __future__ import annotations

import functools
import pathlib
import re
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec
import jax.numpy as jnp
import numpy as np

from experiments import contract, recitation_pretrained_figures
from experiments.recitation_exam import TextExam
from experiments.recitation_plan import make_plan
from experiments.recitation_pretrained_claims import make_claims
from experiments.recitation_text import (
  Passages, read_choices, read_passages, repeated_phrases,
)  # fmt: skip
from idesign import curvature, models, sites, training

# Which axis of a parameter is split over the mesh axis `model`; no other is.
SPLIT = (
  ('blocks/.*(q|k|v|gate|up)/kernel', PartitionSpec(None, None, 'model')),
  ('blocks/.*(o|down)/kernel', PartitionSpec(None, 'model', None)),
)


class Subject(NamedTuple):
  """A model, and all that is asked of it."""

  model: models.Model
  params: Any
  exam: TextExam
  passages: dict[str, Passages]  # That the unedited model recites.
  texts: dict[str, np.ndarray]  # For perplexity; rows of tokens.
  choices: dict[str, list]
  tokenizer: Any


def load(config, mesh) -> Subject:
  """Reads model, tokenizer, passages and questions.

  Raises:
    ValueError: naming the config's key: no passage is recited, say.
  """
  folder = pathlib.Path(config.model.path)
  dtype = jnp.dtype(config.model.dtype)
  dtypes = models.DTypePolicy(param=dtype, compute=dtype)
  model, params = models.load_pretrained(
    folder, dtypes=dtypes,
    shardings=functools.partial(_sharding, mesh),
  )  # fmt: skip
  tokenizer = training.load_tokenizer(folder / 'tokenizer.json')
  exam = TextExam(model, config.exam.batch)
  bos = config.model.bos
  bos_id = tokenizer.token_to_id(bos) if bos else None
  sizes = {'prefix': config.exam.prefix, 'suffix': config.exam.suffix}
  found = {}
  for name, path in config.passages.items():
    found[name] = read_passages(
      path, tokenizer, vocabulary=model.config.vocab_size, bos=bos_id, **sizes
    )
  if config.phrases.stories:
    found['phrases'] = repeated_phrases(
      model, params, bos=bos_id, seed=config.seed, **config.phrases, **sizes
    )
  passages = {}
  for name, part in found.items():
    known = exam.recited(params, part)
    print(f'{name}: {known.sum()} of {len(known)} passages are recited')
    if known.any():
      passages[name] = part.take(known)
  if not passages:
    raise ValueError(
      f'The model recites none of config.passages={dict(config.passages)}: '
      'there is nothing to forget. Look for phrases (config.phrases.stories), '
      'or name passages that it has seen often.'
    )
  rows = lambda files: training.packed_text(
    list(files), tokenizer, length=config.length, bos=bos or None
  )['tokens']
  texts = {name: rows(files) for name, files in config.perplexity.items()}
  choices = {n: read_choices(p) for n, p in config.questions.items()}
  return Subject(model, params, exam, passages, texts, choices, tokenizer)


def _sharding(mesh, path: str) -> NamedSharding:
  specs = [spec for pattern, spec in SPLIT if re.fullmatch(pattern, path)]
  return NamedSharding(mesh, specs[0] if specs else PartitionSpec())


def measure(config, subject: Subject, params) -> dict[str, Any]:
  """Recitation, perplexity and questions, of some parameters."""
  exam = subject.exam
  return {
    'recitation': {
      name: exam.recitation(params, p) for name, p in subject.passages.items()
    },
    'perplexity': {
      name: exam.perplexity(params, rows)
      for name, rows in subject.texts.items()
    },
    'questions': {
      name: exam.accuracy(params, c, subject.tokenizer, config.exam.length)
      for name, c in subject.choices.items()
    },
  }


def collect(config, subject: Subject, mesh, files, folder, groups):
  """Spectra of all groups' sites, by site; a pass over the text for each."""
  rows = training.packed_text(
    list(files), subject.tokenizer, length=config.length,
    bos=config.model.bos or None,
  )['tokens']  # fmt: skip
  rows = np.resize(rows, (max(len(rows), config.batch), rows.shape[1]))
  data = {'inputs': rows[:, :-1], 'labels': rows[:, 1:]}
  batches = training.Batches(data, config.batch, seed=config.seed, mesh=mesh)
  fisher = curvature.Fisher()
  identity = curvature.Identity(
    model=training.fingerprint(subject.params),
    data=curvature.hash_arrays([rows]),
    tokens=config.num_batches * config.batch * (config.length - 1),
    fisher=vars(fisher),
  )
  parts = []
  for i, group in enumerate(groups):
    place = folder / f'{i:02d}'
    if not place.exists():
      stream = curvature.FactorStream(subject.model.apply, group, fisher, mesh)
      factors = stream.collect(
        subject.params, batches, config.num_batches,
        key=jax.random.key(config.seed), workdir=f'{place}.running',
        save_every=config.save_every,
      )  # fmt: skip
      curvature.save_sums(place, factors, identity)
    parts.append(
      curvature.load_sums(
        place, curvature.Factors,
        expect={'model': identity.model, 'data': identity.data},
      )
    )  # fmt: skip
  return join(parts)


def join(parts) -> curvature.Factors:
  """Factors of consecutive layers of the same stacks, as one."""
  names = dict.fromkeys(n for p in parts for n in p.inputs)
  stack = lambda field: {
    name: np.concatenate(
      [getattr(p, field)[name] for p in parts if name in p.inputs]
    )
    for name in names
  }
  first = {
    name: next(p.positions[name] for p in parts if name in p.inputs)
    for name in names
  }
  return curvature.Factors(
    stack('inputs'), stack('outputs'), parts[0].count, first
  )


def run(config, folder: pathlib.Path) -> None:
  """Plans, collects, edits and measures; resumes by batch and by arm."""
  mesh = training.make_mesh(**config.mesh)
  subject = load(config, mesh)
  model, params = subject.model, subject.params
  loss = lambda p, x: curvature.negative_log_likelihood(
    model.apply(p, x[:, :-1]), x[:, 1:]
  )
  example = jax.ShapeDtypeStruct((2, config.length), jnp.int32)
  found = sites.find_sites(loss, params, example, config.select).sites
  plan = make_plan(
    config, model.config, params, found, data=mesh.shape['data'],
    model=mesh.shape['model'],
  )  # fmt: skip
  print(plan, flush=True)
  digest = contract.fingerprint(*(p.tokens for p in subject.passages.values()))
  workdir = contract.Workdir(folder, config, digest)
  workdir.arm('unedited', lambda: measure(config, subject, params))
  at = {site.name: site for site in found}
  get = functools.cache(
    lambda name: collect(
      config, subject, mesh, config.factors[name],
      workdir.path / 'factors' / name, plan.groups,
    )
  )  # fmt: skip
  spectra = curvature.spectra(get('text'), where=config.eigen)
  singular = curvature.singular(params, at)
  keep = {
    'kfac': lambda mass: curvature.keep_high_curvature(
      params, at, spectra, mass=mass
    ),
    'svd': lambda share: curvature.keep_singular(
      params, at, singular, share=share
    ),
    'random': lambda share: curvature.keep_random(
      params, at, spectra, share=share, seed=config.seed
    ),
  }
  for name in config.factors:
    if name != 'text':
      mixed = curvature.spectra(
        curvature.mixture(get('text'), get(name), config.mixture),
        where=config.eigen,
      )
      keep[f'kfac with {name}'] = lambda mass, mixed=mixed: (
        curvature.keep_high_curvature(params, at, mixed, mass=mass)
      )
  for arm, make in keep.items():
    for strength in config.strengths[arm.split()[0]]:
      workdir.arm(
        f'{arm}/{strength:g}',
        lambda make=make, strength=strength: _edited(
          config, subject, make(strength)
        ),
      )
  edit = keep['kfac'](config.mass)
  if jax.process_index() == 0:
    place = workdir.path / 'edit'
    if not place.exists():
      curvature.save_edit(place, edit)
    if not (workdir.path / 'model').exists():
      curvature.edit_folder(
        config.model.path,
        place,
        workdir.path / 'model',
        dtypes=model.config.dtypes,
      )
  contract.save_claims(
    workdir.path / 'claims.json', make_claims(config, workdir.results)
  )
  if jax.process_index() == 0:
    recitation_pretrained_figures.draw(workdir.path)


def _edited(config, subject: Subject, edit: curvature.Edit) -> dict[str, Any]:
  out = measure(config, subject, edit.apply(subject.params))
  return {**out, 'kept': 100 * float(np.mean(list(edit.kept.values())))}
