"""BOOT: the signal of the teacher's path from pure noise, learned without data from its own estimate a step earlier.

The student gives the signal y(x_t, t, s) with which a DDIM step from x_t lands on the teacher's path at s. Along the
path it obeys an ordinary differential equation, of which a DDIM step of the teacher from u to v is Euler's step:

    x_u    = DDIM step t -> u with y(x_t, t, u),   t >= u > v
    y_v    = y_u + Delta (f(x_u, u) - y_u),        Delta = (rho_v - rho_u) / (rho_v - rho_t),  rho = alpha / sigma
    L_step = mean_pixels (y(x_t, t, v) - sg y_v)^2 / Delta^2
    L      = L_step + boundary_weight mean_pixels (y(x_t, t, t) - f(x_t, t))^2

f is the guided teacher, y_u = sg y(x_t, t, u) the student itself. From pure noise rho_t = 0 and Delta = 1 -
e^(lambda_u - lambda_v), lambda = log rho. The loss is the error of the equation's rate: where it is 0 the student
is the teacher's DDIM walk over the grid in one step, wherever the walk ends.

`num_steps` = 1 is the method as published: every state is pure noise, whatever the source, and no image is seen. With
more steps it learns to start from each time of its sampler; the labels need the state only, so it runs on every
source, and its own states are those of the student's sampler, which need no data either.

Source: arXiv 2306.05544, from secondary notes: no code of the authors was found, no golden vectors exist. Verified: the
step against DDIM, the fixed point against the teacher's walk, the order of the exact signal's loss. The weight
1 / Delta^2 is that of the method's flow form (OFTSR), the paper's own was not verified. Ours: Delta beyond pure noise
and so starts within the path, times from a grid, s told as cond["end_time"] instead of t.
"""

import jax.numpy as jnp
import numpy as np

from ddil_jax import keys as keys_lib
from ddil_jax.diffusion import distance as distances
from ddil_jax.diffusion import solvers
from ddil_jax.diffusion.process import Process, expand
from ddil_jax.errors import UsageError
from ddil_jax.objectives.base import Objective, Parts, Player, bind, draw_index, guided_teacher, stop, subset, unchanged
from ddil_jax.types import Array, Cond, DenoiseFn


def signal_step(process: Process, t: Array, u: Array, v: Array) -> Array:
  """Delta [B] of a step from u to v on a path from t >= u > v, all [B]; 1 from t itself and to the clean end."""
  # sigma_t sigma_u (rho_u - rho_t): no quotient, since alpha is 0 at pure noise and sigma at the clean end.
  above = lambda u: process.alpha(u) * process.sigma(t) - process.alpha(t) * process.sigma(u)  # noqa: E731
  return 1 - process.sigma(v) * above(u) / (process.sigma(u) * above(v))


def signal_target(process: Process, teacher: DenoiseFn, x_t: Array, signal: Array, t: Array, u: Array, v: Array,
                  cond: Cond) -> tuple[Array, Array]:
  """(y_v, Delta [B]): the signal [B,H,W,C] of the path from x_t at v, after a teacher's step from that at u."""
  x_u = solvers.ddim_step(process, x_t, signal, t, u)
  delta = signal_step(process, t, u, v)
  return signal + expand(delta, x_t) * (teacher(x_u, u, cond) - signal), delta


def boot_loss(process: Process, student: DenoiseFn, target: DenoiseFn, teacher: DenoiseFn, x_t: Array, t: Array,
              u: Array, v: Array, cond: Cond) -> Array:
  """L_step per example [B]; student and target give the signal at cond["end_time"], the target without gradient."""
  x_t = stop(x_t)
  signal = stop(target(x_t, t, {**cond, "end_time": u}))
  goal, delta = signal_target(process, teacher, x_t, signal, t, u, v, cond)
  return distances.l2()(student(x_t, t, {**cond, "end_time": v}), stop(goal)) / delta**2


def boundary_loss(student: DenoiseFn, teacher: DenoiseFn, x_t: Array, t: Array, cond: Cond) -> Array:
  """Mean square error [B] of the signal where a path begins: there it is the teacher's estimate."""
  x_t = stop(x_t)
  return distances.l2()(student(x_t, t, {**cond, "end_time": t}), stop(teacher(x_t, t, cond)))


def make(parts: Parts, num_steps: int = 1, num_scales: int = 32, boundary_weight: float = 1.0) -> Objective:
  """BOOT on a grid of `num_scales` times, for a student of `num_steps` steps.

  Args:
    num_steps: steps of the student's sampler, at whose times paths begin; 1 is the method as published.
    num_scales: times at which the signal is learned. Few make large steps of Euler, many a long chain of estimates.
    boundary_weight: of the loss where a path begins.

  Raises:
    UsageError: numbers out of range.
  """
  if not 1 <= num_steps < num_scales:
    raise UsageError(f"boot: num_steps {num_steps} must lie between 1 and num_scales - 1 = {num_scales - 1}")
  if boundary_weight < 0:
    raise UsageError(f"boot: boundary_weight {boundary_weight:g} must be at least 0")
  process = parts.process
  # Noise levels end at the smallest one: a network that reads their logarithm knows no clean end.
  fine = parts.make_grid(num_scales)[:-1] if process.name == "edm" else parts.make_grid(num_scales - 1)
  grid = subset(fine, num_steps)
  start = np.searchsorted(-fine, -grid[:-1])  # where in the fine grid the paths begin
  teacher = guided_teacher(parts, parts.guidance_scale)

  def loss(params, view, states, batch, keys):
    del batch
    times = jnp.asarray(fine, states.t.dtype)
    i = keys_lib.randint(keys_lib.named(keys, "u"), jnp.asarray(start)[states.k], len(fine) - 1)
    dropout, expert = keys_lib.named(keys, "dropout"), teacher(view.teacher)
    student = bind(parts.student, params, dropout)
    target = parts.reflect_target(bind(parts.student, stop(params), dropout))
    metrics = {"step": boot_loss(process, student, target, expert, states.x_t, states.t, times[i], times[i + 1],
                                 states.cond),
               "boundary": boundary_loss(student, expert, states.x_t, states.t, states.cond)}
    return metrics["step"] + boundary_weight * metrics["boundary"], metrics

  return Objective(
      name="boot", grid=grid, sampler_grid=grid, solver=solvers.ddim(tell_end=True), student=parts.student,
      teacher=teacher, init=lambda key, params: {"student": parts.init_student(key, params)},
      players=(Player("student", loss),), draw=draw_index(grid), condition=unchanged, reads=("end_time",),
      prior_first=True, own_source="student")
