"""LPIPS-diversity against all pairs one by one; CLIP score against cosines."""

import itertools

import numpy as np
import pytest

from ddil_jax.errors import UsageError
from ddil_jax.evaluation import perceptual
from ddil_jax.evaluation.features import Extractor
from ddil_jax.evaluation.results import Options

EXTRACTOR = Extractor("flat-0", 0, lambda x: (x.reshape(len(x), -1)[:, :0], 3 + x.reshape(len(x), -1)))


def images(n=23, seed=0):
  return np.random.default_rng(seed).standard_normal((n, 4, 4, 3)).astype(np.float32)


def lpips_diversity(batches, labels=None):
  measure = perceptual.LpipsDiversity(EXTRACTOR, labels)
  for given, passed in zip(batches, measure.tap(batches), strict=True):
    assert passed is given
  return measure.value()


def by_pairs(x):
  return np.mean([np.sum((a.astype(float) - b)**2) for a, b in itertools.combinations(x, 2)])


def test_diversity_is_the_mean_over_all_pairs():
  x = images()
  batches = [x[i:i + 5] for i in range(0, len(x), 5)]
  assert lpips_diversity(batches) == pytest.approx(by_pairs(x), rel=1e-6)
  labels = np.arange(23) % 3
  wanted = np.mean([by_pairs(x[labels == c]) for c in range(3)])
  assert lpips_diversity(batches, labels) == pytest.approx(wanted, rel=1e-6)
  assert lpips_diversity([x], labels) == pytest.approx(wanted, rel=1e-6)


def test_its_interval_is_as_wide_as_the_values_of_other_samples_scatter():
  rng, labels = np.random.default_rng(1), np.arange(200) % 2
  values, widths = [], []
  for _ in range(40):
    # The mean is far larger than what differs, as in real embeddings.
    x = (20 + rng.standard_normal((200, 8, 8, 12)) * rng.gamma(2, 1, (200, 1, 1, 1))).astype(np.float32)
    measure = perceptual.LpipsDiversity(EXTRACTOR, labels, Options(bootstrap=40))
    for i in range(0, 200, 50):
      measure.add(x[i:i + 50])
    interval = measure.interval()
    assert interval.low < measure.value() < interval.high
    values.append(measure.value())
    widths.append(interval.high - interval.low)
  # 1.96 standard deviations to each side; that of 40 values is known to 11 %.
  assert np.mean(widths) == pytest.approx(2 * 1.96 * np.std(values, ddof=1), rel=0.25)


def test_interval_refuses():
  measure = perceptual.LpipsDiversity(EXTRACTOR, np.array([0] * 4 + [1] * 3), Options(bootstrap=5))
  measure.add(images(7))
  with pytest.raises(UsageError, match="at least 4 images of each condition; condition 1 has 3"):
    measure.interval()
  measure = perceptual.LpipsDiversity(EXTRACTOR)
  measure.add(images(7))
  assert measure.interval() is None


def test_equal_images_have_none():
  assert lpips_diversity([np.repeat(images(1), 9, axis=0)]) == pytest.approx(0, abs=1e-9)


def test_diversity_refuses():
  with pytest.raises(UsageError, match="condition 1 has 1"):
    lpips_diversity([images(3)], np.array([0, 0, 1]))
  with pytest.raises(UsageError, match="3 labels of at least 4 images"):
    lpips_diversity([images(4)], np.array([0, 0, 1]))
  with pytest.raises(UsageError, match="5 labels of 4 images"):
    lpips_diversity([images(4)], np.zeros(5, int))
  with pytest.raises(UsageError, match="of no images"):
    lpips_diversity([])


def test_clip_score():
  a = np.array([[2.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
  b = np.array([[5.0, 0.0], [3.0, 0.0], [-1.0, 0.0]])
  assert perceptual.clip_score(a, b) == pytest.approx(100 * (1 + 0.5**0.5 + 0) / 3)
  with pytest.raises(UsageError, match="3 images and 2 texts"):
    perceptual.clip_score(a, b[:2])
  with pytest.raises(UsageError, match="pair 1 are all 0"):
    perceptual.clip_score(a, b * [[1], [0], [1]])
  with pytest.raises(UsageError, match="unlike"):
    perceptual.clip_score(a, b[:, :1])
