"""Score identity distillation (SiD), few-step and guided (SiD-LSG), and with a GAN term (SiDA).

Generated x = G(x_t, t). At a fresh time and noise x_tau, with f_T the teacher and f_psi the critic:

    L = mean (f_T - f_psi) [(f_T - x) - alpha (f_T - f_psi)] / w,   w = sg max(mean|x - f_T|, 1e-5)
    L_critic = w(tau) mean (f_psi(x_tau) - x)^2
    SiDA:  L <- (1 - m) L + m beta softplus(-h(x_tau)) / w,
           L_critic += w(tau)/2 (softplus(h(fake_tau)) + softplus(-h(real_tau)))

The gradient goes through x_tau into both networks; only w is stopped. With the exact conditional means the
expectation of L w is (1 - alpha) E mean (f_T - f_psi)^2: 0 at alpha = 1, and a distance with the wrong sign
above it, where the gradient through f_psi is what matters. Guidance acts in three places: teacher (kappa_4, the
config's teacher.guidance_scale), critic in the generator's loss (kappa_2 = kappa_3, `critic_scale`), critic in
its own training (kappa_1, `critic_training_scale`). At 0 the critic sees no condition: both critic scales 0 and
the teacher's 1 are Zero-CFG, negative critic scales Anti-CFG.

With `through="all"` the student walks on from the state to the end of its grid and the gradient goes through
all those calls; "last" takes the image of the state itself, so the uniform mixture over the steps is matched. Both
need the state only: defined on all states. Real images (SiDA) are those of the batch.

Source: arXiv 2404.04057 (SiD), 2410.14919 (SiDA), 2406.01561 (SiD-LSG), 2505.12674 (few steps); golden vectors
`sid_*`, `sid_lsg_*`, `sida_*`. The releases sum over pixels, here is the mean; they start at sigma 2.5 or
timestep 625, here at the first time of the grid; they update the critic first, here both see the state of the
start of the step; SiDA's release multiplies the batch means of the GAN terms by factors per example
(`gan_terms` serves both), in training here each example has its own. Whether the few-step paper goes through
all calls was not verified: its public sampler does.
"""

import jax
import jax.numpy as jnp

from ddil_jax import keys as keys_lib
from ddil_jax.diffusion import solvers, weighting
from ddil_jax.diffusion.distance import per_example
from ddil_jax.diffusion.process import Process, add_noise
from ddil_jax.diffusion.rollout import finish
from ddil_jax.errors import UsageError
from ddil_jax.objectives.base import (Objective, Parts, Player, bind, draw_noise, draw_times, generate, generator,
                                      guided_teacher, init_generator, stop)
from ddil_jax.objectives.dmd2 import critic_loss, gan_logits
from ddil_jax.registry import unknown
from ddil_jax.states.base import cond_of
from ddil_jax.types import Array, Cond, DenoiseFn


def sid_loss(process: Process, real: DenoiseFn, fake: DenoiseFn, x: Array, t: Array, noise: Array, cond: Cond,
             alpha: float = 1.0, tiny: float = 1e-5) -> tuple[Array, dict[str, Array]]:
  """The generator's loss per pixel [B,H,W,C], and x_t, d_real, d_fake, weight [B] (w of the module's equation)."""
  x_t = add_noise(process, x, noise, t)
  d_real, d_fake = real(x_t, t, cond), fake(x_t, t, cond)
  weight = stop(jnp.maximum(per_example(jnp.abs(x - d_real)), tiny))
  gap = d_real - d_fake
  loss = gap * ((d_real - x) - alpha * gap) / weight.reshape((-1,) + (1,) * (x.ndim - 1))
  return loss, {"x_t": x_t, "d_real": d_real, "d_fake": d_fake, "weight": weight}


def gan_terms(fake_logits: Array, real_logits: Array | None = None, limit: float = 10.0) -> Array:
  """Cross entropies of SiDA's logits, of any shape: of the generator, or with real logits of the discriminator.

  The generator's logits are clamped to [-limit, limit]; the discriminator's term is the mean of its two.
  """
  if real_logits is None:
    return jax.nn.softplus(-jnp.clip(fake_logits, -limit, limit))
  return 0.5 * (jax.nn.softplus(fake_logits) + jax.nn.softplus(-real_logits))


def make(parts: Parts, num_steps: int = 1, period: int = 1, alpha: float = 1.0,
         times: tuple[float, float] = (0.0, 0.8), critic_times: tuple[float, float] = (0.0, 1.0),
         critic_weight: str = "snr", weight_cap: float = float("inf"), critic_scale: float = 1.0,
         critic_training_scale: float = 1.0, through: str = "last", gan_weight: float = 0.0, gan_mix: float = 0.5,
         feature: str = "bottleneck") -> Objective:
  """SiD for a student of `num_steps` steps.

  Args:
    period: critic steps per generator step.
    alpha: of the loss; the papers use 1 and 1.2.
    times, critic_times: shares of the noise range from which the times of the two losses are drawn.
    critic_weight: a name of `diffusion.weighting`, capped at weight_cap (SNR is infinite at t = 0).
    critic_scale, critic_training_scale: guidance of the critic, see the module.
    through: "last" or "all".
    gan_weight: beta; 0 is off. gan_mix: m. feature: of the critic, which the head reads.
  """
  process, grid = parts.process, parts.make_grid(num_steps)
  for name, share in (("times", times), ("critic_times", critic_times)):
    if len(share) != 2 or not 0 <= share[0] < share[1] <= 1:
      raise UsageError(f"sid: {name} {share} must be (low, high) with 0 <= low < high <= 1")
  if through not in ("last", "all"):
    raise UsageError(unknown("sid: through", through, ("last", "all")))
  if not 0 <= gan_mix <= 1:
    raise UsageError(f"sid: gan_mix {gan_mix} must be in [0, 1]")
  draw, teacher = draw_times(parts), guided_teacher(parts, parts.guidance_scale)
  weight_fn = weighting.make(critic_weight, cap=weight_cap)

  def image(params, view, states, keys):
    if through == "last":
      return generate(parts, params, states, keys)
    student = bind(parts.student, params, keys_lib.named(keys, "dropout"))
    policy = solvers.renoise()(process, student)
    return finish(policy, states.x_t, states.t, grid, states.cond, keys_lib.named(keys, "finish"), view.unroll)

  def logits(critic, x, t, noise, cond):
    return gan_logits(process, parts.critic, parts.head, critic, x, t, noise, cond, feature)

  def generator_loss(params, view, states, batch, keys):
    del batch
    x, critic = image(params, view, states, keys), view.params["critic"]
    t, noise = draw(keys, "t", times), draw_noise(keys, "eps", states.x_t)
    fake = parts.reflect_target(parts.guidance(critic_scale)(bind(parts.critic, critic["net"])))
    loss, found = sid_loss(process, teacher(view.teacher), fake, x, t, noise, states.cond, alpha)
    metrics = {"sid": per_example(loss), "gap": per_example(jnp.abs(found["d_real"] - found["d_fake"]))}
    loss = metrics["sid"]
    if gan_weight:
      metrics["gan"] = gan_terms(logits(critic, x, t, noise, states.cond)) / found["weight"]
      loss = (1 - gan_mix) * loss + gan_mix * gan_weight * metrics["gan"]
    return loss, metrics

  def critic_player(params, view, states, batch, keys):
    x = stop(image(view.params["student"], view, states, keys))
    t, noise = draw(keys, "critic_t", critic_times), draw_noise(keys, "critic_eps", x)
    fake = parts.guidance(critic_training_scale)(bind(parts.critic, params["net"]))
    loss, _ = critic_loss(process, fake, x, t, noise, states.cond, weight_fn)
    metrics = {"score": loss}
    if gan_weight:
      real_cond = cond_of(batch)
      # Real images at the time and with the noise of the generated ones.
      metrics["gan"] = gan_terms(logits(params, x, t, noise, states.cond),
                                 logits(params, batch["image"], t, noise, real_cond))
      loss = loss + weight_fn(process, t) * metrics["gan"]
    return loss, metrics

  return generator("sid", parts, grid, (Player("student", generator_loss, period), Player("critic", critic_player)),
                   teacher, init_generator(parts, feature if gan_weight else None))
