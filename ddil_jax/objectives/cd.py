"""Consistency distillation (and training): neighbouring points of an ODE path map to one x0.

    x_s = one solver step of the teacher from x_t;   L = w(t) d(f(x_t, t), sg f_target(x_s, s))

f satisfies f(x, t_end) = x (boundary scalings). The target network is the student itself under
stop-gradient, or its EMA. The labels need the state only, so distillation runs on every source. With
`from_data` the clean image takes the teacher's place (consistency training): there is no teacher, and it
is defined on forward states only.

Source: arXiv 2303.01469, algorithms 2 and 3; golden vectors `cd_ve_*`, `ct_ve_*`.
"""

import jax.numpy as jnp

from ddil_jax import keys as keys_lib
from ddil_jax.diffusion import distance as distances
from ddil_jax.diffusion import solvers, weighting
from ddil_jax.diffusion.process import Process
from ddil_jax.errors import UsageError
from ddil_jax.objectives.base import (Objective, Parts, Player, bind, draw_index, guided_teacher, next_time, stop,
                                      subset, unchanged)
from ddil_jax.types import Array, Cond, DenoiseFn


def consistency_loss(process: Process, online: DenoiseFn, target: DenoiseFn, teacher: DenoiseFn, solver,
                     x_t: Array, t: Array, s: Array, cond: Cond, distance, weight=None,
                     teacher_cond: Cond | None = None) -> tuple[Array, dict[str, Array]]:
  """The loss per example [B] and its intermediates x_s, prediction, target.

  Args:
    online, target: consistency functions (boundary scalings included).
    solver: the teacher's one-step solver.
    weight: (process, t) -> [B], default 1.
    teacher_cond: what the teacher sees, default cond.
  """
  x_t = stop(x_t)
  policy = solver(process, teacher)
  x_s, _ = policy.step(policy.init(x_t), x_t, t, s, cond if teacher_cond is None else teacher_cond,
                       jnp.zeros_like(x_t))
  goal = stop(target(stop(x_s), s, cond))
  prediction = online(x_t, t, cond)
  loss = distance(prediction, goal)
  loss = loss if weight is None else weight(process, t) * loss
  return loss, {"x_s": x_s, "prediction": prediction, "target": goal}


def make(parts: Parts, num_scales: int = 18, sampler_steps: int = 4, distance: str = "l2", weight: str = "constant",
         solver: str = "heun", target_decay: float = 0.0, from_data: bool = False) -> Objective:
  """Consistency distillation on a grid of `num_scales` times.

  Args:
    num_scales: points of the grid; the pairs are its num_scales - 1 intervals.
    sampler_steps: steps of the student's re-noising sampler.
    distance, weight, solver: names in `diffusion`.
    target_decay: EMA decay of the target network; 0 is the student itself under stop-gradient.
    from_data: consistency training, without a teacher.
  """
  if num_scales < 2:
    raise UsageError(f"cd: num_scales {num_scales} must be at least 2")
  process = parts.process
  # A noise-level grid ends at its smallest level, where f(x, t) = x; others at the clean end.
  grid = parts.make_grid(num_scales)[:-1] if process.name == "edm" else parts.make_grid(num_scales - 1)
  teacher = None if from_data else guided_teacher(parts, parts.guidance_scale)
  distance_fn, weight_fn = distances.make(distance), weighting.make(weight)
  step = solvers.make(solver)

  def loss(params, view, states, batch, keys):
    del batch
    s = next_time(grid, states.k, states.t)
    # The same dropout mask on both sides, as in the original.
    dropout = keys_lib.named(keys, "dropout")
    denoise = (lambda x_t, t, cond: states.x0) if from_data else teacher(view.teacher)
    goal = view.ema["target"] if target_decay else params
    value, _ = consistency_loss(process, bind(parts.student, params, dropout),
                                parts.reflect_target(bind(parts.student, stop(goal), dropout)),
                                denoise, step, states.x_t, states.t, s, states.cond, distance_fn, weight_fn)
    return value, {}

  return Objective(
      name="cd", grid=grid, sampler_grid=subset(grid, sampler_steps),
      solver=solvers.renoise(process.t_min if process.name == "edm" else 0.0), student=parts.student,
      teacher=teacher, init=lambda key, params: {"student": parts.init_student(key, params)},
      players=(Player("student", loss),), draw=draw_index(grid), condition=unchanged,
      targets={"target": target_decay} if target_decay else {}, needs_x0=from_data)
