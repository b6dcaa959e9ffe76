"""Names of the decoder's projections, ours and those of transformers.

Kernels are `[in, out]` here and `[out, in]` there.
"""

NAMES = {
  **{f'blocks/attn/{x}/kernel': f'self_attn.{x}_proj' for x in 'qkvo'},
  **{f'blocks/mlp/{x}/kernel': f'mlp.{x}_proj' for x in ('gate', 'up', 'down')},
}
