"""The vision transformer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from idesign.models import ViTConfig, vit
from idesign.models.vit import patchify

CONFIG = ViTConfig(
  d_model=16,
  n_layers=2,
  n_heads=2,
  d_ff=24,
  image_size=4,
  patch_size=2,
  channels=3,
  num_classes=5,
)


def build(config=CONFIG):
  model = vit(config)
  rng = np.random.default_rng(0)
  return model, jax.tree.map(
    lambda a: jnp.asarray(0.3 * rng.normal(size=a.shape), a.dtype),
    jax.eval_shape(model.init, jax.random.key(0)),
  )


def images(batch=3, size=4):
  return jax.random.normal(jax.random.key(1), (batch, size, size, 3))


def test_patches_are_cut_in_reading_order():
  x = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
  expected = [
    [image[r : r + 2, c : c + 2].reshape(-1) for r in (0, 2) for c in (0, 2, 4)]
    for image in x
  ]
  np.testing.assert_array_equal(patchify(jnp.asarray(x), 2), expected)


def test_parameters():
  _, params = build()
  shapes = {
    '/'.join(k.key for k in path): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  assert shapes['patch/kernel'] == (12, 16)
  assert shapes['positions/embedding'] == (5, 16)
  assert shapes['cls/embedding'] == (1, 16)
  assert shapes['blocks/attn/q/kernel'] == (2, 16, 16)
  assert shapes['blocks/mlp/down/bias'] == (2, 16)
  assert shapes['head/kernel'] == (16, 5)
  assert not any('gate' in path for path in shapes)


def test_without_positions_patches_have_no_order():
  model, params = build()
  x = images()
  with jax.numpy_dtype_promotion('strict'):
    apply = jax.jit(model.apply)
    logits = apply(params, x)
  assert logits.shape == (3, 5)
  turned = jnp.roll(x, 2, axis=1)  # Whole patches move.
  tolerance = 64 * float(jnp.finfo(jnp.float32).eps)
  assert jnp.abs(apply(params, turned) - logits).max() > 1e-2
  table = params['positions']['embedding']
  same = {'embedding': table.at[1:].set(table[1])}
  unordered = params | {'positions': same}
  np.testing.assert_allclose(
    apply(unordered, turned),
    apply(unordered, x),
    rtol=0,
    atol=tolerance * float(jnp.abs(logits).max()),
  )


def test_every_patch_reaches_the_class_token():
  model, params = build()
  x = images()
  gradient = jax.jit(
    jax.grad(lambda x: jnp.sum(jnp.sin(model.apply(params, x))))
  )(x)
  assert (jnp.abs(gradient) > 0).all()


def test_it_learns_four_images():
  model, params = build()
  x, y = images(4), jnp.arange(4)
  optimizer = optax.adam(3e-2)

  def loss(params):
    return optax.softmax_cross_entropy_with_integer_labels(
      model.apply(params, x), y
    ).mean()

  def step(carry, _):
    params, state = carry
    value, gradient = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(gradient, state)
    return (optax.apply_updates(params, updates), state), value

  _, losses = jax.jit(
    lambda p: jax.lax.scan(step, (p, optimizer.init(p)), length=60)
  )(params)
  assert losses[0] > 1 and losses[-1] < 0.05


def test_names():
  model, params = build()
  text = str(jax.make_jaxpr(model.apply)(params, images()))
  for name in ('resid_pre', 'attn_out', 'mlp_out', 'resid_post'):
    assert text.count(f'name={name}') == 1


@pytest.mark.parametrize(
  'change',
  [
    dict(norm_unit_offset=True),
    dict(attn_scale=0.9),
    dict(attn_softcap=0.1),
    dict(norm_position='both'),
  ],
)
def test_settings_of_blocks_are_heeded(change):
  model, params = build(dataclasses.replace(CONFIG, **change))
  x = images()
  heeded = jax.jit(model.apply)(params, x)
  # The plain model has the same parameters but for norms after the layers.
  blocks = {k: v for k, v in params['blocks'].items() if 'post' not in k}
  plain = jax.jit(vit(CONFIG).apply)(params | {'blocks': blocks}, x)
  assert jnp.abs(heeded - plain).max() > 1e-2


@pytest.mark.parametrize(
  'change,message',
  [
    (dict(patch_size=3), 'image_size=4.*patch_size=3'),
    (dict(num_classes=0), 'num_classes=0'),
    (dict(sliding_window=2), 'patches have no order'),
  ],
)
def test_bad_settings_raise(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CONFIG, **change)


def test_other_images_raise():
  model, params = build()
  with pytest.raises(ValueError, match=r'\[batch, 4, 4, 3\]'):
    model.apply(params, images(size=6))
