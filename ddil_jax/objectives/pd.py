"""Progressive distillation: one student step equals two teacher steps.

With N student steps on times grid[k], the teacher walks DDIM t -> mid -> s and the target is the
x0 with which one DDIM step from x_t would land on the same x_s:

    x~ = (x_s - (sigma_s/sigma_t) x_t) / (alpha_s - (sigma_s/sigma_t) alpha_t)
    L  = w(t) mean_pixels (D(x_t, t) - x~)^2,   w = max(1, SNR) ("snr_trunc")

At the clean end sigma_s = 0, alpha_s = 1 and x~ is the second teacher x0. The teacher's labels are
defined at any state, so PD runs on every source; x_t and x~ carry no gradient. After a stage the
student becomes the teacher and N is halved (`runs.py`).

Source: arXiv 2202.00512, algorithm 2; google-research diffusion_distillation (golden vectors
`pd_vp_*`); the variance-exploding form of arXiv 2303.01469 (`pd_ve_*`) is the same code.
"""

import numpy as np

from ddil_jax import keys as keys_lib
from ddil_jax.diffusion import distance as distances
from ddil_jax.diffusion import solvers, weighting
from ddil_jax.diffusion.process import Process, expand, sigma_ratio
from ddil_jax.diffusion.solvers import ddim_step
from ddil_jax.errors import UsageError
from ddil_jax.objectives.base import (Objective, Parts, Player, draw_guidance, draw_index, guided_teacher, next_time,
                                      stop)
from ddil_jax.types import Array, Cond, DenoiseFn


def invert_ddim(process: Process, x_t: Array, x_s: Array, t: Array, s: Array) -> Array:
  """The x0 with which DDIM goes from x_t to x_s."""
  ratio = expand(sigma_ratio(process, s, t), x_t)
  alpha_t, alpha_s = expand(process.alpha(t), x_t), expand(process.alpha(s), x_t)
  return (x_s - ratio * x_t) / (alpha_s - ratio * alpha_t)


def x_target(process: Process, teacher: DenoiseFn, x_t: Array, t: Array, mid: Array, s: Array,
             cond: Cond) -> tuple[Array, dict[str, Array]]:
  """The two-step target x~ [B,H,W,C] and the intermediates of its computation."""
  x0_first = teacher(x_t, t, cond)
  x_mid = ddim_step(process, x_t, x0_first, t, mid)
  x0_second = teacher(x_mid, mid, cond)
  x_s = ddim_step(process, x_mid, x0_second, mid, s)
  target = invert_ddim(process, x_t, x_s, t, s)
  return target, {"x0_first": x0_first, "x_mid": x_mid, "x0_second": x0_second, "x_s": x_s}


def pd_loss(process: Process, student: DenoiseFn, teacher: DenoiseFn, x_t: Array, t: Array, mid: Array, s: Array,
            cond: Cond, weight, distance=distances.l2()) -> Array:
  """Weighted distance to the two-step target, per example [B]."""
  target, _ = x_target(process, teacher, stop(x_t), t, mid, s, cond)
  return weight(process, t) * distance(student(stop(x_t), t, cond), stop(target))


def make(parts: Parts, num_steps: int = 4, weight: str = "snr_trunc", snr_cap: float = float("inf"),
         guidance_range: tuple[float, ...] = ()) -> Objective:
  """Progressive distillation to `num_steps` student steps.

  Args:
    weight: a name of `diffusion.weighting`.
    snr_cap: largest weight; max(SNR, 1) grows without bound on fine grids.
    guidance_range: (g_min, g_max) drawn per sample and given to teacher and student, for a teacher that
      reads the scale: stage two of guided distillation (arXiv 2210.03142). () is none.
  """
  if guidance_range and parts.guidance_scale != 1:
    raise UsageError(f"pd: with guidance_range the teacher reads the scale itself; guidance_scale is"
                     f" {parts.guidance_scale:g} and must be 1")
  process = parts.process
  fine = parts.make_grid(2 * num_steps)
  grid, middle = fine[::2], np.append(fine[1::2], fine[-1])
  teacher = guided_teacher(parts, parts.guidance_scale)
  weight_fn = weighting.make(weight, cap=snr_cap)

  def loss(params, view, states, batch, keys):
    del batch
    mid = next_time(np.roll(middle, 1), states.k, states.t)
    s = next_time(grid, states.k, states.t)
    student = lambda x_t, t, cond: parts.student(params, x_t, t, cond, keys_lib.named(keys, "dropout"))  # noqa: E731
    return pd_loss(process, student, teacher(view.teacher), states.x_t, states.t, mid, s, states.cond,
                   weight_fn), {}

  return Objective(
      name="pd", grid=grid, sampler_grid=grid, solver=solvers.ddim(), student=parts.student, teacher=teacher,
      init=lambda key, params: {"student": parts.init_student(key, params)},
      players=(Player("student", loss),), draw=draw_index(grid),
      condition=draw_guidance("pd", guidance_range))
