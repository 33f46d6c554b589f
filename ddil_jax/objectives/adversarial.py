"""A GAN term for any method: those of CTM and SCott, on the heads that the adversarial methods share.

    L   = L_base - adversarial_weight sum_k h_k(phi_k(x))           x the student's image
    L_D = sum_k [max(0, 1 + h_k(phi_k(x))) + max(0, 1 - h_k(phi_k(real))) + r1 / 2 |d h_k / d phi_k(real)|^2]

x is where the student's own sampler leads from the training state (`base.py::student_image`): "jump" is one step of it,
CTM's jump to the clean end or a consistency model's estimate; "walk" all steps that are left. phi are

    "images":   layers of a frozen network on x itself, as `add` has them: CTM's projected discriminator
    "teacher":  features of the frozen teacher on x at a fresh time and noise, as `ladd` has them: SCott's is a
                trained adapter on the pretrained network

The discriminator learns at every step, the student as often as in its method. Both need the state only: defined where
the base method is. Real images are those of the batch, never those of rollout states.

Source: arXiv 2310.02279 (CTM), from notes on the authors' code; arXiv 2403.01505 (SCott), from secondary notes; no
golden vectors. Verified: weight 0 is the base method, heads that say nothing add nothing, what a trained discriminator
asks for. Ours: the weight is a number (CTM balances gradient norms over the batch, SCott has 0.4), the networks, a
head alone in the place of SCott's adapter.
"""

from typing import Any

from ddil_jax import keys as keys_lib
from ddil_jax.diffusion.process import add_noise
from ddil_jax.errors import UsageError
from ddil_jax.objectives.add import Discriminator, fooling_loss, hinge_loss, on_images
from ddil_jax.objectives.base import (IMAGES, Objective, Parts, Player, draw_noise, draw_times, init_head,
                                      make_objective, stop, student_image)
from ddil_jax.registry import unknown
from ddil_jax.states.base import cond_of

KINDS = {"images": ("conv_0", "conv_1", "features"), "teacher": ("bottleneck",)}  # and their layers by default


def on_teacher(parts: Parts, features: tuple[str, ...], times: tuple[float, float]) -> Discriminator:
  """Heads on features of the frozen teacher, which sees images at a time from a share of the noise range."""
  draw = draw_times(parts)

  def init(key, teacher):
    return {"heads": {name: init_head(parts, parts.teacher, keys_lib.named(key, name), teacher, name)
                      for name in features}}

  def maps(params, view, x, cond, keys):
    t = draw(keys, "discriminator_t", times)
    x_t = add_noise(parts.process, x, draw_noise(keys, "discriminator_eps", x), t)
    named = parts.teacher(stop(view.teacher), x_t, t, cond, None, features)[1]
    return [(params["heads"][name], named[name]) for name in features]

  return Discriminator(init, maps, lambda path: True)


def make(parts: Parts, base: str = "ctm", adversarial_weight: float = 0.4, images: str = "jump", kind: str = "images",
         heads: tuple[str, ...] = (), heads_net: str = "", heads_times: tuple[float, float] = (0.02, 0.98),
         r1: float = 0.0, **options: Any) -> Objective:
  """`base` and a GAN term of its student.

  Args:
    base: a method; the other options are its own.
    adversarial_weight: 0 is the base method.
    images: an entry of IMAGES.
    kind: an entry of KINDS. heads: layers or features that have one each; () is the kind's own.
    heads_net: the network of "images", as `feature_net` of `add`.
    heads_times: share of the noise range from which "teacher" draws its times.
    r1: weight of the penalty; 0 is off.

  Raises:
    UsageError: an unknown base, option, kind or layer, numbers out of range.
  """
  for what, name, known in (("images", images, IMAGES), ("kind", kind, KINDS)):
    if name not in known:
      raise UsageError(unknown(f"adversarial: {what}", name, known))
  if adversarial_weight < 0 or r1 < 0 or not 0 <= heads_times[0] < heads_times[1] <= 1:
    raise UsageError(f"adversarial: adversarial_weight {adversarial_weight:g} and r1 {r1:g} must be at least 0,"
                     f" heads_times {heads_times} (low, high) with 0 <= low < high <= 1")
  objective = make_objective(base, parts, options)
  if objective.teacher is None or any(player.name == "discriminator" for player in objective.players):
    raise UsageError(f"adversarial: base '{base}' is no method of distillation without such a term")
  if not adversarial_weight:
    return objective._replace(name="adversarial")
  heads = heads or KINDS[kind]
  discriminator = on_images(parts, heads_net, heads) if kind == "images" else on_teacher(parts, heads, heads_times)
  student, *rest = objective.players

  def loss(params, view, states, batch, keys):
    value, metrics = student.loss(params, view, states, batch, keys)
    x = student_image(parts, objective, params, view, states, keys, images)
    maps = discriminator.maps(view.params["discriminator"], view, x, cond_of(states.cond), keys)
    gan = fooling_loss(parts.head, maps)
    return value + adversarial_weight * gan, metrics | {"adversarial": gan}

  def discriminator_loss(params, view, states, batch, keys):
    x = stop(student_image(parts, objective, view.params["student"], view, states, keys, images))
    fake = discriminator.maps(params, view, x, cond_of(states.cond), keys_lib.named(keys, "fake"))
    real = discriminator.maps(params, view, batch["image"], cond_of(batch), keys_lib.named(keys, "real"))
    return hinge_loss(parts.head, fake, real, r1)

  def init(key, teacher):
    return objective.init(key, teacher) | {"discriminator": discriminator.init(keys_lib.named(key, "discriminator"),
                                                                               teacher)}

  players = (student._replace(loss=loss), *rest,
             Player("discriminator", discriminator_loss, trainable=discriminator.learns))
  return objective._replace(name="adversarial", players=players, init=init)
