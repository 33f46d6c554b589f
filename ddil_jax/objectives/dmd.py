"""DMD: distribution matching with regression on teacher pairs.

Generated x = G(x_t, t); the matching gradient and the critic are those of DMD2 without its GAN term. On a state
that comes with the image to which the teacher's flow leads it (source "pairs"):

    L = L_dm + lambda d(G(x_t, t), x0)          and L_dm alone on all other states
    L_critic = w(tau) mean (D_fake(x_tau) - x)^2

So the mixture decides how much of the batch is regressed: with a share p of pairs the regression counts lambda
p in the mean. Without pairs it is DMD2 at one time scale without GAN. Data has no teacher image, so it is
matched only.

Source: arXiv 2311.18828; golden vectors `dmd3p_*` (a third party's code). The paper regresses one step from
pure noise, here from any time of the grid on the interpolation of the pair, and keeps a fixed set of pairs,
here they are made in training (states.replay keeps them for a while). Its distance is LPIPS, here l2, l1 or
pseudo_huber.
"""

import jax.numpy as jnp

from ddil_jax.diffusion import distance as distances
from ddil_jax.diffusion import weighting
from ddil_jax.errors import UsageError
from ddil_jax.objectives.base import (Objective, Parts, Player, bind, draw_noise, draw_times, generate, generator,
                                      guided_teacher, init_generator, stop)
from ddil_jax.objectives.dmd2 import critic_loss, dm_loss
from ddil_jax.states.base import SOURCES


def make(parts: Parts, num_steps: int = 1, period: int = 1, regression: float = 0.25, distance: str = "l2",
         dm_range: tuple[float, float] = (0.02, 0.98), critic_weight: str = "snr",
         weight_cap: float = float("inf"), tiny: float = 1e-8) -> Objective:
  """DMD for a student of `num_steps` steps.

  Args:
    period: critic steps per generator step.
    regression, distance: lambda and d, the latter a name of `diffusion.distance`.
    dm_range: share of the noise range from which the matching times are drawn.
    critic_weight: a name of `diffusion.weighting`, capped at weight_cap (SNR is infinite at t = 0).
    tiny: floor of the gradient's normaliser.
  """
  process, grid = parts.process, parts.make_grid(num_steps)
  if not 0 <= dm_range[0] < dm_range[1] <= 1:
    raise UsageError(f"dmd: dm_range {dm_range} must be (low, high) with 0 <= low < high <= 1")
  if regression < 0:
    raise UsageError(f"dmd: regression {regression} must not be negative")
  draw, teacher = draw_times(parts), guided_teacher(parts, parts.guidance_scale)
  weight_fn, distance_fn = weighting.make(critic_weight, cap=weight_cap), distances.make(distance)

  def generator_loss(params, view, states, batch, keys):
    del batch
    x = generate(parts, params, states, keys)
    fake = parts.reflect_target(bind(parts.critic, view.params["critic"]["net"]))
    dm, _ = dm_loss(process, teacher(view.teacher), fake, x, draw(keys, "t", dm_range), draw_noise(keys, "eps", x),
                    states.cond, tiny=tiny)
    paired = states.source == SOURCES.index("pairs")
    # On other states the distance to an image that has nothing to do with them is dropped.
    error = jnp.where(paired, distance_fn(x, states.x0), 0)
    return dm + regression * error, {"dm": dm, "regression": error}

  def critic_player(params, view, states, batch, keys):
    del batch
    x = stop(generate(parts, view.params["student"], states, keys))
    loss, _ = critic_loss(process, bind(parts.critic, params["net"]), x, draw(keys, "critic_t"),
                          draw_noise(keys, "critic_eps", x), states.cond, weight_fn)
    return loss, {}

  return generator("dmd", parts, grid, (Player("student", generator_loss, period), Player("critic", critic_player)),
                   teacher, init_generator(parts))
