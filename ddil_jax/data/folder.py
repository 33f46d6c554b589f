"""A folder of images, with one sub-folder per class or none."""

import os
import pathlib
import warnings
from typing import BinaryIO

import numpy as np
from absl import logging
from PIL import Image, ImageOps

from ddil_jax.data.dataset import Dataset, fit, to_unit
from ddil_jax.errors import UsageError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_SPLITS = ("train", "test")
_TEST_EVERY = 10
# Decoders of these only, whatever the file's name: that of EPS would start another program.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# 8-bit modes; a 16-bit or float image would be clipped, not scaled, by `convert`.
_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")


def load(path: str | os.PathLike, split: str = "train", image_size: int | None = None,
         channels: int = 3) -> Dataset:
  """Loads the images under `path`, cropped to the centre square and resized to `image_size`.

  * Splits: the sub-folders `train/` and `test/` if both exist, else every tenth file of the sorted list
    is test.
  * Classes: the sorted names of the sub-folders that hold images; without sub-folders one class.
  * The EXIF orientation is applied, transparency goes onto white, of an animation the first frame counts.

  Files with another suffix and hidden ones are not looked at. An image that cannot be used is left out,
  listed in `Dataset.skipped` with its reason, and warned about.

  Args:
    path: the folder.
    split: "train" or "test".
    image_size: pixels of each side of the result.
    channels: 3 (RGB) or 1 (grey).

  Raises:
    UsageError: no such folder, no image_size, channels not 1 or 3, or no usable image.
  """
  root = pathlib.Path(path)
  if not root.is_dir():
    raise UsageError(f"folder: {root} is not a folder; give the path of a folder of images")
  if image_size is None or image_size < 1:
    given = "not given" if image_size is None else image_size
    raise UsageError(f"folder: image_size is {given}; the side of the images in pixels is needed"
                     " (--config.data.image_size=N), to which they are cropped and resized")
  if channels not in (1, 3):
    raise UsageError(f"folder: channels must be 1 or 3, not {channels}")

  if all((root / s).is_dir() for s in _SPLITS):
    files, classes = list_images(root / split), classes_of(list_images(root / "train") + list_images(root / "test"))
  else:
    files = list_images(root)
    classes = classes_of(files)
    is_test = [i % _TEST_EVERY == _TEST_EVERY - 1 for i in range(len(files))]
    files = [f for f, test in zip(files, is_test, strict=True) if test == (split == "test")]

  images, labels, skipped = [], [], []
  for label, file in files:
    try:
      image = fit(open_image(file, channels), image_size)
      images.append(np.asarray(image).reshape(image_size, image_size, channels))
      labels.append(classes.index(label))
    except Exception as e:  # decoders raise all sorts of things on damaged files
      skipped.append((str(file.relative_to(root)), reason(e)))
  if skipped:
    listed = "; ".join(f"{file}: {reason}" for file, reason in skipped[:10])
    logging.warning("folder: %d of %d files in %s cannot be used: %s%s", len(skipped), len(files), root,
                    listed, "; ..." if len(skipped) > 10 else "")
  if not images:
    why = f"; the first of {len(skipped)} that failed: {': '.join(skipped[0])}" if skipped else ""
    raise UsageError(
        f"folder: no usable image for split {split!r} in {root} (suffixes {', '.join(SUFFIXES)}){why}")
  return Dataset("folder", to_unit(np.stack(images), (0, 255)), np.asarray(labels, np.int32), len(classes),
                 (0.0, 255.0), split, tuple(skipped))


def list_images(root: pathlib.Path) -> list[tuple[str, pathlib.Path]]:
  """(class, file) of the images in `root` ("" where they have no sub-folder), sorted."""
  return sorted((file.parent.name if file.parent != root else "", file)
                for pattern in ("*", "*/*") for file in root.glob(pattern)
                if file.suffix.lower() in SUFFIXES and file.is_file()
                and not any(part.startswith(".") for part in file.relative_to(root).parts))


def classes_of(files: list[tuple[str, pathlib.Path]]) -> list[str]:
  """The class names; images beside the sub-folders would be a class of their own, which is refused."""
  classes = sorted({label for label, _ in files})
  if "" in classes and len(classes) > 1:
    stray = next(file for label, file in files if label == "")
    raise UsageError(f"folder: {stray} lies beside the sub-folders {', '.join(classes[1:4])}; put every "
                     "image into a sub-folder, or none")
  return classes


def open_image(file: str | os.PathLike | BinaryIO, channels: int | None = None) -> Image.Image:
  """The decoded image, upright and on white, as RGB (3 channels) or grey (1; None: as the file is).

  Raises:
    Exception: whatever the decoder raises on a damaged file; `reason` puts it in a line.
  """
  with warnings.catch_warnings():
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    with Image.open(file, formats=_FORMATS) as image:
      if image.mode not in _MODES:
        raise ValueError(f"pixel mode {image.mode} is not 8 bits a channel")
      grey = image.mode in ("1", "L", "LA", "La") if channels is None else channels == 1
      image = ImageOps.exif_transpose(image)
      if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
      return image.convert("L" if grey else "RGB")


def reason(error: Exception) -> str:
  """Why a file cannot be read, in one line."""
  if isinstance(error, Image.UnidentifiedImageError):
    return "not an image"
  return " ".join(str(error).split())[:200] or type(error).__name__
