"""Forward-diffused data: `x_t = alpha_t x0 + sigma_t eps`, the states every base method trains on."""

import jax.numpy as jnp

from ddil_jax import keys as keys_lib
from ddil_jax.diffusion.process import Process, add_noise
from ddil_jax.states.base import SOURCES, Context, Source, States, cond_of


def forward(process: Process, draw, condition, prior_first: bool = False) -> Source:
  """Data at a time of the objective's choice.

  Args:
    draw: keys [B] -> (k int32 [B], t [B]), the objective's training times.
    condition: (keys, cond) -> cond, the objective's additions such as a guidance scale.
    prior_first: replace states of index 0 by pure noise, where the last alpha is not 0 but
      sampling starts from noise (DMD2 on Stable Diffusion's table).
  """
  def fresh(ctx: Context) -> States:
    keys = keys_lib.named(ctx.keys, "forward")
    k, t = draw(keys)
    x0 = ctx.batch["image"]
    eps = keys_lib.normal_like(keys_lib.named(keys, "eps"), x0)
    x_t = add_noise(process, x0, eps, t)
    if prior_first:
      x_t = jnp.where((k == 0).reshape((-1,) + (1,) * (x0.ndim - 1)), process.prior_std * eps, x_t)
    source = jnp.full(k.shape, SOURCES.index("forward"), jnp.int32)
    return States(x_t, t, k, condition(keys, cond_of(ctx.batch)), source, x0)

  return Source("forward", fresh, None)
