"""Vendi score, inception score and pairwise diversity against the authors' package and plain formulas."""

import numpy as np
import pytest
import scipy.stats
from scipy.spatial.distance import pdist
from vendi_score import vendi

from ddil_jax.errors import UsageError
from ddil_jax.evaluation import diversity as dv


def draw(n, d, seed=0):
  rng = np.random.default_rng(seed)
  return rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + 0.3


# Vendi score


@pytest.mark.parametrize("n, d", [(200, 7), (9, 30), (12, 12)])
def test_vendi_equals_the_authors_package(n, d, monkeypatch):
  monkeypatch.setattr(dv, "_ROWS", 64)
  x = draw(n, d)
  unit = x / np.linalg.norm(x, axis=1, keepdims=True)
  expected = vendi.score_dual(x)
  np.testing.assert_allclose(dv.vendi_score(x), expected, rtol=1e-10)
  np.testing.assert_allclose(dv.vendi_score(x), vendi.score(list(unit), lambda a, b: a @ b), rtol=1e-8)
  np.testing.assert_allclose(dv.vendi_score(x.astype(np.float32)), expected, rtol=1e-5)


def test_vendi_counts_unlike_samples():
  assert dv.vendi_score(np.tile(draw(1, 8), (50, 1))) == pytest.approx(1)
  orthogonal = np.repeat(np.eye(6), 4, axis=0)  # six kinds, four of each; length does not matter
  assert dv.vendi_score(orthogonal) == pytest.approx(6)
  assert dv.vendi_score(orthogonal * np.arange(1, 25)[:, None]) == pytest.approx(6)
  assert dv.vendi_score(np.eye(6)) == pytest.approx(6)
  # Two kinds with shares p and 1 - p: the exponential of their entropy.
  x = np.eye(2)[(np.arange(100) < 30).astype(int)]
  assert dv.vendi_score(x) == pytest.approx(np.exp(scipy.stats.entropy([0.3, 0.7])))


# Inception score


def scores(p, splits):
  """The score of each part by scipy's relative entropy."""
  parts = [p[i * len(p) // splits:(i + 1) * len(p) // splits] for i in range(splits)]
  return [np.exp(np.mean([scipy.stats.entropy(row, part.mean(axis=0)) for row in part])) for part in parts]


@pytest.mark.parametrize("splits", [1, 10, 7])
def test_inception_score_equals_scipys_relative_entropy(splits):
  p = np.random.default_rng(0).dirichlet(np.full(5, 0.3), 103)
  expected = scores(p, splits)
  mean, std = dv.inception_score(p, splits)
  np.testing.assert_allclose([mean, std], [np.mean(expected), np.std(expected)], rtol=1e-10, atol=1e-12)


def test_inception_score_at_its_ends():
  sure = np.eye(4)[np.arange(40) % 4]
  assert dv.inception_score(sure, 10) == pytest.approx((4, 0))
  assert dv.inception_score(np.full((40, 4), 0.25), 10) == pytest.approx((1, 0))
  assert dv.inception_score(np.eye(4)[np.zeros(40, int)], 10) == pytest.approx((1, 0))


# Pairwise diversity


def test_pairwise_diversity_equals_scipys_pdist():
  x, labels = draw(90, 6), np.random.default_rng(1).integers(0, 3, 90)
  np.testing.assert_allclose(dv.pairwise_diversity(x), pdist(x).mean(), rtol=1e-12)
  expected = np.mean([pdist(x[labels == c]).mean() for c in range(3)])
  np.testing.assert_allclose(dv.pairwise_diversity(x, labels), expected, rtol=1e-12)
  np.testing.assert_allclose(dv.pairwise_diversity(x + 1e3, labels), expected, rtol=1e-9)
  # Labels are names: their numbers mean nothing.
  np.testing.assert_allclose(dv.pairwise_diversity(x, 100 - 7 * labels), expected, rtol=1e-12)
  assert dv.pairwise_diversity(np.tile(x[:1], (5, 1))) == 0


def test_pairwise_diversity_of_subsets():
  x, labels = draw(60, 4), np.arange(60) % 2
  keep = np.random.default_rng(0).random((5, 60)) < 0.5
  expected = [dv.pairwise_diversity(x[row], labels[row]) for row in keep]
  np.testing.assert_allclose(dv.pairwise_diversity_of(x, labels, keep), expected, rtol=1e-12)


# Bad input


def test_bad_input_is_named():
  x = draw(10, 3)
  zero = x.copy()
  zero[7] = 0
  with pytest.raises(UsageError, match="features of sample 7 are all 0"):
    dv.vendi_score(zero)
  with pytest.raises(UsageError, match=r"features has shape \(10,\)"):
    dv.vendi_score(x[:, 0])
  with pytest.raises(UsageError, match="probabilities has 9 samples; at least 10"):
    dv.inception_score(np.full((9, 2), 0.5))
  with pytest.raises(UsageError, match="do not sum to 1"):
    dv.inception_score(np.full((20, 3), 0.5))
  with pytest.raises(UsageError, match="splits is 0"):
    dv.inception_score(np.full((20, 2), 0.5), 0)
  with pytest.raises(UsageError, match="condition 3 has 1"):
    dv.pairwise_diversity(x, [1, 1, 1, 1, 2, 2, 2, 2, 2, 3])
  with pytest.raises(UsageError, match="expected 10 of them"):
    dv.pairwise_diversity(x, [1, 1])
