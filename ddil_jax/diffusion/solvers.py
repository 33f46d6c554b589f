"""One step from time t to time s < t. A solver is `(process, denoise) -> Policy`.

A policy acts on states: `init(x_T) -> carry`, `step(carry, x, t, s, cond, noise) -> (x_s, carry)`
with t, s [B] and standard normal `noise` like x. Only multistep solvers carry anything; only
stochastic ones read the noise. Every solver returns x0 itself when s is the clean end.

A new solver is a function in SOLVERS; the contract tests (order of convergence, exactness on
linear problems) find it there.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ddil_jax.diffusion.process import Process, eps_from_x0, expand
from ddil_jax.diffusion.transforms import Projection
from ddil_jax.errors import UsageError
from ddil_jax.types import Array, DenoiseFn


class Policy(NamedTuple):
  """How a sampler moves: see the module's docstring."""
  init: Callable[[Array], Any]
  step: Callable[..., tuple[Array, Any]]


Solver = Callable[[Process, DenoiseFn], Policy]


def _memoryless(step) -> Policy:
  """A policy of `step(x, t, s, cond, noise) -> x_s` without carry."""
  return Policy(lambda x: (), lambda carry, *args: (step(*args), carry))


def _scales(process: Process, t: Array, like: Array) -> tuple[Array, Array]:
  return expand(process.alpha(t), like), expand(process.sigma(t), like)


def ddim_step(process: Process, x_t: Array, x0: Array, t: Array, s: Array) -> Array:
  """`x_s = alpha_s x0 + sigma_s eps` with eps from (x_t, x0): deterministic DDIM (arXiv 2010.02502)."""
  alpha, sigma = _scales(process, s, x_t)
  return alpha * x0 + sigma * eps_from_x0(process, x_t, x0, t)


def posterior(process: Process, x_t: Array, x0: Array, t: Array, s: Array,
              variance: str = "small", fraction: float = 0.0) -> tuple[Array, Array]:
  """Mean and log-variance of q(x_s | x_t, x0), s < t.

  `mean = r (alpha_t/alpha_s) x_t + (1 - r) alpha_s x0`, r = SNR(t)/SNR(s); the variance is
  (1 - r) sigma_s^2 ("small"), (1 - r) sigma_t^2 ("large"), or the geometric mix
  `large^fraction small^(1-fraction)` ("medium"). Source: arXiv 2202.00512 and 2107.00630.
  """
  (alpha_t, sigma_t), (alpha_s, sigma_s) = _scales(process, t, x_t), _scales(process, s, x_t)
  ratio = alpha_t / alpha_s
  # 1 - r without cancellation where log-SNRs are close.
  one_minus_r = expand(-jnp.expm1(process.log_snr(t) - process.log_snr(s)), x_t)
  one_minus_r = jnp.where(sigma_s > 0, one_minus_r, 1)
  # r alpha_s / alpha_t without a quotient, for pure noise has no signal.
  mean = ratio * (sigma_s / sigma_t) ** 2 * x_t + one_minus_r * alpha_s * x0
  log_factor = jnp.log(one_minus_r)
  small = log_factor + 2 * jnp.log(jnp.where(sigma_s > 0, sigma_s, 1e-30))
  large = log_factor + 2 * jnp.log(sigma_t)
  weights = {"small": 0.0, "large": 1.0, "medium": fraction}
  if variance not in weights:
    raise UsageError(f"unknown posterior variance '{variance}'; there are: large, medium, small")
  return mean, weights[variance] * large + (1 - weights[variance]) * small


def ddim(eta: float = 0.0, project: Projection | None = None, tell_end: bool = False) -> Solver:
  """DDIM; for variance-exploding processes this is Euler's method (arXiv 2010.02502, eq. 12, 16).

  Args:
    eta: 0 deterministic, 1 ancestral.
    project: acts on x0 alone and leaves eps as estimated, which is what diffusers' scheduler does
      with `clip_sample`. To project x0 and recompute eps, wrap the denoiser with
      `transforms.reflect`: the project's default.
    tell_end: give the denoiser cond["end_time"] = s: a jump of a student that was trained for it.
  """
  def solver(process, denoise):
    def step(x, t, s, cond, noise):
      x0 = denoise(x, t, {**cond, "end_time": s} if tell_end else cond)
      eps = eps_from_x0(process, x, x0, t)
      if project is not None:
        x0 = project(x0)
      (alpha_t, sigma_t), (alpha_s, sigma_s) = _scales(process, t, x), _scales(process, s, x)
      if eta == 0:
        return alpha_s * x0 + sigma_s * eps
      jump = jnp.maximum(sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2, 0)
      std = eta * sigma_s / sigma_t * jnp.sqrt(jump)
      return alpha_s * x0 + jnp.sqrt(jnp.maximum(sigma_s**2 - std**2, 0)) * eps + std * noise
    return _memoryless(step)
  return solver


def ancestral(variance: str = "small", fraction: float = 0.0) -> Solver:
  """Samples the posterior q(x_s | x_t, x0); see `posterior` for the variances. Noiseless at the end."""
  def solver(process, denoise):
    def step(x, t, s, cond, noise):
      mean, log_var = posterior(process, x, denoise(x, t, cond), t, s, variance, fraction)
      clean = expand(process.sigma(s), x) <= 0
      return mean + jnp.where(clean, 0, jnp.exp(0.5 * log_var)) * noise
    return _memoryless(step)
  return solver


def renoise(sigma_offset: float = 0.0) -> Solver:
  """Predict x0, then add fresh noise to time s: multistep consistency sampling (arXiv 2303.01469, alg. 1).

  Args:
    sigma_offset: consistency models stop at sigma_min and re-noise by sqrt(sigma_s^2 - sigma_min^2).
  """
  def solver(process, denoise):
    def step(x, t, s, cond, noise):
      alpha, sigma = _scales(process, s, x)
      sigma = jnp.sqrt(jnp.maximum(sigma**2 - sigma_offset**2, 0)) if sigma_offset else sigma
      return alpha * denoise(x, t, cond) + sigma * noise
    return _memoryless(step)
  return solver


def heun(churn: float = 0.0, churn_min: float = 0.0, churn_max: float = float("inf"),
         noise_scale: float = 1.0, num_steps: int = 1) -> Solver:
  """Second-order Heun in (x / alpha, sigma / alpha), Euler on the last step (arXiv 2206.00364, alg. 1, 2).

  Costs two network calls a step.

  Args:
    churn, churn_min, churn_max, noise_scale, num_steps: EDM's stochastic sampler S_churn, S_min,
      S_max, S_noise, N; only for variance-exploding processes.
  """
  def solver(process, denoise):
    if churn and process.name != "edm":
      raise UsageError(f"heun: churn needs the edm process, not '{process.name}'")

    def step(x, t, s, cond, noise):
      if churn:
        gain = jnp.where((t >= churn_min) & (t <= churn_max), min(churn / num_steps, 2**0.5 - 1), 0)
        t_hat = t * (1 + gain)
        x = x + expand(jnp.sqrt(jnp.maximum(t_hat**2 - t**2, 0)), x) * noise_scale * noise
        t = t_hat
      (alpha_t, sigma_t), (alpha_s, sigma_s) = _scales(process, t, x), _scales(process, s, x)
      x0 = denoise(x, t, cond)
      slope = eps_from_x0(process, x, x0, t)
      euler = alpha_s * x0 + sigma_s * slope
      # No second slope at the clean end, where the network is undefined, nor from (nearly) pure noise,
      # where x / alpha is.
      first_order = expand((process.sigma(s) <= 0) | (process.alpha(t) < 1e-3 * process.sigma(t)), x)
      safe_s = jnp.where(process.sigma(s) <= 0, t, s)
      end = jnp.where(first_order, x, euler)
      slope_end = eps_from_x0(process, end, denoise(end, safe_s, cond), safe_s)
      safe_alpha = jnp.where(first_order, 1, alpha_t)
      change = alpha_s * (sigma_s / alpha_s - sigma_t / safe_alpha) * 0.5 * (slope_end - slope)
      return euler + jnp.where(first_order, 0, change)
    return _memoryless(step)
  return solver


def dpmpp_2m() -> Solver:
  """DPM-Solver++(2M): second-order multistep in half-log-SNR, first order at both ends (arXiv 2211.01095).

  With h = l_s - l_t, r = h_prev / h: `D = x0 + (x0 - x0_prev) / (2 r)`,
  `x_s = (sigma_s / sigma_t) x - alpha_s (exp(-h) - 1) D`.
  """
  def solver(process, denoise):
    def init(x):
      return jnp.zeros_like(x), jnp.zeros(x.shape[:1], x.dtype)  # previous x0, previous h (0: none)

    def step(carry, x, t, s, cond, noise):
      del noise
      previous, h_previous = carry
      x0 = denoise(x, t, cond)
      (_, sigma_t), (alpha_s, sigma_s) = _scales(process, t, x), _scales(process, s, x)
      clean = process.sigma(s) <= 0
      h = 0.5 * (process.log_snr(jnp.where(clean, t, s)) - process.log_snr(t))
      second_order = ~clean & (h_previous > 0)
      half_inverse_r = jnp.where(second_order, h / jnp.where(second_order, 2 * h_previous, 1), 0)
      slope = x0 + expand(half_inverse_r, x) * (x0 - previous)
      decay = jnp.where(clean, 1, -jnp.expm1(-h))
      return sigma_s / sigma_t * x + alpha_s * expand(decay, x) * slope, (x0, h)
    return Policy(init, step)
  return solver


def mixed(first: Policy, second: Policy, probability: float, key: Array) -> Policy:
  """DAgger's mixture: at each step `second` acts with the given probability, else `first`.

  One coin a step for the whole batch, so that only the acting policy is computed.
  Source: DDIL (arXiv 2410.11971) after DAgger (arXiv 1011.0686).
  """
  def init(x):
    return jnp.zeros((), jnp.int32), first.init(x), second.init(x)

  def step(carry, x, t, s, cond, noise):
    i, carry_first, carry_second = carry
    second_acts = jax.random.bernoulli(jax.random.fold_in(key, i), probability)

    def act_second(_):
      x_s, updated = second.step(carry_second, x, t, s, cond, noise)
      return x_s, carry_first, updated

    def act_first(_):
      x_s, updated = first.step(carry_first, x, t, s, cond, noise)
      return x_s, updated, carry_second

    x_s, carry_first_next, carry_second_next = jax.lax.cond(second_acts, act_second, act_first, None)
    return x_s, (i + 1, carry_first_next, carry_second_next)

  return Policy(init, step)


SOLVERS = {"ddim": ddim, "ancestral": ancestral, "renoise": renoise, "heun": heun, "dpmpp_2m": dpmpp_2m}


def make(name: str, **options) -> Solver:
  """A solver by name. Raises UsageError with the names that exist."""
  if name not in SOLVERS:
    raise UsageError(f"unknown solver '{name}'; there are: {', '.join(sorted(SOLVERS))}")
  return SOLVERS[name](**options)
