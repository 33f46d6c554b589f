"""Distances between sets of features: Frechet, kernel, precision/recall, density/coverage.

All in float64 on the host; what is pairwise goes in chunks of rows, so that any size fits in memory.
"""

from typing import Iterator

import numpy as np
import scipy.linalg

from ddil_jax.errors import UsageError
from ddil_jax.evaluation import checks

_ENTRIES = 1 << 23  # of a chunk of pairs: 64 MiB


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
  a, b = checks.row_pair(feats_a, feats_b, ("features a", "features b"), least=2)
  mean_a, root_a = _moments(a)
  mean_b, root_b = _moments(b)
  cross = scipy.linalg.svdvals(root_a @ root_b.T).sum()
  return max(0.0, float(np.sum((mean_a - mean_b)**2) + np.sum(root_a**2) + np.sum(root_b**2) - 2 * cross))


def _moments(x):
  mean = x.mean(axis=0)
  return mean, np.linalg.qr((x - mean) / np.sqrt(len(x) - 1), mode="r")


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
    The estimate; it may be negative.

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
    kernels = (x[rows] @ y.T / x.shape[1] + 1 for rows in _chunks(len(x), len(y)))
    return sum(np.vdot(k * k, k) for k in kernels)  # k**3 takes several times as long

  def within(x):
    diagonal = ((np.sum(x**2, axis=1) / x.shape[1] + 1)**3).sum()
    return (total(x, x) - diagonal) / (len(x) * (len(x) - 1))

  return float(within(a) + within(b) - 2 * total(a, b) / (len(a) * len(b)))


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
  if k < 1:
    raise UsageError(f"k is {k}; expected at least 1 neighbour")
  real, fake = checks.row_pair(real, fake, ("real features", "fake features"), least=k + 1)
  center = real.mean(axis=0)  # small norms keep |x|^2 + |y|^2 - 2 x.y precise
  real, fake = real - center, fake - center
  # A point on the boundary is outside, whatever the rounding of the distances.
  rounding = 1e-12 * max(np.sum(real**2, axis=1).max(), np.sum(fake**2, axis=1).max())
  real_radii, fake_radii = _radii2(real, k) - rounding, _radii2(fake, k) - rounding
  covering = np.zeros(len(fake), np.int64)  # real balls that hold the fake point
  recalled = np.zeros(len(real), bool)
  nearest = np.zeros(len(real))
  for rows, d2 in squared_distances(real, fake):
    covering += (d2 < real_radii[rows, None]).sum(axis=0)
    recalled[rows] = (d2 < fake_radii).any(axis=1)
    nearest[rows] = d2.min(axis=1)
  return {
      "precision": float(np.mean(covering > 0)),
      "recall": float(np.mean(recalled)),
      "density": float(np.mean(covering) / k),
      "coverage": float(np.mean(nearest < real_radii)),
  }


def _radii2(x, k):
  radii = np.empty(len(x))
  for rows, d2 in squared_distances(x, x):
    d2[np.arange(len(d2)), np.arange(len(x))[rows]] = np.inf
    radii[rows] = np.partition(d2, k - 1, axis=1)[:, k - 1]
  return radii


def _chunks(n: int, m: int) -> Iterator[slice]:
  rows = max(1, _ENTRIES // m)
  return (slice(i, min(i + rows, n)) for i in range(0, n, rows))


def squared_distances(a, b) -> Iterator[tuple[slice, np.ndarray]]:
  """Yields (rows, |a_i - b_j|^2 [rows, M]) for chunks of the rows of a [N,D] against b [M,D]."""
  norms = np.sum(b**2, axis=1)
  for rows in _chunks(len(a), len(b)):
    d2 = a[rows] @ b.T
    d2 *= -2
    d2 += np.sum(a[rows]**2, axis=1)[:, None]
    d2 += norms
    yield rows, np.maximum(d2, 0, out=d2)


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
  return float(np.mean(np.abs(checks.images(images, "images")) >= bound - tol))
