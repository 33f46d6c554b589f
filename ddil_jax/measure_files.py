"""What images in files are worth, without a run: `ddil evaluate --images=PATH --reference=PATH_OR_SPLIT`."""

import functools
import pathlib
import resource
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from ddil_jax import build as build_lib
from ddil_jax import config_checks
from ddil_jax import measure as measure_lib
from ddil_jax.data import image_files, pipeline
from ddil_jax.data.dataset import Dataset
from ddil_jax.errors import UsageError
from ddil_jax.evaluation import results
from ddil_jax.evaluation.image_sets import ImageSet, image_set
from ddil_jax.training.logging import versions


class Reference(NamedTuple):
  """What images are compared with.

  Attributes:
    images: the set.
    name: of the data set, or of the files with their hash.
    classes: names of its classes, () where there are none.
    dataset: () -> what the small classifier is trained on; None where there is nothing with labels.
  """
  images: ImageSet
  name: str
  classes: tuple[str, ...]
  dataset: Callable[[], Dataset] | None


def measure_files(config: ConfigDict, path: str, reference: str, own_metrics: bool = False,
                  own_data: bool = False) -> dict:
  """Measures a set of images; neither it nor a reference in files is held in memory.

  Args:
    config: its `data`, `eval` and `train.parallel` count.
    path: images, see `data.image_files.open_images`.
    reference: "NAME/SPLIT" of a data set, "SPLIT" of the config's, or a path of images.
    own_metrics: the metrics were asked for by name: what cannot be measured is an error, not left out.
    own_data: the small classifier is that of the config's data set also where the reference is a path.

  Returns:
    {"images", "content", "num", "reference", "num_reference", "extractor", "metrics", "intervals", "seconds",
    "peak_memory_mib", "versions"}; metrics and intervals as in a row of results.json.

  Raises:
    UsageError: anything that does not fit, in one line.
  """
  began = time.monotonic()
  options = config_checks.evaluation_options(config)
  results.check(config.eval.metrics, sys.maxsize, options=options)
  config, split = of_split(config, reference)
  ref = open_reference(config, reference, split, own_data)
  given = image_files.open_images(path, ref.images.shape[3])
  if given.shape[1:] != tuple(ref.images.shape[1:]):
    raise UsageError(f"{path} holds images of {_size(given)}, the reference {reference} of {_size(ref.images)}; nothing is"
                     " resized here, since that changes every metric; a data set is by --config.data.image_size=N")
  labels, missing = _labels(given, ref)
  metrics = [m for m in config.eval.metrics if m != "class_accuracy" or not missing or own_metrics]
  if "class_accuracy" in metrics and missing:
    raise UsageError(f"class_accuracy: {missing}")
  results.check(metrics, given.shape[0], ref.images.shape[0], options)
  needed = not config.eval.extractor or "class_accuracy" in metrics
  if needed and ref.dataset is None:
    raise UsageError(f"{reference} has no labels to train the small classifier on; give as reference a data set"
                     f" (NAME/train), a folder with a sub-folder for each class or an .npz file with labels; or a"
                     " --config, whose data set's classifier is then used; or --extractor=NAME:FILE")
  config_checks.check_networks(config, given.shape[1:])
  networks = measure_lib.load_networks(config, given.shape[1:], metrics, ref.dataset() if needed else None)
  name = measure_lib.reference_name(ref.name, split, ref.images, networks) if split else ref.name
  batches = measure_lib.told(given.batches(), given.shape[0], f"{path}:")
  measured = measure_lib.measure_images(config, batches, given.shape[0], labels, ref.images, name, networks, metrics)
  return {"images": str(path), "content": given.content, "num": given.shape[0], "reference": name,
          "num_reference": ref.images.shape[0], "extractor": networks.extractor.name, "metrics": measured.values,
          "intervals": {name: i._asdict() for name, i in measured.intervals.items()},
          "seconds": round(time.monotonic() - began, 2),
          "peak_memory_mib": peak_memory_mib(), "versions": versions()}


def peak_memory_mib() -> int:
  """The largest resident memory of this process so far, in MiB.

  Linux carries getrusage's `ru_maxrss` over a fork and exec, so that a child of a large process starts with its
  parent's peak; the kernel's VmHWM belongs to the program that runs.
  """
  try:
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) >> 10
  except (OSError, IndexError):  # not Linux
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> (20 if sys.platform == "darwin" else 10)


def of_split(config: ConfigDict, text: str) -> tuple[ConfigDict, str]:
  """The config with the data set of "NAME/SPLIT", and the split; "" for a text that is no split."""
  name, slash, split = text.rpartition("/")
  if split not in pipeline.SPLITS or slash and name not in pipeline.names():
    return config, ""
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.data.name = name or config.data.name
  return config, split


def open_reference(config: ConfigDict, text: str, split: str, own_data: bool = False) -> Reference:
  """The split of the config's data set, or images at a path. Raises UsageError if there are none."""
  if split:
    train = build_lib.load_data(config, "train")
    data = train if split == "train" else build_lib.load_data(config, split)
    return Reference(image_set(data.images), data.name, tuple(map(str, range(data.num_classes))), lambda: train)
  if not pathlib.Path(text).exists():
    raise UsageError(f"no reference {text}: neither a folder or file, nor a split of a data set, NAME/train or NAME/test"
                     f" with NAME one of {', '.join(pipeline.names())}")
  found = image_files.open_images(text)
  classes = found.classes
  if found.labels is not None and not classes:
    classes = tuple(map(str, range(int(found.labels.max()) + 1)))
  if own_data:
    train = build_lib.load_data(config, "train")
    return Reference(found, found.name, tuple(map(str, range(train.num_classes))), lambda: train)
  return Reference(found, found.name, classes, functools.partial(_in_memory, found) if len(classes) > 1 else None)


def _in_memory(images: image_files.ImageFiles) -> Dataset:
  pixels, filled = np.empty(images.shape, np.float32), 0
  for batch in images.batches():  # not joined from a list, which would take twice the memory
    pixels[filled:filled + len(batch)] = batch
    filled += len(batch)
  name = images.name.rpartition("-")[0]
  return Dataset(name, pixels, images.labels, int(images.labels.max()) + 1, (-1.0, 1.0), "train")


def _labels(given: image_files.ImageFiles, ref: Reference) -> tuple[np.ndarray | None, str]:
  """Labels of the images as the reference counts classes, and why they do not say that, "" if they do."""
  if given.labels is None:
    return None, f"{given.path} has no labels (sub-folders for classes, or an array of labels)"
  if given.classes:
    strange = [name for name in given.classes if name not in ref.classes]
    if strange:
      return given.labels, f"{given.path} has a class {strange[0]!r}; the classes are {', '.join(ref.classes) or 'none'}"
    return np.array([ref.classes.index(name) for name in given.classes], np.int32)[given.labels], ""
  if given.labels.min() < 0 or given.labels.max() >= len(ref.classes):
    return given.labels, (f"the labels of {given.path} lie in {given.labels.min()}..{given.labels.max()}; expected"
                          f" 0..{len(ref.classes) - 1}")
  return given.labels, ""


def _size(images) -> str:
  return "x".join(map(str, images.shape[1:]))
