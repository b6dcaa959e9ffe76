"""Models as pure `init` and `apply` functions."""

from idesign.models.attention import KVCache, init_cache
from idesign.models.config import (
  BlockConfig,
  LinearScaling,
  Llama3Scaling,
  RopeConfig,
  TransformerConfig,
)
from idesign.models.functional import DTypePolicy, Model, Params, functional
from idesign.models.generate import Generation, filter_logits, generate
from idesign.models.hf_fields import CheckpointError
from idesign.models.huggingface import load_pretrained, save_pretrained
from idesign.models.mlp import MLPConfig, mlp
from idesign.models.transformer import transformer
from idesign.models.vit import ViTConfig, vit
