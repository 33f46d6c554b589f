"""GDD: distillation by a GAN alone, with most of the generator's convolutions frozen (GDD-I).

Generated x = G(x_t, t). With phi_i features of the frozen teacher at clean images and h_i heads on them:

    ns:     L = sum_i softplus(-h_i(x)),   L_D = sum_i softplus(h_i(x)) + softplus(-h_i(real))
    hinge:  L = -sum_i h_i(x),             L_D = sum_i max(0, 1 + h_i(x)) + max(0, 1 - h_i(real))
    both:   L_D += gamma / 2 |d sum_i h_i(real) / d real|^2

The student starts from the teacher and, with `frozen`, learns norms, embeddings and the ends only: what it
knows stays in the kernels. Only a distribution is learned, no teacher's estimate is used, so its guidance scale
must be 1. Defined on all states; real images are those of the batch.

Source: the authors' repository Zyriix/GDD; golden vectors `gdd_*` (losses, penalty, two-step generator). Its
discriminator reads projected features of pretrained classifiers, here features of the teacher at its smallest
time; it averages the logits of a map, here a head gives one. Which kernels it freezes was not verified:
`frozen` is our reading. The instance-level losses in the same repository (cd, pd, ctm) are methods of their own
here.
"""

import re

import jax
import jax.numpy as jnp

from ddil_jax import keys as keys_lib
from ddil_jax.errors import UsageError
from ddil_jax.objectives.base import (Objective, Parts, Player, generate, generator, guided_teacher, init_head, stop)
from ddil_jax.objectives.ladd import frozen_logits
from ddil_jax.registry import unknown
from ddil_jax.states.base import cond_of
from ddil_jax.types import Array

KINDS = ("ns", "hinge")
BLOCK_KERNELS = r"/conv_(in|out)/kernel$"  # of the UNet's residual blocks


def adversarial_loss(fake: Array, kind: str) -> Array:
  """The generator's term of logits of any shape."""
  return jax.nn.softplus(-fake) if kind == "ns" else -fake


def fake_loss(fake: Array, kind: str) -> Array:
  """The discriminator's term of generated images."""
  return jax.nn.softplus(fake) if kind == "ns" else jax.nn.relu(1 + fake)


def real_loss(real: Array, kind: str) -> Array:
  """The discriminator's term of real images."""
  return jax.nn.softplus(-real) if kind == "ns" else jax.nn.relu(1 - real)


def r1_penalty(total, x: Array) -> Array:
  """`|d total(x) / d x|^2` per example [B]; total: images [B,H,W,C] -> the sum of all logits, a scalar."""
  return jnp.sum(jax.grad(total)(x) ** 2, axis=tuple(range(1, x.ndim)))


def make(parts: Parts, num_steps: int = 1, period: int = 1, kind: str = "ns", r1_gamma: float = 1e-4,
         features: tuple[str, ...] = ("bottleneck",), frozen: str = BLOCK_KERNELS) -> Objective:
  """GDD for a student of `num_steps` steps.

  Args:
    period: discriminator steps per student step.
    kind: an entry of KINDS.
    r1_gamma: gamma; 0 is off.
    features: of the teacher, each with a head of its own.
    frozen: a regular expression; the student's parameters in whose path it is found do not learn. "" is none.
  """
  process, grid = parts.process, parts.make_grid(num_steps)
  if kind not in KINDS:
    raise UsageError(unknown("gdd: kind", kind, KINDS))
  if not features:
    raise UsageError("gdd: features must name at least one feature of the teacher")
  if parts.guidance_scale != 1:
    raise UsageError(f"gdd: it uses features of the teacher, not its estimate, so guidance scale"
                     f" {parts.guidance_scale:g} has no meaning; set it to 1")
  try:
    pattern = re.compile(frozen) if frozen else None
  except re.error as error:
    raise UsageError(f"gdd: frozen '{frozen}' is not a regular expression: {error}") from None

  def logits(heads, view, x, cond):
    t = jnp.full(x.shape[:1], process.t_min, x.dtype)
    return [frozen_logits(parts.teacher, view.teacher, parts.head, heads[name], x, t, cond, name) for name in features]

  def generator_loss(params, view, states, batch, keys):
    del batch
    x = generate(parts, params, states, keys)
    return sum(adversarial_loss(v, kind) for v in logits(view.params["critic"], view, x, states.cond)), {}

  def critic_player(params, view, states, batch, keys):
    x, real, cond = stop(generate(parts, view.params["student"], states, keys)), batch["image"], cond_of(batch)
    of_fake, of_real = logits(params, view, x, states.cond), logits(params, view, real, cond)
    loss = sum(fake_loss(a, kind) + real_loss(b, kind) for a, b in zip(of_fake, of_real))
    metrics = {"gan": loss}
    if r1_gamma:
      metrics["r1"] = r1_penalty(lambda image: sum(v.sum() for v in logits(params, view, image, cond)), real)
      loss = loss + 0.5 * r1_gamma * metrics["r1"]
    return loss, metrics

  def init(key, teacher):
    heads = {name: init_head(parts, parts.teacher, keys_lib.named(key, name), teacher, name) for name in features}
    return {"student": parts.init_student(keys_lib.named(key, "student"), teacher), "critic": heads}

  learns = None if pattern is None else (lambda path: not pattern.search(path))
  players = (Player("student", generator_loss, period, trainable=learns), Player("critic", critic_player))
  return generator("gdd", parts, grid, players, guided_teacher(parts, 1.0), init)
