"""What published networks expect of their images: RGB, 8-bit levels, and the resize of each port."""

import jax
import jax.numpy as jnp
import numpy as np

from ddil_jax.types import Array


def levels(images: Array, quantise: bool) -> Array:
  """Images in [-1, 1] as RGB levels in [0, 255]; what an image file would hold, if quantised.

      level = 127.5 (x + 1),   quantised: floor(level + 1/2) within 0..255

  Args:
    images: [B,H,W,C], C = 3, or 1, which is repeated.
    quantise: round and clip to the 256 levels of a file.

  Returns:
    float32 [B,H,W,3].
  """
  x = 127.5 * (images.astype(jnp.float32) + 1)
  if quantise:
    x = jnp.clip(jnp.floor(x + 0.5), 0, 255)
  return jnp.repeat(x, 3, axis=-1) if x.shape[-1] == 1 else x


def bilinear(x: Array, size: int) -> Array:
  """Bilinear without antialias, half-pixel centres: torch's `interpolate(align_corners=False)`.

      source(i) = (i + 1/2) size_in / size_out - 1/2, clamped to the image

  Args:
    x: [B,H,W,C].

  Returns:
    [B,size,size,C].
  """
  for axis in (2, 1):
    n = x.shape[axis]
    x = _weighted(x, axis, _linear((np.arange(size) + 0.5) * n / size - 0.5, n))
  return x


def bilinear_tf1(x: Array, size: int) -> Array:
  """Bilinear without antialias, from the corner: TensorFlow 1's `resize_bilinear`.

      source(i) = i size_in / size_out, clamped to the image

  Args:
    x: [B,H,W,C].

  Returns:
    [B,size,size,C].
  """
  for axis in (2, 1):
    n = x.shape[axis]
    x = _weighted(x, axis, _linear(np.arange(size) * n / size, n))
  return x


def bicubic(x: Array, height: int, width: int, rounded: bool = False) -> Array:
  """Bicubic (a = -1/2) with antialias, half-pixel centres: Pillow's, of floats or of 8-bit images.

  Args:
    x: [B,H,W,C].
    rounded: round and clip to 0..255 along each axis, as Pillow does with 8-bit images.

  Returns:
    [B,height,width,C].
  """
  for axis, size in ((2, width), (1, height)):
    if x.shape[axis] != size:
      x = _weighted(x, axis, _cubic(x.shape[axis], size))
      x = jnp.clip(jnp.floor(x + 0.5), 0, 255) if rounded else x
  return x


def _weighted(x, axis, weights):
  """sum_j weights[i, j] x_j along an axis."""
  moved = jnp.einsum("...j,ij->...i", jnp.moveaxis(x, axis, -1), jnp.asarray(weights, jnp.float32),
                     precision=jax.lax.Precision.HIGHEST)
  return jnp.moveaxis(moved, -1, axis)


# Weights [size_out, size_in], in float64 on the host: jax.image.resize has positions in float32, and of 64x64
# images made 224x224 it rounds 0.6 % of the pixels to another level than Pillow, this 0.02 %.


def _linear(source, n):
  return np.maximum(1 - np.abs(np.clip(source, 0, n - 1)[:, None] - np.arange(n)), 0)


def _cubic(n, size):
  scale = max(n / size, 1.0)
  d = np.abs((np.arange(size)[:, None] + 0.5) * n / size - np.arange(n) - 0.5) / scale
  w = np.where(d < 1, (1.5 * d - 2.5) * d**2 + 1, np.where(d < 2, ((-0.5 * d + 2.5) * d - 4) * d + 2, 0))
  return w / w.sum(axis=1, keepdims=True)
