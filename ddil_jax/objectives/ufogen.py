"""UFOGen: a diffusion GAN whose generator predicts the clean image, with a reconstruction term.

From data x0: x_t ~ q(x_t | x0), x^ = G(x_t, t), and at a smaller time t' = t - T / N, with noises of their own:

    fake' ~ q(x_t' | x^),   real' ~ q(x_t' | x0)
    L = softplus(-min(h(fake'), c)) + lambda SNR mean (x^ - x0)^2
    L_D = softplus(max(h(fake'), -c)) + softplus(-min(h(real'), c))

h is a head on the critic's features at (x_t', t'), and the critic's network learns with it. Clamped logits have
no gradient: a discriminator that is right by more than c waits. SNR times the x0 error is the error of eps. The
loss needs x0, so it is defined on forward states and teacher pairs: a rollout state has no clean image to be the
real side or the target. Sampling re-noises x^, in one step or several.

Source: arXiv 2311.09257 and 2306.12511 (SIDDMs), after the first author's repository xuyanwu/SIDDMs-UFOGen;
golden vectors `ufogen_*`. Its networks predict a variance too, with a term that trains it; ours do not. Its
discriminator gives a map of logits, ours one a head. Its D learns at every other step (`critic_period=2`). The
cap on SNR is ours.
"""

import jax
import jax.numpy as jnp

from ddil_jax.diffusion import weighting
from ddil_jax.diffusion.distance import l2
from ddil_jax.diffusion.process import Process, add_noise
from ddil_jax.errors import UsageError
from ddil_jax.objectives.base import (Objective, Parts, Player, draw_noise, generate, generator, guided_teacher,
                                      init_generator, stop, subset)
from ddil_jax.objectives.dmd2 import gan_logits
from ddil_jax.types import Array


def adversarial_loss(fake: Array, clamp: float = 0.5) -> Array:
  """The generator's `softplus(-min(fake, clamp))` of logits of any shape."""
  return jax.nn.softplus(-jnp.minimum(fake, clamp))


def discriminator_loss(fake: Array, real: Array, clamp: float = 0.5) -> Array:
  """`softplus(max(fake, -clamp)) + softplus(-min(real, clamp))` of logits of any shape."""
  return jax.nn.softplus(jnp.maximum(fake, -clamp)) + jax.nn.softplus(-jnp.minimum(real, clamp))


def eps_error(process: Process, x0: Array, target: Array, t: Array, cap: float = float("inf")) -> Array:
  """`min(SNR, cap) mean (x0 - target)^2`: the square error of eps, per example [B]."""
  return weighting.make("snr", cap=cap)(process, t) * l2()(x0, target)


def make(parts: Parts, num_steps: int = 4, num_scales: int = 128, period: int = 1, critic_period: int = 1,
         reconstruction: float = 1.0, snr_cap: float = float("inf"), clamp: float = 0.5,
         feature: str = "bottleneck") -> Objective:
  """UFOGen for a student of `num_steps` steps.

  Args:
    num_scales: training times; t' is num_scales / num_steps of them further down.
    period, critic_period: of the updates of student and discriminator.
    reconstruction: lambda. snr_cap: largest SNR in it. clamp: c.
    feature: of the critic, which the head reads.
  """
  if num_scales < num_steps or num_scales % num_steps:
    raise UsageError(f"ufogen: num_scales {num_scales} must be a multiple of num_steps {num_steps}")
  if parts.guidance_scale != 1:
    raise UsageError(f"ufogen: the teacher gives the start only, so guidance scale {parts.guidance_scale:g} has no"
                     " meaning; set it to 1")
  process, grid = parts.process, parts.make_grid(num_scales)
  skip = num_scales // num_steps

  def logits(critic, name, x0, states, keys):
    s = jnp.maximum(jnp.asarray(grid, x0.dtype)[states.k + skip], process.t_min)
    x_s = add_noise(process, x0, draw_noise(keys, name, x0), s)
    return gan_logits(process, parts.critic, parts.head, critic, x_s, s, None, states.cond, feature)

  def generator_loss(params, view, states, batch, keys):
    del batch
    x0 = generate(parts, params, states, keys)
    gan = adversarial_loss(logits(view.params["critic"], "generated", x0, states, keys), clamp)
    error = eps_error(process, x0, states.x0, states.t, snr_cap)
    return gan + reconstruction * error, {"gan": gan, "reconstruction": error}

  def critic_player(params, view, states, batch, keys):
    del batch
    x0 = stop(generate(parts, view.params["student"], states, keys))
    fake, real = logits(params, "fake", x0, states, keys), logits(params, "real", states.x0, states, keys)
    return discriminator_loss(fake, real, clamp), {"fake": fake, "real": real}

  players = (Player("student", generator_loss, period), Player("critic", critic_player, critic_period))
  return generator("ufogen", parts, grid, players, guided_teacher(parts, 1.0), init_generator(parts, feature),
                   sampler_grid=subset(grid, num_steps), prior_first=False, own_source="forward", needs_x0=True)
