"""DMD2: distribution matching with a learned critic, a GAN term and backward simulation.

Generated x = G(x_t, t). At a fresh time and noise x_tau:

    grad = (D_fake - D_real) / mean_CHW |x - D_real|            per sample, D_real guided
    L_dm = 1/2 mean (x - sg(x - grad))^2                        so dL/dx = grad / numel
    L_G  = softplus(-h(x_tau)),   L_D = softplus(h(fake_tau)) + softplus(-h(real_tau))
    L_critic = w(tau) mean (D_fake(x_tau) - x)^2                eps-MSE (w = snr) or EDM weight

h is a head on the critic's bottleneck features; the D loss trains the critic's trunk too. The
critic learns at every step, the generator at every `period`-th, both on the same generated batch,
made by the generator as it was at the start of the step. The generator's inputs are states of the
student's own sampler (DMD2's backward simulation is the student source), or of any mixture: that
is DMD2 + DDIL.

`gan_balance="auto"` weighs the GAN term by how its gradient at the generated image compares with that
of the matching term, see `balance`. That is ours, not DMD2's.

Source: arXiv 2405.14867 and 2311.18828; re-derived from the published equations and checked with
golden vectors (`dmd2_*`); no code is carried over.
"""

import jax
import jax.numpy as jnp

from ddil_jax.diffusion import distance as distances
from ddil_jax.diffusion import solvers, weighting
from ddil_jax.diffusion.process import Process, add_noise
from ddil_jax.errors import UsageError
from ddil_jax.objectives.base import (Objective, Parts, Player, bind, draw_index, draw_noise, draw_times, generate,
                                      generator, guided_teacher, init_generator, stop, unchanged)
from ddil_jax.registry import unknown
from ddil_jax.states.base import cond_of
from ddil_jax.states.rollouts import rollout_source
from ddil_jax.types import Array, Cond, Denoiser, DenoiseFn, Params


mse = distances.l2()


def dm_gradient(x: Array, d_real: Array, d_fake: Array, tiny: float = 1e-12, offset: float = 0.0) -> Array:
  """`(D_fake - D_real) / mean|x - D_real|` per sample; `tiny` makes 0/0 zero and bounds x/0.

  `offset` is added to the normaliser, as FastGen does (1e-6).
  """
  norm = jnp.mean(jnp.abs(x - d_real), axis=tuple(range(1, x.ndim)), keepdims=True)
  gradient = (d_fake - d_real) / (jnp.maximum(norm, tiny) + offset)
  return jnp.where(jnp.isfinite(gradient), gradient, 0)


def carry_gradient(x: Array, gradient: Array) -> Array:
  """`1/2 mean (x - sg(x - gradient))^2` per example [B]: its derivative by x is gradient / numel."""
  return 0.5 * mse(x, stop(x - gradient))


def dm_loss(process: Process, real: DenoiseFn, fake: DenoiseFn, x: Array, t: Array, noise: Array, cond: Cond,
            fake_cond: Cond | None = None, tiny: float = 1e-12) -> tuple[Array, dict[str, Array]]:
  """Distribution-matching loss per example and its intermediates; real is guided, fake is not."""
  x_t = stop(add_noise(process, x, noise, t))
  d_real, d_fake = stop(real(x_t, t, cond)), stop(fake(x_t, t, cond if fake_cond is None else fake_cond))
  gradient = dm_gradient(stop(x), d_real, d_fake, tiny)
  return carry_gradient(x, gradient), {"x_t": x_t, "d_real": d_real, "d_fake": d_fake, "gradient": gradient}


def critic_loss(process: Process, fake: DenoiseFn, x: Array, t: Array, noise: Array, cond: Cond,
                weight) -> tuple[Array, dict[str, Array]]:
  """Denoising loss of the fake score on generated images, per example."""
  x = stop(x)
  x_t = add_noise(process, x, noise, t)
  x0 = fake(x_t, t, cond)
  return weight(process, t) * mse(x0, x), {"x_t": x_t, "x0": x0}


def gan_logits(process: Process, critic: Denoiser, head, params: Params, x: Array, t: Array, noise: Array | None,
               cond: Cond, feature: str = "bottleneck") -> Array:
  """Discriminator logits [B] on noised images; noise None leaves the image clean at time t."""
  x_t = x if noise is None else add_noise(process, x, noise, t)
  _, named = critic(params["net"], x_t, t, cond, None, (feature,))
  return head(params["head"], named[feature])


def gradient_norm(gradient: Array) -> Array:
  """Euclidean norm [B] over all pixels of each sample."""
  return jnp.sqrt(jnp.sum(gradient**2, axis=tuple(range(1, gradient.ndim))))


def balance(dm: Array, gan: Array, limit: float = 1e4, tiny: float = 1e-12) -> Array:
  """Weight [B] that makes the GAN term's gradient at an image as long as the matching term's.

  `w = min(|dL_dm/dx| / |dL_gan/dx|, limit)` per sample, under a stop-gradient.

  Args:
    dm, gan: [B,H,W,C], the derivatives of both losses by the generated image.

  Source: ours. VQGAN (arXiv 2012.09841, eq. 7) takes the ratio over the batch at the decoder's last
  layer. At the image and per sample it needs no second pass through the generator, it is normalised as
  DMD2's matching gradient is, and it does not depend on how the batch is split over devices.
  """
  return stop(jnp.minimum(gradient_norm(dm) / jnp.maximum(gradient_norm(gan), tiny), limit))


def make(parts: Parts, num_steps: int = 4, period: int = 5, dm_range: tuple[float, float] = (0.02, 0.98),
         critic_weight: str = "snr", gan_weight: float = 0.0, gan_critic_weight: float = 1e-2,
         feature: str = "bottleneck", weight_cap: float = float("inf"), tiny: float = 1e-8,
         gan_balance: str = "fixed", gan_balance_limit: float = 1e4) -> Objective:
  """DMD2 for a student of `num_steps` steps.

  Args:
    period: critic steps per generator step.
    dm_range: share of the time range from which the matching times are drawn.
    critic_weight: a name of `diffusion.weighting`, capped at weight_cap (SNR is infinite at t = 0).
    gan_weight, gan_critic_weight: weights of the generator's and the critic's GAN terms; 0 is off.
    feature: which of the critic's features the head reads.
    tiny: floor of the gradient's normaliser.
    gan_balance: "fixed", or "auto": gan_weight is then the length of the GAN term's gradient at the
      generated image in units of the matching term's, see `balance`.
    gan_balance_limit: of the factor on gan_weight under "auto".
  """
  process = parts.process
  if not 0 <= dm_range[0] < dm_range[1] <= 1:
    raise UsageError(f"dmd2: dm_range {dm_range} must be (low, high) with 0 <= low < high <= 1")
  if period < 1:
    raise UsageError(f"dmd2: period {period} must be at least 1")
  if gan_balance not in ("fixed", "auto"):
    raise UsageError(unknown("dmd2: gan_balance", gan_balance, ("fixed", "auto")))
  grid = parts.make_grid(num_steps)
  times, teacher = draw_times(parts), guided_teacher(parts, parts.guidance_scale)
  weight_fn = weighting.make(critic_weight, cap=weight_cap)
  with_gan = gan_weight > 0

  def matching(view, x, cond, keys):
    fake = parts.reflect_target(bind(parts.critic, view.params["critic"]["net"]))
    loss, found = dm_loss(process, teacher(view.teacher), fake, x, times(keys, "dm_t", dm_range),
                          draw_noise(keys, "dm_eps", x), cond, tiny=tiny)
    return loss, found["gradient"]

  def fooling(view, x, cond, keys):
    logits = gan_logits(process, parts.critic, parts.head, view.params["critic"], x, times(keys, "gan_g_t"),
                        draw_noise(keys, "gan_g_eps", x), cond, feature)
    return jax.nn.softplus(-logits)

  def fooling_gradient(view, x, cond, keys):
    gan, pull_back = jax.vjp(lambda x: fooling(view, x, cond, keys), x)
    return gan, pull_back(jnp.ones_like(gan))[0]

  def generator_loss(params, view, states, batch, keys):
    del batch
    x = generate(parts, params, states, keys)
    loss, gradient = matching(view, x, states.cond, keys)
    metrics = {"dm": loss, "dm_gradient": jnp.sqrt(mse(gradient, jnp.zeros_like(x)))}
    if with_gan and gan_balance == "fixed":
      metrics["gan"] = fooling(view, x, states.cond, keys)
      loss = loss + gan_weight * metrics["gan"]
    elif with_gan:
      metrics["gan"], by_image = fooling_gradient(view, stop(x), states.cond, keys)
      metrics["gan_balance"] = balance(gradient / gradient[0].size, by_image, gan_balance_limit)
      # The gradient at the image is known, so it is carried on without a second pass through the critic.
      carried = jnp.sum((x - stop(x)) * by_image, axis=tuple(range(1, x.ndim)))
      loss = loss + gan_weight * metrics["gan_balance"] * (metrics["gan"] + carried)
    return loss, metrics

  def score_loss(net, x, cond, keys):
    return critic_loss(process, bind(parts.critic, net), x, times(keys, "critic_t"), draw_noise(keys, "critic_eps", x),
                       cond, weight_fn)[0]

  def critic_player(params, view, states, batch, keys):
    x = stop(generate(parts, view.params["student"], states, keys))
    loss = score_loss(params["net"], x, states.cond, keys)
    metrics = {"score": loss}
    if with_gan:
      real = batch["image"]
      real_cond = cond_of(batch)
      fake_logits = gan_logits(process, parts.critic, parts.head, params, x, times(keys, "gan_f_t"),
                               draw_noise(keys, "gan_f_eps", x), states.cond, feature)
      real_logits = gan_logits(process, parts.critic, parts.head, params, real, times(keys, "gan_r_t"),
                               draw_noise(keys, "gan_r_eps", x), real_cond, feature)
      metrics["gan"] = jax.nn.softplus(fake_logits) + jax.nn.softplus(-real_logits)
      loss = loss + gan_critic_weight * metrics["gan"]
    return loss, metrics

  def sampler_policy(ctx):
    return solver(process, parts.reflect_sampler(bind(parts.student, ctx.student)))

  draw, solver = draw_index(grid), solvers.renoise()
  backward_simulation = rollout_source("student", process, sampler_policy, grid, grid, draw, unchanged)

  def diagnose(view, states, ctx):
    student, critic = view.params["student"], view.params["critic"]
    fresh = backward_simulation.fresh(ctx._replace(student=student))
    x, of_fresh = (generate(parts, student, each, ctx.keys) for each in (states, fresh))
    training, now = (score_loss(critic["net"], image, each.cond, ctx.keys)
                     for image, each in ((x, states), (of_fresh, fresh)))
    _, gradient = matching(view, x, states.cond, ctx.keys)
    found = {"score_training": training, "score_fresh": now, "critic_lag": now - training,
             "dm_gradient_norm": gradient_norm(gradient / gradient[0].size)}
    if with_gan:
      found["gan_gradient_norm"] = gradient_norm(fooling_gradient(view, x, states.cond, ctx.keys)[1])
    return found

  return generator("dmd2", parts, grid, (Player("student", generator_loss, period), Player("critic", critic_player)),
                   teacher, init_generator(parts, feature if with_gan else None), diagnose=diagnose)
