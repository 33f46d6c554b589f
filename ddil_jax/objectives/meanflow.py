"""MeanFlow: the average velocity between two times, by its own identity and a Jacobian-vector product.

In y = x_t / (alpha + sigma), tau = sigma / (alpha + sigma) every process is the flow, dy/dtau = v. The average
velocity u over [r, t] obeys u = v - (tau_t - tau_r) du/dtau, the total derivative along the path:

    du/dtau = jvp of u(y, t, r) along (v, 1, 0)
    L = w |u(y, t, r) - sg(v - (tau_t - tau_r) du/dtau)|^2,   w = 1 / (|.|^2 + c)^p under stop-gradient

v is noise - x0 (training from data: forward states and teacher pairs) or the guided teacher's velocity, with
which it runs on every source. r = t for a share of the examples: there u is the velocity itself, so that the
student stays a denoiser. A sampling step from t to s is y_s = y_t - (tau_t - tau_s) u(y_t, t, s).

The derivative is also offered as a difference over a stretch of tau: for networks that cannot be differentiated
forward, and for teachers whose derivative says nothing of the next sampling step, since their time embedding is fine
(`difference`).

Source: arXiv 2505.13447; NVlabs/FastGen (golden vectors `fg_meanflow_*`: velocities, the teacher's
guidance, derivative and difference, weights, both losses). Ours: processes other than the flow, by the change of
coordinates above. Not here: guidance of the data's velocity by the student's own estimates.
"""

import jax
import jax.numpy as jnp

from ddil_jax import keys as keys_lib
from ddil_jax.diffusion import solvers
from ddil_jax.diffusion.process import Process, expand, times_around, velocity_from_x0
from ddil_jax.errors import UsageError
from ddil_jax.objectives.base import Objective, Parts, Player, bind, draw_index, guided_teacher, stop, subset, unchanged
from ddil_jax.types import Array, Cond


def flow_time(process: Process, t: Array) -> Array:
  """tau = sigma / (alpha + sigma) [B] in [0, 1]."""
  alpha, sigma = process.alpha(t), process.sigma(t)
  return sigma / (alpha + sigma)


def along_path(process: Process, velocity, x_t: Array, t: Array, r: Array, cond: Cond, v: Array,
               difference: float = 0.0) -> tuple[Array, Array]:
  """u(x_t, t, r) and du/dtau [B,H,W,C], its total derivative where the state moves with dy/dtau = v.

  Args:
    velocity: (x_t, t, r, cond) -> u.
    difference: 0 is a Jacobian-vector product; else the quotient of differences from tau - difference to
      tau + difference, on one side where the other would leave the process or go beyond r.
  """
  scale = lambda t: process.alpha(t) + process.sigma(t)  # noqa: E731
  tau = lambda t: flow_time(process, t)  # noqa: E731
  ones = jnp.ones_like(t)
  y = x_t / expand(scale(t), x_t)
  if difference:
    def moved(to):
      return velocity((y + expand(tau(to) - tau(t), y) * v) * expand(scale(to), y), to, r, cond)

    back, on = times_around(process, tau, t, difference, after=r)
    span = expand(tau(on) - tau(back), y)
    return velocity(x_t, t, r, cond), jnp.where(span > 0, (moved(on) - moved(back)) / jnp.where(span > 0, span, 1), 0)
  _, rate = jax.jvp(tau, (t,), (ones,))
  u, by_t = jax.jvp(lambda y, t: velocity(y * expand(scale(t), y), t, r, cond), (y, t),
                    (v * expand(rate, v), ones))
  return u, by_t / expand(rate, by_t)


def total(x: Array) -> Array:
  """Sum over all axes but the first."""
  return jnp.sum(x, axis=tuple(range(1, x.ndim)))


def polynomial_weight(power: float = 1.0, constant: float = 0.1):
  """error [B] -> w [B] = 1 / (error + c)^p."""
  return lambda error: 1 / (error + constant) ** power


def exponential_weight(factor: float = 1.0, rate: float = -0.01, constant: float = 0.1):
  """error [B] -> w [B] = factor exp(rate error + c)."""
  return lambda error: factor * jnp.exp(rate * error + constant)


def meanflow_loss(process: Process, velocity, x_t: Array, t: Array, r: Array, cond: Cond, v: Array,
                  weight=polynomial_weight(), warm: Array | float = 1.0, by_tangent: bool = False,
                  per_pixel: bool = False, difference: float = 0.0) -> tuple[Array, dict[str, Array]]:
  """The loss per example [B] and its intermediates u, derivative, target, tangent, weight.

  Args:
    velocity: (x_t, t, r, cond) -> average velocity.
    v: [B,H,W,C] velocity at (x_t, t).
    weight: error [B] -> [B], without gradient; the error is |u - target|^2.
    warm: share of the derivative, 0 to 1.
    by_tangent: instead |u - sg(u + w g)|^2 with g = target - u, whose length |g| is what `weight` gets.
    per_pixel: with `by_tangent`, g divided by the square root of the number of pixels.
    difference: see `along_path`.
  """
  u, derivative = along_path(process, velocity, stop(x_t), t, r, cond, stop(v), difference)
  gap = jnp.clip(flow_time(process, t) - flow_time(process, r), 0, 0.999)
  target = stop(v - warm * expand(gap, v) * derivative)
  tangent = stop(target - u) / (u[0].size**0.5 if per_pixel else 1)
  found = {"u": u, "derivative": derivative, "target": target, "tangent": tangent}
  if by_tangent:
    w = weight(jnp.sqrt(total(tangent**2)))
    return total((u - stop(u + expand(w, u) * tangent)) ** 2), found | {"weight": w}
  square = total((u - target) ** 2)
  w = stop(weight(square))
  return w * square, found | {"weight": w}


def make(parts: Parts, num_scales: int = 32, sampler_steps: int = 2, from_data: bool = False, same_share: float = 0.5,
         power: float = 1.0, constant: float = 1e-3, difference: float = 0.0) -> Objective:
  """MeanFlow on a grid of `num_scales` times.

  Args:
    sampler_steps: jumps of the student's sampler.
    from_data: the velocity comes from the clean image, else from the guided teacher.
    same_share: share of the examples with r = t.
    power, constant: of `polynomial_weight`.
    difference: see `along_path`.
  """
  if not 0 <= difference < 1:
    raise UsageError(f"meanflow: difference {difference} must be at least 0 and below 1, all of the flow's time")
  if not 1 <= sampler_steps <= num_scales or not 0 <= same_share <= 1:
    raise UsageError(f"meanflow: sampler_steps {sampler_steps} must lie between 1 and num_scales {num_scales},"
                     f" same_share {same_share} between 0 and 1")
  process, grid = parts.process, parts.make_grid(num_scales)
  teacher = guided_teacher(parts, parts.guidance_scale)

  def loss(params, view, states, batch, keys):
    del batch
    x_t, t, k, times = stop(states.x_t), states.t, states.k, jnp.asarray(grid, states.t.dtype)
    x0 = states.x0 if from_data else stop(teacher(view.teacher)(x_t, t, states.cond))
    student = bind(parts.student, params, keys_lib.named(keys, "dropout"))
    jump_to = times[keys_lib.randint(keys_lib.named(keys, "r"), k + 1, len(grid))]
    r = jnp.where(keys_lib.uniform(keys_lib.named(keys, "same")) < same_share, t, jump_to)

    def velocity(x, t, r, cond):
      return velocity_from_x0(process, x, student(x, t, {**cond, "end_time": r}), t)

    value, found = meanflow_loss(process, velocity, x_t, t, r, states.cond, velocity_from_x0(process, x_t, x0, t),
                                 polynomial_weight(power, constant), difference=difference)
    return value, {"velocity_error": total((found["u"] - found["target"]) ** 2) / found["u"][0].size}

  return Objective(
      name="meanflow", grid=grid, sampler_grid=subset(grid, sampler_steps), solver=solvers.ddim(tell_end=True),
      student=parts.student, teacher=teacher, init=lambda key, params: {"student": parts.init_student(key, params)},
      players=(Player("student", loss),), draw=draw_index(grid), condition=unchanged, needs_x0=from_data,
      reads=("end_time",))
