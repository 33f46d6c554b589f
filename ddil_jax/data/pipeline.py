"""Data sets by name, batches by step, and a look at the data before training starts."""

import functools
import inspect
import os
import pathlib
from typing import Any

import numpy as np

from ddil_jax.data import fake, folder, manual, prepared
from ddil_jax.data.builder import ImageBuilder, find_prepared, prepare, read_prepared
from ddil_jax.data.cifar import Cifar10
from ddil_jax.data.dataset import Dataset, check_choice, resize, some, to_unit
from ddil_jax.data.digits import Digits
from ddil_jax.data.idx import FashionMnist, Mnist
from ddil_jax.errors import UsageError

SPLITS = ("train", "test")
_READERS = 4  # batches of a set on disk that are read at a time, and that wait


def names() -> tuple[str, ...]:
  """The names that `load` knows."""
  return tuple(sorted(_LOADERS))


def default_data_dir() -> pathlib.Path:
  """Where sets are prepared: the environment variable DDIL_DATA, else `data/` here."""
  return pathlib.Path(os.environ.get("DDIL_DATA") or "data")


def load(name: str, data_dir: str | os.PathLike | None = None, split: str = "train",
         image_size: int | None = None, manual_dir: str | os.PathLike | None = None, **options) -> Dataset:
  """Loads a split of a data set, preparing the set on first use.

  * `digits`: from scikit-learn, no files needed.
  * `mnist`, `fashion_mnist`, `cifar10`: from the published files, which the user brings.
  * `folder`: the images under `path` (or `data_dir`); options `path`, `channels`.
  * `fake`: made up; options `channels`, `num_classes`, `num_examples`, `seed`. `fake_text`: the same with prompts.
  * `prepared`: what `ddil prepare` wrote into `path`.

  Args:
    name: one of `names()`.
    data_dir: root of the prepared sets; None is `default_data_dir()`.
    split: "train" or "test".
    image_size: pixels of each side; None keeps those of the set. Images are cropped to the centre
      square and resized (bicubic).
    manual_dir: folder of the user's files; None looks in `<data_dir>/downloads/manual`, `<data_dir>/<name>`
      and `<data_dir>`.
    **options: of the set; None means not given.

  Returns:
    Dataset with images float32 [N, H, W, C] in [-1, 1] and labels int32 [N].

  Raises:
    UsageError: unknown name, split or option; missing, odd or damaged files.
    RunError: no space to prepare the set.
  """
  check_choice("data set", name, _LOADERS)
  check_choice("split", split, SPLITS)
  if image_size is not None and image_size < 1:
    raise UsageError(f"{name}: image_size must be at least 1, not {image_size}")
  given = dict(options, data_dir=data_dir, split=split, image_size=image_size, manual_dir=manual_dir)
  loader = _LOADERS[name]
  known = inspect.signature(loader).parameters
  for option in options:
    if options[option] is not None:
      check_choice(f"option of data set {name}:", option, known)
  return loader(**{k: v for k, v in given.items() if v is not None and k in known})


def _load_built(cls: type[ImageBuilder], split: str, data_dir=None, image_size=None) -> Dataset:
  return _read(cls, split, data_dir or default_data_dir(), image_size)


def _load_brought(cls: type[manual.ManualBuilder], split: str, data_dir=None, image_size=None,
                  manual_dir=None, checksums=None) -> Dataset:
  data_dir = data_dir or default_data_dir()
  return _read(cls, split, data_dir, image_size, folders=manual.places(cls.name, data_dir, manual_dir),
               checksums=checksums)


def _read(cls: type[ImageBuilder], split: str, data_dir: str | os.PathLike, image_size: int | None,
          **kwargs) -> Dataset:
  prepared = find_prepared(cls.name, str(cls.VERSION), data_dir) or prepare(cls, data_dir, **kwargs)
  images, labels = read_prepared(prepared, split)
  if images.shape[1:] != cls.IMAGE_SHAPE:
    raise UsageError(f"{cls.name}: {prepared} holds images of shape {images.shape[1:]}, not "
                     f"{cls.IMAGE_SHAPE}; remove that folder and it is prepared anew")
  value_range = (0.0, float(cls.PIXEL_MAX))
  images = to_unit(images, value_range)
  if image_size is not None:
    images = resize(images, image_size)
  return Dataset(cls.name, images, labels, len(cls.CLASSES), value_range, split)


def _load_folder(split: str, path=None, data_dir=None, image_size=None, channels=3) -> Dataset:
  if not (path or data_dir):
    raise UsageError("folder: give the path of a folder of images, as path (--config.data.path=DIR) or data_dir")
  return folder.load(path or data_dir, split, image_size, channels)


def _load_prepared(split: str, path=None, image_size=None) -> Dataset:
  if not path:
    raise UsageError("prepared: give the folder that `ddil prepare` wrote, as path (--config.data.path=DIR)")
  return prepared.load(path, split, image_size)


_LOADERS = {
    "cifar10": functools.partial(_load_brought, Cifar10),
    "digits": functools.partial(_load_built, Digits),
    "fake": fake.load,
    "fake_text": fake.load_text,
    "fashion_mnist": functools.partial(_load_brought, FashionMnist),
    "folder": _load_folder,
    "mnist": functools.partial(_load_brought, Mnist),
    "prepared": _load_prepared,
}


class Batches:
  """Endless shuffled batches with stateless random access: the data position is the step."""

  def __init__(self, dataset: Dataset, batch_size: int, seed: int, flip: bool, lanes: np.ndarray):
    self._images, self._labels = dataset.images, np.ascontiguousarray(dataset.labels, np.int32)
    self._cond = dict(dataset.cond)
    self._batch_size, self._seed, self._flip, self._lanes = batch_size, seed, flip, lanes
    # Random access costs a permutation per epoch; a batch touches at most two epochs.
    self._epoch = functools.lru_cache(maxsize=2)(self._draw_epoch)
    self.on_disk = not isinstance(self._images, np.ndarray)

  def __getitem__(self, step: int) -> dict[str, np.ndarray]:
    """The batch of this step.

    Returns:
      "image": float32 [B, H, W, C] in [-1, 1]; "label": int32 [B]; "lane": int32 [B], the position of
      the example in the global batch; and the set's further conditions [B, ...].
    """
    if step < 0:
      raise IndexError(f"step {step} is negative")
    epochs, offsets = np.divmod(step * self._batch_size + self._lanes, len(self._images))
    index, flip = np.empty_like(offsets), np.empty(len(offsets), bool)
    for epoch in range(epochs[0], epochs[-1] + 1):
      order, flips = self._epoch(epoch)
      here = epochs == epoch
      index[here], flip[here] = order[offsets[here]], flips[offsets[here]]
    images = self._images[index]
    if self._flip:
      images[flip] = images[flip, :, ::-1]
    cond = {name: rows[index] for name, rows in self._cond.items()}
    return {"image": images, "label": self._labels[index], "lane": self._lanes.astype(np.int32), **cond}

  def _draw_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    # Raw Philox bits keyed by (seed, epoch): numpy keeps bit generators stable over its versions, but not
    # `permutation`. A resumed run must see the same order.
    n = len(self._images)
    bits = np.random.Philox(key=np.array([self._seed, epoch], np.uint64)).random_raw(2 * n)
    return np.argsort(bits[:n], kind="stable"), bits[n:] >> 63 == 1


class Ahead:
  """The batches of steps start .. stop - 1, asked for in this order; of a set on disk the next ones are being read.

  grain's threads do that. Which batch is whose is `Batches`' matter alone: a run that goes on reads what it would have.

  Raises:
    UsageError: from `[step]`, what reading it raised.
  """

  def __init__(self, batches: Batches, start: int, stop: int):
    self._next, self._stream = start, None
    if batches.on_disk:
      import grain  # which takes long, and sets in memory do without
      steps = grain.MapDataset.range(start, stop).map(batches.__getitem__)
      self._stream = iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=_READERS, prefetch_buffer_size=_READERS)))
    self._batches = batches

  def __getitem__(self, step: int) -> dict[str, np.ndarray]:
    """See `Batches`."""
    if self._stream is None:
      return self._batches[step]
    if step != self._next:
      raise IndexError(f"step {step} was asked for where {self._next} comes")
    self._next += 1
    return next(self._stream)

  def close(self) -> None:
    """Ends the threads."""
    if self._stream is not None:
      self._stream.close()


def batches(dataset: Dataset, batch_size: int, seed: int, flip: bool = False, process_index: int = 0,
            process_count: int = 1) -> Batches:
  """Batches by step: `batches(...)[step]` depends on its arguments and the step, on nothing before it.

  The stream of examples is one permutation of the set after the other, each by keys (seed, epoch), and
  batch `step` is its positions `step B .. step B + B - 1`; so every example occurs once per epoch, and a
  batch may span two epochs. Flips are drawn per position of the stream.

  Args:
    dataset: what `load` returned.
    batch_size: examples of the global batch.
    seed: of the shuffle and the flips, 0 .. 2^64 - 1.
    flip: mirror left-right with probability 1/2.
    process_index, process_count: this process's slice of the lanes, `[i B / P, (i + 1) B / P)`; the
      slices of all processes together are the batch of one process.

  Raises:
    UsageError: a batch that is empty, larger than the set, or not divisible; a seed out of range.
  """
  n = len(dataset.images)
  if not 1 <= batch_size <= n:
    raise UsageError(f"batch_size {batch_size} does not fit {dataset.name}/{dataset.split} with {n} "
                     f"examples; valid: 1 to {n}")
  if not 0 <= seed < 2**64:
    raise UsageError(f"data seed {seed} is out of range; valid: 0 to 2**64 - 1")
  if not 0 <= process_index < process_count:
    raise UsageError(f"process_index {process_index} must be 0 to {process_count - 1}")
  if batch_size % process_count:
    raise UsageError(f"batch_size {batch_size} must be a multiple of the {process_count} processes")
  local = batch_size // process_count
  lanes = np.arange(process_index * local, (process_index + 1) * local)
  return Batches(dataset, batch_size, seed, flip, lanes)


def subset(dataset: Dataset, fraction: float) -> Dataset:
  """A fixed random share of a set, round(fraction * N) examples; the same whatever the run's seed.

  Raises:
    UsageError: fraction outside (0, 1], or nothing left.
  """
  n = round(fraction * len(dataset.images))
  if not 0 < fraction <= 1 or not n:
    raise UsageError(f"data fraction {fraction} of {len(dataset.images)} images; a share above 0 and at most 1 that"
                     " leaves one image is needed")
  if fraction == 1:
    return dataset
  kept = np.sort(np.random.default_rng(0).permutation(len(dataset.images))[:n])
  return dataset._replace(
      images=dataset.images[kept], labels=dataset.labels[kept],
      cond={name: rows[kept] for name, rows in dataset.cond.items()},
      captions=[dataset.captions[i] for i in kept] if dataset.captions else (),
      tokens=None if dataset.tokens is None else dataset.tokens[kept],
      pixels=None if dataset.pixels is None else dataset.pixels[kept])


def preflight(dataset: Dataset) -> dict[str, Any]:
  """Looks at the data before anything is trained on it; of a set on disk, at the first 1,024 images.

  Returns:
    {"name", "split", "count", "shape", "value_range" (as found), "num_classes", "per_class" (min, max),
    "skipped", "summary": all of it in one line}.

  Raises:
    UsageError: an empty set, odd shapes, values that are not finite or outside [-1, 1], labels out of
      range, or images that are all the same constant.
  """
  images, labels, where = dataset.images, dataset.labels, f"data set {dataset.name}/{dataset.split}"
  if len(images.shape) != 4:
    raise UsageError(f"{where}: images have the shape {images.shape}, [N, H, W, C] is expected")
  if 0 in images.shape:
    raise UsageError(f"{where} is empty: its images have the shape {images.shape}")
  if images.dtype != np.float32:
    raise UsageError(f"{where}: images are {images.dtype}, float32 in [-1, 1] is expected")
  if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
    raise UsageError(
        f"{where}: labels are {labels.dtype} {labels.shape}, integers [{len(images)}] are expected")
  seen = some(images)
  lo, hi = float(seen.min()), float(seen.max())  # nan and inf show in them
  prompts_only = bool(dataset.captions) and np.isnan(seen).all()
  if not np.isfinite([lo, hi]).all() and not prompts_only:
    bad = int((~np.isfinite(seen)).any(axis=(1, 2, 3)).sum())
    raise UsageError(f"{where}: {bad} of {len(seen)} images hold values that are not finite")
  if (lo < -1 or hi > 1) and not dataset.decoder:
    raise UsageError(f"{where}: values from {lo:g} to {hi:g}, [-1, 1] is expected")
  if lo == hi:
    raise UsageError(f"{where}: every pixel of every image is {lo:g}; there is nothing to learn")
  if labels.min() < 0 or labels.max() >= dataset.num_classes:
    raise UsageError(f"{where}: labels from {labels.min()} to {labels.max()}, 0 to "
                     f"{dataset.num_classes - 1} are expected")
  counts = np.bincount(labels, minlength=dataset.num_classes)
  info = {
      "name": dataset.name, "split": dataset.split, "count": len(images), "shape": dataset.image_shape,
      "value_range": (lo, hi), "num_classes": dataset.num_classes,
      "per_class": (int(counts.min()), int(counts.max())), "skipped": len(dataset.skipped)}
  shape = "x".join(map(str, dataset.image_shape))
  summary = (f"{dataset.name}/{dataset.split}: {len(images):,} images {shape}, "
             f"{'none there, prompts only' if prompts_only else f'values {lo:g} to {hi:g}'}, {dataset.num_classes} class{'es' * (dataset.num_classes > 1)} of "
             f"{counts.min():,} to {counts.max():,}")
  if dataset.skipped:
    summary += f"; {len(dataset.skipped)} files skipped, e.g. {': '.join(dataset.skipped[0])}"
  return info | {"summary": summary}
