"""Covariate shift: how far the states that a student visits are from those it was trained on.

Per grid time t_k, the distance between the marginals of z_{t_k} under the student's rollout, the
teacher's rollout and the forward process: sliced Wasserstein-2 and unbiased MMD^2, with bootstrap
intervals. Under guidance the teacher itself is far from the forward marginal, so all three pairs
are measured. The same in a feature space, and how wrong the training label is on the states of each
source.
"""

import functools
from typing import Callable

import numpy as np

from ddil_jax.errors import UsageError
from ddil_jax.evaluation import checks
from ddil_jax.evaluation.pairs import squared_distances


def sliced_wasserstein2(a, b, num_projections: int = 64, seed: int = 0) -> float:
  """Sliced Wasserstein-2 distance between two sets of samples.

      SW2 = sqrt( mean_theta W2^2(theta . a, theta . b) ),   W2^2 = int_0^1 (F_a^-1(u) - F_b^-1(u))^2 du

  The directions theta are unit vectors, uniform on the sphere and orthogonal in blocks of D, which
  lowers the variance. A unit vector already normalises by sqrt(D): a mean shift delta gives
  |delta| / sqrt(D), the root mean square shift *per pixel*, whatever the image size. The integral
  over the empirical quantile functions is exact, also for unequal sample sizes.

  Args:
    a: [N, ...].
    b: [M, ...] of the same sample shape.
    num_projections: P.
    seed: of the directions.

  Returns:
    SW2 >= 0 in units of the samples. Its bias grows as samples get fewer: compare it with the floor,
    the distance of two independent draws of one distribution at the same N and M.

  Raises:
    UsageError: empty sets, unlike shapes, non-finite values.

  Source: Bonneel et al. 2015, Sliced and Radon Wasserstein barycenters of measures, section 3.
  """
  a, b = checks.row_pair(a, b, ("samples a", "samples b"))
  theta = directions(a.shape[1], num_projections, seed)
  return _sw2_sorted(np.sort(theta @ a.T, axis=1), np.sort(theta @ b.T, axis=1))


def directions(dim: int, num: int, seed: int) -> np.ndarray:
  """Unit directions [num, dim], each uniform on the sphere, orthonormal in blocks of `dim`."""
  if num < 1:
    raise UsageError(f"num_projections is {num}; expected at least 1")
  rng = np.random.default_rng(seed)
  blocks = [np.linalg.qr(rng.standard_normal((dim, min(dim, num - i))))[0].T for i in range(0, num, dim)]
  return np.concatenate(blocks)


def _sw2_sorted(x, y) -> float:
  """SW2 of sorted projections [P,N] and [P,M]."""
  i, j, weight = _coupling(x.shape[1], y.shape[1])
  return float(np.sqrt(np.mean((x[:, i] - y[:, j])**2 @ weight)))


@functools.lru_cache(maxsize=16)
def _coupling(n: int, m: int):
  """Index pairs and weights of the monotone coupling of n and m equally weighted points."""
  # Steps of the two quantile functions, in units of 1/(n m): integers, so that ties are exact.
  ends = np.union1d(np.arange(1, n + 1, dtype=np.int64) * m, np.arange(1, m + 1, dtype=np.int64) * n)
  starts = np.concatenate([[0], ends[:-1]])
  return starts // m, starts // n, (ends - starts) / (n * m)


def bandwidth_from(reference, num: int = 1000, seed: int = 0) -> float:
  """Bandwidth h of the RBF kernel: the median distance between pairs of reference samples.

  The reference of a covariate shift is the *forward marginal* at that time, so that every policy is
  seen through the same kernel.

  Args:
    reference: [N, ...], N >= 2.
    num: at most so many of them, drawn without replacement.

  Raises:
    UsageError: fewer than 2 samples, non-finite values, all samples equal.
  """
  h = _median_distance(checks.rows(reference, "reference", least=2), num, seed)
  if h is None:
    raise UsageError("the reference's samples are all alike: the median distance is 0, no bandwidth follows")
  return h


def _median_distance(x, num: int = 1000, seed: int = 0) -> float | None:
  """Median distance of pairs of x [N,D], at most `num` of them; None if it is 0 to rounding."""
  if len(x) > num:
    x = x[np.random.default_rng(seed).choice(len(x), num, replace=False)]
  x = x - x.mean(axis=0)
  i = np.arange(len(x))
  d2 = [d[i[rows, None] < i] for rows, d in squared_distances(x, x)]
  h = float(np.median(np.sqrt(np.concatenate(d2))))
  return h if h > 1e-12 * (1 + np.abs(x).max()) else None


def mmd2_unbiased(a, b, bandwidth: float) -> float:
  """Unbiased squared maximum mean discrepancy with an RBF kernel.

      k(x, y) = exp(-|x - y|^2 / (2 h^2))
      MMD^2 = mean_{i != j} k(a_i, a_j) + mean_{i != j} k(b_i, b_j) - 2 mean_{i,j} k(a_i, b_j)

  Args:
    a: [N, ...], N >= 2.
    b: [M, ...], M >= 2.
    bandwidth: h in units of the samples; see `bandwidth_from`.

  Returns:
    The estimate; 0 in the mean when the distributions are equal, so it may be negative.

  Raises:
    UsageError: fewer than 2 samples, unlike shapes, non-finite values, h <= 0.

  Source: Gretton et al. 2012, A kernel two-sample test (JMLR 13), lemma 6.
  """
  a, b = checks.row_pair(a, b, ("samples a", "samples b"), least=2)
  if not bandwidth > 0:
    raise UsageError(f"bandwidth is {bandwidth}; expected a number above 0")
  ones = [np.ones((1, len(x))) for x in (a, b)]
  terms = [_kernel_mean(x, y, u, v, bandwidth, x is y)
           for x, y, u, v in ((a, a, ones[0], ones[0]), (b, b, ones[1], ones[1]), (a, b, *ones))]
  return float((terms[0] + terms[1] - 2 * terms[2])[0])


def _kernel_mean(a, b, wa, wb, bandwidth, within: bool) -> np.ndarray:
  """Weighted means [R] of k(a_i, b_j) under weights wa [R,N], wb [R,M]; `within` leaves out i = j.

  The exponential is taken in the weights' dtype: float32 is 5 times as fast and good to 1e-6.
  """
  total = np.zeros(len(wa))
  for rows, d2 in squared_distances(a, b):
    kernel = np.exp((d2 * (-0.5 / bandwidth**2)).astype(wa.dtype))
    if within:
      kernel[np.arange(len(kernel)), np.arange(len(a))[rows]] = 0
    total += np.sum((wa[:, rows] @ kernel) * wb, axis=1, dtype=np.float64)
  pairs = wa.sum(axis=1) * wb.sum(axis=1) - (np.sum(wa * wb, axis=1) if within else 0)
  return total / pairs


def bootstrap(fn: Callable, a, b, num: int = 100, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
  """Bootstrap interval of a distance fn(a, b) under resampling of both sets.

  Resampling repeats points, which moves a distance up as a smaller sample would; so the quantiles of
  the resampled values are shifted such that their mean is the estimate: the interval says how much
  the estimate scatters, not where the distance of the infinite sets is. See the floor for that.

  Args:
    fn: (a, b) -> float.
    a, b: [N, ...], [M, ...].
    num: resamplings.
    level: of the interval.

  Returns:
    (low, high).

  Raises:
    UsageError: num < 2, level outside (0, 1).
  """
  _check_bootstrap(num, level)
  a, b = np.asarray(a), np.asarray(b)
  rng = np.random.default_rng(seed)
  draws = [fn(a[rng.integers(len(a), size=len(a))], b[rng.integers(len(b), size=len(b))]) for _ in range(num)]
  return _interval(fn(a, b), np.asarray(draws), level)


def _check_bootstrap(num, level):
  if num < 2 or not 0 < level < 1:
    raise UsageError(f"bootstrap of {num} draws at level {level}; expected at least 2 and 0 < level < 1")


def _interval(estimate, draws, level):
  low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2]) + (estimate - np.mean(draws))
  return float(low), float(high)


def shift_curves(student_path, teacher_path, forward_path, grid, floor_path=None, num_projections: int = 64,
                 num_bootstrap: int = 20, level: float = 0.95, seed: int = 0, space: str = "",
                 paired: bool = False) -> list[dict[str, float]]:
  """Covariate shift per grid time, in state space or, given features of the states, in their space.

  Pairs: student_forward, student_teacher, teacher_forward and, with a second forward draw, `floor`
  (forward against forward: what equal distributions measure at this sample size). The kernel's
  bandwidth at t_k is the median heuristic on the forward marginal of t_k.

  Args:
    student_path, teacher_path, forward_path: [K+1,N,H,W,C], states at t_0 > ... > t_K, or [K+1,N,D],
      features of them. N may differ, but SW2 and its floor have the same bias at equal N only. No
      sample may be there twice: near t = 0 a repeated image makes its copies neighbours and MMD^2
      large.
    grid: [K+1] the times.
    floor_path: a second, independent draw of the forward path, or None.
    num_projections: of the sliced distance.
    num_bootstrap, level: of the intervals.
    seed: of directions and resampling.
    space: "" or a word before the names of all distances, such as "feature_".
    paired: the i-th samples of all sets belong together, since they have one label or start from the same
      noise: they are resampled together. Else the sets are resampled independently.

  Returns:
    A row per k: {"t", "k", "bandwidth", "sw2_<pair>", "mmd2_<pair>", and each with "_low", "_high"};
    without bandwidth and mmd2 at a time where all forward samples are alike, as features of pure noise
    may be.

  Raises:
    UsageError: unlike shapes, lengths that differ from the grid's, fewer than 2 samples, non-finite states,
      paired sets of unlike N.
  """
  _check_bootstrap(num_bootstrap, level)
  grid = np.asarray(grid, np.float64)
  paths = {"student": student_path, "teacher": teacher_path, "forward": forward_path}
  pairs = {"student_forward": ("student", "forward"), "student_teacher": ("student", "teacher"),
           "teacher_forward": ("teacher", "forward")}
  if floor_path is not None:
    paths["second forward"] = floor_path
    pairs["floor"] = ("second forward", "forward")
  paths = {name: np.asarray(path) for name, path in paths.items()}
  shape = paths["forward"].shape
  for name, path in paths.items():
    if path.ndim < 3 or path.shape[0] != len(grid) or path.shape[2:] != shape[2:]:
      raise UsageError(f"the {name} path has shape {path.shape}; expected [{len(grid)}, N, "
                       f"{', '.join(map(str, shape[2:]))}], as the grid and the forward path say")
  if paired and len({path.shape[1] for path in paths.values()}) > 1:
    raise UsageError(f"paired sets of {', '.join(str(path.shape[1]) for path in paths.values())} samples; equal"
                     " numbers are needed")
  theta = directions(int(np.prod(shape[2:])), num_projections, seed)
  rng = np.random.default_rng([seed, 1])
  rows = []
  for k, t in enumerate(grid):
    x = {name: checks.rows(path[k], f"the {name} path at k = {k}", least=2) for name, path in paths.items()}
    draws = {name: _resamplings(rng, len(v), num_bootstrap) for name, v in x.items()}
    if paired:
      draws = dict.fromkeys(draws, draws["forward"])
    row = {"t": float(t), "k": k}
    values = {"sw2": _sw2_draws(x, draws, pairs, theta)}
    bandwidth = _median_distance(x["forward"], seed=seed)
    if bandwidth is not None:
      row[f"{space}bandwidth"] = bandwidth
      values["mmd2"] = _mmd2_draws(x, draws, pairs, bandwidth)
    for kind, of_pair in values.items():
      for pair, v in of_pair.items():
        row |= _with_interval(f"{space}{kind}_{pair}", v, level)
    rows.append(row)
  return rows


def _with_interval(name, v, level):
  """The row entries of an estimate v[0] and its resamplings v[1:]."""
  low, high = _interval(v[0], v[1:], level)
  return {name: float(v[0]), f"{name}_low": low, f"{name}_high": high}


def label_error_curves(labels: dict, references: dict, grid, num_bootstrap: int = 20, level: float = 0.95,
                       seed: int = 0) -> list[dict[str, float]]:
  """How wrong the training label is, per grid time and state source.

      E_k = sqrt( mean_n mean_pixel (label(z_n) - reference(z_n))^2 ),   z_n the source's states at t_k

  Args:
    labels, references: {source: [K,N,H,W,C]}, the label at each state and what it should be: the true
      denoiser's estimate where that is known (`models/exact.py`), else the best that the teacher can do.
    grid: [K] the times; the clean end, where there is nothing to estimate, has no label.
    num_bootstrap, level: of the intervals, over samples.
    seed: of the resampling.

  Returns:
    A row per k: {"t", "k", "label_error_<source>", "_low", "_high"}, in units of the samples, per pixel.

  Raises:
    UsageError: unlike shapes, lengths that differ from the grid's, fewer than 2 samples, non-finite values.
  """
  _check_bootstrap(num_bootstrap, level)
  rows = [{"t": float(t), "k": k} for k, t in enumerate(np.asarray(grid, np.float64))]
  rng = np.random.default_rng([seed, 2])
  for source, label in labels.items():
    label, reference = np.asarray(label), np.asarray(references[source])
    if label.shape != reference.shape or label.ndim < 3 or len(label) != len(rows):
      raise UsageError(f"labels of {source} states have shape {label.shape}, their references {reference.shape};"
                       f" expected [{len(rows)}, N, ...] of both")
    for k, row in enumerate(rows):
      both = checks.row_pair(label[k], reference[k], tuple(f"the {what} of {source} states at k = {k}"
                                                           for what in ("labels", "references")), least=2)
      squared = np.mean((both[0] - both[1])**2, axis=1)
      draws = np.sqrt(squared[_resamplings(rng, len(squared), num_bootstrap)].mean(axis=1))
      row |= _with_interval(f"label_error_{source}", draws, level)
  return rows


def _resamplings(rng, n, num):
  """Indices [1 + num, n]: first the set itself, which gives the estimate, then resamplings of it."""
  return np.concatenate([np.arange(n)[None], rng.integers(n, size=(num, n))])


def _sw2_draws(x, draws, pairs, theta):
  projected = {name: (theta @ v.T).astype(np.float32) for name, v in x.items()}
  values = {pair: [] for pair in pairs}
  for r in range(len(draws["forward"])):
    ordered = {name: np.sort(np.take(p, draws[name][r], axis=1), axis=1) for name, p in projected.items()}
    for pair, (a, b) in pairs.items():
      values[pair].append(_sw2_sorted(ordered[a], ordered[b]))
  return {pair: np.asarray(v) for pair, v in values.items()}


def _mmd2_draws(x, draws, pairs, bandwidth):
  # A resampling is a weighting of the points; a point is never paired with its own copy (that would
  # count k = 1 as if two draws had met).
  weights = {name: np.stack([np.bincount(i, minlength=len(x[name])) for i in d]).astype(np.float32)
             for name, d in draws.items()}

  def mean(a, b):
    return _kernel_mean(x[a], x[b], weights[a], weights[b], bandwidth, within=a == b)

  within = {name: mean(name, name) for name in x}
  return {pair: within[a] + within[b] - 2 * mean(a, b) for pair, (a, b) in pairs.items()}
