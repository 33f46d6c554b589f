"""Results whose names say what they are: `fd@5000/test/digits-cnn-1a2b3c4d`. Unlike ones are not compared."""

import collections
import pathlib
import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from ddil_jax.errors import UsageError
from ddil_jax import files, registry
from ddil_jax.evaluation import bootstrap as bs
from ddil_jax.evaluation import diversity
from ddil_jax.evaluation import metrics as m
from ddil_jax.evaluation.features import Extractor, probabilities
from ddil_jax.evaluation.image_sets import ImageSet, InMemory, Statistics, gather

PRDC = ("precision", "recall", "density", "coverage")
_SCORE = ("inception_score", "inception_score_std")
AGAINST_REFERENCE = ("fd", "kd", *PRDC)
OF_FEATURES = (*AGAINST_REFERENCE, "vendi", "diversity")
OF_LOGITS = ("class_accuracy", *_SCORE)
METRICS = (*AGAINST_REFERENCE, "class_accuracy", "saturation", "vendi", "diversity", *_SCORE)
_NONE = "-"
_PATTERN = re.compile(r"([a-z0-9_]+)@([1-9][0-9]*)/([^/\s]+)/([^/\s]+)")
_memory: collections.OrderedDict[tuple[str, str], np.ndarray] = collections.OrderedDict()


class MetricName(NamedTuple):
  """`metric@n/reference/extractor`; a measure that needs no reference or extractor has "-" there.

  Attributes:
    metric: "fd".
    n: number of samples measured.
    reference: name of the reference set, "test".
    extractor: its name with its hash.
  """

  metric: str
  n: int
  reference: str = _NONE
  extractor: str = _NONE

  def __str__(self) -> str:
    return f"{self.metric}@{self.n}/{self.reference}/{self.extractor}"

  @classmethod
  def parse(cls, text: str) -> "MetricName":
    match = _PATTERN.fullmatch(text)
    if match is None:
      raise UsageError(f"{text!r} is no metric name; expected metric@n/reference/extractor, "
                       "like 'fd@5000/test/digits-cnn-1a2b3c4d'")
    metric, n, reference, extractor = match.groups()
    return cls(metric, int(n), reference, extractor)


class Comparison(NamedTuple):
  """Two values of one metric; `difference` is b - a."""

  name: MetricName
  a: float
  b: float

  @property
  def difference(self) -> float:
    return self.b - self.a


class Options(NamedTuple):
  """How metrics are measured.

  Attributes:
    k: neighbours of precision, recall, density and coverage.
    splits: of the inception score.
    bootstrap: half-samples for intervals; 0 is none.
    seed: of the half-samples.
  """

  k: int = 5
  splits: int = 10
  bootstrap: int = 0
  seed: int = 0


class Measured(NamedTuple):
  """Values by their names (see `MetricName`), and their intervals, {} without bootstrap."""

  values: dict[str, float]
  intervals: dict[str, bs.Interval]


def check(metrics: Iterable[str], num_samples: int, num_reference: int | None = None,
          options: Options = Options()) -> None:
  """Raises UsageError for an unknown metric, or for fewer images than one of them needs."""
  if options.bootstrap == 1 or options.bootstrap < 0:
    raise UsageError(f"bootstrap is {options.bootstrap}; expected 0 (none) or at least 2 draws")
  if options.k < 1:
    raise UsageError(f"k is {options.k}; expected at least 1 neighbour")
  if options.splits < 1:
    raise UsageError(f"splits is {options.splits}; expected at least 1")
  for metric in metrics:
    if metric not in METRICS:
      raise UsageError(registry.unknown("metric", metric, METRICS))
    least = {**dict.fromkeys(("fd", "kd", "diversity"), 2), **dict.fromkeys(_SCORE, options.splits),
             **dict.fromkeys(PRDC, options.k + 1)}.get(metric, 1)
    why = {**dict.fromkeys(_SCORE, f" ({options.splits} splits)"),
           **dict.fromkeys(PRDC, f" ({options.k} neighbours)")}.get(metric, "")
    if num_reference is not None and metric in AGAINST_REFERENCE and num_reference < least:
      raise UsageError(f"{metric} needs at least {least} reference images{why}; there are {num_reference}")
    if options.bootstrap:
      least, why = 2 * least, why + ", as the bootstrap halves them"
    if num_samples < least:
      raise UsageError(f"{metric} needs at least {least} samples{why}; there are {num_samples}")


def check_logits(metrics: Iterable[str], num_classes: int, name: str) -> None:
  """Raises UsageError where a metric needs logits and the extractor has none."""
  for metric in set(metrics) & set(OF_LOGITS):
    if not num_classes:
      raise UsageError(f"{metric} needs logits; the extractor {name} has none: take a classifier's, or leave it out")


def evaluate(samples, labels, reference, reference_name: str, extractor: Extractor | None, metrics=METRICS,
             cache_dir=None, options: Options = Options(), classifier: Extractor | None = None) -> Measured:
  """Measures samples against a reference set; of the images only one batch is held at a time.

  Args:
    samples: [N,H,W,C], or batches of such; measured as they are (not clipped).
    labels: int [N] that the samples were asked to be; None where there are none.
    reference: [M,H,W,C], or an `ImageSet`; None where no metric needs it.
    reference_name: "train", "test".
    extractor: gives features and logits; None where no metric needs them.
    metrics: some of METRICS.
    cache_dir: where to keep the features of the reference; None keeps them in memory only.
    options: of the metrics and their intervals.
    classifier: judges class accuracy; None: the extractor, whose classes have to be those of the labels.

  Raises:
    UsageError: an unknown metric, too few or non-finite samples, unlike shapes, no labels for class accuracy,
      no logits for the inception score.
  """
  check(metrics, np.iinfo(int).max, options=options)
  if extractor is not None:
    check_logits(set(metrics) - {"class_accuracy" if classifier else ""}, extractor.num_classes, extractor.name)
  if "class_accuracy" in metrics and labels is None:
    raise UsageError("class_accuracy needs labels; give them or leave it out of the metrics")
  if not re.fullmatch(r"[^/\s]+", reference_name):
    raise UsageError(f"reference name {reference_name!r}; expected no '/' and no blanks, like 'test'")
  against_reference = bool(set(metrics) & set(AGAINST_REFERENCE))
  reference = InMemory(reference, f"reference {reference_name!r}") if isinstance(reference, np.ndarray) else reference
  if isinstance(samples, np.ndarray):
    samples = [samples]
  like = (tuple(reference.shape[1:]), f"those of reference {reference_name!r}") if against_reference else None
  judge = classifier if "class_accuracy" in metrics else None
  statistics = gather(samples, extractor, like, bool(set(metrics) & set(OF_FEATURES)),
                      bool(set(metrics) & set(_SCORE if judge else OF_LOGITS)), judge)
  check(metrics, statistics.count, reference.shape[0] if against_reference else None, options)
  if labels is not None and len(labels) != statistics.count:
    raise UsageError(f"{len(labels)} labels of {statistics.count} samples")
  known = reference_features(extractor, reference, cache_dir) if against_reference else None
  values = _values(statistics, labels, known, metrics, options)
  draws = {}
  if options.bootstrap:
    keep = bs.half_samples(statistics.count, options.bootstrap, options.seed, labels)
    draws = _draws(statistics, labels, known, metrics, options, keep)

  def name(metric):
    by = judge if judge and metric == "class_accuracy" else None if metric == "saturation" else extractor
    return str(MetricName(metric, statistics.count, reference_name if metric in AGAINST_REFERENCE else _NONE,
                          by.name if by else _NONE))

  return Measured({name(metric): values[metric] for metric in metrics},
                  {name(metric): bs.interval(values[metric], draws[metric]) for metric in metrics if metric in draws})


def _values(s: Statistics, labels, reference, metrics, options) -> dict[str, float]:
  values = {}
  if "fd" in metrics:
    values["fd"] = m.frechet_distance(s.features, reference)
  if "kd" in metrics:
    values["kd"] = m.kernel_distance(s.features, reference)
  if set(metrics) & set(PRDC):
    values |= m.prdc(reference, s.features, options.k)
  if "vendi" in metrics:
    values["vendi"] = diversity.vendi_score(s.features)
  if "diversity" in metrics:
    values["diversity"] = diversity.pairwise_diversity(s.features, labels)
  if "class_accuracy" in metrics:
    values["class_accuracy"] = m.class_accuracy(s.judged, labels)
  if set(metrics) & set(_SCORE):
    values |= zip(_SCORE, diversity.inception_score(probabilities(s.logits), options.splits))
  if "saturation" in metrics:
    values["saturation"] = float(np.mean(s.saturated))
  return values


def _draws(s: Statistics, labels, reference, metrics, options, keep) -> dict[str, np.ndarray]:
  """Each metric [R] of half-samples."""
  draws = {}
  if "fd" in metrics:
    draws["fd"] = bs.frechet_distance(s.features, reference, keep)
  if "kd" in metrics:
    draws["kd"] = bs.kernel_distance(s.features, reference, keep)
  if set(metrics) & set(PRDC):
    draws |= bs.prdc(reference, s.features, keep, options.k)
  if "vendi" in metrics:
    draws["vendi"] = bs.each(lambda index: diversity.vendi_score(s.features[index]), keep)
  if "diversity" in metrics:
    draws["diversity"] = diversity.pairwise_diversity_of(s.features, labels, keep)
  if "class_accuracy" in metrics:
    right = s.judged.argmax(axis=1) == np.asarray(labels)
    draws["class_accuracy"] = bs.each(lambda index: right[index].mean(), keep)
  if set(metrics) & set(_SCORE):
    p = probabilities(s.logits)
    scores = bs.each(lambda index: diversity.inception_score(p[index], options.splits), keep)
    draws |= zip(_SCORE, scores.T)
  if "saturation" in metrics:
    draws["saturation"] = bs.each(lambda index: s.saturated[index].mean(), keep)
  return draws


def reference_features(extractor: Extractor, images: ImageSet, cache_dir=None) -> np.ndarray:
  """Features [M,D] of a reference set, computed once per extractor and content of the set."""
  key = (extractor.name, images.content)
  if key not in _memory:
    _memory[key] = _stored_features(extractor, images, cache_dir)
  _memory.move_to_end(key)
  while len(_memory) > 8:
    _memory.popitem(last=False)
  return _memory[key]


def _stored_features(extractor, images, cache_dir):
  about = {"extractor": extractor.name, "reference": images.content, "preprocessing": images.preprocessing}
  file = f"{extractor.name}-on-{images.content[:16]}.safetensors"
  path = None if cache_dir is None else pathlib.Path(cache_dir) / file
  if path is not None and path.exists():
    try:
      arrays, found = files.load_arrays(path)
      if found == about and "features" in arrays:
        return arrays["features"]
    except UsageError:
      pass  # damaged: it is only a cache, made again below
  features = gather(images.batches(), extractor).features
  if path is not None:
    files.save_arrays(path, {"features": features}, about)
  return features


def compare(a: dict[str, float], b: dict[str, float], metric: str = "fd") -> Comparison:
  """The values of one metric in two results, if they were measured alike.

  Args:
    a, b: results of `evaluate`.
    metric: "fd", or a full name where the results hold several of it.

  Raises:
    UsageError: the metric is absent, or n, reference or extractor differ (it says which), or several fit.
  """
  if "@" in metric:
    metric = str(MetricName.parse(metric))
  names_a, names_b = (_names_of(r, metric, which) for r, which in ((a, "first"), (b, "second")))
  common = [name for name in names_a if name in names_b]
  if len(common) == 1:
    return Comparison(common[0], float(a[str(common[0])]), float(b[str(common[0])]))
  if common:
    raise UsageError(f"{metric!r} is ambiguous; give one of {', '.join(map(str, common))}")
  # Name what differs between the nearest pair.
  pairs = [(x, y) for x in names_a for y in names_b]
  x, y = min(pairs, key=lambda p: sum(u != v for u, v in zip(*p)))
  differing = [f"{field} ({u} and {v})" for field, u, v in zip(MetricName._fields, x, y) if u != v]
  raise UsageError(f"{x} and {y} cannot be compared: they differ in {', '.join(differing)}")


def _names_of(results, metric, which):
  names = [MetricName.parse(name) for name in results]
  found = [name for name in names if metric in (name.metric, str(name))]
  if not found:
    have = ", ".join(sorted(results)) or "nothing"
    raise UsageError(f"the {which} result has no {metric!r}; it has {have}")
  return found
