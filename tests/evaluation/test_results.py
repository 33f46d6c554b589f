import numpy as np
import pytest

from ddil_jax.errors import UsageError
from ddil_jax.evaluation import metrics as m, results
from ddil_jax.evaluation.features import Extractor
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
  got = evaluate(samples, labels, reference, "test", extractor)
  logits, fake = extractor.outputs(samples)
  real = extractor.features(reference)
  tail = "@40/test/linear-0a1b2c3d"
  assert got == {
      f"fd{tail}": m.frechet_distance(fake, real), f"kd{tail}": m.kernel_distance(fake, real),
      **{f"{k}{tail}": v for k, v in m.prdc(real, fake, 5).items()},
      "class_accuracy@40/-/linear-0a1b2c3d": m.class_accuracy(logits, labels),
      "saturation@40/-/-": m.saturation(samples)}
  assert got[f"fd{tail}"] > 0 and 0 < got["saturation@40/-/-"] < 1
  some = evaluate(samples, None, reference, "test", extractor, metrics=("saturation", "recall"))
  assert list(some) == ["saturation@40/-/-", f"recall{tail}"]


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
  path, = tmp_path.iterdir()
  damaged = bytearray(path.read_bytes())
  damaged[-3] ^= 1
  path.write_bytes(damaged)
  results._memory.clear()
  assert evaluate(images(30, 1), None, reference, cache_dir=tmp_path, **args) == first
  assert calls == [30, 30, 60]
  # A file that holds the features of another reference is not believed.
  other = images(60, 9)
  results.reference_features(extractor, other, tmp_path)
  mine, theirs = sorted(tmp_path.iterdir(), key=lambda p: p != path)
  mine.write_bytes(theirs.read_bytes())
  results._memory.clear()
  assert evaluate(images(30, 1), None, reference, cache_dir=tmp_path, **args) == first
  for seed in range(20):
    results.reference_features(extractor, images(5, seed))
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
  with pytest.raises(UsageError, match="unknown metric 'coverge'; did you mean 'coverage'"):
    evaluate(samples, None, *args, metrics=("coverge",))
  with pytest.raises(UsageError, match="class_accuracy needs labels"):
    evaluate(samples, None, *args)
  with pytest.raises(UsageError, match="reference name 'a/b'"):
    evaluate(samples, None, reference, "a/b", extractor, metrics=("fd",))
  with pytest.raises(UsageError, match=r"'test' has images of shape \(2, 2, 1\); expected \(4, 4, 1\)"):
    evaluate(samples, None, reference[:, :2, :2], "test", extractor, metrics=("fd",))
  bad = samples.copy()
  bad[3] = np.nan
  with pytest.raises(UsageError, match="samples has non-finite numbers in 1 of 20 rows, first row 3"):
    evaluate(bad, None, *args, metrics=("fd",))
  with pytest.raises(UsageError, match="fake features has 5 samples; at least 6 are needed"):
    evaluate(samples[:5], None, *args, metrics=("density",))
  with pytest.raises(UsageError, match="features a has 1 samples; at least 2 are needed"):
    evaluate(samples[:1], None, *args, metrics=("fd",))
