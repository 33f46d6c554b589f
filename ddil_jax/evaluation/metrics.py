"""Distances between sets of features: Frechet, kernel, precision/recall, density/coverage.

All in float64 on the host; what is pairwise goes in tiles (`pairs.py`), so that any size fits in memory.
"""

import threading

import numpy as np
import scipy.linalg

from ddil_jax.errors import UsageError
from ddil_jax.evaluation import checks, pairs
from ddil_jax.evaluation.pairs import Points

_ROWS = 4096  # of a block in a QR decomposition


def frechet_distance(feats_a, feats_b) -> float:
  """The Frechet (2-Wasserstein) distance, squared, of two Gaussians fitted to features.

      |m_a - m_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2))

  With C = R^T R from a QR decomposition of the centred features, the last trace is the sum of
  the singular values of R_a R_b^T: no covariance is squared or inverted, so that it stays exact
  when the covariances are rank deficient (fewer samples than features).

  Args:
    feats_a: [N,D], N >= 2.
    feats_b: [M,D], M >= 2.

  Returns:
    The distance, >= 0; it has a positive bias that falls with N and M: compare at equal N only.

  Raises:
    UsageError: fewer than 2 samples, unlike D, non-finite values.

  Source: Heusel et al. 2017 (arXiv 1706.08500), eq. 6.
  """
  a, b = checks.row_pair(feats_a, feats_b, ("features a", "features b"), least=2, dtype=None)
  return frechet_of_moments(moments(a), moments(b))


def moments(x) -> tuple[np.ndarray, np.ndarray]:
  """Mean [D] and root R of the covariance C = R^T R of features [N,D]; in blocks, so that N may be large."""
  mean = x.mean(axis=0, dtype=np.float64)
  root = np.empty((0, x.shape[1]))
  # Narrow blocks are decomposed many times slower by several BLAS threads than by one.
  with pairs.one_blas_thread(x.shape[1] < 512):
    for i in range(0, len(x), _ROWS):
      block = (x[i:i + _ROWS] - mean) / np.sqrt(len(x) - 1)
      root = np.linalg.qr(np.concatenate([root, block]), mode="r")
  return mean, root


def frechet_of_moments(a, b) -> float:
  """`frechet_distance` of two sets from their `moments`."""
  (mean_a, root_a), (mean_b, root_b) = a, b
  cross = scipy.linalg.svdvals(root_a @ root_b.T).sum()
  return max(0.0, float(np.sum((mean_a - mean_b)**2) + np.sum(root_a**2) + np.sum(root_b**2) - 2 * cross))


def kernel_distance(feats_a, feats_b, block: int | None = None, num_blocks: int = 100,
                    seed: int = 0) -> float:
  """Unbiased squared MMD with the cubic kernel of KID, on whole sets or averaged over random blocks.

      k(x, y) = (x . y / D + 1)^3
      MMD^2 = mean_{i != j} k(a_i, a_j) + mean_{i != j} k(b_i, b_j) - 2 mean_{i,j} k(a_i, b_j)

  Args:
    feats_a: [N,D], N >= 2.
    feats_b: [M,D], M >= 2.
    block: None takes whole sets; a number averages over `num_blocks` random subsets of that size.
    num_blocks, seed: of the blocks.

  Returns:
    The estimate; it may be negative. It is unbiased for independent samples. Classes asked for in equal
    numbers are not: two of N such samples are less often of one class than two of the model's, so that
    the estimate is low by about 1/N of what the kernel's mean is larger within classes than over all.

  Raises:
    UsageError: fewer samples than 2 or than `block`, unlike D, non-finite values.

  Source: Binkowski et al. 2018 (arXiv 1801.01401), section 4.
  """
  a, b = checks.row_pair(feats_a, feats_b, ("features a", "features b"), least=2)
  if block is None:
    return _cubic_mmd2(a, b)
  if not 2 <= block <= min(len(a), len(b)):
    raise UsageError(f"blocks of {block} from {len(a)} and {len(b)} samples; "
                     f"expected 2..{min(len(a), len(b))}")
  if num_blocks < 1:
    raise UsageError(f"num_blocks is {num_blocks}; expected at least 1")
  rng = np.random.default_rng(seed)
  pick = lambda x: x[rng.choice(len(x), block, replace=False)]  # noqa: E731
  return float(np.mean([_cubic_mmd2(pick(a), pick(b)) for _ in range(num_blocks)]))


def _cubic_mmd2(a, b):
  def total(x, y):
    def block(rows):
      return sum(float(cubic_kernel(x[rows], y[cols]).sum()) for cols in pairs.columns(len(y)))
    return sum(pairs.over_rows(block, x))

  def within(x):
    return (total(x, x) - cubic_diagonal(x).sum()) / (len(x) * (len(x) - 1))

  return float(within(a) + within(b) - 2 * total(a, b) / (len(a) * len(b)))


def cubic_kernel(x, y) -> np.ndarray:
  """(x . y / D + 1)^3 of vectors [N,D] and [M,D]: [N,M]."""
  k = x @ y.T
  k /= x.shape[1]
  k += 1
  square = k * k  # k**3 takes several times as long
  return np.multiply(square, k, out=square)


def cubic_diagonal(x) -> np.ndarray:
  """(|x|^2 / D + 1)^3 of vectors [N,D]: [N]."""
  return (np.sum(x**2, axis=1) / x.shape[1] + 1)**3


def prdc(real, fake, k: int = 5) -> dict[str, float]:
  """Precision, recall, density and coverage by k-nearest-neighbour balls.

  With r_k(x) the distance of x to its k-th neighbour in its own set (itself excluded), strictly inside:

      precision = mean_j [ exists i: |f_j - r_i| < r_k(r_i) ]     recall: the same with roles exchanged
      density   = 1/(k M) sum_j sum_i [ |f_j - r_i| < r_k(r_i) ]
      coverage  = mean_i [ min_j |f_j - r_i| < r_k(r_i) ]

  Args:
    real: [N,D] reference features, N > k.
    fake: [M,D] features of samples, M > k.
    k: neighbours.

  Returns:
    {"precision", "recall", "density", "coverage"}.

  Raises:
    UsageError: k < 1, no more than k samples in a set, unlike D, non-finite values.

  Source: Naeem et al. 2020 (arXiv 2002.09797), sections 2 and 3.
  """
  real, fake, rounding = centred(real, fake, k)
  real_radii = pairs.neighbour_distance2(real, k) - rounding
  fake_radii = pairs.neighbour_distance2(fake, k) - rounding
  covering = np.zeros(len(fake.x), np.int64)  # real balls that hold the fake point
  recalled, covered = np.zeros(len(real.x), bool), np.zeros(len(real.x), bool)
  lock = threading.Lock()

  def block(rows):
    for cols, d2 in pairs.squared_distance_tiles(real, fake, rows):
      inside = d2 < real_radii[rows, None]
      covered[rows] |= inside.any(axis=1)
      recalled[rows] |= (d2 < fake_radii[cols]).any(axis=1)
      count = np.count_nonzero(inside, axis=0)
      with lock:
        covering[cols] += count

  pairs.over_rows(block, real.x)
  return {"precision": float(np.mean(covering > 0)), "recall": float(np.mean(recalled)),
          "density": float(np.mean(covering) / k), "coverage": float(np.mean(covered))}


def centred(real, fake, k: int) -> tuple[Points, Points, float]:
  """The checked sets of `prdc`, with the real mean at 0, and a bound for the rounding of squared distances.

  A point on a ball's boundary is outside, whatever the rounding: the bound is taken off squared radii.
  """
  if k < 1:
    raise UsageError(f"k is {k}; expected at least 1 neighbour")
  real, fake = checks.row_pair(real, fake, ("real features", "fake features"), least=k + 1)
  center = real.mean(axis=0)
  real, fake = Points.of(real - center), Points.of(fake - center)
  return real, fake, 1e-12 * max(real.norms.max(), fake.norms.max())


def class_accuracy(logits, labels) -> float:
  """Share of samples that the classifier assigns to the class they were asked to be.

  Args:
    logits: [N,K].
    labels: int [N] in 0..K-1.

  Raises:
    UsageError: unlike lengths, labels out of range, non-finite logits.
  """
  logits = checks.rows(logits, "logits")
  return float(np.mean(logits.argmax(axis=1) == checks.class_labels(labels, len(logits), logits.shape[1])))


def saturation(images, bound: float = 1.0, tol: float = 1e-3) -> float:
  """Share of pixels at or beyond the bound: mean [ |x| >= bound - tol ].

  Args:
    images: [N,H,W,C].
    bound: of the box [-bound, bound].
    tol: how near counts as at the bound.

  Raises:
    UsageError: not [N,H,W,C], non-finite values.
  """
  return float(np.mean(saturated(images, bound, tol)))


def saturated(images, bound: float = 1.0, tol: float = 1e-3) -> np.ndarray:
  """`saturation` of each image: [N]."""
  return np.mean(np.abs(checks.images(images, "images")) >= bound - tol, axis=(1, 2, 3))
