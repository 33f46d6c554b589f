"""Drawing images for evaluation: one seed per sample, so that a batch size changes nothing."""

from typing import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ddil_jax.errors import UsageError
from ddil_jax.evaluation import checks


def sample_images(sample_fn: Callable, num_samples: int, image_shape, seed: int, labels=None,
                  batch_size: int = 256, progress: Callable[[int, int], None] | None = None) -> np.ndarray:
  """Draws N images in batches of a fixed shape.

      key_i = fold_in(key(seed), i),   image_i = sample_fn(key_i, label_i)

  Every draw of image i, its x_T included, has to come from key i. The last batch is filled up and cut.

  Args:
    sample_fn: (keys [B], labels int32 [B] or None) -> images [B,H,W,C]; jitted by the caller.
    num_samples: N.
    image_shape: (H, W, C), checked.
    seed: of the run of evaluation.
    labels: int [N], or None: then sample_fn gets None.
    batch_size: B of every call.
    progress: called with (images done, N) after each batch.

  Returns:
    float32 [N,H,W,C].

  Raises:
    UsageError: N or B below 1, labels of another length, images of another shape.
  """
  if num_samples < 1 or batch_size < 1:
    raise UsageError(f"{num_samples} samples in batches of {batch_size}; expected at least 1 of each")
  padded = -(-num_samples // batch_size) * batch_size
  keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(padded))
  if labels is not None:
    labels = checks.class_labels(labels, num_samples, np.iinfo(np.int32).max).astype(np.int32)
    labels = np.concatenate([labels, np.full(padded - num_samples, labels[-1], np.int32)])
  shape = (batch_size, *image_shape)
  images = np.empty((num_samples, *image_shape), np.float32)
  for start in range(0, num_samples, batch_size):
    stop = min(start + batch_size, num_samples)
    batch = slice(start, start + batch_size)
    out = np.asarray(sample_fn(keys[batch], None if labels is None else jnp.asarray(labels[batch])))
    if out.shape != shape:
      raise UsageError(f"sample_fn gave images of shape {out.shape}; expected {shape}")
    images[start:stop] = out[:stop - start]
    if progress is not None:
      progress(stop, num_samples)
  return images


def balanced_labels(num_samples: int, num_classes: int) -> np.ndarray:
  """Labels int32 [N] = 0, 1, ..., K-1, 0, 1, ...: every beginning of it is balanced."""
  if num_samples < 1 or num_classes < 1:
    raise UsageError(f"{num_samples} labels of {num_classes} classes; expected at least 1 of each")
  return (np.arange(num_samples) % num_classes).astype(np.int32)
