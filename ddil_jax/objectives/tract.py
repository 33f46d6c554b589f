"""TRACT: one student step equals a whole block of teacher steps, learned with itself as the far teacher.

A grid of `num_steps` blocks of `block_size` small steps. From t the teacher walks one small step to
`mid`; a moving average of the student, the self-teacher, jumps from there to the block's end:

    x_mid = one step of the teacher, t -> mid
    x_end = DDIM(x_mid; mid -> end) with the self-teacher's x0;   x_mid itself where mid is the end
    x~    = the x0 with which one DDIM step from x_t lands on x_end     (`pd.invert_ddim`)
    L     = w(t) mean_pixels (D(x_t, t) - sg x~)^2,   w = max(1, SNR)

The labels need nothing but the state, so it runs on every source. The self-teacher's average is
debiased: it forgets its start, so that its first update copies the student.

Source: arXiv 2303.04248; apple/ml-tract (golden vectors `tract_*`; on noise levels with a Heun step
of the teacher `tract_edm_*`). With R = 2, the first small step and the teacher as self-teacher it is
progressive distillation. Ours: the mean over pixels (the original sums), one phase per run.
"""

import jax.numpy as jnp

from ddil_jax import keys as keys_lib
from ddil_jax.diffusion import distance as distances
from ddil_jax.diffusion import solvers, weighting
from ddil_jax.diffusion.process import Process, expand, sigma_ratio
from ddil_jax.errors import UsageError
from ddil_jax.objectives.base import (Objective, Parts, Player, bind, draw_index, guided_teacher, next_time, stop,
                                      unchanged)
from ddil_jax.objectives.pd import invert_ddim
from ddil_jax.types import Array, Cond, DenoiseFn


def tract_target(process: Process, teacher: DenoiseFn, self_teacher: DenoiseFn, x_t: Array, t: Array, mid: Array,
                 end: Array, cond: Cond, solver: solvers.Solver | None = None) -> tuple[Array, dict[str, Array]]:
  """The block's x-target [B,H,W,C], and the intermediates x_mid, x_end.

  The x-target of two DDIM steps is a mean of their x0, with weights b = alpha_v - alpha_u sigma_v / sigma_u of the
  steps u -> v: `(r b_1 x0_1 + b_2 x0_2) / (r b_1 + b_2)`, r = sigma_end / sigma_mid. Inverting the whole step says
  the same and loses digits where the steps are small.

  Args:
    t, mid, end: [B], t > mid >= end.
    solver: of the teacher's small step; None is DDIM.
  """
  if solver is None:
    first = teacher(x_t, t, cond)
    x_mid = solvers.ddim_step(process, x_t, first, t, mid)
  else:
    policy = solver(process, teacher)
    x_mid, _ = policy.step(policy.init(x_t), x_t, t, mid, cond, jnp.zeros_like(x_t))
    first = invert_ddim(process, x_t, x_mid, t, mid)
  arrived = mid <= end
  # The self-teacher is not asked at the clean end, where its answer would not count.
  asked = jnp.where(arrived, t, mid)
  second = self_teacher(x_mid, asked, cond)
  x_end = jnp.where(expand(arrived, x_t), x_mid, solvers.ddim_step(process, x_mid, second, asked, end))
  ratio = sigma_ratio(process, end, asked)
  of_first = ratio * (process.alpha(mid) - process.alpha(t) * sigma_ratio(process, mid, t))
  of_second = process.alpha(end) - process.alpha(asked) * ratio
  share = jnp.where(arrived, 1, of_first / (of_first + of_second))
  return expand(share, x_t) * first + expand(1 - share, x_t) * second, {"x_mid": x_mid, "x_end": x_end}


def tract_loss(process: Process, student: DenoiseFn, teacher: DenoiseFn, self_teacher: DenoiseFn, x_t: Array, t: Array,
               mid: Array, end: Array, cond: Cond, weight, solver: solvers.Solver | None = None) -> Array:
  """Weighted distance to the block's target, per example [B]; weight is (process, t) -> [B]."""
  x_t = stop(x_t)
  target, _ = tract_target(process, teacher, self_teacher, x_t, t, mid, end, cond, solver)
  return weight(process, t) * distances.l2()(student(x_t, t, cond), stop(target))


def debiased(decay: float):
  """EMA decay at update n that gives all updates so far their weights: 1 - (1 - m) / (1 - m^(n+1))."""
  return lambda n: 1 - (1 - decay) / (1 - decay ** (n + 1.0))


def make(parts: Parts, num_steps: int = 1, block_size: int = 16, weight: str = "snr_trunc", snr_cap: float = 1e6,
         self_decay: float = 0.5, solver: str = "ddim") -> Objective:
  """One phase of TRACT, from num_steps * block_size teacher steps to num_steps.

  Args:
    block_size: small steps R per student step.
    weight, snr_cap: a name of `diffusion.weighting` and the largest weight.
    self_decay: of the self-teacher's average.
    solver: "ddim" or "heun" for the teacher's small step.
  """
  if num_steps < 1 or block_size < 2:
    raise UsageError(f"tract: num_steps {num_steps} must be at least 1 and block_size {block_size} at least 2")
  if not 0 <= self_decay < 1:
    raise UsageError(f"tract: self_decay {self_decay} must be in [0, 1)")
  process = parts.process
  grid = parts.make_grid(num_steps * block_size)
  ends = grid[::block_size]
  teacher = guided_teacher(parts, parts.guidance_scale)
  step = None if solver == "ddim" else solvers.make(solver)
  weight_fn = weighting.make(weight, cap=snr_cap)

  def loss(params, view, states, batch, keys):
    del batch
    mid, end = next_time(grid, states.k, states.t), next_time(ends, states.k // block_size, states.t)
    self_teacher = parts.reflect_target(bind(parts.student, view.ema["self_teacher"]))
    student = bind(parts.student, params, keys_lib.named(keys, "dropout"))
    return tract_loss(process, student, teacher(view.teacher), self_teacher, states.x_t, states.t, mid, end,
                      states.cond, weight_fn, step), {}

  return Objective(
      name="tract", grid=grid, sampler_grid=ends, solver=solvers.ddim(), student=parts.student, teacher=teacher,
      init=lambda key, params: {"student": parts.init_student(key, params)},
      players=(Player("student", loss),), draw=draw_index(grid), condition=unchanged,
      targets={"self_teacher": debiased(self_decay)})
