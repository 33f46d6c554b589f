"""Closed-form teachers: the exact E[x0 | x_t] of Gaussian data and of Gaussian mixtures.

Every objective can be tested against them without training. An exact teacher is a Denoiser and
carries its parameters: `teacher(teacher.params, x_t, t, cond)`.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ddil_jax.diffusion.process import Process, expand
from ddil_jax.errors import UsageError
from ddil_jax.types import Array, Cond, Params


@dataclasses.dataclass(frozen=True, eq=False)
class ExactTeacher:
  """A denoiser in closed form.

  Attributes:
    params: its parameters, a dict of arrays.
    denoise: (params, x_t [B,H,W,C], t [B], cond) -> x0.
  """
  params: dict[str, Array]
  denoise: Callable

  def __call__(self, params: Params, x_t: Array, t: Array, cond: Cond, keys: Array | None = None,
               features: tuple[str, ...] = ()) -> Array:
    """E[x0 | x_t] of the data that params describe; keys play no part, features do not exist."""
    del keys
    if features:
      raise UsageError(f"unknown feature '{features[0]}'; a closed-form teacher has none")
    return self.denoise(params, x_t, t, cond)


def _like(v: Array, x: Array) -> Array:
  """v with as many axes as x, added on the left; scalars pass through."""
  return v.reshape((1,) * (x.ndim - v.ndim) + v.shape) if v.ndim else v


def _check_std(std) -> None:
  if not np.all(np.asarray(std) > 0):
    raise UsageError(f"exact teacher: std {std} must be positive")


def gaussian(process: Process, mean: Array | float, std: Array | float) -> ExactTeacher:
  """The exact denoiser of data N(mean, std^2).

  `E[x0 | x_t] = m + alpha c^2 / (alpha^2 c^2 + sigma^2) (x_t - alpha m)`, c = std.

  Args:
    mean, std: scalars, or arrays that broadcast to [H, W, C].

  Returns:
    ExactTeacher with params {"mean", "std"}.

  Raises:
    UsageError: std is not positive.
  """
  _check_std(std)

  def denoise(params, x_t, t, cond):
    del cond
    alpha, sigma = expand(process.alpha(t), x_t), expand(process.sigma(t), x_t)
    mean, variance = _like(params["mean"], x_t), _like(params["std"], x_t) ** 2
    return mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x_t - alpha * mean)

  return ExactTeacher({"mean": jnp.asarray(mean, float), "std": jnp.asarray(std, float)}, denoise)


def gaussian_flow(process: Process, mean: Array | float, std: Array | float, x_t: Array, t: Array,
                  s: Array) -> Array:
  """The probability-flow map from time t to time s for data N(mean, std^2): the exact many-step DDIM.

  In x / alpha it is affine with ratio sqrt((c^2 + sbar_s^2) / (c^2 + sbar_t^2)), sbar = sigma / alpha;
  written without the quotient, so that alpha(t) = 0 is allowed:
  `x_s = alpha_s m + sqrt((alpha_s^2 c^2 + sigma_s^2) / (alpha_t^2 c^2 + sigma_t^2)) (x_t - alpha_t m)`.

  Args:
    x_t: [B,H,W,C]; t, s: [B].
  """
  mean, variance = _like(jnp.asarray(mean), x_t), _like(jnp.asarray(std), x_t) ** 2
  alpha_t, sigma_t = expand(process.alpha(t), x_t), expand(process.sigma(t), x_t)
  alpha_s, sigma_s = expand(process.alpha(s), x_t), expand(process.sigma(s), x_t)
  ratio = jnp.sqrt((alpha_s**2 * variance + sigma_s**2) / (alpha_t**2 * variance + sigma_t**2))
  return alpha_s * mean + ratio * (x_t - alpha_t * mean)


def mixture(process: Process, means: Array, std: Array | float, weights: Array | None = None,
            labels: Array | None = None) -> ExactTeacher:
  """The exact denoiser of a mixture of K Gaussians N(means[k], std^2 I), optionally with classes.

  `E[x0 | x_t] = sum_k r_k (m_k + alpha c^2 / v (x_t - alpha m_k))`, `v = alpha^2 c^2 + sigma^2`,
  `r = softmax_k(log w_k - |x_t - alpha m_k|^2 / (2 v))`, the norm over all pixels.

  Args:
    means: [K, ...], each entry a scalar or an array that broadcasts to [H, W, C].
    std: scalar.
    weights: [K], positive, need not sum to 1; None is equal.
    labels: [K], the class of each component, every class 0 .. n - 1 at least once. With
      cond["label"] = j only class j's components count; the null class n, or no label, means all.

  Returns:
    ExactTeacher with params {"mean" [K, ...], "std", "weights" [K]}.

  Raises:
    UsageError: sizes that differ, weights or std that are not positive, a class without components.
  """
  _check_std(std)
  if np.ndim(std) or not np.ndim(means):
    raise UsageError(f"mixture: std must be a scalar (shape {np.shape(std)} given), means an array [K, ...]")
  k = np.shape(means)[0]
  weights = np.ones(k) if weights is None else np.asarray(weights)
  if weights.shape != (k,) or not np.all(weights > 0):
    raise UsageError(f"mixture: weights {weights.tolist()} must be {k} positive numbers, one per mean")
  if labels is not None:
    labels = np.asarray(labels)
    num_classes = int(labels.max()) + 1
    if labels.shape != (k,) or set(labels.tolist()) != set(range(num_classes)):
      raise UsageError(f"mixture: labels {labels.tolist()} must be {k} classes, each of 0..n-1 at least once")

  def denoise(params, x_t, t, cond):
    x = x_t[:, None]  # [B, 1, H, W, C]
    alpha, sigma = expand(process.alpha(t), x), expand(process.sigma(t), x)
    means = params["mean"]
    means = means.reshape((1, k) + (1,) * (x.ndim - 1 - means.ndim) + means.shape[1:])
    variance = params["std"] ** 2
    total = alpha**2 * variance + sigma**2
    offset = x - alpha * means  # [B, K, H, W, C]
    distance = jnp.sum(offset**2 / total, axis=tuple(range(2, x.ndim)))
    logits = jnp.log(params["weights"])[None] - 0.5 * distance
    if labels is not None and "label" in cond:
      wanted = cond["label"][:, None]
      logits = jnp.where((wanted == labels[None]) | (wanted == num_classes), logits, -jnp.inf)
    posterior = expand(jax.nn.softmax(logits, axis=1), offset)
    return jnp.sum(posterior * (means + alpha * variance / total * offset), axis=1)

  params = {"mean": means, "std": std, "weights": weights}
  return ExactTeacher({name: jnp.asarray(v, float) for name, v in params.items()}, denoise)
