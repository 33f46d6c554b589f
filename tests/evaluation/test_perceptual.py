"""LPIPS-diversity against all pairs one by one; agreement with captions against cosines one by one."""

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
  with pytest.raises(UsageError, match="text 1 are all 0"):
    perceptual.clip_score(a, b * [[1], [0], [1]])
  with pytest.raises(UsageError, match="unlike"):
    perceptual.clip_score(a, b[:, :1])


def cosine(a, b):
  return float(np.dot(a, b) / np.sqrt(np.dot(a, a) * np.dot(b, b)))


def related(n=60, k=40, seed=0):
  """(image features [n,8], text features [k,8], own caption of each image [n]): some are near their own, not all."""
  rng = np.random.default_rng(seed)
  texts, own = rng.standard_normal((k, 8)), rng.integers(0, k, n)
  return texts[own] * rng.uniform(0.5, 2, (n, 1)) + 1.5 * rng.standard_normal((n, 8)), texts, own


def test_retrieval_among_all_captions():
  a, b, own = related()
  ranks = np.array([sum(cosine(x, text) > cosine(x, b[i]) for text in b) for x, i in zip(a, own)])
  for top in (1, 5):
    assert 0.1 < np.mean(ranks < top) < 0.9
    np.testing.assert_array_equal(perceptual.retrieved(a, b, own, len(b), top), ranks < top)


def test_retrieval_among_some_captions():
  """An image whose own caption has rank r of K is found if none of the r better ones is drawn."""
  k, candidates, draws = 40, 6, 4000
  texts = np.stack([np.cos(np.arange(k) / k), np.sin(np.arange(k) / k)], axis=1)
  images = np.repeat([[1.0, 0.0]], draws, axis=0)
  for rank in (0, 3, 10):
    hits = perceptual.retrieved(images, texts, np.full(draws, rank), candidates)
    others = [(k - 1 - rank - i) / (k - 1 - i) for i in range(candidates - 1)]
    assert hits.mean() == pytest.approx(np.prod(others), abs=4 * 0.5 / draws**0.5)
  assert (hits != perceptual.retrieved(images, texts, np.full(draws, rank), candidates, seed=1)).any()


def test_equal_captions_are_not_found():
  assert not perceptual.retrieved(np.ones((4, 3)), np.ones((5, 3)), np.arange(4), 5).any()


def test_caption_agreement():
  rng = np.random.default_rng(2)
  x = images(30)
  features = EXTRACTOR.features(x).astype(float)
  own = rng.integers(0, 12, 30)
  texts = rng.standard_normal((12, features.shape[1])) + np.array([features[own == c].sum(axis=0) for c in range(12)])
  measure = perceptual.CaptionAgreement(EXTRACTOR, texts, own, 12, Options(bootstrap=30))
  batches = [x[:7], x[7:]]
  assert all(a is b for a, b in zip(measure.tap(batches), batches, strict=True))
  values, intervals = measure.measured()
  cosines = np.array([[cosine(image, text) for text in texts] for image in features])
  assert values == {"clip_score@30/-/flat-0": pytest.approx(100 * np.mean(cosines[np.arange(30), own].clip(0))),
                    "r_precision@30/-/flat-0": pytest.approx(np.mean(cosines.argmax(axis=1) == own))}
  assert 0.2 < values["r_precision@30/-/flat-0"] < 1
  for name, interval in intervals.items():
    assert interval.low < values[name] < interval.high
  again = perceptual.CaptionAgreement(EXTRACTOR, texts, own, 12)
  again.add(x)
  assert again.measured().values == pytest.approx(values) and again.measured().intervals == {}


def test_caption_agreement_refuses():
  texts = np.eye(48)[:5]
  for captions, candidates, words in (([0, 5], 5, "captions lie in 0..5; expected 0..4"),
                                      ([0.5], 5, "captions has .* expected 1 integers"),
                                      ([0], 6, "among 6, of 5 different captions"), ([0], 1, "among 1, of 5")):
    with pytest.raises(UsageError, match=words):
      perceptual.CaptionAgreement(EXTRACTOR, texts, captions, candidates)
  measure = perceptual.CaptionAgreement(EXTRACTOR, texts, [0, 1, 2], 5)
  with pytest.raises(UsageError, match="0 images and 3 captions"):
    measure.measured()
  measure.add(images(4))
  with pytest.raises(UsageError, match="4 images and 3 captions"):
    measure.measured()
  with pytest.raises(UsageError, match="features of image 0 are all 0"):
    perceptual.retrieved(np.zeros((1, 3)), np.eye(3), [0], 3)
