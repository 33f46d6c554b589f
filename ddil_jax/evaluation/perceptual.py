"""Measures of perceptual networks: LPIPS-diversity, and whether images show what their captions say."""

import functools
from collections.abc import Iterable, Iterator

import jax
import numpy as np

from ddil_jax.errors import UsageError
from ddil_jax.evaluation import bootstrap as bs, checks
from ddil_jax.evaluation.features import Extractor
from ddil_jax.evaluation.results import Measured, MetricName, Options

_SKETCH = 512


class LpipsDiversity:
  """Mean LPIPS over all pairs of images of the same condition, in one pass over batches.

      mean_c mean_{i < j, c_i = c_j = c} |e_i - e_j|^2 = mean_c 2 / (n_c - 1) (sum_i |e_i|^2 - n_c |mean_i e_i|^2)

  since LPIPS is the squared distance of embeddings (`models/lpips.py`): all pairs count, none is formed. What is kept
  is one embedding and one number per condition; for an interval also 512 numbers per image: sums of its embedding's
  entries with random signs, whose squared distances are those of the embeddings within sqrt(2 / 512) = 6 %.

  Args:
    extractor: of LPIPS embeddings.
    labels: int [N], the condition of each image over all batches; None: all have the same.
    options: `bootstrap` and `seed` of the interval are used.

  Source: DDIL (arXiv 2410.11971), evaluation of diversity; Zhang et al. 2018 (arXiv 1801.03924);
  for the sums Achlioptas 2003, Database-friendly random projections (JCSS 66).
  """

  def __init__(self, extractor: Extractor, labels=None, options: Options = Options()):
    self._extractor, self._labels, self._options = extractor, labels, options
    self._seen, self._of = 0, {}  # condition -> (n, sum of e [D], sum of |e|^2)
    self._sketches = []  # of each batch [B,512]

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
    if self._options.bootstrap:
      self._sketches.append(_sketch(e))
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

  def interval(self) -> bs.Interval | None:
    """Of the value, from half-samples; None without bootstrap.

    Raises:
      UsageError: fewer than 4 images of a condition.
    """
    if not self._options.bootstrap:
      return None
    value, s = self.value(), np.concatenate(self._sketches).astype(np.float64)
    labels = np.zeros(len(s), int) if self._labels is None else np.asarray(self._labels)
    for c, (n, *_) in sorted(self._of.items()):
      if n < 4:
        raise UsageError("an interval of LPIPS-diversity needs at least 4 images of each condition;"
                         f" condition {c} has {n}")
    keep = bs.half_samples(len(s), self._options.bootstrap, self._options.seed, labels)
    parts = [s[labels == c] - s[labels == c].mean(axis=0) for c in sorted(self._of)]
    halves = [keep[:, labels == c].astype(float) for c in sorted(self._of)]
    draws = [2 / (w.sum(axis=1) - 1) * (w @ np.square(x).sum(axis=1) - np.square(w @ x).sum(axis=1) / w.sum(axis=1))
             for x, w in zip(parts, halves)]
    return bs.interval(value, np.mean(draws, axis=0))


def _sketch(e):
  """Sums [B,512] of every 512th entry of e [B,D], with signs that are the same for all."""
  signs = np.random.default_rng(0).choice(np.float32([-1, 1]), e.shape[1])
  signed = np.pad(e * signs, ((0, 0), (0, -e.shape[1] % _SKETCH)))
  return signed.reshape(len(e), -1, _SKETCH).sum(axis=1).astype(np.float32)


class CaptionAgreement:
  """How well images agree with the captions that they were drawn for, in one pass over batches.

  Two metrics: `clip_score`, and `r_precision`, the share of images whose own caption is found among others.

  Args:
    extractor: of CLIP's image features.
    texts: [K,D], CLIP's features of the captions, each caption once (`text_features`).
    captions: int [N], which of them each image over all batches was drawn for.
    candidates: of `r_precision`.
    options: `bootstrap` and `seed` are used; the seed draws the other captions too.

  Raises:
    UsageError: unlike shapes, unknown captions, fewer captions than candidates.
  """

  def __init__(self, extractor: Extractor, texts, captions, candidates: int = 100, options: Options = Options()):
    self._extractor, self._candidates, self._options = extractor, candidates, options
    self._texts, self._features = checks.rows(texts, "text features"), []
    self._captions = checks.class_labels(captions, len(captions), len(self._texts), "captions")
    _check_candidates(candidates, len(self._texts))

  def tap(self, batches: Iterable) -> Iterator:
    """Passes batches of images [B,H,W,C] in [-1, 1] on, and takes them in."""
    for images in batches:
      self.add(images)
      yield images

  def add(self, images) -> None:
    """Takes a batch in."""
    self._features.append(self._extractor.features(images))

  def measured(self) -> Measured:
    """Both metrics by their names, like `r_precision@500/-/clip-uint8-1a2b3c4d`, and their intervals.

    Raises:
      UsageError: more or fewer images than captions, none, or features without a direction.
    """
    features = np.concatenate(self._features) if self._features else np.zeros((0, self._texts.shape[1]))
    if len(features) != len(self._captions):
      raise UsageError(f"{len(features)} images and {len(self._captions)} captions; expected one caption an image")
    name = lambda metric: str(MetricName(metric, len(features), extractor=self._extractor.name))  # noqa: E731
    parts = {"clip_score": clip_scores(features, self._texts[self._captions]),
             "r_precision": retrieved(features, self._texts, self._captions, self._candidates, seed=self._options.seed)}
    values = {name(metric): float(x.mean()) for metric, x in parts.items()}
    if not self._options.bootstrap:
      return Measured(values, {})
    keep = bs.half_samples(len(features), self._options.bootstrap, self._options.seed)
    return Measured(values, {name(metric): bs.interval(values[name(metric)], bs.each(lambda i: x[i].mean(), keep))
                             for metric, x in parts.items()})


def text_features(module, variables, tokens, batch_size: int = 256) -> np.ndarray:
  """Features [K,D] of texts by CLIP's text tower, float32.

  Args:
    module: Linen; `apply(variables, tokens, method="text_features")` gives [K,D].
    variables: of it.
    tokens: int [K,T].
    batch_size: texts at a time.
  """
  apply = jax.jit(functools.partial(module.apply, method="text_features"))
  return np.concatenate([np.asarray(apply(variables, tokens[i:i + batch_size]), np.float32)
                         for i in range(0, len(tokens), batch_size)])


def clip_score(image_features, texts) -> float:
  """The mean of `clip_scores`."""
  return float(clip_scores(image_features, texts).mean())


def clip_scores(image_features, texts) -> np.ndarray:
  """How well each image agrees with the text that it was asked to show.

      100 max(cos(image_i, text_i), 0)

  Papers also give it divided by 100, or with 2.5 in place of 100 (CLIP-S).

  Args:
    image_features: [N,D], of CLIP's image tower.
    texts: [N,D], of its text tower, one per image.

  Returns:
    [N].

  Raises:
    UsageError: unlike shapes, non-finite values, a feature vector of norm 0.

  Source: Hessel et al. 2021 (arXiv 2104.08718), eq. 1.
  """
  a, b = checks.row_pair(image_features, texts, ("image features", "text features"))
  if len(a) != len(b):
    raise UsageError(f"{len(a)} images and {len(b)} texts; expected one text per image")
  a, b = _directions(a, "image"), _directions(b, "text")
  return 100 * np.maximum(np.einsum("nd,nd->n", a, b), 0)


def retrieved(image_features, texts, captions, candidates: int = 100, top: int = 1, seed: int = 0) -> np.ndarray:
  """Whether each image's own caption is among the `top` best of `candidates`: it and others drawn at random.

      #{j in others_i: cos(image_i, text_j) >= cos(image_i, text_own)} < top

  Args:
    image_features: [N,D], of CLIP's image tower.
    texts: [K,D], of its text tower, each caption once.
    captions: int [N], which of them is an image's own.
    candidates: captions that an image is compared with, its own included.
    seed: of the draw of the others.

  Returns:
    bool [N]; its mean is R-precision.

  Raises:
    UsageError: unlike shapes, non-finite values, unknown captions, fewer captions than candidates, a norm of 0.

  Source: Xu et al. 2018 (arXiv 1711.10485), section 4; with CLIP: Park et al. 2021 (NeurIPS Datasets and Benchmarks).
  """
  a, b = checks.row_pair(image_features, texts, ("image features", "text features"))
  captions = checks.class_labels(captions, len(a), len(b), "captions")
  _check_candidates(candidates, len(b))
  a, b, rng = _directions(a, "image"), _directions(b, "text"), np.random.default_rng(seed)
  out = np.empty(len(a), bool)
  for i, own in enumerate(captions):
    others = rng.permutation(len(b) - 1)[:candidates - 1]
    cosines = b[others + (others >= own)] @ a[i]
    out[i] = np.count_nonzero(cosines >= b[own] @ a[i]) < top
  return out


def _check_candidates(candidates, num):
  if not 2 <= candidates <= num:
    raise UsageError(f"an image's caption is looked for among {candidates}, of {num} different captions; expected at"
                     " least 2 and no more than there are")


def _directions(x, what):
  norms = np.linalg.norm(x, axis=1)
  if not norms.all():
    raise UsageError(f"features of {what} {int(norms.argmin())} are all 0: their cosine is undefined")
  return x / norms[:, None]
