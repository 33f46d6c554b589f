"""f-distill: DMD2's matching gradient under any f-divergence, weighed by a discriminator's density ratio.

Generated x = G(x_t, t), h a head on the frozen teacher's features at x_tau, r = exp(h(x_tau)) ~ p_data /
p_student:

    L = 1/2 mean (x - sg(x - w(r) grad))^2 + lambda softplus(-h(x_tau)),   grad as in DMD2
    L_critic = w_critic(tau) mean (D_fake(x_tau) - x)^2 + softplus(h(fake_tau)) + softplus(-h(real_tau))

    w(r) = f''(r) r^2 up to a factor: rkl 1, kl r, js r / (1 + r), sf 1 / (1 + r), sh sqrt r, jf 1 + r, neyman 1 / r

r is bounded, divided by its mean at like noise levels (`ratio_bins`), and w by its mean over the batch. With rkl
the matching gradient is DMD2's; DMD2's head is on the critic, not on the teacher. Defined on all states; real
images are those of the batch.

Source: arXiv 2502.15681; NVlabs/FastGen (the authors'), golden vectors `fg_fdistill_*` and, for the parts that
it shares with FastGen's DMD2, `fg_dmd2_*`. FastGen keeps a running mean of r per noise level; an objective here
has no state of its own, so `make` takes the mean over the batch. FastGen's `rkl` fails in the release; here w =
1.
"""

import jax
import jax.numpy as jnp

from ddil_jax import keys as keys_lib
from ddil_jax.diffusion import weighting
from ddil_jax.diffusion.process import add_noise
from ddil_jax.errors import UsageError
from ddil_jax.objectives.base import (Objective, Parts, Player, bind, draw_noise, draw_times, generate, generator,
                                      guided_teacher, init_generator, init_head, stop)
from ddil_jax.objectives.dmd2 import carry_gradient, critic_loss, dm_gradient
from ddil_jax.objectives.ladd import discriminator_loss, frozen_logits
from ddil_jax.registry import unknown
from ddil_jax.states.base import cond_of
from ddil_jax.types import Array

WEIGHTS = {
    "rkl": jnp.ones_like,
    "kl": lambda r: r,
    "js": lambda r: r / (1 + r),
    "sf": lambda r: 1 / (1 + r),
    "sh": jnp.sqrt,
    "jf": lambda r: 1 + r,
    "neyman": lambda r: 1 / r,
}


def density_ratio(logits: Array, lower: float = 0.1, upper: float = 5.0) -> Array:
  """`exp(logit)` [B] within [lower, upper], without gradient."""
  return stop(jnp.clip(jnp.exp(jnp.clip(logits, -10, 10)), lower, upper))


def bin_index(t: Array, low: float, high: float, count: int) -> Array:
  """Which of `count` equal parts of [low, high] each time [B] lies in, int32."""
  return jnp.clip(jnp.floor((t - low) / ((high - low) / count)).astype(jnp.int32), 0, count - 1)


def bin_means(ratio: Array, index: Array, previous: Array, rate: float, mean, tiny: float) -> Array:
  """Means of the ratio in each bin [K], blended with previous ones; empty bins keep those.

  Args:
    index: [B] from `bin_index`.
    previous: [K]; rate: the share that is kept of them.
    mean: [B, ...] -> [...], over the whole batch.
    tiny: added to the share of a bin.
  """
  inside = (index[:, None] == jnp.arange(len(previous))[None]).astype(ratio.dtype)
  share, total = mean(inside), mean(inside * ratio[:, None])
  return jnp.where(share > 0, rate * previous + (1 - rate) * total / (share + tiny), previous)


def f_weight(name: str, ratio: Array, mean, tiny: float = 1e-6) -> Array:
  """w(r) over its mean over the batch, [B]."""
  values = WEIGHTS[name](ratio)
  return values / (mean(values) + tiny)


def make(parts: Parts, num_steps: int = 4, period: int = 5, divergence: str = "js",
         dm_range: tuple[float, float] = (0.02, 0.98), critic_weight: str = "snr",
         weight_cap: float = float("inf"), gan_weight: float = 1e-3, feature: str = "bottleneck",
         ratio_range: tuple[float, float] = (0.1, 5.0), ratio_bins: int = 0, tiny: float = 1e-8) -> Objective:
  """f-distill for a student of `num_steps` steps.

  Args:
    period: critic steps per generator step.
    divergence: a name of WEIGHTS.
    dm_range: share of the noise range from which the matching times are drawn.
    critic_weight: a name of `diffusion.weighting`, capped at weight_cap (SNR is infinite at t = 0).
    gan_weight: lambda; the head learns with weight 1 in any case, for it gives the ratio.
    feature: of the teacher, which the head reads.
    ratio_range: bounds of r. ratio_bins: noise levels are divided into so many parts, 0 is off.
    tiny: floor of the gradient's normaliser.
  """
  process, grid = parts.process, parts.make_grid(num_steps)
  if divergence not in WEIGHTS:
    raise UsageError(unknown("f_distill: divergence", divergence, WEIGHTS))
  if not 0 <= dm_range[0] < dm_range[1] <= 1:
    raise UsageError(f"f_distill: dm_range {dm_range} must be (low, high) with 0 <= low < high <= 1")
  if not 0 < ratio_range[0] < ratio_range[1]:
    raise UsageError(f"f_distill: ratio_range {ratio_range} must be (low, high) with 0 < low < high")
  draw, teacher = draw_times(parts), guided_teacher(parts, parts.guidance_scale)
  weight_fn = weighting.make(critic_weight, cap=weight_cap)

  def logits(head, view, x_t, t, cond):
    return frozen_logits(parts.teacher, view.teacher, parts.head, head, x_t, t, cond, feature)

  def generator_loss(params, view, states, batch, keys):
    del batch
    x, critic, cond = generate(parts, params, states, keys), view.params["critic"], states.cond
    t = draw(keys, "t", dm_range)
    x_t = add_noise(process, x, draw_noise(keys, "eps", x), t)
    fake = parts.reflect_target(bind(parts.critic, critic["net"]))
    d_real, d_fake = (denoise(stop(x_t), t, cond) for denoise in (teacher(view.teacher), fake))
    found = logits(critic["head"], view, x_t, t, cond)
    ratio = density_ratio(found, *ratio_range)
    if ratio_bins:
      index = bin_index(t, process.t_min, process.t_max, ratio_bins)
      ratio = ratio / bin_means(ratio, index, jnp.ones(ratio_bins), 0.0, view.mean, tiny)[index]
    weight = f_weight(divergence, ratio, view.mean)
    gradient = dm_gradient(stop(x), stop(d_real), stop(d_fake), tiny) * weight.reshape((-1,) + (1,) * (x.ndim - 1))
    dm, gan = carry_gradient(x, gradient), jax.nn.softplus(-found)
    return dm + gan_weight * gan, {"dm": dm, "gan": gan, "ratio": ratio}

  def critic_player(params, view, states, batch, keys):
    x = stop(generate(parts, view.params["student"], states, keys))
    t, noise = draw(keys, "critic_t"), draw_noise(keys, "critic_eps", x)
    score, _ = critic_loss(process, bind(parts.critic, params["net"]), x, t, noise, states.cond, weight_fn)
    t, noise = draw(keys, "gan_t", dm_range), draw_noise(keys, "gan_eps", x)
    fake = logits(params["head"], view, add_noise(process, x, noise, t), t, states.cond)
    real = logits(params["head"], view, add_noise(process, batch["image"], noise, t), t, cond_of(batch))
    gan = discriminator_loss(fake, real)
    return score + gan, {"score": score, "gan": gan}

  def init(key, teacher):
    params = init_generator(parts)(key, teacher)
    params["critic"]["head"] = init_head(parts, parts.teacher, keys_lib.named(key, "head"), teacher, feature)
    return params

  return generator("f_distill", parts, grid,
                   (Player("student", generator_loss, period), Player("critic", critic_player)), teacher, init)
