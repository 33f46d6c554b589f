"""How unlike the samples of one set are: Vendi score, inception score, mean pairwise distance of features."""

import numpy as np
import scipy.linalg

from ddil_jax.errors import UsageError
from ddil_jax.evaluation import checks, pairs
from ddil_jax.evaluation.pairs import Points

_ROWS = 4096  # of a block of a Gram matrix


def vendi_score(features) -> float:
  """The effective number of unlike samples: the exponential of the entropy of the similarities' spectrum.

      VS = exp( - sum_i l_i log l_i ),   l_i the eigenvalues of K / N,   K_ij = <x_i, x_j> / (|x_i| |x_j|)

  K / N and the D x D matrix sum_i u_i u_i^T / N of the unit vectors u have the same positive
  eigenvalues; the smaller of the two is taken.

  Args:
    features: [N,D].

  Returns:
    The score, from 1 (all alike) to min(N, D).

  Raises:
    UsageError: no samples, non-finite values, a feature vector of norm 0.

  Source: Friedman & Dieng 2022 (arXiv 2210.02410), definition 3.1, and section 3 for the smaller matrix.
  """
  x = checks.rows(features, "features", dtype=None)
  n, dim = x.shape
  with pairs.one_blas_thread(dim < 512):
    if n > dim:
      gram = np.zeros((dim, dim))
      for i in range(0, n, _ROWS):
        u = _unit(x[i:i + _ROWS], i)
        gram += u.T @ u
    else:
      u = _unit(x, 0)
      gram = u @ u.T
  spectrum = scipy.linalg.eigvalsh(gram / n)
  spectrum = spectrum[spectrum > 0]
  return float(np.exp(-np.sum(spectrum * np.log(spectrum))))


def _unit(x, first):
  x = x.astype(np.float64)
  norms = np.linalg.norm(x, axis=1, keepdims=True)
  if not norms.all():
    raise UsageError(f"features of sample {first + int(norms.argmin())} are all 0: "
                     "their cosine similarity to others is undefined")
  return x / norms


def inception_score(probabilities, splits: int = 10) -> tuple[float, float]:
  """How sure a classifier is of each image and how evenly it uses its classes.

      IS = exp( mean_i KL(p_i || mean_i p_i) ),   from 1 to K

  computed on each of `splits` consecutive parts of the samples.

  Args:
    probabilities: [N,K], p_i(y) of a classifier.
    splits: number of parts.

  Returns:
    Mean and standard deviation (of the parts, not of the mean) over the parts. A part of few samples has
    a score that is too low: compare at equal N only.

  Raises:
    UsageError: fewer samples than parts, rows that are no distributions.

  Source: Salimans et al. 2016 (arXiv 1606.03498), section 4.
  """
  if splits < 1:
    raise UsageError(f"splits is {splits}; expected at least 1")
  p = checks.rows(probabilities, "probabilities", least=splits)
  if p.min() < 0 or np.abs(p.sum(axis=1) - 1).max() > 1e-3:
    raise UsageError("probabilities are negative or do not sum to 1")
  ends = [i * len(p) // splits for i in range(splits + 1)]
  scores = [_score(p[start:stop]) for start, stop in zip(ends, ends[1:])]
  return float(np.mean(scores)), float(np.std(scores))


def _score(p):
  tiny = np.finfo(np.float64).tiny  # 0 log 0 is 0
  log_ratio = np.log(np.maximum(p, tiny)) - np.log(np.maximum(p.mean(axis=0), tiny))
  return np.exp(np.mean(np.sum(p * log_ratio, axis=1)))


def pairwise_diversity(features, labels=None) -> float:
  """Mean distance of the features of two samples of the same condition.

      mean_c mean_{i < j, c_i = c_j = c} |f_i - f_j|

  LPIPS-diversity is the same with squared distances of LPIPS embeddings: `perceptual.LpipsDiversity`.

  Args:
    features: [N,D].
    labels: int [N], the condition of each sample; None: all have the same.

  Returns:
    The mean, >= 0, in units of the features; unbiased.

  Raises:
    UsageError: fewer than 2 samples of a condition, non-finite values, labels of another length.

  Source: DDIL (arXiv 2410.11971) names LPIPS-diversity among its metrics; this form of it is ours.
  """
  return float(pairwise_diversity_of(features, labels, None)[0])


def pairwise_diversity_of(features, labels, keep) -> np.ndarray:
  """`pairwise_diversity` [R] of subsets keep bool [R,N]; None is the whole set alone."""
  x = checks.rows(features, "features", least=2)
  keep = np.ones((1, len(x)), bool) if keep is None else keep
  labels = np.zeros(len(x), int) if labels is None else np.asarray(labels)
  if labels.shape != (len(x),):
    raise UsageError(f"labels has shape {labels.shape}; expected {len(x)} of them")
  return np.mean([_mean_distance(x[labels == c], keep[:, labels == c], c) for c in np.unique(labels)], axis=0)


def _mean_distance(x, keep, label):
  counts = keep.sum(axis=1)
  if counts.min() < 2:
    raise UsageError(f"diversity needs at least 2 samples of each condition; condition {label} has {counts.min()}")
  points, weights = Points.of(x - x.mean(axis=0)), keep.astype(np.float64)

  def block(rows):
    total = np.zeros(len(keep))
    for cols, d2 in pairs.squared_distance_tiles(points, points, rows):
      pairs.set_diagonal(d2, rows, cols, 0)
      distance = np.sqrt(d2, out=d2)
      total += np.einsum("rm,rm->r", weights[:, rows] @ distance, weights[:, cols])
    return total

  return np.sum(pairs.over_rows(block, points.x), axis=0) / (counts * (counts - 1))
