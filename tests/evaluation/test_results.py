import re

import numpy as np
import pytest

from ddil_jax import files
from ddil_jax.errors import UsageError
from ddil_jax.evaluation import bootstrap as bs
from ddil_jax.evaluation import diversity, results
from ddil_jax.evaluation import metrics as m
from ddil_jax.evaluation.features import Extractor, probabilities
from ddil_jax.evaluation.image_sets import InMemory
from ddil_jax.evaluation.results import MetricName, compare, evaluate


@pytest.fixture(autouse=True)
def fresh_memory():
  results._memory.clear()


@pytest.fixture
def extractor():
  """A fixed linear map with two classes; counts its calls."""
  weights = np.random.default_rng(0).standard_normal((16, 6))
  calls = []

  def outputs(images):
    calls.append(len(images))
    features = images.reshape(len(images), -1) @ weights
    return features[:, :2], features

  made = Extractor("linear-0a1b2c3d", 2, outputs)
  return made, calls


def images(n, seed=0, shift=0.0):
  return np.clip(0.5 * np.random.default_rng(seed).standard_normal((n, 4, 4, 1)) + shift, -1, 1)


def test_names_round_trip():
  text = "fd@5000/test/digits-cnn-1a2b3c4d"
  name = MetricName.parse(text)
  assert name == MetricName("fd", 5000, "test", "digits-cnn-1a2b3c4d")
  assert str(name) == text
  assert MetricName.parse(str(MetricName("saturation", 7))) == MetricName("saturation", 7)
  for bad in ("fd", "fd@5k/t/x", "fd@0/test/x", "fd@5/test", "fd@5/t t/x", "fd@5/a/b/c", "@5/a/b"):
    with pytest.raises(UsageError, match="is no metric name; expected metric@n/reference/extractor"):
      MetricName.parse(bad)


def test_evaluate_gives_every_metric_under_its_name(extractor):
  extractor, calls = extractor
  samples, reference = images(40, 1, 0.1), images(60, 2)
  labels = np.arange(40) % 2
  got, intervals = evaluate(samples, labels, reference, "test", extractor)
  logits, fake = extractor.outputs(samples)
  real = extractor.features(reference)
  tail, alone = "@40/test/linear-0a1b2c3d", "@40/-/linear-0a1b2c3d"
  score, std = diversity.inception_score(probabilities(logits), 10)
  assert got == {
      f"fd{tail}": m.frechet_distance(fake, real), f"kd{tail}": m.kernel_distance(fake, real),
      **{f"{k}{tail}": v for k, v in m.prdc(real, fake, 5).items()},
      f"class_accuracy{alone}": m.class_accuracy(logits, labels), "saturation@40/-/-": m.saturation(samples),
      f"vendi{alone}": diversity.vendi_score(fake), f"diversity{alone}": diversity.pairwise_diversity(fake, labels),
      f"inception_score{alone}": score, f"inception_score_std{alone}": std}
  assert got[f"fd{tail}"] > 0 and 0 < got["saturation@40/-/-"] < 1
  assert intervals == {}
  some = evaluate(samples, None, reference, "test", extractor, metrics=("saturation", "recall")).values
  assert list(some) == ["saturation@40/-/-", f"recall{tail}"]


def test_intervals_of_every_metric(extractor):
  extractor, _ = extractor
  samples, reference, labels = images(80, 1, 0.1), images(60, 2), np.arange(80) % 2
  options = results.Options(k=3, splits=4, bootstrap=30, seed=5)
  values, intervals = evaluate(samples, labels, reference, "test", extractor, options=options)
  assert values == evaluate(samples, labels, reference, "test", extractor, options=options._replace(bootstrap=0)).values
  assert set(intervals) == set(values) and len(values) == len(results.METRICS)
  # Every one is that of its own metric on the same halves.
  halves = [np.flatnonzero(row) for row in bs.half_samples(80, 30, 5, labels)]
  for metric in results.METRICS:
    draws = [evaluate(samples[i], labels[i], reference, "test", extractor, (metric,),
                      options=options._replace(bootstrap=0)).values for i in halves]
    name, = (name for name in values if MetricName.parse(name).metric == metric)
    np.testing.assert_allclose(intervals[name], bs.interval(values[name], [next(iter(d.values())) for d in draws]),
                               rtol=1e-8, atol=1e-12)
    assert intervals[name].low < values[name] < intervals[name].high


def test_batches_are_as_good_as_an_array(extractor):
  extractor, calls = extractor
  samples, reference = images(50, 1, 0.1), images(60, 2)
  whole = evaluate(samples, np.arange(50) % 2, reference, "test", extractor)
  for size in (1, 7, 50):
    calls.clear()
    batches = (samples[i:i + size] for i in range(0, 50, size))
    again = evaluate(batches, np.arange(50) % 2, reference, "test", extractor)
    assert list(again.values) == list(whole.values)
    np.testing.assert_allclose(list(again.values.values()), list(whole.values.values()), rtol=1e-10)
    assert max(calls) <= size  # no more than a batch at once
  calls.clear()
  evaluate(samples, None, reference, "test", extractor, metrics=("saturation",))
  assert not calls  # nothing that a metric does not need


def test_reference_features_are_made_once(extractor, tmp_path):
  extractor, calls = extractor
  reference = images(60, 2)
  args = dict(reference_name="test", extractor=extractor, metrics=("fd",))
  first = evaluate(images(30, 1), None, reference, **args)
  evaluate(images(20, 3), None, reference.copy(), **args)
  assert calls == [30, 60, 20]
  evaluate(images(20, 3), None, reference + 0.01, **args)  # other content
  assert calls[3:] == [20, 60]
  results._memory.clear()
  evaluate(images(30, 1), None, reference, cache_dir=tmp_path, **args)
  results._memory.clear()
  calls.clear()
  assert evaluate(images(30, 1), None, reference, cache_dir=tmp_path, **args) == first
  assert calls == [30]  # read from disk
  arrays, about = files.load_arrays(next(tmp_path.iterdir()))
  assert about == {"extractor": "linear-0a1b2c3d", "reference": InMemory(reference).content, "preprocessing": "none"}
  assert arrays["features"].shape == (60, 6)
  path, = tmp_path.iterdir()
  damaged = bytearray(path.read_bytes())
  damaged[-3] ^= 1
  path.write_bytes(damaged)
  results._memory.clear()
  assert evaluate(images(30, 1), None, reference, cache_dir=tmp_path, **args) == first
  assert calls == [30, 30, 60]
  # A file that holds the features of another reference is not believed.
  other = images(60, 9)
  results.reference_features(extractor, InMemory(other), tmp_path)
  mine, theirs = sorted(tmp_path.iterdir(), key=lambda p: p != path)
  mine.write_bytes(theirs.read_bytes())
  results._memory.clear()
  assert evaluate(images(30, 1), None, reference, cache_dir=tmp_path, **args) == first
  for seed in range(20):
    results.reference_features(extractor, InMemory(images(5, seed)))
  assert len(results._memory) <= 8


def test_compare_takes_like_with_like():
  a = {"fd@5000/test/cnn-1": 3.0, "kd@5000/test/cnn-1": 0.1}
  b = {"fd@5000/test/cnn-1": 2.5, "kd@5000/test/cnn-1": 0.3}
  got = compare(a, b)
  assert (got.a, got.b, got.difference) == (3.0, 2.5, -0.5)
  assert str(got.name) == "fd@5000/test/cnn-1"
  assert compare(a, b, "kd").difference == pytest.approx(0.2)
  both = {**a, "fd@1000/test/cnn-1": 4.0}
  assert compare(both, b).a == 3.0  # the one that both have
  with pytest.raises(UsageError, match="ambiguous; give one of"):
    compare(both, both)
  assert compare(both, both, "fd@1000/test/cnn-1").a == 4.0


@pytest.mark.parametrize("other, differs", [
    ("fd@1000/test/cnn-1", r"n \(5000 and 1000\)$"),
    ("fd@5000/train/cnn-1", r"reference \(test and train\)$"),
    ("fd@5000/test/cnn-2", r"extractor \(cnn-1 and cnn-2\)$"),
    ("fd@1000/test/cnn-2", r"n \(5000 and 1000\), extractor \(cnn-1 and cnn-2\)$"),
])
def test_unlike_results_are_refused(other, differs):
  with pytest.raises(UsageError, match="cannot be compared: they differ in " + differs):
    compare({"fd@5000/test/cnn-1": 3.0}, {other: 2.0})


def test_a_metric_that_is_not_there_is_named():
  with pytest.raises(UsageError, match="the second result has no 'fd'; it has kd@5/t/c"):
    compare({"fd@5/t/c": 1.0}, {"kd@5/t/c": 1.0})


def test_bad_input_is_named(extractor):
  extractor, _ = extractor
  samples, reference = images(20), images(20, 1)
  args = (reference, "test", extractor)
  with pytest.raises(UsageError, match="unknown metric 'coverge'; did you mean coverage"):
    evaluate(samples, None, *args, metrics=("coverge",))
  with pytest.raises(UsageError, match="class_accuracy needs labels"):
    evaluate(samples, None, *args)
  with pytest.raises(UsageError, match="3 labels of 20 samples"):
    evaluate(samples, np.zeros(3, int), *args)
  with pytest.raises(UsageError, match="reference name 'a/b'"):
    evaluate(samples, None, reference, "a/b", extractor, metrics=("fd",))
  with pytest.raises(UsageError, match=r"shape \(4, 4, 1\), those of reference 'test' \(2, 2, 1\)"):
    evaluate(samples, None, reference[:, :2, :2], "test", extractor, metrics=("fd",))
  with pytest.raises(UsageError, match=r"shape \(2, 2, 1\), the first samples \(4, 4, 1\)"):
    evaluate(iter([samples, samples[:, :2, :2]]), None, *args, metrics=("saturation",))
  with pytest.raises(UsageError, match="no samples"):
    evaluate(iter([]), None, *args, metrics=("saturation",))
  bad = samples.copy()
  bad[3] = np.nan
  with pytest.raises(UsageError, match="samples has non-finite numbers in 1 of 20 rows, first row 3"):
    evaluate(bad, None, *args, metrics=("fd",))


@pytest.mark.parametrize("metrics, num, options, words", [
    (("density",), 5, {}, "density needs at least 6 samples (5 neighbours); there are 5"),
    (("density",), 9, {"k": 9}, "density needs at least 10 samples (9 neighbours); there are 9"),
    (("fd",), 1, {}, "fd needs at least 2 samples; there are 1"),
    (("inception_score",), 9, {}, "inception_score needs at least 10 samples (10 splits); there are 9"),
    (("recall",), 11, {"bootstrap": 10}, "at least 12 samples (5 neighbours), as the bootstrap halves them; there are 11"),
    (("fd",), 9, {"bootstrap": 1}, "bootstrap is 1; expected 0 (none) or at least 2"),
    (("fd",), 9, {"k": 0}, "k is 0"),
    (("fd",), 9, {"splits": 0}, "splits is 0"),
])
def test_too_few_samples_are_refused(extractor, metrics, num, options, words):
  with pytest.raises(UsageError, match=re.escape(words)):
    evaluate(images(num), None, images(20, 1), "test", extractor[0], metrics, options=results.Options(**options))


def test_too_small_a_reference_is_refused(extractor):
  with pytest.raises(UsageError, match=re.escape("coverage needs at least 6 reference images (5 neighbours); there are 4")):
    evaluate(images(20), None, images(4, 1), "test", extractor[0], ("coverage",))


def test_a_classifier_of_its_own_judges_the_class(extractor):
  """The extractor of published weights knows other classes, or none."""
  extractor, _ = extractor
  samples, reference, labels = images(40, 1), images(60, 2), np.arange(40) % 3
  classifier = Extractor("three-11111111", 3, lambda x: (x.reshape(len(x), -1)[:, :3], x.reshape(len(x), -1)))
  metrics, options = ("fd", "class_accuracy", "inception_score"), results.Options(bootstrap=6)
  values, intervals = evaluate(samples, labels, reference, "test", extractor, metrics, None, options, classifier)
  assert list(values) == ["fd@40/test/linear-0a1b2c3d", "class_accuracy@40/-/three-11111111",
                          "inception_score@40/-/linear-0a1b2c3d"] and set(intervals) == set(values)
  assert values["class_accuracy@40/-/three-11111111"] == m.class_accuracy(classifier.logits(samples), labels)
  without = extractor._replace(num_classes=0)
  assert evaluate(samples, labels, reference, "test", without, ("class_accuracy",), classifier=classifier).values
  for metric in ("inception_score", "class_accuracy"):
    with pytest.raises(UsageError, match=f"{metric} needs logits; the extractor linear-0a1b2c3d has none"):
      evaluate(samples, labels, reference, "test", without, (metric,))
