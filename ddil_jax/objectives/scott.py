"""SCott: consistency whose solver step is several stochastic steps of the guided teacher.

    x_s = h steps of DDIM with noise share eta from x_t, evenly spaced between t and s
    L   = w(t) d(f(x_t, t), sg f_target(x_s, s))

With eta = 0 and h = 1 it is consistency distillation (`cd`). The steps need the state only, so it runs on
every source.

Source: arXiv 2403.01505, from secondary notes: no code was found and no golden vectors exist. In the paper
also an adversarial term, 0.4 of a hinge loss on a trained discriminator: `adversarial` adds it. Verified: at
eta = 0 and h = 1 the loss is CD's, and at eta = 1 a step has the mean and variance of the posterior.
"""

import jax
import jax.numpy as jnp

from ddil_jax import keys as keys_lib
from ddil_jax.diffusion import distance as distances
from ddil_jax.diffusion import solvers, weighting
from ddil_jax.diffusion.process import Process
from ddil_jax.errors import UsageError
from ddil_jax.objectives.base import (Objective, Parts, Player, bind, draw_index, guided_teacher, next_time, stop,
                                      subset, unchanged)
from ddil_jax.types import Array, Cond, DenoiseFn


def stochastic_steps(process: Process, teacher: DenoiseFn, x_t: Array, t: Array, s: Array, cond: Cond, keys: Array,
                     steps: int, eta: float) -> Array:
  """x_s [B,H,W,C] after `steps` DDIM steps with noise share eta, evenly spaced from t to s [B]."""
  policy = solvers.ddim(eta)(process, teacher)

  def body(x, i):
    now, then = (t + (s - t) * (i + j) / steps for j in (0, 1))
    # The last step ends at s itself: a rounding above the clean end would not be clean.
    then = jnp.where(i == steps - 1, s, then)
    x, _ = policy.step((), x, now, then, cond, keys_lib.normal_like(keys_lib.numbered(keys, i), x))
    return x, None

  return jax.lax.scan(body, x_t, jnp.arange(steps))[0]


def make(parts: Parts, num_scales: int = 18, sampler_steps: int = 2, solver_steps: int = 3, eta: float = 0.3,
         distance: str = "l2", weight: str = "constant", target_decay: float = 0.95) -> Objective:
  """SCott on a grid of `num_scales` times; options as in `cd`.

  Args:
    solver_steps: h, teacher steps between two neighbouring times.
    eta: noise share of a step, 0 to 1.
  """
  if num_scales < 2 or solver_steps < 1 or not 0 <= eta <= 1:
    raise UsageError(f"scott: num_scales {num_scales} must be at least 2, solver_steps {solver_steps} at least 1, eta"
                     f" {eta} in [0, 1]")
  process = parts.process
  edm = process.name == "edm"
  grid = parts.make_grid(num_scales)[:-1] if edm else parts.make_grid(num_scales - 1)
  teacher = guided_teacher(parts, parts.guidance_scale)
  distance_fn, weight_fn = distances.make(distance), weighting.make(weight)

  def loss(params, view, states, batch, keys):
    del batch
    s, x_t = next_time(grid, states.k, states.t), stop(states.x_t)
    x_s = stop(stochastic_steps(process, teacher(view.teacher), x_t, states.t, s, states.cond,
                                keys_lib.named(keys, "solver"), solver_steps, eta))
    dropout = keys_lib.named(keys, "dropout")
    target = parts.reflect_target(bind(parts.student, view.ema["target"] if target_decay else params, dropout))
    goal = stop(target(x_s, s, states.cond))
    prediction = bind(parts.student, params, dropout)(x_t, states.t, states.cond)
    return weight_fn(process, states.t) * distance_fn(prediction, goal), {}

  return Objective(
      name="scott", grid=grid, sampler_grid=subset(grid, sampler_steps),
      solver=solvers.renoise(process.t_min if edm else 0.0), student=parts.student, teacher=teacher,
      init=lambda key, params: {"student": parts.init_student(key, params)}, players=(Player("student", loss),),
      draw=draw_index(grid), condition=unchanged, targets={"target": target_decay} if target_decay else {})
