"""Results whose names say what they are: `fd@5000/test/digits-cnn-1a2b3c4d`. Unlike ones are not compared."""

import collections
import difflib
import pathlib
import re
from typing import NamedTuple

import numpy as np

from ddil_jax.errors import UsageError
from ddil_jax.evaluation import checks, files, metrics as m
from ddil_jax.evaluation.features import Extractor

PRDC = ("precision", "recall", "density", "coverage")
METRICS = ("fd", "kd", *PRDC, "class_accuracy", "saturation")
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


def evaluate(samples, labels, reference_images, reference_name: str, extractor: Extractor,
             metrics=METRICS, cache_dir=None, k: int = 5) -> dict[str, float]:
  """Measures samples against a reference set.

  Args:
    samples: [N,H,W,C], measured as they are (not clipped).
    labels: int [N] that the samples were asked to be; None where there are none.
    reference_images: [M,H,W,C].
    reference_name: "train", "test".
    extractor: gives features and logits.
    metrics: some of METRICS.
    cache_dir: where to keep the features of the reference; None keeps them in memory only.
    k: neighbours of precision, recall, density and coverage.

  Returns:
    {name: value} with names as in `MetricName`.

  Raises:
    UsageError: an unknown metric, too few or non-finite samples, unlike shapes, no labels for class accuracy.
  """
  for metric in metrics:
    if metric not in METRICS:
      near = difflib.get_close_matches(metric, METRICS, n=1)
      raise UsageError(f"unknown metric {metric!r}" + (f"; did you mean {near[0]!r}?" if near else "")
                       + f" There are: {', '.join(METRICS)}")
  if "class_accuracy" in metrics and labels is None:
    raise UsageError("class_accuracy needs labels; give them or leave it out of the metrics")
  if not re.fullmatch(r"[^/\s]+", reference_name):
    raise UsageError(f"reference name {reference_name!r}; expected no '/' and no blanks, like 'test'")
  samples = checks.images(samples, "samples")
  reference_images = checks.images(reference_images, f"reference {reference_name!r}", samples.shape[1:])
  n = len(samples)
  against_reference = set(metrics) & {"fd", "kd", *PRDC}
  if against_reference or "class_accuracy" in metrics:
    logits, features = extractor.outputs(samples)
  if against_reference:
    reference = reference_features(extractor, reference_images, cache_dir)

  values = {}
  if "fd" in metrics:
    values["fd"] = m.frechet_distance(features, reference)
  if "kd" in metrics:
    values["kd"] = m.kernel_distance(features, reference)
  if set(metrics) & set(PRDC):
    values.update(m.prdc(reference, features, k))
  if "class_accuracy" in metrics:
    values["class_accuracy"] = m.class_accuracy(logits, labels)
  if "saturation" in metrics:
    values["saturation"] = m.saturation(samples)
  names = {metric: MetricName(metric, n, reference_name, extractor.name) for metric in against_reference}
  names["class_accuracy"] = MetricName("class_accuracy", n, extractor=extractor.name)
  names["saturation"] = MetricName("saturation", n)
  return {str(names[metric]): values[metric] for metric in metrics}


def reference_features(extractor: Extractor, images, cache_dir=None) -> np.ndarray:
  """Features [M,D] of a reference set, computed once per extractor and content of the set."""
  content = files.digest({"images": np.asarray(images)})
  key = (extractor.name, content)
  if key not in _memory:
    _memory[key] = _stored_features(extractor, images, content, cache_dir)
  _memory.move_to_end(key)
  while len(_memory) > 8:
    _memory.popitem(last=False)
  return _memory[key]


def _stored_features(extractor, images, content, cache_dir):
  about = {"extractor": extractor.name, "reference": content}
  file = f"{extractor.name}-on-{content[:16]}.safetensors"
  path = None if cache_dir is None else pathlib.Path(cache_dir) / file
  if path is not None and path.exists():
    try:
      arrays, found = files.load_arrays(path)
      if found == about and "features" in arrays:
        return arrays["features"]
    except UsageError:
      pass  # damaged: it is only a cache, made again below
  features = extractor.features(images)
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
