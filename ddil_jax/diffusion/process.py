"""Forward processes `x_t = alpha(t) x0 + sigma(t) eps`: the noise schedules.

Each process is a frozen record of functions of `t` [B]. Conventions:

* time grows with noise; the prior is `x_T ~ N(0, prior_std^2)` at `t_max`;
* a time at or below `t_clean` is *exactly* clean data (alpha 1, sigma 0). With it the last
  step of a solver returns x0 itself, and the progressive-distillation target at i = 0 becomes
  the second teacher x0, without special cases;
* `time_input(t)` is what a network is given (about 0..1000).

All of it is computed in the dtype of `t` (float32, or float64 under x64), whatever the
networks compute in.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ddil_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Process:
  """A forward process.

  Attributes:
    name: name in configs and messages.
    alpha, sigma: t [B] -> signal and noise scale [B].
    log_snr: t [B] -> log(alpha^2 / sigma^2) [B], from its own formula where that is more exact.
    time_input: t [B] -> the network's time input [B].
    t_max: time of the prior.
    t_min: smallest time at which a network is trained or called.
    t_clean: times at or below it are clean data.
    prior_std: standard deviation of x at t_max.
    variance_preserving: whether alpha^2 + sigma^2 = 1.
  """
  name: str
  alpha: Callable[[Array], Array]
  sigma: Callable[[Array], Array]
  log_snr: Callable[[Array], Array]
  time_input: Callable[[Array], Array]
  t_max: float
  t_min: float
  t_clean: float
  prior_std: float
  variance_preserving: bool


def expand(v: Array, like: Array) -> Array:
  """Reshapes v [B] to [B, 1, ...] so that it multiplies `like` [B, ...]; scalars pass through."""
  v = jnp.asarray(v)
  return v.reshape(v.shape + (1,) * (like.ndim - v.ndim)) if v.ndim else v


def add_noise(process: Process, x0: Array, eps: Array, t: Array) -> Array:
  """Draws from q(x_t | x0): `alpha(t) x0 + sigma(t) eps`; x0, eps [B, ...], t [B]."""
  return expand(process.alpha(t), x0) * x0 + expand(process.sigma(t), x0) * eps


def eps_from_x0(process: Process, x_t: Array, x0: Array, t: Array) -> Array:
  """The noise that belongs to (x_t, x0): `(x_t - alpha x0) / sigma`, 0 where sigma is 0."""
  alpha, sigma = expand(process.alpha(t), x_t), expand(process.sigma(t), x_t)
  return jnp.where(sigma > 0, (x_t - alpha * x0) / jnp.where(sigma > 0, sigma, 1), 0)


def velocity_from_x0(process: Process, x_t: Array, x0: Array, t: Array) -> Array:
  """The velocity eps - x0 of the straight line through (x_t, x0): `(x_t - (alpha + sigma) x0) / sigma`.

  In y = x_t / (alpha + sigma) and tau = sigma / (alpha + sigma) every process is the flow process;
  this is dy/dtau. 0 where sigma is 0.
  """
  alpha, sigma = expand(process.alpha(t), x_t), expand(process.sigma(t), x_t)
  return jnp.where(sigma > 0, (x_t - (alpha + sigma) * x0) / jnp.where(sigma > 0, sigma, 1), 0)


def sigma_ratio(process: Process, s: Array, t: Array) -> Array:
  """`sigma(s) / sigma(t)` [B]; sigma is computed without cancellation, so a quotient is exact enough."""
  return process.sigma(s) / process.sigma(t)


def snr(process: Process, t: Array) -> Array:
  """Signal-to-noise ratio alpha^2 / sigma^2 [B]."""
  return jnp.exp(process.log_snr(t))


def times_around(process: Process, of: Callable[[Array], Array], t: Array, step: Array | float,
                 after: Array | float = -np.inf) -> tuple[Array, Array]:
  """Times [B] at which `of`, which grows with the time, is `step` below and above its value at t; for differences.

  Each is t itself where it would be outside of what a network is called at, the lower one also where it would not be
  later than `after`.
  """
  def at(wanted):
    def halve(_, ends):
      low, high = ends
      middle = (low + high) / 2
      above = of(middle) > wanted
      return jnp.where(above, low, middle), jnp.where(above, middle, high)

    return sum(jax.lax.fori_loop(0, 60, halve, (jnp.full_like(t, process.t_min), jnp.full_like(t, process.t_max)))) / 2

  here, (low, high) = of(t), (of(jnp.full_like(t, end)) for end in (process.t_min, process.t_max))
  below = at(here - step)
  return (jnp.where((here - step >= low) & (below > after), below, t),
          jnp.where(here + step <= high, at(here + step), t))


def cosine(logsnr_min: float = -20.0, logsnr_max: float = 20.0) -> Process:
  """Cosine log-SNR, `lambda(u) = -2 log tan(a u + b)`, u in [0, 1].

  Source: Progressive Distillation (arXiv 2202.00512), `b = atan(exp(-logsnr_max / 2))`,
  `a = atan(exp(-logsnr_min / 2)) - b`.

  Raises:
    ValueError: logsnr_min is not below logsnr_max.
  """
  if not logsnr_min < logsnr_max:
    raise ValueError(f"cosine: logsnr_min {logsnr_min} must be below logsnr_max {logsnr_max}")
  b = np.arctan(np.exp(-0.5 * logsnr_max))
  a = np.arctan(np.exp(-0.5 * logsnr_min)) - b

  def log_snr(t):
    return -2 * jnp.log(jnp.tan(a * t + b))

  return Process(
      name="cosine",
      alpha=lambda t: jnp.where(t > 0, jnp.sqrt(jax.nn.sigmoid(log_snr(t))), 1),
      sigma=lambda t: jnp.where(t > 0, jnp.sqrt(jax.nn.sigmoid(-log_snr(t))), 0),
      log_snr=log_snr,
      time_input=lambda t: 1000 * t,
      t_max=1.0, t_min=1e-3, t_clean=0.0, prior_std=1.0, variance_preserving=True)


def linear(beta_min: float = 0.1, beta_max: float = 20.0) -> Process:
  """Continuous linear-beta VP process, `alpha(t) = exp(-t^2 (bmax - bmin) / 4 - t bmin / 2)`.

  Source: Score SDE (arXiv 2011.13456), appendix C; t in [0, 1].
  """
  def log_alpha(t):
    return -0.25 * t**2 * (beta_max - beta_min) - 0.5 * t * beta_min

  def variance(t):
    return -jnp.expm1(2 * log_alpha(t))

  return Process(
      name="linear",
      alpha=lambda t: jnp.where(t > 0, jnp.exp(log_alpha(t)), 1),
      sigma=lambda t: jnp.where(t > 0, jnp.sqrt(variance(jnp.maximum(t, 0))), 0),
      log_snr=lambda t: 2 * log_alpha(t) - jnp.log(variance(t)),
      time_input=lambda t: 1000 * t,
      t_max=1.0, t_min=1e-3, t_clean=0.0, prior_std=1.0, variance_preserving=True)


def discrete(alphas_cumprod: np.ndarray, final_alpha_one: bool = True) -> Process:
  """A table of cumulative alphas, t in {0, ..., T-1}: the convention of DDPM and Stable Diffusion.

  `alpha(t) = sqrt(alphas_cumprod[t])`; between integers the table is interpolated. Any t < 0 is
  the end of the grid: clean data, or `alphas_cumprod[0]` without `final_alpha_one`.

  Args:
    alphas_cumprod: [T] decreasing, in (0, 1).
    final_alpha_one: diffusers' `set_alpha_to_one`.
  """
  table = np.asarray(alphas_cumprod)
  last = len(table) - 1

  def cumprod(t):
    values, low = jnp.asarray(table, t.dtype), jnp.clip(jnp.floor(t), 0, last).astype(jnp.int32)
    start = jnp.minimum(low, last - 1)  # the last time has the slope of the interval before it
    inside = values[low] + (t - low) * (values[start + 1] - values[start])
    # No clip of t: at a bound it would halve the derivative.
    inside = jnp.where(t > last, values[last], inside)
    return jnp.where(t < 0, 1 if final_alpha_one else values[0], inside)

  def as_float(t):
    return jnp.asarray(t) if jnp.issubdtype(jnp.asarray(t).dtype, jnp.floating) else jnp.asarray(t, float)

  return Process(
      name="discrete",
      alpha=lambda t: jnp.sqrt(cumprod(as_float(t))),
      sigma=lambda t: jnp.sqrt(1 - cumprod(as_float(t))),
      log_snr=lambda t: jnp.log(cumprod(as_float(t))) - jnp.log1p(-cumprod(as_float(t))),
      time_input=lambda t: jnp.asarray(t),
      t_max=float(last), t_min=0.0, t_clean=-1.0 if final_alpha_one else -np.inf,
      prior_std=1.0, variance_preserving=True)


def stable_diffusion(final_alpha_one: bool = True, zero_terminal_snr: bool = False) -> Process:
  """Stable Diffusion's scaled-linear table, 1000 steps, betas (sqrt .00085 .. sqrt .012)^2."""
  table = sd_alphas_cumprod()
  if zero_terminal_snr:
    table = rescale_zero_terminal_snr(table)
  return dataclasses.replace(discrete(table, final_alpha_one), name="stable_diffusion")


def ddpm(final_alpha_one: bool = True) -> Process:
  """DDPM's linear table, 1000 steps, betas 1e-4 .. 0.02 (arXiv 2006.11239)."""
  return dataclasses.replace(discrete(ddpm_linear_alphas_cumprod(), final_alpha_one), name="ddpm")


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0, time_scale: float = 250.0) -> Process:
  """Variance exploding, `x_t = x0 + t eps`: the time is the noise level (EDM, arXiv 2206.00364).

  Args:
    time_scale: the network's time input is `time_scale * log(t)`; EDM's own c_noise is 0.25.
  """
  return Process(
      name="edm",
      alpha=lambda t: jnp.ones_like(t),
      sigma=lambda t: jnp.asarray(t),
      log_snr=lambda t: -2 * jnp.log(t),
      time_input=lambda t: time_scale * jnp.log(jnp.maximum(t, 1e-30)),
      t_max=sigma_max, t_min=sigma_min, t_clean=0.0, prior_std=sigma_max, variance_preserving=False)


def noise_level(t_max: float = 80.0, time_input: Callable[[Array], Array] | None = None) -> Process:
  """A variance-preserving process whose time is the noise level sigma / alpha: samplers in that unit
  (Euler on Stable Diffusion, Karras grids) on networks that were trained on another one.

    alpha = 1 / sqrt(1 + t^2),   sigma = t / sqrt(1 + t^2)

  Args:
    t_max: largest level.
    time_input: level [B] -> the network's time input, default the level itself.
  """
  return Process(
      name="noise_level",
      alpha=lambda t: 1 / jnp.sqrt(1 + t**2),
      sigma=lambda t: t / jnp.sqrt(1 + t**2),
      log_snr=lambda t: -2 * jnp.log(t),
      time_input=time_input or jnp.asarray,
      t_max=t_max, t_min=1e-3, t_clean=0.0, prior_std=1.0, variance_preserving=True)


def flow() -> Process:
  """Rectified flow, `x_t = (1 - t) x0 + t eps`, t in [0, 1] (arXiv 2209.03003)."""
  return Process(
      name="flow",
      alpha=lambda t: 1 - t,
      sigma=lambda t: jnp.asarray(t),
      log_snr=lambda t: 2 * (jnp.log1p(-t) - jnp.log(t)),
      time_input=lambda t: 1000 * t,
      t_max=1.0, t_min=1e-3, t_clean=0.0, prior_std=1.0, variance_preserving=False)


# Tables -------------------------------------------------------------------------------------


def _cumprod(betas: np.ndarray) -> np.ndarray:
  """Cumulative product of 1 - beta, float32: summed up in float64, as PyTorch does on a CPU."""
  return np.cumprod((1 - betas).astype(np.float64)).astype(np.float32)


def _linspace(start: float, stop: float, n: int) -> np.ndarray:
  """float32 linspace rounded as PyTorch's: from both ends with a float32 step. Noise levels near
  t = 0 depend on the last bit of the first beta."""
  start, stop = np.float32(start), np.float32(stop)
  step, i = np.float64((stop - start) / np.float32(n - 1)), np.arange(n)
  return np.where(i < n // 2, start + step * i, stop - step * (n - 1 - i)).astype(np.float32)


def sd_betas(num_steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> np.ndarray:
  """Scaled-linear betas [num_steps]: squares of a linear ramp of square roots, in float32."""
  return _linspace(beta_start**0.5, beta_end**0.5, num_steps) ** 2


def sd_alphas_cumprod(num_steps: int = 1000, beta_start: float = 0.00085,
                      beta_end: float = 0.012) -> np.ndarray:
  """Cumulative product of 1 - beta [num_steps] of the scaled-linear schedule."""
  return _cumprod(sd_betas(num_steps, beta_start, beta_end))


def ddpm_linear_alphas_cumprod(num_steps: int = 1000, beta_start: float = 1e-4,
                               beta_end: float = 0.02) -> np.ndarray:
  """DDPM's linear betas (arXiv 2006.11239) as cumulative alphas [num_steps]."""
  return _cumprod(_linspace(beta_start, beta_end, num_steps))


def cosine_alphas_cumprod(num_steps: int = 1000, max_beta: float = 0.999) -> np.ndarray:
  """Improved DDPM's squared-cosine table (arXiv 2102.09672), betas capped at max_beta."""
  bar = lambda u: np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2  # noqa: E731
  steps = np.arange(num_steps) / num_steps
  betas = np.minimum(1 - bar(steps + 1 / num_steps) / bar(steps), max_beta).astype(np.float32)
  return _cumprod(betas)


def rescale_zero_terminal_snr(alphas_cumprod: np.ndarray) -> np.ndarray:
  """Shifts and scales sqrt(alphas_cumprod) so that the last is 0 and the first is kept (arXiv 2305.08891)."""
  root = np.sqrt(alphas_cumprod)
  return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
