"""Export: what is written is read back, here and by transformers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idesign.models import DTypePolicy, load_pretrained, save_pretrained
from idesign.models.hf_config import write_config
from tests.models import hf_cases
from tests.models.hf_cases import CASES


@pytest.mark.parametrize('case', CASES)
def test_exports_are_read_by_transformers(case, tmp_path):
  import transformers

  model, params, _ = hf_cases.ours(case)
  tokens, mask, expected = hf_cases.reference(case, 'left')
  save_pretrained(tmp_path / 'out', model, params)
  theirs = type(hf_cases.torch_model(case)).from_pretrained(tmp_path / 'out')
  again = hf_cases.torch_logits(theirs.eval(), tokens, mask)
  # Their own weights back in their own model: nothing may change.
  assert hf_cases.distance(expected, again, mask) == 0
  original = hf_cases.torch_model(case).config.to_dict()
  assert theirs.config.model_type == original['model_type']
  auto = transformers.AutoConfig.from_pretrained(tmp_path / 'out')
  assert auto.architectures == [type(theirs).__name__]
  reloaded, reread = load_pretrained(tmp_path / 'out')
  assert reloaded.config == model.config
  jax.tree.map(np.testing.assert_array_equal, reread, params)


@pytest.mark.parametrize('case', ['llama', 'gpt2', 'neox', 'gemma3'])
def test_bfloat16_and_sharded_roundtrips_are_bit_exact(case, tmp_path):
  dtypes = DTypePolicy(param=jnp.bfloat16)
  model, params = load_pretrained(hf_cases.checkpoint(case), dtypes=dtypes)
  assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))
  folder = tmp_path / 'out'
  save_pretrained(folder, model, params, max_shard_bytes=8_000)
  shards = sorted(folder.glob('*.safetensors'))
  index = json.loads((folder / 'model.safetensors.index.json').read_text())
  assert len(shards) > 3
  assert {s.name for s in shards} == set(index['weight_map'].values())
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  assert index['metadata']['total_size'] == size
  _, reread = load_pretrained(folder, dtypes=dtypes)
  jax.tree.map(np.testing.assert_array_equal, reread, params)
  theirs = type(hf_cases.torch_model(case)).from_pretrained(folder)
  assert str(theirs.dtype) == 'torch.bfloat16'
  for name, tensor in hf_cases.torch_model(case).state_dict().items():
    assert (theirs.state_dict()[name] == tensor.bfloat16()).all(), name


def test_whole_numbers_are_written_as_transformers_reads_them():
  import transformers

  model, _, _ = hf_cases.ours('gemma2')
  config = dataclasses.replace(model.config, attn_softcap=5, logit_softcap=7)
  _, raw = write_config(config)
  theirs = transformers.Gemma2Config(**raw)
  assert theirs.attn_logit_softcapping == 5
  assert theirs.final_logit_softcapping == 7
