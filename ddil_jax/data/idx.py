"""mnist and fashion_mnist from their four original IDX files, which the user brings."""

import gzip
import math
import pathlib
import struct
import zlib

import numpy as np

from ddil_jax.data.manual import ManualBuilder, Published
from ddil_jax.errors import UsageError

_SPLITS = {"train": "train", "test": "t10k"}
_MAX_VALUES = 1 << 30  # a header that asks for more is not believed


def read_idx(path: pathlib.Path, ndim: int) -> np.ndarray:
  """Reads a gzipped IDX file of unsigned bytes.

  The format: two zero bytes, 0x08 (unsigned byte), the number of dimensions, each dimension as a
  big-endian uint32, then the values in C order.

  Args:
    path: the .gz file.
    ndim: dimensions that it must have: 3 for images, 1 for labels.

  Returns:
    uint8 array.

  Raises:
    UsageError: not gzip, another magic number, too short, too long, or too large.
  """
  try:
    with gzip.open(path, "rb") as f:
      magic = f.read(4)
      if magic != bytes((0, 0, 8, ndim)):
        raise UsageError(f"{path}: magic number 0x{magic.hex()} where an IDX file of {ndim} dimension(s) has "
                         f"0x{bytes((0, 0, 8, ndim)).hex()}")
      header = f.read(4 * ndim)
      if len(header) < 4 * ndim:
        raise UsageError(f"{path}: ends inside its header")
      dims = struct.unpack(f">{ndim}I", header)
      count = math.prod(dims)
      if not 0 < count <= _MAX_VALUES:
        raise UsageError(f"{path}: its header gives the dimensions {dims}; 1 to {_MAX_VALUES} values can be "
                         "read")
      data = f.read(count + 1)  # one more, to see a file that is too long
  except (OSError, EOFError, zlib.error) as e:
    raise UsageError(f"{path}: cannot be read as gzip: {e}") from e
  if len(data) != count:
    found = len(data) if len(data) < count else f"more than {count}"
    raise UsageError(f"{path}: its header announces {dims}, {count} bytes, but {found} follow")
  return np.frombuffer(data, np.uint8).reshape(dims)


class _Idx(ManualBuilder, skip_registration=True):
  """A set in the layout of MNIST."""
  IMAGE_SHAPE = (28, 28, 1)

  def read(self):
    paths = self.given_files()
    arrays = {}
    for split, prefix in _SPLITS.items():
      image_file, label_file = (paths[f"{prefix}-{kind}-ubyte.gz"] for kind in ("images-idx3", "labels-idx1"))
      images, labels = read_idx(image_file, 3), read_idx(label_file, 1)
      if images.shape[1:] != self.IMAGE_SHAPE[:2]:
        raise UsageError(
            f"{image_file}: images of {images.shape[1]}x{images.shape[2]}, {self.name} has 28x28")
      if len(images) != len(labels):
        raise UsageError(f"{image_file} has {len(images)} images, {label_file} {len(labels)} labels")
      if labels.max() >= len(self.CLASSES):
        raise UsageError(f"{label_file}: label {labels.max()} where {self.name} has 0..9")
      arrays[split] = (images[..., None], labels)
    return arrays


class Mnist(_Idx, skip_registration=True):
  """MNIST: 60,000 + 10,000 images of 28 x 28."""
  CLASSES = tuple("0123456789")
  ABOUT = "MNIST handwritten digits, 28x28, from the original IDX files."
  HOMEPAGE = "https://yann.lecun.com/exdb/mnist (mirror: storage.googleapis.com/cvdf-datasets/mnist)"
  FILES = {
      "train-images-idx3-ubyte.gz": Published(
          9912422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
      "train-labels-idx1-ubyte.gz": Published(
          28881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
      "t10k-images-idx3-ubyte.gz": Published(
          1648877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
      "t10k-labels-idx1-ubyte.gz": Published(
          4542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
  }


class FashionMnist(_Idx, skip_registration=True):
  """Fashion-MNIST: 60,000 + 10,000 images of 28 x 28."""
  CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
             "Ankle boot")
  ABOUT = "Zalando's article images, 28x28, from the original IDX files."
  HOMEPAGE = "https://github.com/zalandoresearch/fashion-mnist"
  FILES = {
      "train-images-idx3-ubyte.gz": Published(
          26421880, "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
      "train-labels-idx1-ubyte.gz": Published(
          29515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
      "t10k-images-idx3-ubyte.gz": Published(
          4422102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
      "t10k-labels-idx1-ubyte.gz": Published(
          5148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
  }
