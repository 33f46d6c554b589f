"""SLAM: latent consistency along the whole sub-path between two neighbouring times, not at its ends alone.

    z_s     = DDIM step of the guided teacher, t -> s
    z_gamma = gamma z_t + (1 - gamma) (alpha_t / alpha_s) z_s,   gamma ~ U(0, 1) per sample
    sigma_gamma^2 = (sigma_s alpha_t / alpha_s)^2 + gamma^2 (1 - (alpha_t / alpha_s)^2)
    x0      = (z_gamma - sigma_gamma eps(z_gamma, t, gamma)) / alpha_t
    L       = d(c_skip(t) z_gamma + c_out(t) x0, sg f_ema(z_s, s, gamma = 1))

z_gamma has signal scale alpha_t and noise scale sigma_gamma, for a variance-preserving process exactly
so if z_t is a Markov step from z_s. The network sees the time t, and gamma in the slot of the guidance
scale, as w = 10 (1 - gamma): gamma = 1 is w = 0, what a network that is told no scale embeds, and the loss is
LCM's. Where x_t is (nearly) pure noise gamma is 1. The labels need the state only, so it runs on every source.

Source: arXiv 2404.13903; MCG-NJU/SPLAM (golden vectors `splam_*`). Outside variance preservation
(flow, noise levels) sigma_gamma is our reading: sqrt((sigma_s r)^2 + gamma^2 (sigma_t^2 - (sigma_s r)^2)),
r = alpha_t / alpha_s, which is the same where alpha^2 + sigma^2 = 1.
"""

import jax.numpy as jnp
import numpy as np

from ddil_jax import keys as keys_lib
from ddil_jax.diffusion import distance as distances
from ddil_jax.diffusion import solvers
from ddil_jax.diffusion.prediction import lcm_scalings
from ddil_jax.diffusion.process import Process, eps_from_x0, expand
from ddil_jax.errors import UsageError
from ddil_jax.objectives.base import (Objective, Parts, Player, bind, draw_index, guided_teacher, next_time, stop,
                                      subset, unchanged)
from ddil_jax.objectives.lcm import consistency_function
from ddil_jax.types import Array, Cond, DenoiseFn


def sub_path(process: Process, z_t: Array, z_s: Array, t: Array, s: Array, gamma: Array) -> tuple[Array, Array]:
  """The point z_gamma [B,H,W,C] between z_t (gamma = 1) and z_s, and its noise scale [B]."""
  ratio = process.alpha(t) / process.alpha(s)
  kept = (process.sigma(s) * ratio) ** 2
  sigma = jnp.sqrt(kept + gamma**2 * (process.sigma(t) ** 2 - kept))
  return expand(gamma, z_t) * z_t + expand((1 - gamma) * ratio, z_t) * z_s, sigma


def slam_loss(process: Process, student: DenoiseFn, target: DenoiseFn, teacher: DenoiseFn, x_t: Array, t: Array,
              s: Array, gamma: Array, cond: Cond, distance, sigma_data: float = 0.5, timestep_scaling: float = 10.0,
              teacher_cond: Cond | None = None) -> tuple[Array, dict[str, Array]]:
  """The loss per example [B] and its intermediates z_s, z_gamma, sigma_gamma, x0, prediction, target.

  Args:
    student: a denoiser without boundary scalings, told gamma by cond["guidance_scale"].
    target: consistency function, boundary scalings included.
    gamma: [B] in [0, 1].
    teacher_cond: what the teacher sees, default cond.
  """
  x_t = stop(x_t)
  z_s = stop(solvers.ddim_step(process, x_t, teacher(x_t, t, cond if teacher_cond is None else teacher_cond), t, s))
  # From (nearly) pure noise no x0 can be read off a noise estimate: there it is LCM.
  pure = process.alpha(t) < 1e-3 * process.sigma(t)
  gamma = jnp.where(pure, 1, gamma)
  z, sigma = sub_path(process, x_t, z_s, t, s, gamma)
  told = lambda gamma: {**cond, "guidance_scale": 1 + 10 * (1 - gamma)}  # noqa: E731
  denoised = student(z, t, told(gamma))
  mixed = z - expand(sigma, z) * eps_from_x0(process, z, denoised, t)
  x0 = jnp.where(expand(pure, z), denoised, mixed / expand(jnp.where(pure, 1, process.alpha(t)), z))
  c_skip, c_out = (expand(c, z) for c in lcm_scalings(t, sigma_data, timestep_scaling))
  prediction = c_skip * z + c_out * x0
  goal = stop(target(z_s, s, told(jnp.ones_like(gamma))))
  return distance(prediction, goal), {"z_s": z_s, "z_gamma": z, "sigma_gamma": sigma, "x0": x0,
                                      "prediction": prediction, "target": goal}


def make(parts: Parts, num_scales: int = 50, sampler_steps: int = 4, distance: str = "pseudo_huber",
         huber_c: float = 1e-3, target_decay: float = 0.95, timestep_scaling: float = 10.0) -> Objective:
  """SLAM on a training grid of `num_scales` intervals; options as in `lcm`, with the teacher's one guidance scale."""
  process = parts.process
  if num_scales < 1 or sampler_steps < 1 or sampler_steps > num_scales:
    raise UsageError(f"slam: sampler_steps {sampler_steps} must lie between 1 and num_scales {num_scales}")
  grid = parts.make_grid(num_scales)
  sampler_grid = subset(grid, sampler_steps)
  grid = np.maximum(grid, 0)  # as in LCM: a table's last interval ends at its step 0
  scaling = timestep_scaling * 999.0 / process.t_max
  student = consistency_function(parts.student, scaling)
  teacher = guided_teacher(parts, parts.guidance_scale)
  distance_fn = distances.make(distance, **({"c": huber_c} if distance == "pseudo_huber" else {}))

  def loss(params, view, states, batch, keys):
    del batch
    dropout = keys_lib.named(keys, "dropout")
    gamma = keys_lib.uniform(keys_lib.named(keys, "gamma"))
    target = parts.reflect_target(bind(student, view.ema["target"], dropout))
    value, _ = slam_loss(process, bind(parts.student, params, dropout), target, teacher(view.teacher), states.x_t,
                         states.t, next_time(grid, states.k, states.t), gamma, states.cond, distance_fn,
                         timestep_scaling=scaling)
    return value, {}

  return Objective(
      name="slam", grid=grid, sampler_grid=sampler_grid, solver=solvers.renoise(), student=student, teacher=teacher,
      init=lambda key, params: {"student": parts.init_student(key, params)},
      players=(Player("student", loss),), draw=draw_index(grid), condition=unchanged, targets={"target": target_decay},
      reads=("guidance_scale",))
