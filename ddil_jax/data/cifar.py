"""cifar10 from `cifar-10-binary.tar.gz`, which the user brings."""

import pathlib
import tarfile
import zlib

import numpy as np

from ddil_jax.data.builder import Arrays
from ddil_jax.data.manual import ManualBuilder, Published
from ddil_jax.errors import UsageError

FILE = "cifar-10-binary.tar.gz"
_FOLDER = "cifar-10-batches-bin"
_MEMBERS = {
    "train": tuple(f"{_FOLDER}/data_batch_{i}.bin" for i in range(1, 6)),
    "test": (f"{_FOLDER}/test_batch.bin",),
}
_SHAPE = (32, 32, 3)
_RECORD = 1 + 32 * 32 * 3
_MAX_RECORDS = 10_000  # of one member


class Cifar10(ManualBuilder, skip_registration=True):
  """CIFAR-10: 50,000 + 10,000 images of 32 x 32 x 3."""
  IMAGE_SHAPE = _SHAPE
  CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
  ABOUT = "CIFAR-10, 32x32, from the original binary archive."
  HOMEPAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
  FILES = {FILE: Published(170052171, "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd")}

  def read(self):
    path = self.given_files()[FILE]
    members = read_members(path)
    return {split: _decode(path, [members[m] for m in names]) for split, names in _MEMBERS.items()}


def read_members(path: pathlib.Path) -> dict[str, bytes]:
  """Reads the six batch files out of the archive in memory; nothing is unpacked to disk.

  Raises:
    UsageError: not a tar.gz, a member whose name leaves the archive's folder, a batch file that is
      missing, occurs twice, is not a plain file, or is not 1 to 10,000 whole records.
  """
  wanted = {name for names in _MEMBERS.values() for name in names}
  found = {}
  try:
    with tarfile.open(path, "r:gz") as tar:
      for member in tar:
        parts = pathlib.PurePosixPath(member.name).parts
        if member.name.startswith("/") or ".." in parts:
          raise UsageError(f"{path}: member {member.name!r} points out of the archive")
        if member.name not in wanted:
          continue  # the readme and the class names
        if not member.isreg() or member.name in found:
          raise UsageError(f"{path}: member {member.name} occurs twice or is not a plain file")
        if member.size % _RECORD or not 0 < member.size <= _RECORD * _MAX_RECORDS:
          raise UsageError(f"{path}: member {member.name} has {member.size} bytes; 1 to {_MAX_RECORDS} "
                           f"records of {_RECORD} bytes are expected")
        found[member.name] = tar.extractfile(member).read()
        if len(found[member.name]) != member.size:
          raise UsageError(f"{path}: member {member.name} is cut short")
  except (tarfile.TarError, OSError, EOFError, zlib.error) as e:
    raise UsageError(f"{path}: cannot be read as a tar.gz archive: {e}") from e
  if missing := sorted(wanted - found.keys()):
    raise UsageError(f"{path}: has no member {', '.join(missing)}")
  return found


def _decode(path: pathlib.Path, batches: list[bytes]) -> Arrays:
  # A record is the label and then the red, green and blue planes, each in rows.
  records = np.frombuffer(b"".join(batches), np.uint8).reshape(-1, _RECORD)
  labels = records[:, 0]
  if labels.max() >= len(Cifar10.CLASSES):
    raise UsageError(f"{path}: label {labels.max()} where cifar10 has 0..9")
  planes = records[:, 1:].reshape(-1, _SHAPE[2], *_SHAPE[:2])
  return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels
