"""Diff-Instruct: the integral KL divergence between the student's diffused images and the teacher's.

Generated x = G(x_t, t). At a fresh time and noise x_tau:

    L = mean sg(D_fake(x_tau) - D_real(x_tau)) x                  so dL/dx = w(tau) (D_fake - D_real) / numel
    L_critic = w_critic(tau) mean (D_fake(x_tau) - x)^2

With w = alpha^2 / sigma^2 the expectation of the gradient is that of KL(diffused G || diffused data), since
D_fake - D_real = sigma^2 / alpha (s_fake - s_real); the release has w = 1, which is the default here. It is
DMD2 without the normaliser, the GAN term and the second time scale. Defined on all states: a student that is
trained at several times takes those of its own sampler, data or teacher states alike.

Source: arXiv 2305.18455; golden vectors `diff_instruct_*`. The release starts at a noise level of its own (1 to 5
in the golden vectors), here at the first time of the grid, and draws noise levels log-normally, here uniformly
from `times` of the table; both are ours. Guidance of the teacher and several steps are ours too.
"""

import jax.numpy as jnp

from ddil_jax.diffusion import weighting
from ddil_jax.diffusion.distance import per_example
from ddil_jax.diffusion.process import Process, add_noise, expand
from ddil_jax.errors import UsageError
from ddil_jax.objectives.base import (Objective, Parts, Player, bind, draw_noise, draw_times, generate, generator,
                                      guided_teacher, init_generator, stop)
from ddil_jax.objectives.dmd2 import critic_loss
from ddil_jax.types import Array, Cond, DenoiseFn


def ikl_loss(process: Process, real: DenoiseFn, fake: DenoiseFn, x: Array, t: Array, noise: Array, cond: Cond,
             weight=None) -> tuple[Array, dict[str, Array]]:
  """The loss per pixel [B,H,W,C], whose value means nothing, and d_real, d_fake, gradient."""
  x_t = stop(add_noise(process, x, noise, t))
  d_real, d_fake = stop(real(x_t, t, cond)), stop(fake(x_t, t, cond))
  gradient = d_fake - d_real if weight is None else expand(weight(process, t), x) * (d_fake - d_real)
  return gradient * x, {"d_real": d_real, "d_fake": d_fake, "gradient": gradient}


def make(parts: Parts, num_steps: int = 1, period: int = 1, times: tuple[float, float] = (0.02, 0.98),
         weight: str = "constant", critic_weight: str = "snr", weight_cap: float = float("inf")) -> Objective:
  """Diff-Instruct for a student of `num_steps` steps.

  Args:
    period: critic steps per generator step.
    times: share of the noise range from which the generator's times are drawn; the critic sees all.
    weight, critic_weight: names of `diffusion.weighting` ("snr": the KL divergence), capped at weight_cap.
  """
  process, grid = parts.process, parts.make_grid(num_steps)
  if not 0 <= times[0] < times[1] <= 1:
    raise UsageError(f"diff_instruct: times {times} must be (low, high) with 0 <= low < high <= 1")
  draw, teacher = draw_times(parts), guided_teacher(parts, parts.guidance_scale)
  weight_fn, critic_weight_fn = (weighting.make(name, cap=weight_cap) for name in (weight, critic_weight))

  def generator_loss(params, view, states, batch, keys):
    del batch
    x = generate(parts, params, states, keys)
    fake = parts.reflect_target(bind(parts.critic, view.params["critic"]["net"]))
    loss, found = ikl_loss(process, teacher(view.teacher), fake, x, draw(keys, "t", times), draw_noise(keys, "eps", x),
                           states.cond, weight_fn)
    return per_example(loss), {"gap": jnp.sqrt(per_example(found["gradient"] ** 2))}

  def critic_player(params, view, states, batch, keys):
    del batch
    x = stop(generate(parts, view.params["student"], states, keys))
    loss, _ = critic_loss(process, bind(parts.critic, params["net"]), x, draw(keys, "critic_t"),
                          draw_noise(keys, "critic_eps", x), states.cond, critic_weight_fn)
    return loss, {}

  return generator("diff_instruct", parts, grid,
                   (Player("student", generator_loss, period), Player("critic", critic_player)), teacher,
                   init_generator(parts))
