"""Images that somebody else made, read a batch at a time: a folder of image files, an .npy or an .npz file.

Nothing is resized: how images are resized changes every metric, so they are measured as they are.
"""

import hashlib
import os
import pathlib
import re
import zipfile
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ddil_jax.data import folder
from ddil_jax.data.dataset import to_unit
from ddil_jax.errors import UsageError

_BATCH = 512
_KEYS, _LABELS = ("images", "arr_0"), ("labels", "arr_1")  # the second ones as `np.savez` names them
_READ = 1 << 22


class ImageFiles(NamedTuple):
  """A set of images on disk; what `evaluation.image_sets.ImageSet` asks for, and labels.

  Attributes:
    path: where it lies.
    shape: (N, H, W, C).
    content: sha256 of the files, in their order.
    preprocessing: how stored pixels become floats in [-1, 1].
    labels: int32 [N], or None where there are none.
    classes: names of the classes of a folder; () for labels that are numbers.
    read: () -> batches float32 [B, H, W, C] in [-1, 1].
  """
  path: pathlib.Path
  shape: tuple[int, int, int, int]
  content: str
  preprocessing: str
  labels: np.ndarray | None
  classes: tuple[str, ...]
  read: object

  def batches(self) -> Iterator[np.ndarray]:
    return self.read()

  @property
  def name(self) -> str:
    """Says which images these are: the file's or folder's name and a piece of the hash."""
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "_", self.path.resolve().stem) or "images"
    return f"{stem}-{self.content[:8]}"


def open_images(path: str | os.PathLike, channels: int | None = None) -> ImageFiles:
  """Opens a set of images of one size.

  * A folder: the image files in it, or in its sub-folders, which are then the classes; sorted by name.
    Transparency goes onto white, the EXIF orientation is applied.
  * `.npy`: an array [N, H, W, C] or [N, H, W], uint8 or float in [-1, 1].
  * `.npz`: such an array under `images` or `arr_0`, integer labels [N] under `labels` or `arr_1` if any.

  Args:
    path: of the folder or file.
    channels: 1 (grey) or 3 (RGB) of image files; None takes those of the first. Grey files are read as
      RGB where 3 are asked for, coloured ones as grey only if all of their channels are equal.

  Raises:
    UsageError: nothing there, no images, an odd array; while reading: a file that cannot be read, of
      another size, or coloured, by its name; floats outside [-1, 1].
  """
  path = pathlib.Path(path)
  if path.is_dir():
    return _open_folder(path, channels)
  if not path.exists():
    raise UsageError(f"no folder or file {path}; give a folder of images, an .npy or an .npz file")
  if path.suffix not in (".npy", ".npz"):
    raise UsageError(f"{path} is neither a folder nor an .npy or .npz file")
  return _open_array(path)


# Folders ------------------------------------------------------------------------------------


def _open_folder(path, channels) -> ImageFiles:
  files = folder.list_images(path)
  if not files:
    raise UsageError(f"{path} holds no images (suffixes {', '.join(folder.SUFFIXES)})")
  classes = folder.classes_of(files)
  first = _decode(files[0][1], channels)
  content = hashlib.sha256()
  for label, file in files:
    data = file.read_bytes()
    content.update(f"\0{label}\0{len(data)}\0".encode() + data)

  def read():
    for i in range(0, len(files), _BATCH):
      images = [_decode(file, first.shape[2]) for _, file in files[i:i + _BATCH]]
      for image, (_, file) in zip(images, files[i:]):
        if image.shape != first.shape:
          raise UsageError(f"{file} is {_size(image)}, but {files[0][1]} is {_size(first)}; images of one size are"
                           " needed")
      yield to_unit(np.stack(images), (0, 255))

  labels = None
  if classes != [""]:
    labels = np.array([classes.index(label) for label, _ in files], np.int32)
  return ImageFiles(path, (len(files), *first.shape), content.hexdigest(),
                    f"decoded to {first.shape[2]} channel(s), 2 p / 255 - 1", labels,
                    tuple(classes) if labels is not None else (), read)


def _decode(file, channels) -> np.ndarray:
  """uint8 [H, W, C]; UsageError with the file's name."""
  try:
    pixels = np.asarray(folder.open_image(file, 3 if channels else None))
  except Exception as error:  # decoders raise all sorts of things on damaged files
    raise UsageError(f"{file} cannot be read: {folder.reason(error)}") from error
  pixels = pixels[..., None] if pixels.ndim == 2 else pixels
  if channels == 1:
    if (pixels != pixels[..., :1]).any():
      raise UsageError(f"{file} is in colour; grey images are needed, as the other ones are")
    pixels = pixels[..., :1]
  return pixels


def _size(image):
  return f"{image.shape[1]}x{image.shape[0]}"


# Arrays -------------------------------------------------------------------------------------


class _Array(NamedTuple):
  """An array in a file: its member of an .npz ("" for an .npy), dtype and shape."""
  path: pathlib.Path
  member: str
  dtype: np.dtype
  shape: tuple[int, ...]

  def open(self):
    """The file, standing after the header."""
    file = zipfile.ZipFile(self.path).open(self.member) if self.member else open(self.path, "rb")
    _header(file)
    return file

  def rows(self, size: int) -> Iterator[np.ndarray]:
    """Blocks of rows, read one after the other."""
    row = self.dtype.itemsize * int(np.prod(self.shape[1:]))
    with self.open() as file:
      for start in range(0, self.shape[0], size):
        count = min(size, self.shape[0] - start)
        try:
          data = file.read(count * row)
        except Exception as error:  # of zipfile and zlib, whose checksums come last
          raise _unreadable(self.path, error) from error
        if len(data) != count * row:
          raise UsageError(f"{self.path} ends after {start + len(data) // max(row, 1)} of {self.shape[0]} images")
        yield np.frombuffer(data, self.dtype).reshape(count, *self.shape[1:])


def _header(file) -> tuple[np.dtype, tuple[int, ...], bool]:
  """Reads the header of the .npy format."""
  version = np.lib.format.read_magic(file)
  read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
  if read is None:
    raise ValueError(f"format version {version}")
  shape, fortran, dtype = read(file)
  return dtype, shape, fortran


def _arrays(path) -> dict[str, _Array]:
  """The arrays of a file by name; "" is that of an .npy. Nothing is unpickled."""
  try:
    if path.suffix == ".npz":
      with zipfile.ZipFile(path) as archive:
        members = [name for name in archive.namelist() if name.endswith(".npy")]
    else:
      members = [""]
    found = {}
    for member in members:
      # The header is read twice: here, and by every reading.
      raw = zipfile.ZipFile(path).open(member) if member else open(path, "rb")
      with raw:
        dtype, shape, fortran = _header(raw)
      if fortran and len(shape) > 1:
        raise UsageError(f"{path} is stored in Fortran order; save np.ascontiguousarray(images)")
      found[member.removesuffix(".npy")] = _Array(path, member, dtype, shape)
    return found
  except UsageError:
    raise
  except Exception as error:  # zipfile, zlib, numpy and the system each have their own
    raise _unreadable(path, error) from error


def _unreadable(path, error) -> UsageError:
  return UsageError(f"{path} cannot be read as {path.suffix}: {folder.reason(error)}")


def _open_array(path) -> ImageFiles:
  arrays = _arrays(path)
  name = "" if path.suffix == ".npy" else next((key for key in _KEYS if key in arrays), None)
  if name is None:
    raise UsageError(f"{path} has no array {' or '.join(_KEYS)}; it has {', '.join(arrays) or 'none'}")
  array = arrays[name]
  where = f"{path}{f'[{name}]' * bool(name)}"
  shape = (*array.shape, 1) if len(array.shape) == 3 else array.shape
  if len(shape) != 4 or shape[3] not in (1, 3, 4) or not all(shape):
    hint = "; the channels come last" if len(shape) == 4 and shape[1] in (1, 3) else ""
    raise UsageError(f"{where} has the shape {array.shape}; images [N, H, W, C] with C = 1 or 3 are needed{hint}")
  if array.dtype != np.uint8 and not np.issubdtype(array.dtype, np.floating):
    raise UsageError(f"{where} is {array.dtype}; uint8, or floats in [-1, 1], are needed")
  content = hashlib.sha256()
  with open(path, "rb") as file:
    while data := file.read(_READ):
      content.update(data)

  def read():
    lowest = np.inf
    for i, block in enumerate(array.rows(_BATCH)):
      block = block.reshape(-1, *shape[1:])
      if array.dtype == np.uint8:
        yield to_unit(block, (0, 255))
        continue
      lowest = min(lowest, float(block.min()))
      bad = ~(np.abs(block) <= 1 + 1e-3).all(axis=(1, 2, 3))
      if bad.any():
        raise UsageError(f"image {i * _BATCH + int(bad.argmax())} of {where} has values from {block[bad][0].min():g} to"
                         f" {block[bad][0].max():g}; floats have to lie in [-1, 1]: clip them, or store uint8")
      yield block.astype(np.float32)
    if lowest >= 0 and array.dtype != np.uint8:
      raise UsageError(f"no pixel of {where} is below 0: these look like images in [0, 1]; store 2 x - 1, or uint8")

  kind = "2 p / 255 - 1" if array.dtype == np.uint8 else "none"
  return ImageFiles(path, shape, content.hexdigest(), kind, _labels(path, arrays, shape[0]), (), read)


def _labels(path, arrays, num) -> np.ndarray | None:
  array = next((arrays[key] for key in _LABELS if key in arrays), None)
  if array is None:
    return None
  if array.shape != (num,) or not np.issubdtype(array.dtype, np.integer):
    raise UsageError(f"the labels of {path} are {array.dtype} {array.shape}; integers [{num}] are needed")
  return np.concatenate(list(array.rows(num))).astype(np.int32)
