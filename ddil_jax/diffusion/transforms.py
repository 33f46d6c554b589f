"""Transforms of denoisers, `DenoiseFn -> DenoiseFn`: guidance, reflected diffusion, shifted times.

Reflected diffusion keeps x0 estimates in the data box. Since a solver recomputes eps from the
transformed x0, the pair always satisfies x_t = alpha x0 + sigma eps. Outside the box `clip` has
gradient 0 and `fold` gradient -1; on the student's own output use `straight_through`.

A new projection is a function in PROJECTIONS; the contract tests find it there.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ddil_jax.diffusion.process import Process
from ddil_jax.errors import UsageError
from ddil_jax.types import Array, Cond, DenoiseFn

Transform = Callable[[DenoiseFn], DenoiseFn]
Projection = Callable[[Array], Array]
Bound = float | Sequence[float]


def _bounds(lo: Bound, hi: Bound, x0: Array) -> tuple[Array, Array]:
  """Scalar or per-channel bounds, shaped to broadcast against x0 [..., C]."""
  lo, hi = (jnp.asarray(v, x0.dtype) for v in (lo, hi))
  per_channel = lambda v: v.reshape((1,) * (x0.ndim - 1) + (-1,)) if v.ndim else v  # noqa: E731
  return per_channel(lo), per_channel(hi)


def _check_bounds(lo: Bound, hi: Bound) -> None:
  if not np.all(np.asarray(lo) < np.asarray(hi)):
    raise UsageError(f"transform bounds: lo {lo} must be below hi {hi}")


def identity() -> Projection:
  """No change."""
  return lambda x0: x0


def clip(lo: Bound = -1.0, hi: Bound = 1.0) -> Projection:
  """Static thresholding to [lo, hi], scalars or one bound per channel."""
  _check_bounds(lo, hi)
  return lambda x0: jnp.clip(x0, *_bounds(lo, hi, x0))


def dynamic(percentile: float = 0.995, floor: float = 1.0, ceiling: float = float("inf"),
            lo: Bound = -1.0, hi: Bound = 1.0) -> Projection:
  """Dynamic thresholding: clip at a per-sample quantile and scale back into the box.

  With y the estimate in units of the box (-1..1), `s = clip(quantile(|y|, percentile), floor,
  ceiling)`, `y <- clip(y, -s, s) / s`. Source: Imagen (arXiv 2205.11487, section 2.3).
  """
  _check_bounds(lo, hi)
  if not 0 < percentile <= 1:
    raise UsageError(f"dynamic threshold: percentile {percentile} must be in (0, 1]")

  def project(x0):
    low, high = _bounds(lo, hi, x0)
    centre, half = (low + high) / 2, (high - low) / 2
    y = (x0 - centre) / half
    s = jnp.quantile(jnp.abs(y).reshape(y.shape[0], -1), percentile, axis=1)
    s = jnp.clip(s, floor, ceiling).reshape((-1,) + (1,) * (y.ndim - 1))
    return centre + half * jnp.clip(y, -s, s) / s

  return project


def fold(lo: Bound = -1.0, hi: Bound = 1.0) -> Projection:
  """Reflection at the walls: the triangle wave of arXiv 2304.04740, identity inside the box."""
  _check_bounds(lo, hi)

  def project(x0):
    low, high = _bounds(lo, hi, x0)
    u = jnp.mod((x0 - low) / (high - low), 2)
    inside = (x0 >= low) & (x0 <= high)
    # Inside, the value itself: a round trip through the unit box would change bits.
    return jnp.where(inside, x0, low + (high - low) * jnp.where(u <= 1, u, 2 - u))

  return project


PROJECTIONS = {"identity": identity, "clip": clip, "dynamic": dynamic, "fold": fold}


def projection(kind: str, **options) -> Projection:
  """A projection by name. Raises UsageError with the names that exist."""
  if kind not in PROJECTIONS:
    raise UsageError(f"unknown transform '{kind}'; there are: {', '.join(sorted(PROJECTIONS))}")
  return PROJECTIONS[kind](**options)


def straight_through(project: Projection) -> Projection:
  """The projection's value with the gradient of the identity."""
  return lambda x0: x0 + jax.lax.stop_gradient(project(x0) - x0)


def reflect(project: Projection) -> Transform:
  """Applies a projection to every x0 estimate of a denoiser."""
  return lambda denoise: lambda x_t, t, cond: project(denoise(x_t, t, cond))


def guidance(scale: float | Array | None, null: Callable[[Cond], Cond]) -> Transform:
  """Classifier-free guidance, `u + g (c - u)` on x0 (equal to guidance on eps at the same x_t).

  LCM's convention c + w (c - u) is g = 1 + w. g = 1 is the conditional estimate itself and
  costs one network call.

  Args:
    scale: g, a number or [B]; None reads cond["guidance_scale"] and hides it from the network.
    null: cond -> the unconditional cond.
  """
  def transform(denoise):
    if isinstance(scale, int | float) and scale == 1:
      return denoise

    def guided(x_t, t, cond):
      g = cond["guidance_scale"] if scale is None else jnp.asarray(scale, x_t.dtype)
      g = g.reshape((-1,) + (1,) * (x_t.ndim - 1)) if g.ndim else g
      cond = {k: v for k, v in cond.items() if k != "guidance_scale"}
      c, u = denoise(x_t, t, cond), denoise(x_t, t, null(cond))
      return u + g * (c - u)

    return guided

  return transform


def shift_time(process: Process, window: float, cutoff: float = 0.0, data_variance: float = 0.0,
               candidates: int = 50) -> Transform:
  """Asks the denoiser at the time near t whose noise level x_t really has, against exposure bias, without training.

      t' = argmin over |s - t| <= window of |Var(x_t) - Var_s|,   Var_s = alpha(s)^2 data_variance + sigma(s)^2

  Var(x_t) is over the pixels of an example; of times that fit equally well the one next to t is taken. The estimate
  of x0 at t' is handed on as that at t.

  Args:
    process: of x_t.
    window: in units of t; 0 changes nothing.
    cutoff: no shift at times up to this one, where an image's own variance says more than the noise's.
    data_variance: over the pixels of an image, on average; the released code has 0.
    candidates: times tried on each side of t.

  Source: Li et al. 2023 (arXiv 2305.15583), section 4 and released code; the data's part of the variance is ours.
  """
  if window < 0:
    raise UsageError(f"time shift: window {window:g} must be at least 0")
  offsets = np.linspace(-window, window, 2 * candidates + 1)
  offsets = offsets[np.argsort(np.abs(offsets), kind="stable")]

  def transform(denoise):
    if window == 0:
      return denoise

    def shifted(x_t, t, cond):
      times = jnp.clip(t[:, None] + jnp.asarray(offsets, t.dtype)[None], process.t_min, process.t_max)
      flat = times.reshape(-1)
      marginal = (process.alpha(flat)**2 * data_variance + process.sigma(flat)**2).reshape(times.shape)
      own = x_t.reshape(x_t.shape[0], -1).var(axis=1)
      nearest = jnp.argmin(jnp.abs(marginal - own[:, None]), axis=1)
      moved = jnp.take_along_axis(times, nearest[:, None], axis=1)[:, 0]
      return denoise(x_t, jnp.where(t > cutoff, moved, t), cond)

    return shifted

  return transform


def chain(*transforms: Transform) -> Transform:
  """Applies transforms from left to right: the last one is outermost."""
  def transform(denoise):
    for each in transforms:
      denoise = each(denoise)
    return denoise
  return transform
