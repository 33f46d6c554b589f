"""Drawing images for evaluation: one seed per sample, so that a batch size changes nothing."""

from collections.abc import Callable, Iterator

import jax
import numpy as np

from ddil_jax.errors import UsageError
from ddil_jax.evaluation import checks
from ddil_jax.types import ONE_DEVICE, Devices

_keys = jax.jit(jax.vmap(jax.random.fold_in, (None, 0)))


def sample_batches(sample_fn: Callable, num_samples: int, image_shape, seed: int, given=None,
                   batch_size: int = 256, devices: Devices = ONE_DEVICE) -> Iterator[np.ndarray]:
  """Draws N images in batches of a fixed shape, and forgets them.

      key_i = fold_in(key(seed), i),   image_i = sample_fn(key_i, given_i)

  Every draw of image i, its x_T included, has to come from key i: then image i depends neither on the
  batch size nor on the number of devices. The last batch is filled up and cut.

  Args:
    sample_fn: (keys [B], what is given of B examples, or None) -> images [B,H,W,C]; jitted by the caller.
    num_samples: N.
    image_shape: (H, W, C), checked.
    seed: of the run of evaluation.
    given: labels int [N], or a dict of rows [N,...] such as a condition; None: sample_fn gets None.
    batch_size: B of every call, rounded up to a multiple of the devices.
    devices: over which keys and what is given are split; every process has all images.

  Yields:
    float32 [B,H,W,C], N in all.

  Raises:
    UsageError: N or B below 1, rows of another number, images of another shape.
  """
  if num_samples < 1 or batch_size < 1:
    raise UsageError(f"{num_samples} samples in batches of {batch_size}; expected at least 1 of each")
  batch_size = devices.round_up(batch_size)
  rows = given if isinstance(given, dict) else {} if given is None else {"label": given}
  if "label" in rows:
    labels = checks.class_labels(rows["label"], num_samples, np.iinfo(np.int32).max).astype(np.int32)
    rows = {**rows, "label": labels}
  for name, values in rows.items():
    if len(values) != num_samples:
      raise UsageError(f"{len(values)} rows of '{name}' for {num_samples} samples")
  shape, root = (batch_size, *image_shape), jax.random.key(seed)
  for start in range(0, num_samples, batch_size):
    index = np.arange(start, start + batch_size)
    keys = devices.split(_keys(root, index))
    some = {name: devices.split(values[np.minimum(index, num_samples - 1)]) for name, values in rows.items()}
    if not isinstance(given, dict):
      some = some.get("label")
    out = np.asarray(devices.fetch(sample_fn(keys, some)), np.float32)
    if out.shape != shape:
      raise UsageError(f"sample_fn gave images of shape {out.shape}; expected {shape}")
    yield out[:num_samples - start]


def sample_images(sample_fn: Callable, num_samples: int, *args, **kwargs) -> np.ndarray:
  """The images of `sample_batches` with the same arguments, together: float32 [N,H,W,C]."""
  return np.concatenate(list(sample_batches(sample_fn, num_samples, *args, **kwargs)))


def balanced_labels(num_samples: int, num_classes: int) -> np.ndarray:
  """Labels int32 [N] = 0, 1, ..., K-1, 0, 1, ...: every beginning of it is balanced."""
  if num_samples < 1 or num_classes < 1:
    raise UsageError(f"{num_samples} labels of {num_classes} classes; expected at least 1 of each")
  return (np.arange(num_samples) % num_classes).astype(np.int32)
