"""What a loaded data set is, and the one mapping from stored pixels to [-1, 1]."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from ddil_jax.errors import UsageError


Rows = Any  # array-like over examples: len, .shape, .dtype, and rows[index array] -> np.ndarray


class Dataset(NamedTuple):
  """One split of a data set, in memory or, where its rows are no arrays, on disk.

  Attributes:
    name: name in configs and messages.
    images: float32 [N, H, W, C] in [-1, 1], or latents where there is a `decoder`; NaN where there are only prompts.
    labels: int32 [N] in [0, num_classes).
    num_classes: number of classes; 1 where there are none.
    value_range: (lo, hi) of the stored pixels, which `to_unit` maps to -1 and 1.
    split: "train" or "test".
    skipped: (file, reason) of the files that could not be used.
    cond: what an example is conditioned on beside its label, rows [N, ...].
    null: the same without N: the empty prompt.
    captions: str [N], or ().
    tokens: int32 rows [N, T] of the captions as their text encoder read them, or None.
    pixels: images float32 [N, H, W, C] in [-1, 1] where `images` are latents, or None.
    decoder: file of the autoencoder that decodes `images`; "" where they are pixels.
    bounds: (lo per channel, hi per channel) of the latents, or None.
  """
  name: str
  images: Rows
  labels: np.ndarray
  num_classes: int
  value_range: tuple[float, float]
  split: str
  skipped: tuple[tuple[str, str], ...] = ()
  cond: Mapping[str, Rows] = {}
  null: Mapping[str, np.ndarray] = {}
  captions: Sequence[str] = ()
  tokens: Rows | None = None
  pixels: Rows | None = None
  decoder: str = ""
  bounds: tuple[tuple[float, ...], tuple[float, ...]] | None = None

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(H, W, C)."""
    return tuple(self.images.shape[1:])


def some(rows: Rows, most: int = 1024) -> np.ndarray:
  """The rows themselves if they are in memory, else the first ones: to look at, without reading all."""
  return rows if isinstance(rows, np.ndarray) else rows[np.arange(min(len(rows), most))]


def to_unit(pixels: np.ndarray, value_range: tuple[float, float]) -> np.ndarray:
  """Maps stored pixels to [-1, 1]: `2 (p - lo) / (hi - lo) - 1` in float32; lo and hi are met exactly.

  Args:
    pixels: [...] uint8 or float.
    value_range: (lo, hi) that the *format* allows, (0, 255) for bytes, not the extremes that occur.
  """
  lo, hi = value_range
  # In place: a set of 60,000 images should not need three copies of itself.
  x = pixels.astype(np.float32)
  x -= np.float32(lo)
  x /= np.float32(hi - lo)
  x *= 2
  x -= 1
  return x


def fit(image: Image.Image, size: int) -> Image.Image:
  """Centre-crops to a square and resizes to size x size (bicubic, with antialiasing when it shrinks)."""
  if image.size == (size, size):
    return image
  return ImageOps.fit(image, (size, size), method=Image.Resampling.BICUBIC)


def resize(images: np.ndarray, size: int) -> np.ndarray:
  """`fit` for float images [N, H, W, C] in [-1, 1]; what bicubic overshoots is clipped."""
  if images.shape[1:3] == (size, size):
    return images
  out = np.empty((len(images), size, size, images.shape[-1]), np.float32)
  for i, image in enumerate(images):
    for c in range(image.shape[-1]):
      out[i, :, :, c] = np.asarray(fit(Image.fromarray(np.ascontiguousarray(image[:, :, c])), size))
  return out.clip(-1, 1)


def check_choice(what: str, value: str, valid: Iterable[str]) -> None:
  """Raises UsageError with the nearest and all valid names if `value` is not one of them."""
  valid = sorted(valid)
  if value in valid:
    return
  near = difflib.get_close_matches(str(value), valid, n=3, cutoff=0.5)
  hint = f"; did you mean {' or '.join(near)}?" if near else ";"
  raise UsageError(f"unknown {what} {value!r}{hint} there are: {', '.join(valid)}")
