"""Half-samples: what is computed for all of them at once is what the metrics say of each; intervals are honest."""

import numpy as np
import pytest

from ddil_jax.errors import UsageError
from ddil_jax.evaluation import bootstrap as bs
from ddil_jax.evaluation import metrics as m
from ddil_jax.evaluation import pairs


def draw(n, d=4, seed=0, scale=1.0, shift=0.0):
  return (scale * np.random.default_rng(seed).standard_normal((n, d)) + shift).astype(np.float32)


def test_halves_are_halves_of_every_label():
  labels = np.random.default_rng(0).integers(0, 7, 101)
  keep = bs.half_samples(101, 50, seed=3, labels=labels)
  assert keep.shape == (50, 101) and keep.dtype == bool
  assert set(keep.sum(axis=1)) == {50, 51}
  for c in range(7):
    size = np.sum(labels == c)
    assert set(keep[:, labels == c].sum(axis=1)) <= {size // 2, -(-size // 2)}
  # Each sample is in half of the draws; no draw is another.
  assert abs(keep.mean(axis=0) - 0.5).max() < 5 * 0.5 / np.sqrt(50)
  assert len(np.unique(keep, axis=0)) == 50
  np.testing.assert_array_equal(bs.half_samples(101, 50, 3, labels), keep)
  assert (bs.half_samples(101, 50, 4, labels) != keep).any()


@pytest.mark.parametrize("shift", [0.0, 0.7, 30.0])
@pytest.mark.parametrize("columns", [2048, 17])
def test_all_draws_at_once_equal_the_metric_of_each(monkeypatch, shift, columns):
  monkeypatch.setattr(pairs, "COLUMNS", columns)
  reference, features = draw(140, seed=1), draw(151, seed=2, scale=1.2, shift=shift)
  keep = bs.half_samples(151, 12)
  halves = [features[row] for row in keep]
  np.testing.assert_allclose(bs.frechet_distance(features, reference, keep),
                             [m.frechet_distance(half, reference) for half in halves], rtol=1e-9)
  np.testing.assert_allclose(bs.kernel_distance(features, reference, keep),
                             [m.kernel_distance(half, reference) for half in halves], rtol=1e-9)
  for k in (1, 5):
    got = bs.prdc(reference, features, keep, k)
    expected = [m.prdc(reference, half, k) for half in halves]
    for name, values in got.items():
      # A ball of k = 1 can grow beyond all candidates.
      atol = 0.02 if (k, name) == (1, "recall") else 1e-12
      np.testing.assert_allclose(values, [e[name] for e in expected], atol=atol)


def test_prdc_of_draws_with_copies_and_few_samples():
  # 40 samples are 5 images, eight times each: radii are 0, and the candidates are copies.
  reference, features = draw(30, seed=1), np.repeat(draw(5, seed=2), 8, axis=0)
  keep = bs.half_samples(40, 6)
  got = bs.prdc(reference, features, keep, k=2)
  expected = [m.prdc(reference, features[row], k=2) for row in keep]
  assert {name: v.tolist() for name, v in got.items()} == {name: [e[name] for e in expected] for name in got}
  few = draw(14, seed=3)
  keep = bs.half_samples(14, 6)
  got = bs.prdc(reference, few, keep, k=5)
  expected = [m.prdc(reference, few[row], k=5) for row in keep]
  assert {name: v.tolist() for name, v in got.items()} == {name: [e[name] for e in expected] for name in got}


def test_halves_scatter_as_the_whole_does():
  """For a mean exactly s / sqrt(N); for the Frechet and kernel distance as over independent sets."""
  x = draw(400, 1)[:, 0]
  keep = bs.half_samples(400, 4000)
  means = bs.each(lambda index: x[index].mean(), keep)
  np.testing.assert_allclose(means.std(), x.std() / np.sqrt(400), rtol=0.05)

  reference = draw(300, seed=1)
  rng = np.random.default_rng(5)
  sets = rng.standard_normal((150, 200, 4)) * 1.3 + 0.4
  keep = bs.half_samples(200, 60)
  for metric, of_halves in ((m.frechet_distance, bs.frechet_distance), (m.kernel_distance, bs.kernel_distance)):
    truth = np.std([metric(s, reference) for s in sets])
    estimates = [of_halves(s, reference, keep).std() for s in sets[:12]]
    np.testing.assert_allclose(np.mean(estimates), truth, rtol=0.2)


def test_intervals_hold_the_expected_value_and_the_mean_shows_the_bias():
  """95 % intervals of the Frechet distance at N hold its expectation at N; mean - value is its bias in N."""
  rng, reference = np.random.default_rng(7), draw(300, seed=1)
  sets = rng.standard_normal((120, 150, 4)) * 1.2
  values = np.array([m.frechet_distance(s, reference) for s in sets])
  keep = bs.half_samples(150, 60)
  found = [bs.interval(v, bs.frechet_distance(s, reference, keep)) for v, s in zip(values, sets)]
  held = np.mean([low <= values.mean() <= high for _, low, high in found])
  assert 0.85 <= held <= 1
  # An unbiased interval would be useless if it were wide: four deviations, not more.
  np.testing.assert_allclose(np.mean([high - low for _, low, high in found]), 3.92 * values.std(), rtol=0.25)
  many = m.frechet_distance(rng.standard_normal((40_000, 4)) * 1.2, reference)
  np.testing.assert_allclose(np.mean([f.mean for f in found]) - values.mean(), values.mean() - many, rtol=0.25)


def test_interval():
  draws = np.arange(101.0)
  got = bs.interval(7.0, draws, level=0.9)
  assert got.mean == 50 and got.low == pytest.approx(7 - 45) and got.high == pytest.approx(7 + 45)


def test_bad_input_is_named():
  with pytest.raises(UsageError, match="bootstrap of 1 samples"):
    bs.half_samples(1, 10)
  with pytest.raises(UsageError, match="with 1 draws"):
    bs.half_samples(10, 1)
  with pytest.raises(UsageError, match="level 95"):
    bs.interval(0.0, [1.0, 2.0], 95)
