"""Moment matching, alternating: the conditional means of what the student gives agree with the teacher's.

From a state z_t the student gives x = G(z_t, t), and z_s, s < t, is drawn from q(z_s | z_t, x). With the
auxiliary network g_phi (the critic) and the teacher g_T:

    L = w(s) mean sg(g_phi(z_s) - g_T(z_s)) x                         so dL/dx = w (g_phi - g_T) / numel
    L_phi = w(s) [mean (x - g_phi(z_s))^2 + mean (g_T(z_s) - g_phi(z_s))^2]

g_phi learns E[x | z_s] halfway to the teacher, so the student's gradient is 0 where E[x | z_s] = E_data[x |
z_s] at all s. t is a time of the student's grid, s uniform down to the next one. The student's sampler is
ancestral, the same q step by step. Defined on all states. In one step from pure noise it is Diff-Instruct on
z_s.

Source: arXiv 2406.04103, algorithm 2 (from secondary notes; w(s) and the times are our reading). Golden vectors
`moment_matching_*` are of a third party's code, which differs from the paper: z_s is the deterministic DDIM
point (`kind="ddim"`), and there is no weight.
"""

import jax.numpy as jnp

from ddil_jax import keys as keys_lib
from ddil_jax.diffusion import solvers, weighting
from ddil_jax.diffusion.distance import l2, per_example
from ddil_jax.diffusion.process import Process
from ddil_jax.errors import UsageError
from ddil_jax.objectives.base import (Objective, Parts, Player, bind, draw_noise, generate, generator, guided_teacher,
                                      init_generator, next_time, stop)
from ddil_jax.registry import unknown
from ddil_jax.types import Array


def transition(process: Process, kind: str, z_t: Array, x: Array, t: Array, s: Array, noise: Array) -> Array:
  """z_s from (z_t, x): a draw of q(z_s | z_t, x) ("posterior"), or the "ddim" point."""
  policy = {"posterior": solvers.ancestral, "ddim": solvers.ddim}[kind]()(process, lambda x_t, t, cond: x)
  return policy.step(policy.init(z_t), z_t, t, s, {}, noise)[0]


def student_loss(x: Array, d_aux: Array, d_real: Array) -> Array:
  """`mean sg(g_phi - g_T) x` per example [B]."""
  return per_example(stop(d_aux - d_real) * x)


def aux_loss(x: Array, d_aux: Array, d_real: Array) -> Array:
  """`mean (x - g_phi)^2 + mean (g_T - g_phi)^2` per example [B]."""
  return l2()(stop(x), d_aux) + l2()(stop(d_real), d_aux)


def make(parts: Parts, num_steps: int = 8, period: int = 1, weight: str = "constant", weight_cap: float = float("inf"),
         kind: str = "posterior") -> Objective:
  """Alternating moment matching for a student of `num_steps` steps.

  Args:
    period: steps of the auxiliary network per step of the student.
    weight: w, a name of `diffusion.weighting`, capped at weight_cap.
    kind: of the transition to z_s: "posterior" or "ddim".
  """
  process, grid = parts.process, parts.make_grid(num_steps)
  if kind not in ("posterior", "ddim"):
    raise UsageError(unknown("moment_matching: kind", kind, ("posterior", "ddim")))
  teacher, weight_fn = guided_teacher(parts, parts.guidance_scale), weighting.make(weight, cap=weight_cap)
  reflect = parts.reflect_target

  def visited(params, view, states, keys):
    """(x, z_s, s) with the student's gradient in x alone."""
    x = generate(parts, params, states, keys)
    # Below t and above the clean end, where no network is called; the last interval may begin at t_min itself.
    end = jnp.maximum(next_time(grid, states.k, states.t), 0.5 * process.t_min)
    u = keys_lib.uniform(keys_lib.named(keys, "s"), 0.0, 0.999).astype(states.t.dtype)
    s = end + u * (states.t - end)
    z_s = transition(process, kind, states.x_t, stop(x), states.t, s, draw_noise(keys, "z_s", x))
    return x, z_s, s

  def generator_loss(params, view, states, batch, keys):
    del batch
    x, z_s, s = visited(params, view, states, keys)
    aux = reflect(bind(parts.critic, view.params["critic"]["net"]))
    d_aux, d_real = (denoise(z_s, s, states.cond) for denoise in (aux, teacher(view.teacher)))
    return weight_fn(process, s) * student_loss(x, d_aux, d_real), {"gap": l2()(d_aux, d_real)}

  def critic_player(params, view, states, batch, keys):
    del batch
    x, z_s, s = visited(view.params["student"], view, states, keys)
    d_aux, d_real = (denoise(z_s, s, states.cond) for denoise in (bind(parts.critic, params["net"]),
                                                                   teacher(view.teacher)))
    return weight_fn(process, s) * aux_loss(x, d_aux, d_real), {}

  return generator("moment_matching", parts, grid,
                   (Player("student", generator_loss, period), Player("critic", critic_player)), teacher,
                   init_generator(parts), solver=solvers.ancestral())
