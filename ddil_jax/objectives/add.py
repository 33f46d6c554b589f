"""ADD: adversarial distillation on features of a frozen image network, with the teacher's estimate of noised images.

Generated x = G(x_t, t). With phi_k layers of a network that knows images, h_k a head on each of them:

    L      = - sum_k h_k(phi_k(x)) + distill_weight L_distill
    L_D    = sum_k max(0, 1 + h_k(phi_k(x))) + max(0, 1 - h_k(phi_k(real)))
             + gamma / 2 sum_k |d h_k / d phi_k(real)|^2
    L_distill = alpha(tau) mean_pixels (x - sg D(alpha sg x + sigma eps, tau))^2

The discriminator reads clean images and learns its heads only; D is the guided teacher at a fresh time and noise. The
method's own states are noised data at the student's few times, as in the paper, but neither loss needs the image
of a state: defined on all states. Real images are those of the batch.

The network is `feature_net`: published weights, or by default a small classifier of the data set (not the one whose
features measure a run, but its like: a student trained on it may score better than it is). It is kept, unchanged, with
the heads among the discriminator's parameters.

Source: arXiv 2311.17042, from secondary notes; no code of the authors exists, no golden vectors. Verified: both terms
where a discriminator cannot tell, the penalty, the gradient of L_distill on Gaussian data in closed form. Our
readings: the penalty at the heads' inputs with the factor 1/2, the mean over pixels, tau uniform. Not here: heads
that are told text and an image, the paper's other two weights of L_distill (score distillation), DINOv2.
"""

import jax
import jax.numpy as jnp

from ddil_jax import keys as keys_lib
from ddil_jax.diffusion import distance as distances
from ddil_jax.diffusion.process import Process, add_noise
from ddil_jax.errors import UsageError
from ddil_jax.objectives.base import (Objective, Parts, Player, draw_noise, draw_times, generate, generator,
                                      guided_teacher, stop)
from ddil_jax.objectives.gdd import adversarial_loss, fake_loss, r1_penalty, real_loss
from ddil_jax.types import Array, Cond, DenoiseFn


def distillation_loss(process: Process, teacher: DenoiseFn, x: Array, t: Array, noise: Array, cond: Cond) -> Array:
  """L_distill per example [B] of generated x [B,H,W,C] at time t [B]; no gradient passes through the teacher."""
  x_t = add_noise(process, stop(x), noise, t)
  return process.alpha(t) * distances.l2()(x, stop(teacher(x_t, t, cond)))


def make(parts: Parts, num_steps: int = 4, period: int = 1, feature_net: str = "",
         layers: tuple[str, ...] = ("norm_0", "norm_1"), distill_weight: float = 2.5,
         times: tuple[float, float] = (0.02, 0.98), r1_gamma: float = 1e-5) -> Objective:
  """ADD for a student of `num_steps` steps.

  Args:
    period: discriminator steps per student step.
    feature_net: "NAME:FILE" of published weights (`ddil list`), or "" for a small classifier of the data set.
    layers: of that network, by name, each with a head of its own.
    distill_weight: 0 is a GAN alone.
    times: share of the noise range from which tau is drawn.
    r1_gamma: gamma; 0 is off.

  Raises:
    UsageError: no layers or an unknown one, times or weights out of range, weights that cannot be read.
  """
  process, grid = parts.process, parts.make_grid(num_steps)
  if not layers:
    raise UsageError("add: layers must name at least one layer of the feature network")
  if not 0 <= times[0] < times[1] <= 1:
    raise UsageError(f"add: times {times} must be (low, high) with 0 <= low < high <= 1")
  if distill_weight < 0 or r1_gamma < 0:
    raise UsageError(f"add: distill_weight {distill_weight:g} and r1_gamma {r1_gamma:g} must be at least 0")
  draw, teacher, net = draw_times(parts), guided_teacher(parts, parts.guidance_scale), parts.feature_net(feature_net)
  trained = net.load()
  shapes = jax.eval_shape(lambda: net.layers(trained, jnp.zeros((1,) + parts.image_shape), layers))

  def maps(critic, x):
    named = net.layers(stop(critic["net"]), x, layers)
    return {name: (critic["heads"][name], named[name]) for name in layers}

  def logits(critic, x):
    return [parts.head(*each) for each in maps(critic, x).values()]

  def generator_loss(params, view, states, batch, keys):
    del batch
    x = generate(parts, params, states, keys)
    loss = sum(adversarial_loss(v, "hinge") for v in logits(view.params["critic"], x))
    metrics = {"gan": loss}
    if distill_weight:
      metrics["distill"] = distillation_loss(process, teacher(view.teacher), x, draw(keys, "t", times),
                                             draw_noise(keys, "eps", x), states.cond)
      loss = loss + distill_weight * metrics["distill"]
    return loss, metrics

  def critic_player(params, view, states, batch, keys):
    x = stop(generate(parts, view.params["student"], states, keys))
    real = maps(params, batch["image"]).values()
    loss = sum(fake_loss(v, "hinge") for v in logits(params, x))
    loss = loss + sum(real_loss(parts.head(*each), "hinge") for each in real)
    metrics = {"gan": loss}
    if r1_gamma:
      metrics["r1"] = sum(r1_penalty(lambda map_, head=head: parts.head(head, map_).sum(), map_) for head, map_ in real)
      loss = loss + 0.5 * r1_gamma * metrics["r1"]
    return loss, metrics

  def init(key, teacher_params):
    heads = {name: parts.init_head(keys_lib.named(key, name), shapes[name]) for name in layers}
    student = parts.init_student(keys_lib.named(key, "student"), teacher_params)
    return {"student": student, "critic": {"net": trained, "heads": heads}}

  players = (Player("student", generator_loss, period),
             Player("critic", critic_player, trainable=lambda path: not path.startswith("net/")))
  return generator("add", parts, grid, players, teacher, init, own_source="forward")
