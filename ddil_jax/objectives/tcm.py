"""Truncated consistency models: a second stage that learns the noisy times only, held at their lower end.

    D(x, t) = student where t >= t', else the frozen first stage
    L = L_ect(D; t > t')                                        a consistency step of `ect` between t and r
      + boundary_weight d(student(x_t', t'), sg first(x_r, r)) / (t' - r),   x_r the step of `ect` from t'

The first stage is a consistency model, a run of `ect`: it takes the place of the teacher, and is not guided: its
guidance scale must be 1. The step from t to r is made with the clean image, so it is defined on forward states and
teacher pairs; on rollout states no image belongs to x_t. At the boundary the state is the same image and noise at t'.

Source: arXiv 2410.14895; NVlabs/FastGen (golden vectors `fg_tcm_*`). The original takes the first rows of a
permutation of the batch for the boundary and means over both parts; here a coin per example decides, and the
terms are divided by their probabilities, which is the same in expectation. Ours: one number for r/t, no stages.
"""

import math

import jax.numpy as jnp
import numpy as np

from ddil_jax import keys as keys_lib
from ddil_jax.diffusion import solvers
from ddil_jax.diffusion.process import add_noise, eps_from_x0, expand
from ddil_jax.errors import UsageError
from ddil_jax.objectives.base import Objective, Parts, Player, bind, draw_index, guided_teacher, stop, subset, unchanged
from ddil_jax.objectives.ect import PAIR_WEIGHTS, ect_loss, nearer_time
from ddil_jax.types import Array, DenoiseFn


def truncated(student: DenoiseFn, first: DenoiseFn, transition: Array | float) -> DenoiseFn:
  """The student at times t >= transition, the frozen first stage below."""
  def denoise(x_t, t, cond):
    return jnp.where(expand(t >= transition, x_t), student(x_t, t, cond), first(x_t, t, cond))
  return denoise


def make(parts: Parts, num_scales: int = 32, sampler_steps: int = 1, transition: float = 1.0, ratio: float = 0.9,
         boundary_share: float = 0.25, boundary_weight: float = 0.1, huber_c: float = 1e-4) -> Objective:
  """The second stage, on the times of a grid of `num_scales` whose noise level is above the transition.

  Args:
    transition: noise level sigma / alpha of t'.
    ratio: r/t far from the data.
    boundary_share: share of the examples at the boundary.
    boundary_weight: of the boundary term.
    huber_c: constant of the distance.
  """
  if not 0 < boundary_share < 1 or not 0 <= ratio < 1 or not transition > 0:
    raise UsageError(f"tcm: boundary_share {boundary_share} must be in (0, 1), ratio {ratio} in [0, 1), transition"
                     f" {transition} positive")
  if parts.guidance_scale != 1:
    raise UsageError(f"tcm: the teacher is the first stage, a consistency model, so guidance scale"
                     f" {parts.guidance_scale:g} has no meaning; set it to 1")
  process, whole = parts.process, parts.make_grid(num_scales)
  with np.errstate(divide="ignore"):
    level = np.asarray(process.sigma(jnp.asarray(whole[:-1])) / process.alpha(jnp.asarray(whole[:-1])))
  kept = int(np.sum(level >= transition))
  if kept < max(2, sampler_steps + 1):
    raise UsageError(f"tcm: {kept} of {num_scales} times have a noise level of at least {transition}; sampler_steps"
                     f" {sampler_steps} needs {max(2, sampler_steps + 1)}: more num_scales or a lower transition")
  grid, boundary = np.append(whole[:kept], whole[-1]), float(whole[kept - 1])
  unit = process.t_max if process.t_max > 1 and process.name != "edm" else 1.0

  def loss(params, view, states, batch, keys):
    del batch
    dropout, cond, x0 = keys_lib.named(keys, "dropout"), states.cond, states.x0
    held = keys_lib.uniform(keys_lib.named(keys, "boundary")) < boundary_share
    t = jnp.where(held, boundary, states.t).astype(states.t.dtype)
    moved = add_noise(process, x0, eps_from_x0(process, states.x_t, x0, states.t), t)
    x_t = jnp.where(expand(held, moved), moved, states.x_t)
    r = jnp.minimum(nearer_time(t / unit, ratio, process.t_min / unit) * unit, t - 1e-6 * jnp.maximum(t, 1))
    first = bind(parts.teacher, view.teacher)
    # At the boundary the target is below it whatever r is.
    edge = jnp.where(held, jnp.inf, boundary)
    target = parts.reflect_target(truncated(bind(parts.student, stop(params), dropout), first, edge))
    value, found = ect_loss(process, bind(parts.student, params, dropout), target, lambda x, t, cond: x0, x_t, t, r,
                            cond, lambda level, t, r: PAIR_WEIGHTS["default"](level, t / unit, r / unit), huber_c)
    scale = jnp.where(held, boundary_weight / boundary_share, 1 / (1 - boundary_share))
    return scale * value / math.prod(parts.image_shape), {"unweighted": found["unweighted"]}

  return Objective(
      name="tcm", grid=grid, sampler_grid=subset(grid, sampler_steps), solver=solvers.renoise(), student=parts.student,
      teacher=guided_teacher(parts, 1.0), init=lambda key, params: {"student": parts.init_student(key, params)},
      players=(Player("student", loss),), draw=draw_index(grid), condition=unchanged, needs_x0=True)
