"""Images side by side, as PNG."""

import io

import numpy as np
from PIL import Image

from ddil_jax.errors import UsageError
from ddil_jax import files
from ddil_jax.evaluation import checks


def image_grid(images, columns: int, gap: int = 1, scale: int = 1) -> np.ndarray:
  """Images in rows of `columns`, from left to right, on white.

      byte = round(127.5 (x + 1)), clipped to 0..255

  Args:
    images: [N,H,W,C] in [-1, 1], C = 1, 3 or 4; the last row may be shorter.
    columns: images a row.
    gap: pixels between images.
    scale: each pixel becomes scale x scale.

  Returns:
    uint8 [height, width, C].

  Raises:
    UsageError: not such images, non-finite values, columns or scale below 1.
  """
  images = checks.images(images, "images")
  n, h, w, c = images.shape
  if c not in (1, 3, 4):
    raise UsageError(f"images have {c} channels; a picture has 1, 3 or 4")
  if columns < 1 or scale < 1 or gap < 0:
    raise UsageError(f"columns {columns}, scale {scale}, gap {gap}; expected at least 1, 1 and 0")
  pixels = np.clip(np.round(127.5 * (images.astype(np.float64) + 1)), 0, 255).astype(np.uint8)
  pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
  h, w, rows = h * scale, w * scale, -(-n // columns)
  sheet = np.full((rows * (h + gap) - gap, columns * (w + gap) - gap, c), 255, np.uint8)
  for i, image in enumerate(pixels):
    top, left = (i // columns) * (h + gap), (i % columns) * (w + gap)
    sheet[top:top + h, left:left + w] = image
  return sheet


def png_bytes(array) -> bytes:
  """A picture uint8 [H,W], [H,W,1], [H,W,3] or [H,W,4] as PNG."""
  array = np.asarray(array)
  if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))):
    raise UsageError(f"a picture of shape {array.shape} and dtype {array.dtype}; expected uint8 [H,W,1|3|4]")
  out = io.BytesIO()
  Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array).save(out, format="PNG")
  return out.getvalue()


def save_png(path, array) -> None:
  """Writes a picture as PNG, whole or not at all."""
  files.write_bytes(path, png_bytes(array))
