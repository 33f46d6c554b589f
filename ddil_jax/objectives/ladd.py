"""LADD: adversarial distillation on features of the frozen teacher, nothing else.

Generated x = G(x_t, t). With phi the teacher's features of the noised image and h a head on them:

    L = softplus(-h(phi(x_tau)))
    L_D = softplus(h(phi(fake_tau))) + softplus(-h(phi(real_tau)))
          + r (h(phi(real_tau)) - h(phi(real_tau + a n)))^2

Only the head is trained against the student; the teacher is the feature network at all noise levels. The last
term is the approximate R1 penalty. Defined on all states; real images are those of the batch. No guidance acts,
since no estimate of the teacher is used: its guidance scale must be 1.

Source: arXiv 2403.12015 (from its abstract); the equations as in NVlabs/FastGen, golden vectors `fg_ladd_*`,
with the penalty of arXiv 2501.08316. FastGen adds the penalty's noise to the clean image and tells the network
the time of the noised one; here the noised image is disturbed (`frozen_logits` serves both). It updates student
and head in turn, 1 to 4; here the head learns at every step. The paper's student sees a few noise levels, here
the times of the grid.
"""

import jax

from ddil_jax import keys as keys_lib
from ddil_jax.diffusion.process import add_noise
from ddil_jax.errors import UsageError
from ddil_jax.objectives.base import (Objective, Parts, Player, draw_noise, draw_times, generate, generator,
                                      guided_teacher, init_head, stop)
from ddil_jax.states.base import cond_of
from ddil_jax.types import Array, Cond, Denoiser, Params


def frozen_logits(teacher: Denoiser, teacher_params: Params, head, head_params: Params, x_t: Array, t: Array,
                  cond: Cond, feature: str = "bottleneck") -> Array:
  """Logits [B] of a head on the teacher's features at x_t."""
  return head(head_params, teacher(stop(teacher_params), x_t, t, cond, None, (feature,))[1][feature])


def discriminator_loss(fake: Array, real: Array) -> Array:
  """`softplus(fake) + softplus(-real)` of logits; 2 log 2 where both are 0."""
  return jax.nn.softplus(fake) + jax.nn.softplus(-real)


def approximate_r1(logits: Array, disturbed: Array) -> Array:
  """Square of the logits' change under a disturbance of the real images."""
  return (logits - disturbed) ** 2


def make(parts: Parts, num_steps: int = 4, period: int = 1, times: tuple[float, float] = (0.02, 0.98),
         r1_weight: float = 100.0, r1_noise: float = 0.1, feature: str = "bottleneck") -> Objective:
  """LADD for a student of `num_steps` steps.

  Args:
    period: discriminator steps per student step.
    times: share of the noise range from which the discriminator's times are drawn.
    r1_weight, r1_noise: r and a; r = 0 is off.
    feature: of the teacher, which the head reads.
  """
  process, grid = parts.process, parts.make_grid(num_steps)
  if not 0 <= times[0] < times[1] <= 1:
    raise UsageError(f"ladd: times {times} must be (low, high) with 0 <= low < high <= 1")
  if parts.guidance_scale != 1:
    raise UsageError(f"ladd: it uses features of the teacher, not its estimate, so guidance scale"
                     f" {parts.guidance_scale:g} has no meaning; set it to 1")
  draw = draw_times(parts)

  def logits(head, view, x_t, t, cond):
    return frozen_logits(parts.teacher, view.teacher, parts.head, head, x_t, t, cond, feature)

  def noised(name, x, keys):
    t = draw(keys, f"{name}_t", times)
    return add_noise(process, x, draw_noise(keys, f"{name}_eps", x), t), t

  def generator_loss(params, view, states, batch, keys):
    del batch
    x_t, t = noised("generated", generate(parts, params, states, keys), keys)
    return jax.nn.softplus(-logits(view.params["critic"]["head"], view, x_t, t, states.cond)), {}

  def critic_player(params, view, states, batch, keys):
    real_cond = cond_of(batch)
    fake_t, t = noised("fake", stop(generate(parts, view.params["student"], states, keys)), keys)
    real_t, real_time = noised("real", batch["image"], keys)
    real = logits(params["head"], view, real_t, real_time, real_cond)
    loss = discriminator_loss(logits(params["head"], view, fake_t, t, states.cond), real)
    metrics = {"gan": loss}
    if r1_weight:
      disturbed = real_t + r1_noise * draw_noise(keys, "r1", real_t)
      metrics["r1"] = approximate_r1(real, logits(params["head"], view, disturbed, real_time, real_cond))
      loss = loss + r1_weight * metrics["r1"]
    return loss, metrics

  def init(key, teacher):
    head = init_head(parts, parts.teacher, keys_lib.named(key, "head"), teacher, feature)
    return {"student": parts.init_student(keys_lib.named(key, "student"), teacher), "critic": {"head": head}}

  return generator("ladd", parts, grid, (Player("student", generator_loss, period), Player("critic", critic_player)),
                   guided_teacher(parts, 1.0), init)
