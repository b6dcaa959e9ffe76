"""Digits with wrong labels, and the networks trained on them."""

from __future__ import annotations

import gzip
import pathlib
from typing import NamedTuple

import numpy as np
import optax
from sklearn import datasets, model_selection

from experiments import contract
from experiments.seeds import train_seeds
from idesign import curvature, models, training

SIDES = {'digits': 8, 'mnist': 28}  # Pixels of an image, by source.


class World(NamedTuple):
  """One seed's data; images `[N, H, W, 1]` centred, labels `[N]`."""

  images: np.ndarray  # Training, held-out and test images, in this order.
  labels: np.ndarray  # As trained on; some training labels are wrong.
  truth: np.ndarray
  split: np.ndarray  # 0 train, 1 held out, 2 test.
  noisy: np.ndarray  # True where the label is wrong.

  @property
  def train(self) -> np.ndarray:
    return self.split == 0


def read_images(source: str, data_dir: str) -> tuple[np.ndarray, np.ndarray]:
  """Images `[N, H, W, 1]` in [0, 1] and their classes.

  Args:
    source: `'digits'`: scikit-learn's, bundled; `'mnist'`: the test images of
      MNIST in `data_dir/mnist`, or, where there is no such folder, the training
      images of the data set `ylecun/mnist`, which needs a network.
    data_dir: where `mnist` may be.

  Raises:
    ValueError: another source.
  """
  side_of(source)
  if source == 'digits':
    pixels, truth = datasets.load_digits(return_X_y=True)
    return pixels.reshape(-1, 8, 8, 1) / 16, truth
  folder = pathlib.Path(data_dir) / 'mnist'
  if folder.is_dir():
    pixels = _idx(folder / 't10k-images-idx3-ubyte.gz')
    truth = _idx(folder / 't10k-labels-idx1-ubyte.gz')
    return pixels[..., None] / 255, truth
  import datasets as hub  # pylint: disable=g-import-not-at-top

  rows = training.image_rows(hub.load_dataset('ylecun/mnist', split='train'))
  return rows['image'] / 255, rows['label']


def side_of(source: str) -> int:
  """Pixels of the side of an image.

  Raises:
    ValueError: an unknown source.
  """
  if source not in SIDES:
    raise ValueError(f'config.data.source={source!r} is none of {[*SIDES]}.')
  return SIDES[source]


def _idx(path: pathlib.Path) -> np.ndarray:
  """An IDX file of bytes: two zeros, type 8, how many axes, their sizes."""
  content = gzip.decompress(path.read_bytes())
  if content[:3] != b'\0\0\x08':
    raise ValueError(f'{path} is not an IDX file of unsigned bytes.')
  axes = content[3]
  shape = np.frombuffer(content, '>u4', axes, offset=4)
  return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def make_world(
  seed: int, *, noise: float, train: float, images: int,
  source: str = 'digits', data_dir: str = '',
) -> World:  # fmt: skip
  """Splits the first images by class and replaces some training labels.

  Args:
    seed: of the split and of the wrong labels.
    noise: share of the training labels to replace, each by a wrong one.
    train: share of the images to train on; the rest is halved.
    images: how many images to use.
    source, data_dir: as for `read_images`.
  """
  pixels, truth = read_images(source, data_dir)
  if not 50 <= images <= len(truth):
    raise ValueError(
      f'config.data.images={images} must be from 50 (to split by class) to '
      f'{len(truth):,}, which is all there are.'
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
  pixels = pixels[order]
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
  """The classifier: `apply(params, [B, H, W, 1]) -> [B, 10]`."""
  side = side_of(config.data.source)
  m = config.model
  if 'hidden' in m:
    net = models.mlp(models.MLPConfig(side**2, tuple(m.hidden), 10))
    flat = lambda params, x: net.apply(params, x.reshape(x.shape[0], -1))
    return net._replace(apply=flat)
  return models.vit(
    models.ViTConfig(
      image_size=side,
      channels=1,
      num_classes=10,
      patch_size=m.patch_size,
      d_model=m.d_model,
      n_heads=m.n_heads,
      d_ff=m.d_ff,
      n_layers=m.n_layers,
    )
  )


def losses(model: models.Model, temperature: float = 1.0):
  """`loss(params, {'image', 'label'}) -> [B]`, in nats."""

  def loss(params, batch):
    logits = model.apply(params, batch['image']) / temperature
    return curvature.negative_log_likelihood(logits, batch['label'])

  return loss


def rows(world: World, members: np.ndarray, labels=None):
  """Some of the images as a batch; labels are those that are trained on."""
  labels = world.labels if labels is None else labels
  return {'image': world.images[members], 'label': labels[members]}


def train(config, model, worlds, seeds, workdir: contract.Workdir):
  """The networks of all seeds, trained side by side; see `train_seeds`."""
  data = [rows(w, w.train) for w in worlds]
  epoch = len(data[0]['image']) // config.batch_size
  num_steps = config.epochs * epoch
  optimizer = optax.adamw(
    optax.cosine_decay_schedule(config.learning_rate, num_steps),
    weight_decay=config.weight_decay,
  )
  return train_seeds(
    model.init,
    losses(model),
    optimizer,
    data,
    seeds,
    workdir,
    batch_size=config.batch_size,
    num_steps=num_steps,
    save_every=max(1, num_steps // 10),
    log_every=epoch,
  )
