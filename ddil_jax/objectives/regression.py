"""Regression on the teacher's paths: one student step gives the image to which the teacher's walk leads.

    x* = DDIM walk of the guided teacher from x_t at t to the clean end
    L  = mean_pixels (D(x_t, t) - sg x*)^2 / 2

On a state of the teacher's own rollout this is regression on stored pairs (noise or path point, image), the plain
knowledge distillation; as x* needs the state only, it runs on every source and labels any state.

Source: knowledge distillation as in NVlabs/FastGen (golden vectors `fg_kd`: the loss on given paths), after
arXiv 2101.02388. Ours: the label is walked at once instead of being stored.
"""

import jax
import jax.numpy as jnp

from ddil_jax import keys as keys_lib
from ddil_jax.diffusion import distance as distances
from ddil_jax.diffusion import solvers
from ddil_jax.diffusion.process import Process
from ddil_jax.errors import UsageError
from ddil_jax.objectives.base import Objective, Parts, Player, bind, draw_index, guided_teacher, stop, unchanged
from ddil_jax.types import Array, Cond, DenoiseFn


def end_point(process: Process, teacher: DenoiseFn, x_t: Array, t: Array, end: float, cond: Cond, steps: int) -> Array:
  """Where `steps` DDIM steps from x_t [B,H,W,C] at t [B] lead, at evenly spaced times down to `end`."""
  def body(x, i):
    now, then = (end + (t - end) * (steps - i - j) / steps for j in (0, 1))
    return solvers.ddim_step(process, x, teacher(x, now, cond), now, then), None
  return jax.lax.scan(body, x_t, jnp.arange(steps))[0]


def regression_loss(student: DenoiseFn, x_t: Array, t: Array, label: Array, cond: Cond) -> Array:
  """Half the mean square error to the label, per example [B]."""
  return 0.5 * distances.l2()(student(stop(x_t), t, cond), stop(label))


def make(parts: Parts, num_steps: int = 4, label_steps: int = 8) -> Objective:
  """Regression at the times of a sampler of `num_steps` steps; a label costs `label_steps` teacher steps."""
  if num_steps < 1 or label_steps < 1:
    raise UsageError(f"regression: num_steps {num_steps} and label_steps {label_steps} must be at least 1")
  process, grid = parts.process, parts.make_grid(num_steps)
  teacher = guided_teacher(parts, parts.guidance_scale)

  def loss(params, view, states, batch, keys):
    del batch
    x_t, t, cond = stop(states.x_t), states.t, states.cond
    label = end_point(process, teacher(view.teacher), x_t, t, grid[-1], cond, label_steps)
    return regression_loss(bind(parts.student, params, keys_lib.named(keys, "dropout")), x_t, t, label, cond), {}

  return Objective(
      name="regression", grid=grid, sampler_grid=grid, solver=solvers.renoise(), student=parts.student,
      teacher=teacher, init=lambda key, params: {"student": parts.init_student(key, params)},
      players=(Player("student", loss),), draw=draw_index(grid), condition=unchanged)
