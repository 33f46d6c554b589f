"""The feature extractor: a small classifier, trained once per data set and named by its hash."""

import logging
import pathlib
import re
from collections.abc import Callable
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ddil_jax.errors import UsageError
from ddil_jax import files
from ddil_jax.evaluation import checks
from ddil_jax.types import ONE_DEVICE, Devices

# Images a batch of the extractor; fixed, so that features do not depend on how images are handed over.
_BATCH = 256
STEPS = 800  # for which a classifier is trained
# Classifiers that come with the package. Training rounds otherwise on another processor, and ends with another hash.
SHIPPED = pathlib.Path(__file__).with_name("classifiers")


class Extractor(NamedTuple):
  """A network seen as a feature map; images are float [N,H,W,C] in [-1, 1].

  Attributes:
    name: says what it is, ending in a hash of its parameters and preprocessing.
    num_classes: K; 0 for a network without classes.
    outputs: images -> (logits [N,K], features [N,D]), float32.
    variables: {"params": ...} of the network, for those who need more of it than its outputs.
    on: devices -> the same extractor on those.
  """

  name: str
  num_classes: int
  outputs: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
  variables: dict | None = None
  on: Callable[[Devices], "Extractor"] | None = None

  def features(self, images) -> np.ndarray:
    return self.outputs(images)[1]

  def logits(self, images) -> np.ndarray:
    return self.outputs(images)[0]


def probabilities(logits) -> np.ndarray:
  """Softmax of logits [N,K] in float64."""
  logits = logits.astype(np.float64)
  p = np.exp(logits - logits.max(axis=1, keepdims=True))
  return p / p.sum(axis=1, keepdims=True)


def make_extractor(module, variables, image_shape, name: str, devices: Devices = ONE_DEVICE,
                   batch_size: int = _BATCH) -> Extractor:
  """An extractor from a classifier and its parameters.

  Args:
    module: Linen; `apply(variables, images [B,H,W,C])` gives (logits [B,K], features [B,D]).
    variables: {"params": ...}.
    image_shape: (H, W, C) it reads.
    name: without the hash.
    devices: over which batches are split.
    batch_size: images at a time; smaller ones for large networks.
  """
  image_shape = tuple(int(d) for d in image_shape)
  leaves = _flat(variables)
  about = {"module": _describe(module), "image_shape": image_shape, "range": [-1, 1]}
  num_classes = jax.eval_shape(module.apply, variables, jnp.zeros((1, *image_shape)))[0].shape[-1]
  apply, name = jax.jit(module.apply), f"{name}-{files.digest(leaves, about)[:8]}"

  def on(devices):
    placed = devices.whole(variables)

    def outputs(images):
      return in_batches(lambda x: apply(placed, x), checks.images(images, "images", image_shape), devices, batch_size)

    return Extractor(name, num_classes, outputs, variables, on)

  return on(devices)


def in_batches(apply: Callable, images: np.ndarray, devices: Devices = ONE_DEVICE, batch_size: int = _BATCH):
  """`apply` on images [N,...] in batches of one size, each split over the devices; the last is filled up and cut.

  Returns:
    What `apply` gives, a tree of arrays, as float32 [N, ...].
  """
  size, parts = devices.round_up(batch_size), []
  for i in range(0, len(images), size):
    part = np.asarray(images[i:i + size], np.float32)
    filled = np.concatenate([part, np.zeros((size - len(part), *part.shape[1:]), np.float32)])
    parts.append(jax.tree.map(lambda x: np.asarray(devices.fetch(x), np.float32)[:len(part)],
                              apply(devices.split(filled))))
  return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def train_classifier(module, images, labels, num_classes: int, cache_dir, name: str, seed: int = 0,
                     steps: int = STEPS, batch_size: int = 128, learning_rate: float = 3e-3,
                     max_shift: float = 1 / 16, noise: float = 0.2, devices: Devices = ONE_DEVICE,
                     progress: Callable[[int], None] = lambda step: None) -> Extractor:
  """Trains the classifier once and returns it as an extractor; a later call reads the cache.

  Cross entropy under Adam with cosine decay; images are shifted by up to `max_shift` of their side
  (fractions of a pixel too) and get Gaussian noise of deviation `noise`. The cached file is named
  by the recipe and the data; its content is verified by hash and by the features of a probe batch,
  and is made again when it does not hold. What the package has in `SHIPPED` is taken from there, so that
  a metric of that data set has the same name on every machine.

  Args:
    module: Linen; `apply({"params"}, images [B,H,W,C])` gives (logits [B,K], features [B,D]).
    images: [N,H,W,C] in [-1, 1].
    labels: int [N].
    num_classes: K.
    cache_dir: folder of the cache; None does without.
    name: "digits-cnn"; the extractor's name adds a hash.
    devices: over which the extractor's batches are split; it is trained on one.
    progress: told the number of steps done, where it is trained.

  Raises:
    UsageError: unlike shapes, values outside [-1, 1], labels outside 0..K-1.
  """
  images = checks.images(images, "images").astype(np.float32, copy=False)
  if max(images.max(), -images.min()) > 1 + 1e-3:
    raise UsageError(f"images lie in {images.min():.3g}..{images.max():.3g}; expected [-1, 1]")
  labels = checks.class_labels(labels, len(images), num_classes).astype(np.int32)
  if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
    raise UsageError(f"name {name!r} of the extractor; expected letters, digits, '-', '_' and '.'")
  image_shape = images.shape[1:]
  (logits, _), variables = jax.eval_shape(module.init_with_output, jax.random.key(0), images[:1])
  if logits.shape[-1] != num_classes:
    raise UsageError(f"the classifier has {logits.shape[-1]} logits; the data has {num_classes} classes")
  if set(variables) != {"params"}:
    raise UsageError(f"the classifier has collections {sorted(variables)}; only 'params' is supported")
  recipe = {"module": _describe(module), "num_classes": num_classes, "seed": seed, "steps": steps,
            "batch_size": batch_size, "learning_rate": learning_rate, "max_shift": max_shift, "noise": noise}
  data = files.digest({"images": images, "labels": labels}, recipe)
  file = f"{name}-{data[:16]}.safetensors"
  path = None if cache_dir is None else pathlib.Path(cache_dir) / file
  for kept in (SHIPPED / file, path):
    if kept is not None and kept.exists():
      try:
        return _read(kept, module, image_shape, name, devices)
      except UsageError as e:
        logging.warning("%s: training the classifier again", e)

  variables = _fit(module, images, labels, seed, steps, batch_size, learning_rate, max_shift, noise, progress)
  extractor = make_extractor(module, variables, image_shape, name, devices)
  some = slice(0, 4096)
  accuracy = float(np.mean(extractor.logits(images[some]).argmax(axis=1) == labels[some]))
  logging.info("%s: accuracy %.4f on its training images", extractor.name, accuracy)
  if path is not None:
    arrays = dict(_flat(variables), probe=extractor.features(_probe(image_shape)))
    about = {"recipe": recipe, "extractor": extractor.name, "train_accuracy": accuracy}
    files.save_arrays(path, arrays, about)
  return extractor


def _fit(module, images, labels, seed, steps, batch_size, learning_rate, max_shift, noise, progress):
  root = jax.random.key(seed)
  variables = jax.jit(module.init)(jax.random.fold_in(root, steps), jnp.asarray(images[:1]))
  optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

  def pick(i):
    return jax.random.randint(jax.random.split(jax.random.fold_in(root, i), 3)[0], (batch_size,), 0, len(images))

  def step(variables, opt, x, labels, i):
    _, key_shift, key_noise = jax.random.split(jax.random.fold_in(root, i), 3)
    most = max_shift * x.shape[1]
    x = _shift(x, jax.random.uniform(key_shift, (batch_size, 2), minval=-most, maxval=most))
    x = x + noise * jax.random.normal(key_noise, x.shape)

    def loss(variables):
      logits, _ = module.apply(variables, x)
      return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    updates, opt = optimizer.update(jax.grad(loss)(variables), opt)
    return optax.apply_updates(variables, updates), opt

  step = jax.jit(step)
  opt = jax.jit(optimizer.init)(variables)
  # Batches are taken on the host: a copy of all images on the device may be too much for it.
  for i, index in enumerate(np.asarray(jax.jit(jax.vmap(pick))(jnp.arange(steps)))):
    variables, opt = step(variables, opt, images[index], labels[index], i)
    progress(i + 1)
  return variables


def _shift(x, offset):
  """Moves image b by offset[b] pixels (fractions too, linear); what enters repeats the edge."""
  def weights(size, by):
    i = jnp.arange(size, dtype=x.dtype)
    source = jnp.clip(i.reshape(1, -1) + by.reshape(-1, 1), 0, size - 1)
    return jnp.maximum(0, 1 - jnp.abs(source[:, :, None] - i.reshape(1, 1, -1)))

  rows, columns = weights(x.shape[1], offset[:, 0]), weights(x.shape[2], offset[:, 1])
  return jnp.einsum("bij,bkl,bjlc->bikc", rows, columns, x)


def _read(path, module, image_shape, name, devices) -> Extractor:
  arrays, about = files.load_arrays(path)
  probe = arrays.pop("probe", None)
  variables = flax.traverse_util.unflatten_dict(arrays, sep="/")
  try:
    extractor = make_extractor(module, variables, image_shape, name, devices)
    features = extractor.features(_probe(image_shape))
  except Exception as e:  # flax raises its own kinds when parameters do not fit the module
    raise UsageError(f"{path} does not fit the classifier ({type(e).__name__})") from e
  # The hash covers the numbers, the probe covers the code that uses them.
  if extractor.name != about["extractor"] or not np.allclose(features, probe, rtol=1e-3, atol=1e-3):
    raise UsageError(f"{path} belongs to another version of the classifier")
  return extractor


def _probe(image_shape) -> np.ndarray:
  return np.random.default_rng(0).uniform(-1, 1, (8, *image_shape)).astype(np.float32)


def _flat(variables) -> dict[str, np.ndarray]:
  return {k: np.asarray(v) for k, v in flax.traverse_util.flatten_dict(variables, sep="/").items()}


def _describe(module) -> str:
  return re.sub(r" at 0x[0-9a-f]+", "", repr(module))  # functions among the fields print their address
