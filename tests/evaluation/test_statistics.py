"""Statistics against scipy.stats, and against what they promise."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from ddil_jax.errors import UsageError
from ddil_jax.evaluation import statistics


@pytest.mark.parametrize("n", [3, 5, 30])
def test_mean_interval_is_that_of_scipy(n):
  x = np.random.default_rng(n).normal(3, 2, n)
  found = statistics.mean_interval(x)
  expected = scipy.stats.ttest_1samp(x, 0).confidence_interval(0.95)
  assert (found.mean, found.low, found.high) == pytest.approx((x.mean(), *expected)) and found.n == n
  assert found.half == pytest.approx(scipy.stats.sem(x) * scipy.stats.t.ppf(0.975, n - 1))
  wide = statistics.mean_interval(x, 0.99)
  assert (wide.low, wide.high) == pytest.approx(tuple(scipy.stats.ttest_1samp(x, 0).confidence_interval(0.99)))


@pytest.mark.parametrize("n", [1, 2])
def test_no_interval_of_fewer_than_three(n):
  values = dict(enumerate([1.0, 1.1][:n]))
  assert statistics.mean_interval(list(values.values())) == (pytest.approx(1 + .05 * (n - 1)), None, None, n)
  found = statistics.paired_difference(values, {seed: v - 5 for seed, v in values.items()})
  assert (found.low, found.p, found.half, found.significant) == (None, None, None, False)
  assert found.mean == pytest.approx(5) and found.n == n


def test_paired_difference_is_scipys_paired_test_over_shared_seeds():
  rng = np.random.default_rng(0)
  values = {seed: 4 + rng.normal() for seed in range(1, 9)}
  baseline = {seed: values.get(seed, 0) + .5 + .1 * rng.normal() for seed in range(0, 7)}
  shared = range(1, 7)
  test = scipy.stats.ttest_rel([values[s] for s in shared], [baseline[s] for s in shared])
  found = statistics.paired_difference(values, baseline)
  assert found.n == 6 and found.p == pytest.approx(test.pvalue)
  assert (found.low, found.high) == pytest.approx(tuple(test.confidence_interval(0.95)))
  assert found.lower == sum(values[s] < baseline[s] for s in shared)
  assert found.significant and test.pvalue < .05
  assert statistics.paired_difference({0: 1.}, {1: 1.}) is None


def test_interval_excludes_zero_exactly_where_p_is_below_five_percent():
  rng = np.random.default_rng(1)
  seen = set()
  for _ in range(300):
    d = statistics.paired_difference(dict(enumerate(rng.normal(.5, 1, 5))), dict.fromkeys(range(5), 0.))
    assert d.significant == (d.p < .05)
    seen.add(d.significant)
  assert seen == {True, False}


def test_intervals_cover_the_truth_as_often_as_they_say():
  """4 seeds: the 95 % interval holds the mean in 95 of 100 cases, to within 3 standard errors."""
  x = np.random.default_rng(2).normal(size=(2000, 4))
  held = np.mean([i.low <= 0 <= i.high for i in map(statistics.mean_interval, x)])
  assert abs(held - .95) < 3 * math.sqrt(.95 * .05 / 2000)


def test_differences_that_are_all_the_same():
  seeds = {0: 1., 1: 2., 2: 3.}
  same = statistics.paired_difference(seeds, seeds)
  assert (same.low, same.high, same.p, same.significant) == (0, 0, 1, False)
  shifted = statistics.paired_difference({s: v + 1 for s, v in seeds.items()}, seeds)
  assert (shifted.low, shifted.high, shifted.p, shifted.significant) == (1, 1, 0, True)


def closed_test(p_values, alpha):
  """Holm's procedure as the closed test by Bonferroni: a hypothesis falls if every set that holds it does."""
  every = range(len(p_values))
  sets = [s for k in every for s in itertools.combinations(every, k + 1)]
  return [all(min(p_values[j] for j in s) <= alpha / len(s) for s in sets if i in s) for i in every]


@pytest.mark.parametrize("p_values", [
    [], [.04], [.06], [.01, .04, .03, .005], [.01, .02, .03, .04], [.049, .051, .0001], [.025, .025]])
def test_holm_is_the_closed_bonferroni_test(p_values):
  assert statistics.holm(p_values) == closed_test(p_values, .05)


@pytest.mark.parametrize("n", [5, 40])
def test_correlations_are_those_of_scipy(n):
  rng = np.random.default_rng(n)
  x = rng.normal(size=n)
  y = .6 * x + rng.normal(size=n)
  found, test = statistics.correlation(x, y, "pearson"), scipy.stats.pearsonr(x, y)
  assert (found.r, found.p) == pytest.approx(tuple(test)) and found.n == n
  assert (found.low, found.high) == pytest.approx(tuple(test.confidence_interval(0.95)))
  ranks, test = statistics.correlation(np.exp(x), y), scipy.stats.spearmanr(x, y)
  assert (ranks.r, ranks.p) == pytest.approx(tuple(test))
  # Wider than Pearson's of the same ranks, by the factor of the source.
  plain = statistics.correlation(scipy.stats.rankdata(x), scipy.stats.rankdata(y), "pearson")
  widths = [math.atanh(c.high) - math.atanh(c.low) for c in (ranks, plain)]
  assert widths[0] / widths[1] == pytest.approx(math.sqrt(1 + ranks.r**2 / 2))


def test_spearman_interval_is_near_the_bootstrap():
  rng = np.random.default_rng(3)
  x = rng.normal(size=200)
  y = x + rng.normal(size=200)
  found = statistics.correlation(x, y)
  index = rng.integers(0, 200, (500, 200))
  low, high = np.quantile([scipy.stats.spearmanr(x[i], y[i])[0] for i in index], (.025, .975))
  assert (found.low, found.high) == pytest.approx((low, high), abs=.03)


def test_perfect_correlation_has_no_width():
  assert statistics.correlation([1, 2, 3, 4], [1, 4, 9, 16])[:3] == (1, 1, 1)
  assert statistics.correlation([1, 2, 3, 4], [-2, -4, -6, -8], "pearson").high == pytest.approx(-1)


@pytest.mark.parametrize("call, words", [
    (lambda: statistics.mean_interval([]), "at least one"),
    (lambda: statistics.mean_interval([1., float("nan")]), "finite"),
    (lambda: statistics.correlation([1, 2, 3], [1, 2, 3]), "at least 4"),
    (lambda: statistics.correlation([1, 2, 3, 4], [1, 2, 3]), "as many of each"),
    (lambda: statistics.correlation([1, 2, 3, 4], [1, 1, 1, 1]), "all the same"),
    (lambda: statistics.correlation([1, 2, 3, 4], [1, 2, 3, 5], "kendall"), "spearman")])
def test_mistakes(call, words):
  with pytest.raises(UsageError, match=words):
    call()
