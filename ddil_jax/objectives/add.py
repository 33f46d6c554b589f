"""ADD: adversarial distillation on features of a frozen image network, with the teacher's estimate of noised images.

Generated x = G(x_t, t). With phi_k layers of a network that knows images, h_k a head on each of them:

    L      = - sum_k h_k(phi_k(x)) + distill_weight L_distill
    L_D    = sum_k [max(0, 1 + h_k(phi_k(x))) + max(0, 1 - h_k(phi_k(real))) + gamma / 2 |d h_k / d phi_k(real)|^2]
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

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ddil_jax import keys as keys_lib
from ddil_jax.diffusion import distance as distances
from ddil_jax.diffusion.process import Process, add_noise
from ddil_jax.errors import UsageError
from ddil_jax.objectives.base import (Objective, Parts, Player, draw_noise, draw_times, generate, generator,
                                      guided_teacher, stop)
from ddil_jax.objectives.gdd import adversarial_loss, fake_loss, r1_penalty, real_loss
from ddil_jax.states.base import cond_of
from ddil_jax.types import Array, Cond, DenoiseFn, Params


class Discriminator(NamedTuple):
  """Heads on layers of a network that is not trained.

  Attributes:
    init: (key, teacher params) -> params.
    maps: (params, view, x [B,H,W,C], cond, keys [B]) -> [(params of a head, the map that it reads [B,h,w,c])].
    learns: whether an entry of its params, by path, is trained.
  """
  init: Callable[[Array, Params], Params]
  maps: Callable[..., list[tuple[Params, Array]]]
  learns: Callable[[str], bool]


def on_images(parts: Parts, name: str, layers: tuple[str, ...]) -> Discriminator:
  """Heads on layers of `parts.feature_net(name)`, which reads clean images and is kept among the parameters.

  Raises:
    UsageError: an unknown layer, weights that cannot be read.
  """
  net = parts.feature_net(name)
  trained = net.load()
  shapes = jax.eval_shape(lambda: net.layers(trained, jnp.zeros((1,) + parts.image_shape), layers))

  def init(key, teacher):
    del teacher
    heads = {name: parts.init_head(keys_lib.named(key, name), shapes[name]) for name in layers}
    return {"net": trained, "heads": heads}

  def maps(params, view, x, cond, keys):
    named = net.layers(stop(params["net"]), x, layers)
    return [(params["heads"][name], named[name]) for name in layers]

  return Discriminator(init, maps, lambda path: not path.startswith("net/"))


def fooling_loss(head, maps: list[tuple[Params, Array]]) -> Array:
  """The generator's hinge loss per example [B]: minus the logits, summed over the heads. head: (params, map) -> [B]."""
  return sum(adversarial_loss(head(*each), "hinge") for each in maps)


def hinge_loss(head, fake: list[tuple[Params, Array]], real: list[tuple[Params, Array]],
               r1_gamma: float) -> tuple[Array, dict[str, Array]]:
  """The discriminator's loss L_D per example [B], and its parts "gan" and, for r1_gamma > 0, "r1"."""
  loss = sum(fake_loss(head(*each), "hinge") for each in fake) + sum(real_loss(head(*each), "hinge") for each in real)
  if not r1_gamma:
    return loss, {"gan": loss}
  r1 = sum(r1_penalty(lambda map_, own=own: head(own, map_).sum(), map_) for own, map_ in real)
  return loss + 0.5 * r1_gamma * r1, {"gan": loss, "r1": r1}


def distillation_loss(process: Process, teacher: DenoiseFn, x: Array, t: Array, noise: Array, cond: Cond) -> Array:
  """L_distill per example [B] of generated x [B,H,W,C] at time t [B]; no gradient passes through the teacher."""
  x_t = add_noise(process, stop(x), noise, t)
  return process.alpha(t) * distances.l2()(x, stop(teacher(x_t, t, cond)))


def make(parts: Parts, num_steps: int = 4, period: int = 1, feature_net: str = "",
         layers: tuple[str, ...] = ("conv_0", "conv_1", "features"), distill_weight: float = 40.0,
         times: tuple[float, float] = (0.02, 0.98), r1_gamma: float = 1e-5) -> Objective:
  """ADD for a student of `num_steps` steps.

  Args:
    period: discriminator steps per student step.
    feature_net: "NAME:FILE" of published weights (`ddil list`), or "" for a small classifier of the data set.
    layers: of that network, by name, each with a head of its own. Those before a norm see how bright an image is.
    distill_weight: 0 is a GAN alone. On a sum over pixels the paper's 2.5 is 2.5 H W C here.
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
  draw, teacher = draw_times(parts), guided_teacher(parts, parts.guidance_scale)
  discriminator = on_images(parts, feature_net, layers)

  def generator_loss(params, view, states, batch, keys):
    del batch
    x = generate(parts, params, states, keys)
    loss = fooling_loss(parts.head, discriminator.maps(view.params["critic"], view, x, states.cond, keys))
    metrics = {"gan": loss}
    if distill_weight:
      metrics["distill"] = distillation_loss(process, teacher(view.teacher), x, draw(keys, "t", times),
                                             draw_noise(keys, "eps", x), states.cond)
      loss = loss + distill_weight * metrics["distill"]
    return loss, metrics

  def critic_player(params, view, states, batch, keys):
    x = stop(generate(parts, view.params["student"], states, keys))
    fake, real = (discriminator.maps(params, view, image, cond, keys)
                  for image, cond in ((x, states.cond), (batch["image"], cond_of(batch))))
    return hinge_loss(parts.head, fake, real, r1_gamma)

  def init(key, teacher_params):
    return {"student": parts.init_student(keys_lib.named(key, "student"), teacher_params),
            "critic": discriminator.init(key, teacher_params)}

  players = (Player("student", generator_loss, period),
             Player("critic", critic_player, trainable=discriminator.learns))
  return generator("add", parts, grid, players, teacher, init, own_source="forward")
