"""Image sets of ours as tensorflow-datasets builders that need no TensorFlow.

A subclass says how to `read` its source; this file turns it into array_record files and back.
The images are stored as raw bytes (a Tensor feature): an `Image` feature would need TensorFlow to
encode an array, and is read at a third of the speed.
"""

import abc
import contextlib
import errno
import io
import os
import pathlib
import shutil
import tempfile

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from ddil_jax.data.dataset import check_choice
from ddil_jax.errors import RunError, UsageError

Arrays = tuple[np.ndarray, np.ndarray]  # images uint8 [N, H, W, C], labels int [N]


class ImageBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A class-labelled set of small images; examples keep the order of the source.

  Attributes:
    IMAGE_SHAPE: (H, W, C).
    CLASSES: the names of the classes.
    PIXEL_MAX: the largest pixel that the format allows; the smallest is 0.
    ABOUT: one line for the prepared files.
    HOMEPAGE: where the data comes from.
  """
  VERSION = tfds.core.Version("1.0.0")
  IMAGE_SHAPE: tuple[int, int, int]
  CLASSES: tuple[str, ...]
  PIXEL_MAX = 255
  ABOUT = ""
  HOMEPAGE = ""

  @abc.abstractmethod
  def read(self) -> dict[str, Arrays]:
    """Reads the source: {split: (images uint8 [N, H, W, C], labels [N])}."""

  def _info(self):
    return tfds.core.DatasetInfo(
        builder=self, description=self.ABOUT, homepage=self.HOMEPAGE, disable_shuffling=True,
        supervised_keys=("image", "label"),
        features=tfds.features.FeaturesDict({
            "image": tfds.features.Tensor(shape=self.IMAGE_SHAPE, dtype=np.uint8, encoding="bytes"),
            "label": tfds.features.ClassLabel(names=list(self.CLASSES)),
        }))

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing is downloaded
    return {split: self._generate_examples(*arrays) for split, arrays in self.read().items()}

  def _generate_examples(self, images, labels):
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
      yield i, {"image": image, "label": int(label)}


def prepare(cls: type[ImageBuilder], data_dir: str | os.PathLike, **kwargs) -> pathlib.Path:
  """Returns the folder of the prepared set, `<data_dir>/<name>/<version>`, and makes it if need be.

  It is made in a temporary folder beside and renamed, so a prepared set is always whole. Of several
  processes that prepare at once, the first rename wins and the others use its result; unlike a lock,
  this works on network file systems too.

  Args:
    cls: what to prepare; `kwargs` go to its constructor.
    data_dir: root of the prepared sets.

  Raises:
    UsageError: data_dir cannot be written, or is in the way; or what `cls.read` raises.
    RunError: no space.
  """
  root = pathlib.Path(data_dir)
  final = root / cls.name / str(cls.VERSION)
  if _is_prepared(final):
    return final
  tmp = None
  try:
    root.mkdir(parents=True, exist_ok=True)
    tmp = pathlib.Path(tempfile.mkdtemp(prefix=f".preparing-{cls.name}-", dir=root))
    logging.info("preparing %s in %s", cls.name, final)
    builder = cls(data_dir=tmp, file_format="array_record", **kwargs)
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # tfds announces a download that does not happen
      builder.download_and_prepare()
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
      os.rename(builder.data_path, final)
    except OSError:
      if not _is_prepared(final):  # else another process was first
        raise
  except OSError as e:
    if e.errno in (errno.ENOSPC, errno.EDQUOT, None):
      raise RunError(f"{cls.name}: cannot prepare in {root}: {e}") from e
    raise UsageError(
        f"{cls.name}: cannot prepare {final}: {e.strerror}; give a writable --data_dir, or remove what "
        "is in the way") from e
  finally:
    if tmp is not None:
      shutil.rmtree(tmp, ignore_errors=True)
  return final


def find_prepared(name: str, version: str, data_dir: str | os.PathLike) -> pathlib.Path | None:
  """The folder of a prepared set, ours or one that plain tfds has written as array_record."""
  ours = pathlib.Path(data_dir) / name / version
  others = sorted(p for p in ours.parent.glob("*.*.*") if p != ours)
  for folder in (ours, *reversed(others)):
    if _is_prepared(folder) and any(folder.glob("*.array_record*")):
      return folder
  return None


def _is_prepared(folder: pathlib.Path) -> bool:
  # tfds writes this file last.
  return (folder / "dataset_info.json").is_file()


def read_prepared(folder: str | os.PathLike, split: str) -> Arrays:
  """Reads a prepared set through `as_data_source`, without TensorFlow.

  Args:
    folder: `<data_dir>/<name>/<version>`.
    split: a split that it has.

  Returns:
    images uint8 [N, H, W, C], labels int32 [N].

  Raises:
    UsageError: no such split, or the files are damaged.
  """
  try:
    builder = tfds.builder_from_directory(os.fspath(folder))
    check_choice(f"split of {builder.name}", split, builder.info.splits)
    source = builder.as_data_source(split=split)
    count = builder.info.splits[split].num_examples
    shape = builder.info.features["image"].shape
    images, labels = np.empty((count, *shape), np.uint8), np.empty(count, np.int32)
    if len(source) != count:
      raise ValueError(f"{len(source)} examples where {count} were written")
    for start in range(0, count, 4096):  # in blocks, for speed
      indices = range(start, min(start + 4096, count))
      for i, example in zip(indices, source.__getitems__(indices), strict=True):
        images[i], labels[i] = example["image"], example["label"]
  except UsageError:
    raise
  except Exception as e:  # whatever array_record, protobuf and tfds raise on damaged files
    reason = " ".join(str(e).split())[:200]
    raise UsageError(f"cannot read the prepared data in {folder}: {reason}; remove that folder and it is "
                     "prepared anew") from e
  return images, labels
