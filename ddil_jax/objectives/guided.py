"""Guided distillation, stage one: a student that is told the guidance scale equals the guided teacher.

    g ~ U[g_min, g_max] per sample
    L = w(t) mean_pixels (D(x_t, t, c, g) - sg (u + g (c - u)))^2,   c, u the teacher with and without class

One call instead of two, at any scale. Its student, given as a teacher that reads the scale
(`teacher.guidance_embedding`), is what stage two distils in steps: `pd` with `guidance_range`. The label
needs the state only, so it runs on every source.

Source: arXiv 2210.03142, section 3.1; no code of the authors was found and no golden vectors exist. In
the paper w = g - 1. Verified: at the exact student the loss is 0; g = 1 is distillation of the conditional
teacher.
"""

from ddil_jax import keys as keys_lib
from ddil_jax.diffusion import distance as distances
from ddil_jax.diffusion import solvers, weighting
from ddil_jax.errors import UsageError
from ddil_jax.objectives.base import (Objective, Parts, Player, bind, draw_guidance, draw_index, guided_teacher, stop,
                                      subset)


def make(parts: Parts, num_scales: int = 32, sampler_steps: int = 8, guidance_range: tuple[float, ...] = (1.0, 5.0),
         weight: str = "v_mse", weight_cap: float = 1e6) -> Objective:
  """Stage one on a grid of `num_scales` times.

  Args:
    sampler_steps: DDIM steps of the student's sampler, a subset of the training times.
    guidance_range: (g_min, g_max), drawn per sample and given to the student.
    weight, weight_cap: a name of `diffusion.weighting` and the largest weight.
  """
  if not 1 <= sampler_steps <= num_scales:
    raise UsageError(f"guided: sampler_steps {sampler_steps} must lie between 1 and num_scales {num_scales}")
  if not guidance_range:
    raise UsageError("guided: guidance_range must be (g_min, g_max): the student learns every scale between them")
  process, grid = parts.process, parts.make_grid(num_scales)
  teacher, weight_fn = guided_teacher(parts, None), weighting.make(weight, cap=weight_cap)

  def loss(params, view, states, batch, keys):
    del batch
    x_t = stop(states.x_t)
    label = stop(teacher(view.teacher)(x_t, states.t, states.cond))
    student = bind(parts.student, params, keys_lib.named(keys, "dropout"))
    return weight_fn(process, states.t) * distances.l2()(student(x_t, states.t, states.cond), label), {}

  return Objective(
      name="guided", grid=grid, sampler_grid=subset(grid, sampler_steps), solver=solvers.ddim(), student=parts.student,
      teacher=teacher, init=lambda key, params: {"student": parts.init_student(key, params)},
      players=(Player("student", loss),), draw=draw_index(grid), condition=draw_guidance("guided", guidance_range))
