"""What a few seeds can say: intervals of means and of paired differences, and correlations. Numbers only.

No interval is given for fewer than `LEAST` seeds, and nothing is called different without one.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats

from ddil_jax.errors import UsageError

LEAST = 3  # values of which an interval is made
LEVEL = 0.95


class Interval(NamedTuple):
  """A mean of n values with its interval; `low` and `high` are None where n < LEAST."""
  mean: float
  low: float | None
  high: float | None
  n: int

  @property
  def half(self) -> float | None:
    """Half the width: mean +- half."""
    return None if self.low is None else (self.high - self.low) / 2


class Difference(NamedTuple):
  """A mean paired difference over n pairs.

  Attributes:
    mean: of value - baseline.
    low, high: its interval; None where n < LEAST.
    p: of the two-sided t-test of a mean of 0; None where n < LEAST.
    lower: pairs in which the value is below the baseline.
    n: pairs.
  """
  mean: float
  low: float | None
  high: float | None
  p: float | None
  lower: int
  n: int

  @property
  def half(self) -> float | None:
    """Half the width: mean +- half."""
    return None if self.low is None else (self.high - self.low) / 2

  @property
  def significant(self) -> bool:
    """Whether there is an interval and it excludes 0."""
    return self.low is not None and not self.low <= 0 <= self.high


class Correlation(NamedTuple):
  """A correlation r of n pairs, its interval, and p of the test of r = 0."""
  r: float
  low: float
  high: float
  p: float
  n: int


def mean_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
  """The mean and its t-interval, for values that are independent and nearly normal.

      m +- t_{n-1}((1 + level) / 2) s / sqrt(n)

  Args:
    values: finite, at least one.
    level: of confidence.

  Raises:
    UsageError: no value, or one that is not finite.
  """
  x = _finite(values, "values")
  mean = float(x.mean())
  if len(x) < LEAST:
    return Interval(mean, None, None, len(x))
  half = _half_width(x, level)
  return Interval(mean, mean - half, mean + half, len(x))


def paired_difference(values: Mapping, baseline: Mapping, level: float = LEVEL) -> Difference | None:
  """The mean of value - baseline over the seeds that both have, with the paired t-test's interval and p.

      d_s = x_s - b_s;    p = P(|T_{n-1}| >= |mean(d)| / (s_d / sqrt(n)))

  Args:
    values: {seed: finite value}.
    baseline: the same of what it is compared with.
    level: of confidence.

  Returns:
    None where no seed is shared.
  """
  shared = [seed for seed in values if seed in baseline]
  if not shared:
    return None
  d = _finite([values[seed] - baseline[seed] for seed in shared], "differences")
  mean, lower, n = float(d.mean()), int((d < 0).sum()), len(d)
  if n < LEAST:
    return Difference(mean, None, None, None, lower, n)
  half, scale = _half_width(d, level), d.std(ddof=1) / math.sqrt(n)
  # Equal differences in all seeds leave no doubt, and no t.
  p = 2 * float(scipy.stats.t.sf(abs(mean) / scale, n - 1)) if scale else float(mean == 0)
  return Difference(mean, mean - half, mean + half, p, lower, n)


def _half_width(x, level):
  return float(scipy.stats.t.ppf((1 + level) / 2, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))


def holm(p_values: Sequence[float], alpha: float = 1 - LEVEL) -> list[bool]:
  """Which of m hypotheses are rejected when the chance of even one false rejection is to be at most alpha.

      p_(1) <= alpha / m, p_(2) <= alpha / (m - 1), ... in order of size, up to the first that fails

  Args:
    p_values: of all comparisons that were made, independent or not.
    alpha: chance of any false rejection.

  Source: Holm 1979, A simple sequentially rejective multiple test procedure, section 3.
  """
  rejected = [False] * len(p_values)
  for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
    if p_values[i] > alpha / (len(p_values) - rank):
      break
    rejected[i] = True
  return rejected


def correlation(x: Sequence[float], y: Sequence[float], kind: str = "spearman",
                level: float = LEVEL) -> Correlation:
  """Correlation of pairs, with an interval by Fisher's transform.

      tanh( atanh(r) +- z((1 + level) / 2) se ),   se^2 = 1 / (n - 3)              pearson
                                                   se^2 = (1 + r^2 / 2) / (n - 3)   spearman

  Args:
    x, y: finite, [n] each, n > 3; pairs have to be independent: seeds of one setting are not.
    kind: "pearson", or "spearman", which asks for a monotone relation only.
    level: of confidence.

  Raises:
    UsageError: unlike lengths, fewer than 4 pairs, one of them constant, an unknown kind.

  Source: Fisher 1921; for ranks Bonett and Wright 2000, Sample size requirements for estimating Pearson,
  Kendall and Spearman correlations.
  """
  x, y = _finite(x, "x"), _finite(y, "y")
  if len(x) != len(y) or len(x) < 4:
    raise UsageError(f"a correlation of {len(x)} with {len(y)} values; expected as many of each, at least 4")
  if np.ptp(x) == 0 or np.ptp(y) == 0:
    raise UsageError("a correlation with values that are all the same; expected some that differ")
  tests = {"pearson": scipy.stats.pearsonr, "spearman": scipy.stats.spearmanr}
  if kind not in tests:
    raise UsageError(f"unknown correlation {kind!r}; there are: {', '.join(tests)}")
  r, p = (float(v) for v in tests[kind](x, y))
  r = min(1.0, max(-1.0, r))
  if abs(r) > 1 - 1e-12:
    return Correlation(r, r, r, p, len(x))
  half = scipy.stats.norm.ppf((1 + level) / 2) * math.sqrt((1 + r * r / 2 * (kind == "spearman")) / (len(x) - 3))
  return Correlation(r, math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half), p, len(x))


def _finite(values, what):
  x = np.asarray(values, np.float64)
  if x.ndim != 1 or not x.size or not np.isfinite(x).all():
    raise UsageError(f"{what} of shape {x.shape}; expected a list of finite numbers, at least one")
  return x
