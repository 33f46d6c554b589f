"""Teacher pairs: noise and the image to which the teacher's flow carries it, interpolated.

    eps ~ N(0, I),   x0 = rollout of the teacher from prior_std eps,   x_t = alpha_t x0 + sigma_t eps

The interpolation is that of forward-diffused data, with the teacher's coupling of noise and image in
the place of an independent one. So it has a clean image, and a loss that needs one is defined here.

Source: reflow (arXiv 2209.03003, section 2.2); regression on pairs (arXiv 2311.18828, section 3.3).
"""

import jax
import jax.numpy as jnp
import numpy as np

from ddil_jax import keys as keys_lib
from ddil_jax.diffusion.process import Process, add_noise, expand
from ddil_jax.diffusion.rollout import prior, rollout
from ddil_jax.states.base import SOURCES, Context, Source, States, cond_of


def pairs(process: Process, make_policy, grid: np.ndarray, draw, condition, prior_first: bool = False) -> Source:
  """A source of teacher pairs.

  Args:
    make_policy: Context -> Policy of the teacher.
    grid: [K+1] the teacher's times.
    draw, condition, prior_first: as in `forward`.
  """
  def fresh(ctx: Context) -> States:
    keys = keys_lib.named(ctx.keys, "pairs")
    k, t = draw(keys)
    cond = condition(keys, cond_of(ctx.batch))
    x_T = prior(process, keys, ctx.batch["image"])
    x0 = rollout(make_policy(ctx), x_T, grid, cond, keys)
    x_t = add_noise(process, x0, x_T / process.prior_std, t)
    if prior_first:
      x_t = jnp.where(expand(k == 0, x_T), x_T, x_t)
    return States(x_t, t, k, cond, jnp.full(k.shape, SOURCES.index("pairs"), jnp.int32), x0)

  def path(ctx: Context) -> States:
    return jax.tree.map(lambda v: v[:, None], fresh(ctx))

  return Source("pairs", fresh, path)
