"""The digits with wrong labels, and the networks trained on them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import optax
from sklearn import datasets, model_selection

from experiments import contract
from experiments.seeds import train_seeds
from idesign import curvature, models


class World(NamedTuple):
  """One seed's data; images `[N, 8, 8, 1]` centred, labels `[N]`."""

  images: np.ndarray  # Training, held-out and test images, in this order.
  labels: np.ndarray  # As trained on; some training labels are wrong.
  truth: np.ndarray
  split: np.ndarray  # 0 train, 1 held out, 2 test.
  noisy: np.ndarray  # True where the label is wrong.

  @property
  def train(self) -> np.ndarray:
    return self.split == 0


def make_world(seed: int, *, noise: float, train: float, images: int) -> World:
  """Splits the first digits by class and replaces some training labels.

  Args:
    seed: of the split and of the wrong labels.
    noise: share of the training labels to replace, each by a wrong one.
    train: share of the images to train on; the rest is halved.
    images: how many images to use, at most 1,797.
  """
  pixels, truth = datasets.load_digits(return_X_y=True)
  if not 50 <= images <= len(truth):
    raise ValueError(
      f'config.data.images={images} must be from 50 (to split by class) to '
      f'{len(truth)}, which is all there are.'
    )
  pixels, truth = pixels[:images], truth[:images]
  everything = np.arange(len(truth))
  trained, rest = model_selection.train_test_split(
    everything, train_size=train, stratify=truth, random_state=seed
  )
  held_out, test = model_selection.train_test_split(
    rest, train_size=0.5, stratify=truth[rest], random_state=seed
  )
  order = np.concatenate([trained, held_out, test])
  pixels = pixels[order].reshape(-1, 8, 8, 1) / 16
  pixels = (pixels - pixels[: len(trained)].mean()).astype(np.float32)
  truth = truth[order].astype(np.int32)
  split = np.repeat([0, 1, 2], [len(trained), len(held_out), len(test)])
  rng = np.random.default_rng(np.random.SeedSequence([seed, 1]))
  noisy = np.zeros(len(order), bool)
  wrong = rng.choice(len(trained), round(noise * len(trained)), replace=False)
  noisy[wrong] = True
  labels = truth.copy()
  labels[wrong] = (labels[wrong] + rng.integers(1, 10, len(wrong))) % 10
  return World(pixels, labels, truth, split, noisy)


def make_model(config) -> models.Model:
  """The classifier: `apply(params, [B, 8, 8, 1]) -> [B, 10]`."""
  if config.world == 'mlp':
    net = models.mlp(models.MLPConfig(64, tuple(config.model.hidden), 10))
    flat = lambda params, x: net.apply(params, x.reshape(x.shape[0], 64))
    return net._replace(apply=flat)
  m = config.model
  return models.vit(
    models.ViTConfig(
      image_size=8,
      channels=1,
      num_classes=10,
      patch_size=m.patch_size,
      d_model=m.d_model,
      n_heads=m.n_heads,
      d_ff=m.d_ff,
      n_layers=m.n_layers,
    )
  )


def train(config, model, worlds, seeds, workdir: contract.Workdir):
  """The networks of all seeds, trained side by side; see `train_seeds`."""
  rows = [
    {'image': w.images[w.train], 'label': w.labels[w.train]} for w in worlds
  ]
  epoch = len(rows[0]['image']) // config.batch_size
  num_steps = config.epochs * epoch
  optimizer = optax.adamw(
    optax.cosine_decay_schedule(config.learning_rate, num_steps),
    weight_decay=config.weight_decay,
  )

  def loss(params, batch):
    logits = model.apply(params, batch['image'])
    return curvature.negative_log_likelihood(logits, batch['label'])

  return train_seeds(
    model.init,
    loss,
    optimizer,
    rows,
    seeds,
    workdir,
    batch_size=config.batch_size,
    num_steps=num_steps,
    save_every=max(1, num_steps // 10),
    log_every=epoch,
  )
