"""TwinFlow: one-step generation by a student that also learns the flow to its own images, at negative times.

In y = x_t / (alpha + sigma), tau = sigma / (alpha + sigma) every process is the flow, dy/dtau = v. u(x_t, t, r) is
the average velocity from t to r < t, and u(x_t, t, t) the velocity itself. Five mean squares, with equal weights:

    recursive      u(x_t, t, r) to sg(u - clip(e)),  e = (u (tau_t - tau_r) - I) / (tau_t - tau_m) - v
    one_step       the same from the prior to the clean end
    velocity       u(x_t, t, t) to v
    fake_velocity  u(x'_t, -t, -t) to z - x',  x'_t = alpha x' + sigma z,  x' = the student's one-step image of z
    rectify        u(z, T, 0) to sg(u - (u(x'_s, -s, -s) - u(x'_s, s, s))),  x'_s of x' and fresh noise

I is what a reference network covers by `order` Euler steps from the near time m to r, after a step along v from t
to m. rectify is the gradient of distribution matching: the two velocities are E[noise - image] of fake and of real
images, so their difference moves x' by E[real] - E[fake]. A negative time is told by cond["time_sign"].

v is noise - x0 (the original: forward states and teacher pairs), or the guided teacher's velocity, with which the
method runs on every source. A process whose network is told negative times already (EDM's log noise levels)
cannot tell the twin and is refused.

Source: arXiv 2512.05150; inclusionAI/TwinFlow, its MNIST tutorial (golden vectors `twinflow_*`: all five terms, their
targets, gradients). The loss of the first term alone is RCGM. Our reading: the tutorial is the method; the paper's
split of the batch between the terms is not here. Ours: other processes, the teacher's velocity, times of a grid
(m is the next one; the original's is 0.01 away), and the reference is the average before the step's update. Not
here: guidance of the data's velocity by the student's own estimates.
"""

import jax.numpy as jnp

from ddil_jax import keys as keys_lib
from ddil_jax.diffusion import distance, solvers
from ddil_jax.diffusion.process import Process, add_noise, eps_from_x0, expand, velocity_from_x0
from ddil_jax.errors import UsageError
from ddil_jax.objectives.base import (Objective, Parts, Player, bind, draw_index, draw_noise, guided_teacher, next_time,
                                      stop, subset, unchanged)
from ddil_jax.objectives.meanflow import flow_time
from ddil_jax.types import Array, Cond


def twin(cond: Cond, t: Array) -> Cond:
  """The condition that turns times [B] negative."""
  return {**cond, "time_sign": -jnp.ones_like(t)}


def span(process: Process, t: Array, s: Array, like: Array) -> Array:
  """tau_t - tau_s [B,1,1,1]."""
  return expand(flow_time(process, t) - flow_time(process, s), like)


def move(process: Process, x_t: Array, u: Array, t: Array, s: Array) -> Array:
  """x_s [B,H,W,C]: from t to s at the velocity u."""
  scale = lambda t: expand(process.alpha(t) + process.sigma(t), x_t)  # noqa: E731
  return scale(s) * (x_t / scale(t) - span(process, t, s, x_t) * u)


def recursive_target(process: Process, u: Array, reference, x_t: Array, t: Array, near: Array, r: Array, cond: Cond,
                     v: Array, order: int = 2, bound: float = 1.0) -> Array:
  """What u(x_t, t, r) is drawn to, without gradient.

  Args:
    u: [B,H,W,C], the student's average velocity from t to r.
    reference: (x_t, t, r, cond) -> average velocity, for the way from `near` to r.
    near: [B], r <= near < t.
    v: [B,H,W,C], the velocity at (x_t, t).
    order: Euler steps of the reference.
    bound: of the correction of every value.
  """
  x, covered = move(process, x_t, v, t, near), jnp.zeros_like(x_t)
  for i in range(order):
    now, then = (r + (near - r) * (order - j) / order for j in (i, i + 1))  # ends at r without rounding
    w = reference(x, now, then, cond)
    x, covered = move(process, x, w, now, then), covered + span(process, now, then, x) * w
  error = (u * span(process, t, r, u) - covered) / span(process, t, near, u) - v
  return stop(u - jnp.clip(error, -bound, bound))


def fake_velocity_loss(process: Process, velocity, image: Array, noise: Array, t: Array, cond: Cond) -> Array:
  """The loss [B] by which negative times learn the flow between noise and the student's images [B,H,W,C]."""
  x_t = stop(add_noise(process, image, noise, t))
  return distance.l2()(velocity(x_t, t, t, twin(cond, t)), stop(noise - image))


def rectification(process: Process, velocity, image: Array, noise: Array, t: Array, cond: Cond) -> Array:
  """Velocity of fake images minus that of real ones [B,H,W,C] at a noised image of the student, without gradient."""
  x_t = add_noise(process, image, noise, t)
  return stop(velocity(x_t, t, t, twin(cond, t)) - velocity(x_t, t, t, cond))


def make(parts: Parts, num_scales: int = 32, sampler_steps: int = 1, from_data: bool = False, order: int = 2,
         bound: float = 1.0, target_decay: float = 0.99) -> Objective:
  """TwinFlow on a grid of `num_scales` times.

  Args:
    sampler_steps: jumps of the student's sampler.
    from_data: the velocity comes from the clean image, else from the guided teacher.
    order: Euler steps of the reference in `recursive_target`.
    bound: of its correction.
    target_decay: EMA decay of the reference; 0 is the student itself.

  Raises:
    UsageError: a number out of range, or a process whose times are negative for the network already.
  """
  process, grid, l2 = parts.process, parts.make_grid(num_scales), distance.l2()
  if not 1 <= sampler_steps <= num_scales or order < 1 or not bound > 0:
    raise UsageError(f"twinflow: sampler_steps {sampler_steps} must lie between 1 and num_scales {num_scales}, order"
                     f" {order} be at least 1, bound {bound} positive")
  told = float(jnp.min(process.time_input(jnp.asarray(grid[:-1], jnp.float32))))
  if told < 0:
    raise UsageError(f"twinflow: negative times tell the flow to the student's own images, but the networks of process"
                     f" '{process.name}' are told times down to {told:.0f} already; use another process")
  teacher = guided_teacher(parts, parts.guidance_scale)

  def loss(params, view, states, batch, keys):
    del batch
    x_t, t, cond, times = stop(states.x_t), states.t, states.cond, jnp.asarray(grid, states.t.dtype)
    label = (lambda x_t, t, cond: states.x0) if from_data else teacher(view.teacher)
    along = lambda x, t: stop(velocity_from_x0(process, x, label(x, t, cond), t))  # noqa: E731

    def average(denoise):
      return lambda x, t, r, cond: velocity_from_x0(process, x, denoise(x, t, {**cond, "end_time": r}), t)

    u = average(bind(parts.student, params, keys_lib.named(keys, "dropout")))
    reference = average(parts.reflect_target(bind(parts.student, view.ema["target"])))

    def recursive(x, t, near, r, v):
      found = u(x, t, r, cond)
      return found, l2(found, recursive_target(process, stop(found), reference, x, t, near, r, cond, v, order, bound))

    v = along(x_t, t)
    r = times[keys_lib.randint(keys_lib.named(keys, "r"), states.k + 1, len(grid))]
    terms = {"recursive": recursive(x_t, t, next_time(grid, states.k, t), r, v)[1],
             "velocity": l2(u(x_t, t, t, cond), v)}

    # With the data's velocity the noise of x_t belongs to its image; else there is no image, and any noise will do.
    noise = eps_from_x0(process, x_t, states.x0, t) if from_data else draw_noise(keys, "prior", x_t)
    start, near, end = (jnp.full_like(t, each) for each in (grid[0], grid[1], grid[-1]))
    prior = stop(process.prior_std * noise)
    jump, terms["one_step"] = recursive(prior, start, near, end, along(prior, start))
    image = stop(move(process, prior, jump, start, end))
    terms["fake_velocity"] = fake_velocity_loss(process, u, image, noise, t, cond)

    s = times[keys_lib.randint(keys_lib.named(keys, "s"), 0, len(grid) - 1)]
    difference = rectification(process, u, image, draw_noise(keys, "noise", image), s, cond)
    terms["rectify"] = l2(jump, stop(jump - difference))
    return sum(terms.values()), terms

  return Objective(
      name="twinflow", grid=grid, sampler_grid=subset(grid, sampler_steps), solver=solvers.ddim(tell_end=True),
      student=parts.student, teacher=teacher, init=lambda key, params: {"student": parts.init_student(key, params)},
      players=(Player("student", loss),), draw=draw_index(grid), condition=unchanged,
      targets={"target": target_decay}, needs_x0=from_data, reads=("end_time",))
