"""Measures of perceptual networks: LPIPS-diversity and CLIP score."""

from collections.abc import Iterable, Iterator

import numpy as np

from ddil_jax.errors import UsageError
from ddil_jax.evaluation import checks
from ddil_jax.evaluation.features import Extractor


class LpipsDiversity:
  """Mean LPIPS over all pairs of images of the same condition, in one pass over batches.

      mean_c mean_{i < j, c_i = c_j = c} |e_i - e_j|^2 = mean_c 2 / (n_c - 1) (sum_i |e_i|^2 - n_c |mean_i e_i|^2)

  since LPIPS is the squared distance of embeddings (`models/lpips.py`): all pairs count, none is formed. What is kept
  is one embedding and one number per condition.

  Args:
    extractor: of LPIPS embeddings.
    labels: int [N], the condition of each image over all batches; None: all have the same.

  Source: DDIL (arXiv 2410.11971), evaluation of diversity; Zhang et al. 2018 (arXiv 1801.03924).
  """

  def __init__(self, extractor: Extractor, labels=None):
    self._extractor, self._labels = extractor, labels
    self._seen, self._of = 0, {}  # condition -> (n, sum of e [D], sum of |e|^2)

  def tap(self, batches: Iterable) -> Iterator:
    """Passes batches of images [B,H,W,C] in [-1, 1] on, and takes them in."""
    for images in batches:
      self.add(images)
      yield images

  def add(self, images) -> None:
    """Takes a batch in. Raises UsageError for images of another shape, or more of them than labels."""
    e = checks.rows(self._extractor.features(images), "embeddings")
    start, self._seen = self._seen, self._seen + len(e)
    labels = np.zeros(len(e), int) if self._labels is None else np.asarray(self._labels)[start:self._seen]
    if len(labels) != len(e):
      raise UsageError(f"{len(self._labels)} labels of at least {self._seen} images")
    for c in np.unique(labels):
      part = e[labels == c]
      n, total, square = self._of.get(c, (0, 0.0, 0.0))
      self._of[c] = (n + len(part), total + part.sum(axis=0), square + float(np.vdot(part, part)))

  def value(self) -> float:
    """The mean, >= 0. Raises UsageError for fewer than 2 images of a condition, or fewer images than labels."""
    if self._labels is not None and len(self._labels) != self._seen:
      raise UsageError(f"{len(self._labels)} labels of {self._seen} images")
    if not self._of:
      raise UsageError("LPIPS-diversity of no images; at least 2 of each condition are needed")
    means = []
    for c, (n, total, square) in sorted(self._of.items()):
      if n < 2:
        raise UsageError(f"LPIPS-diversity needs at least 2 images of each condition; condition {c} has {n}")
      means.append(max(0.0, 2 / (n - 1) * (square - float(np.vdot(total, total)) / n)))
    return float(np.mean(means))


def clip_score(image_features, text_features) -> float:
  """How well images agree with the texts they were asked to show.

      mean_i 100 max(cos(image_i, text_i), 0)

  Papers also give it divided by 100, or with 2.5 in place of 100 (CLIP-S).

  Args:
    image_features: [N,D], of CLIP's image tower.
    text_features: [N,D], of its text tower, one per image.

  Raises:
    UsageError: unlike shapes, non-finite values, a feature vector of norm 0.

  Source: Hessel et al. 2021 (arXiv 2104.08718), eq. 1.
  """
  a, b = checks.row_pair(image_features, text_features, ("image features", "text features"))
  if len(a) != len(b):
    raise UsageError(f"{len(a)} images and {len(b)} texts; expected one text per image")
  norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
  if not norms.all():
    raise UsageError(f"features of pair {int(norms.argmin())} are all 0: their cosine is undefined")
  return float(100 * np.mean(np.maximum(np.einsum("nd,nd->n", a, b) / norms, 0)))
