"""sCM: continuous-time consistency in TrigFlow coordinates, with a normalised and warmed-up tangent.

With tan(tau) = sigma / (alpha c), c = sigma_data, and x^ = c x_t / sqrt(alpha^2 c^2 + sigma^2), which is
cos(tau) x0 + sin(tau) c eps, every process is TrigFlow and a denoiser is D = cos(tau) x^ - sin(tau) c F(x^, tau).
The consistency function is D:

    dx^/dtau = c F_teacher, or -sin(tau) x0 + cos(tau) c eps
    g  = -cos^2(tau) (c F - dx^/dtau) - warm cos(tau) sin(tau) (x^ + c dF/dtau)
    L  = w mean_pixels (F - sg(F + g / (|g| + 0.1)))^2,   w = alpha / sigma = 1 / (c tan(tau))

dF/dtau is a Jacobian-vector product along (dx^/dtau, 1).

With the teacher's slope it runs on every source; with the data's on forward states and teacher pairs. As in
`meanflow`, the derivative is also offered as a difference, on the arc on which the slope turns x^.

Source: arXiv 2410.11081; NVlabs/FastGen (golden vectors `fg_scm_*`). The original also learns a log-variance
per time, `exp(-v) L + v`: `scm_loss` takes it, the player here keeps it at 0. Ours: other processes.
"""

import jax
import jax.numpy as jnp

from ddil_jax import keys as keys_lib
from ddil_jax.diffusion import solvers
from ddil_jax.diffusion.process import Process, expand, times_around
from ddil_jax.errors import UsageError
from ddil_jax.objectives.base import Objective, Parts, Player, bind, draw_index, guided_teacher, stop, subset, unchanged
from ddil_jax.types import Array, Cond, DenoiseFn


def angle(process: Process, t: Array, sigma_data: float = 0.5) -> Array:
  """TrigFlow's time tau [B] in [0, pi/2]."""
  return jnp.arctan2(process.sigma(t), process.alpha(t) * sigma_data)


def to_trig(process: Process, x_t: Array, t: Array, sigma_data: float = 0.5) -> Array:
  """x^ of x_t: both have the same image and noise."""
  return x_t * expand(_factor(process, t, sigma_data), x_t)


def _factor(process, t, sigma_data):
  return sigma_data / jnp.sqrt((process.alpha(t) * sigma_data) ** 2 + process.sigma(t) ** 2)


def trig_output(process: Process, denoise: DenoiseFn, x_hat: Array, t: Array, cond: Cond,
                sigma_data: float = 0.5) -> Array:
  """F(x^, tau) of a denoiser: `(cos(tau) x^ - D) / (c sin(tau))`."""
  tau = expand(angle(process, t, sigma_data), x_hat)
  x_t = x_hat / expand(_factor(process, t, sigma_data), x_hat)
  return (jnp.cos(tau) * x_hat - denoise(x_t, t, cond)) / (sigma_data * jnp.sin(tau))


def tangent(tau: Array, x_hat: Array, slope: Array, output: Array, derivative: Array, warm: Array | float,
            sigma_data: float = 0.5) -> Array:
  """g [B,H,W,C] before normalisation.

  Args:
    slope: dx^/dtau.
    output, derivative: F, and cos(tau) sin(tau) dF/dtau.
    warm: share of the second term, 0 to 1.
  """
  cos, sin = jnp.cos(expand(tau, x_hat)), jnp.sin(expand(tau, x_hat))
  return -cos**2 * (sigma_data * output - slope) - warm * (cos * sin * x_hat + sigma_data * derivative)


def normalised(g: Array, constant: float = 0.1, mean_norm: bool = False) -> tuple[Array, Array]:
  """g / (|g| + constant) and |g| [B]; with `mean_norm` the norm is the root mean square."""
  square = jnp.sum(g**2, axis=tuple(range(1, g.ndim)))
  norm = jnp.sqrt(square / g[0].size if mean_norm else square)
  return g / expand(norm + constant, g), norm


def scm_loss(process: Process, student: DenoiseFn, x_t: Array, t: Array, slope: Array, cond: Cond,
             warm: Array | float, log_variance: Array | float = 0.0, sigma_data: float = 0.5,
             constant: float = 0.1, prior_weight: bool = True, mean_norm: bool = False,
             per_pixel: bool = False, difference: float = 0.0,
             path: Array | None = None) -> tuple[Array, dict[str, Array]]:
  """The loss per example [B] and its intermediates F, derivative, g, norm, unweighted.

  Args:
    slope: dx^/dtau [B,H,W,C], the path's.
    warm: share of the tangent's second term.
    log_variance: [B], learned weight of the time.
    constant, mean_norm: of the tangent's normalisation.
    prior_weight: weight 1 / tan(tau) / c, the inverse noise level.
    per_pixel: the weight divided by the number of pixels.
    difference: 0 is a Jacobian-vector product; else the quotient of differences, over this share of tau on both sides.
    path: dx^/dtau of the arc of the differences, default the slope.
  """
  x_hat, tau = to_trig(process, stop(x_t), t, sigma_data), angle(process, t, sigma_data)
  network = lambda x, t: trig_output(process, student, x, t, cond, sigma_data)  # noqa: E731
  angle_at = lambda t: angle(process, t, sigma_data)  # noqa: E731
  # Scaled by cos sin: at the ends the derivative itself is unbounded.
  scale = jnp.cos(tau) * jnp.sin(tau)
  if difference:
    def moved(to):
      turn = expand(angle_at(to) - tau, x_hat)
      return network(jnp.cos(turn) * x_hat + jnp.sin(turn) * stop(slope if path is None else path), to)

    back, on = times_around(process, angle_at, t, difference * tau)
    output = network(x_hat, t)
    derivative = expand(scale / (angle_at(on) - angle_at(back)), x_hat) * (moved(on) - moved(back))
  else:
    _, rate = jax.jvp(angle_at, (t,), (jnp.ones_like(t),))
    output, derivative = jax.jvp(network, (x_hat, t), (expand(scale, x_hat) * slope, scale / rate))
  g, norm = normalised(stop(tangent(tau, x_hat, slope, output, derivative, warm, sigma_data)), constant, mean_norm)
  square = jnp.mean((output - stop(output) - g) ** 2, axis=tuple(range(1, g.ndim)))
  weight = process.alpha(t) / process.sigma(t) if prior_weight else jnp.ones_like(t)
  weight = weight / g[0].size if per_pixel else weight
  loss = weight * jnp.exp(-log_variance) * square + log_variance
  return loss, {"F": output, "derivative": derivative, "g": g, "norm": norm, "unweighted": square}


def make(parts: Parts, num_scales: int = 32, sampler_steps: int = 2, from_data: bool = False, warmup_steps: int = 100,
         constant: float = 0.1, sigma_data: float = 0.5, difference: float = 0.0) -> Objective:
  """sCM on a grid of `num_scales` times.

  Args:
    sampler_steps: steps of the student's re-noising sampler.
    from_data: the slope of the path comes from the clean image, else from the guided teacher.
    warmup_steps: over which the tangent's second term comes in.
    constant: of the tangent's normalisation.
    sigma_data: standard deviation of the data.
    difference: see `scm_loss`.
  """
  if not 0 <= difference < 1:
    raise UsageError(f"scm: difference {difference} must be at least 0 and below 1, the whole of tau")
  if warmup_steps < 1 or not 1 <= sampler_steps <= num_scales:
    raise UsageError(f"scm: warmup_steps {warmup_steps} must be at least 1, sampler_steps {sampler_steps} between 1 and"
                     f" num_scales {num_scales}")
  process, grid = parts.process, parts.make_grid(num_scales)
  teacher = guided_teacher(parts, parts.guidance_scale)

  def loss(params, view, states, batch, keys):
    del batch
    x_t, t = stop(states.x_t), states.t
    label = (lambda x_t, t, cond: states.x0) if from_data else teacher(view.teacher)
    x_hat = to_trig(process, x_t, t, sigma_data)
    # c F of the exact denoiser of one image is the data's own slope.
    slope = stop(sigma_data * trig_output(process, label, x_hat, t, states.cond, sigma_data))
    warm = jnp.minimum(view.step / warmup_steps, 1).astype(t.dtype)
    student = bind(parts.student, params, keys_lib.named(keys, "dropout"))
    value, found = scm_loss(process, student, x_t, t, slope, states.cond, warm, sigma_data=sigma_data,
                            constant=constant, difference=difference)
    return value, {"tangent_norm": found["norm"]}

  return Objective(
      name="scm", grid=grid, sampler_grid=subset(grid, sampler_steps), solver=solvers.renoise(), student=parts.student,
      teacher=teacher, init=lambda key, params: {"student": parts.init_student(key, params)},
      players=(Player("student", loss),), draw=draw_index(grid), condition=unchanged, needs_x0=from_data)
