"""Sets of images as batches, and what a measurement keeps of them: never the images."""

import functools
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import numpy as np

from ddil_jax import files
from ddil_jax.errors import UsageError
from ddil_jax.evaluation import checks
from ddil_jax.evaluation.features import Extractor
from ddil_jax.evaluation.metrics import saturated

_BATCH = 512


class ImageSet(Protocol):
  """Images that can be read again and again, a batch at a time.

  Attributes:
    shape: (N, H, W, C).
    content: hash of the images as they are stored.
    preprocessing: how the stored images become floats in [-1, 1], in words.
  """

  shape: tuple[int, int, int, int]
  content: str
  preprocessing: str

  def batches(self) -> Iterator[np.ndarray]:
    """Float32 [B,H,W,C] in [-1, 1]; N in all."""


class InMemory:
  """An array [N,H,W,C] in [-1, 1] as an `ImageSet`; UsageError if it is none."""

  preprocessing = "none"

  def __init__(self, images, name: str = "images"):
    self._images = checks.images(images, name)
    self.shape = self._images.shape

  @functools.cached_property
  def content(self) -> str:
    return files.digest({"images": self._images})

  def batches(self) -> Iterator[np.ndarray]:
    return (self._images[i:i + _BATCH] for i in range(0, len(self._images), _BATCH))


class OnDisk:
  """Images [N,H,W,C] in [-1, 1] that are read as they are asked for, `rows[index]`, as an `ImageSet`.

  Its content is that of `InMemory`, so that a set has one name and one file of features wherever it lies.
  """

  preprocessing = "none"

  def __init__(self, rows, name: str = "images"):
    self._rows, self._name, self.shape = rows, name, tuple(rows.shape)

  @functools.cached_property
  def content(self) -> str:
    return files.digest_rows("images", self.shape, self.batches())

  def batches(self) -> Iterator[np.ndarray]:
    n = self.shape[0]
    return (checks.images(self._rows[np.arange(i, min(i + _BATCH, n))], self._name) for i in range(0, n, _BATCH))


def image_set(rows, name: str = "images") -> ImageSet:
  """Images as an array, or as rows that are read when they are asked for."""
  return InMemory(rows, name) if isinstance(rows, np.ndarray) else OnDisk(rows, name)


class Statistics(NamedTuple):
  """What metrics need of N images.

  Attributes:
    count: N.
    features, logits: float32 [N,D] and [N,K] of the extractor, None where they were not asked for.
    judged: float32 [N,C], logits of the classifier; without one those of the extractor.
    saturated: [N], share of each image's pixels at the bound.
  """

  count: int
  features: np.ndarray | None
  logits: np.ndarray | None
  judged: np.ndarray | None
  saturated: np.ndarray


def gather(batches: Iterable[np.ndarray], extractor: Extractor, like: tuple[tuple[int, ...], str] | None = None,
           features: bool = True, logits: bool = False, classifier: Extractor | None = None) -> Statistics:
  """Reads batches of images once and keeps what metrics need.

  Args:
    batches: [B,H,W,C] each, as they are (not clipped).
    extractor: of features and logits.
    like: (H, W, C) that images must have, and whose that is; None takes that of the first batch.
    features, logits: which of the two to keep.
    classifier: whose logits to keep besides.

  Raises:
    UsageError: no images, unlike shapes, non-finite values.
  """
  kept = {"features": [], "logits": [], "judged": [], "saturated": []}
  for batch in batches:
    batch = checks.images(batch, "samples")
    like = like or (batch.shape[1:], "the first samples")
    if batch.shape[1:] != like[0]:
      raise UsageError(f"samples have the shape {batch.shape[1:]}, {like[1]} {like[0]}")
    kept["saturated"].append(saturated(batch))
    if features or logits:
      of_logits, of_features = extractor.outputs(batch)
      kept["features"] += [of_features] if features else []
      kept["logits"] += [of_logits] if logits else []
    if classifier is not None:
      kept["judged"].append(classifier.logits(batch))
  if not kept["saturated"]:
    raise UsageError("there are no samples; at least one image is needed")
  joined = {name: np.concatenate(parts) if parts else None for name, parts in kept.items()}
  if classifier is None:
    joined["judged"] = joined["logits"]
  return Statistics(len(joined["saturated"]), **joined)
