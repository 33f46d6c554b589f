"""Latent consistency distillation: consistency under guidance, on a skipping DDIM grid.

    x_s = DDIM step of the guided teacher, g ~ U[g_min, g_max] per sample, k timesteps at once
    f(x, t) = c_skip(t) x + c_out(t) D(x, t, g)
    L = d(f(x_t, t, g), sg f_ema(x_s, s, g)),  d = l2 or pseudo_huber

The student and the target see g (an embedding of w = g - 1), the teacher does not. The EMA target
starts as a copy. The labels need the state only, so it runs on every source. In pixels as in latents; the
name follows the paper.

Source: arXiv 2310.04378, algorithm 1; luosiallen/latent-consistency-model and diffusers' script
(golden vectors `lcm_*`). Our guidance convention is u + g (c - u); theirs is w = g - 1.
"""

import numpy as np

from ddil_jax import keys as keys_lib
from ddil_jax.diffusion import distance as distances
from ddil_jax.diffusion import solvers
from ddil_jax.diffusion.prediction import lcm_scalings
from ddil_jax.diffusion.process import expand
from ddil_jax.errors import UsageError
from ddil_jax.objectives.base import (Objective, Parts, Player, bind, draw_guidance, draw_index, guided_teacher,
                                      next_time, subset)
from ddil_jax.objectives.cd import consistency_loss
from ddil_jax.types import Denoiser


def consistency_function(denoiser: Denoiser, timestep_scaling: float = 10.0, sigma_data: float = 0.5) -> Denoiser:
  """`f = c_skip x_t + c_out x0` with LCM's scalings; t is multiplied by `timestep_scaling`."""
  def f(params, x_t, t, cond, keys=None, features=(), *reuse):
    c_skip, c_out = lcm_scalings(t, sigma_data, timestep_scaling)
    mix = lambda x0: expand(c_skip, x_t) * x_t + expand(c_out, x_t) * x0  # noqa: E731
    out = denoiser(params, x_t, t, cond, keys, features, *reuse)
    return (mix(out[0]), out[1]) if features else mix(out)
  return f


def make(parts: Parts, num_scales: int = 50, sampler_steps: int = 4, distance: str = "l2", huber_c: float = 1e-3,
         target_decay: float = 0.95, guidance_range: tuple[float, ...] = (),
         timestep_scaling: float = 10.0) -> Objective:
  """LCM on a training grid of `num_scales` intervals (a skip of 1/num_scales).

  Args:
    sampler_steps: steps of the student's sampler, a subset of the grid.
    distance: "l2", "l1" or "pseudo_huber" with constant huber_c.
    target_decay: EMA of the target network.
    guidance_range: (g_min, g_max) drawn per sample and given to the student; () uses the fixed
      guidance scale of the teacher and no embedding.
    timestep_scaling: per discrete step of 1000; other processes are rescaled to that unit.
  """
  process = parts.process
  if num_scales < 1 or sampler_steps < 1 or sampler_steps > num_scales:
    raise UsageError(f"lcm: sampler_steps {sampler_steps} must lie between 1 and num_scales {num_scales}")
  condition = draw_guidance("lcm", guidance_range)
  grid = parts.make_grid(num_scales)
  sampler_grid = subset(grid, sampler_steps)
  steps_per_unit = 999.0 / process.t_max
  # A table's last interval ends at its step 0, as in the original, where f(x, 0) = x.
  grid = np.maximum(grid, 0)
  student = consistency_function(parts.student, timestep_scaling * steps_per_unit)
  teacher = guided_teacher(parts, None if guidance_range else parts.guidance_scale)
  distance_fn = distances.make(distance, **({"c": huber_c} if distance == "pseudo_huber" else {}))

  def loss(params, view, states, batch, keys):
    del batch
    dropout = keys_lib.named(keys, "dropout")
    value, _ = consistency_loss(process, bind(student, params, dropout),
                                parts.reflect_target(bind(student, view.ema["target"], dropout)),
                                teacher(view.teacher), solvers.ddim(), states.x_t, states.t,
                                next_time(grid, states.k, states.t), states.cond, distance_fn)
    return value, {}

  return Objective(
      name="lcm", grid=grid, sampler_grid=sampler_grid, solver=solvers.renoise(), student=student,
      teacher=teacher, init=lambda key, params: {"student": parts.init_student(key, params)},
      players=(Player("student", loss),), draw=draw_index(grid), condition=condition,
      targets={"target": target_decay})
