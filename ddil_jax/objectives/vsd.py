"""Variational score distillation (ProlificDreamer, SwiftBrush): the critic is the teacher with a LoRA.

Generated x = G(x_t, t). At a fresh time and noise x_tau, with the teacher and the critic both guided by g:

    L = 1/2 mean (x - sg(x - w(tau) (eps_T - eps_LoRA)))^2,  w = sigma^2    so dL/dx = w (eps_T - eps_LoRA) / numel
    L_LoRA = alpha^2 mean (eps_LoRA(x_tau) - eps)^2

Only the LoRA of the critic learns, on all of the noise range, unguided; with probability `label_dropout`
it sees no condition. With random_guidance each image has a scale of its own, g ~ U[g_min, g_max] (SNOOPI's
random guidance), else it is the config's teacher.guidance_scale; `guide_critic=False` guides the teacher only.
Adapters that are 0 make eps_T = eps_LoRA and the gradient 0. Defined on all states.

Source: arXiv 2305.16213 (VSD), 2312.05239 (SwiftBrush), golden vectors `swiftbrush_*`; 2412.02687 (SNOOPI, from
its abstract: range and distribution of its scale are ours). The release drops the condition of a whole batch at
once, here of each example. It starts from the table's last step with a constant for its alpha, here at the
grid's first time.
"""

import jax.numpy as jnp

from ddil_jax import keys as keys_lib
from ddil_jax.diffusion.distance import per_example
from ddil_jax.diffusion.process import Process, add_noise, eps_from_x0, expand, snr
from ddil_jax.errors import UsageError
from ddil_jax.lora import LoRA
from ddil_jax.objectives.base import (Objective, Parts, Player, bind, draw_noise, draw_times, drop_condition, generate,
                                      generator, guided_teacher, init_generator, low_rank, stop)
from ddil_jax.objectives.dmd2 import carry_gradient, critic_loss
from ddil_jax.types import Array, Cond, DenoiseFn


def vsd_loss(process: Process, real: DenoiseFn, fake: DenoiseFn, x: Array, t: Array, noise: Array,
             cond: Cond) -> tuple[Array, dict[str, Array]]:
  """The generator's loss per example [B], and x_t, gradient, eps_real; both networks as guided."""
  x_t = stop(add_noise(process, x, noise, t))
  eps_real, eps_fake = (eps_from_x0(process, x_t, stop(denoise(x_t, t, cond)), t) for denoise in (real, fake))
  gradient = expand(process.sigma(t), x) ** 2 * (eps_real - eps_fake)
  return carry_gradient(x, gradient), {"x_t": x_t, "gradient": gradient, "eps_real": eps_real}


def lora_weight(process: Process, t: Array) -> Array:
  """alpha^2 SNR: what turns the x0-MSE into `(alpha (eps_LoRA - eps))^2`."""
  return process.alpha(t) ** 2 * snr(process, t)


def make(parts: Parts, num_steps: int = 1, period: int = 1, times: tuple[float, float] = (0.02, 0.98), rank: int = 8,
         guide_critic: bool = True, random_guidance: tuple[float, ...] = (), label_dropout: float = 0.1,
         weight_cap: float = float("inf")) -> Objective:
  """VSD for a student of `num_steps` steps.

  Args:
    period: critic steps per generator step.
    times: share of the noise range from which the generator's times are drawn; the critic sees all.
    rank: of the critic's LoRA.
    guide_critic: guide the critic in the generator's loss as the teacher.
    random_guidance: (g_min, g_max) of the scale of each image; () is the teacher's fixed scale.
    label_dropout: share of labels that the critic does not see in its own training.
    weight_cap: largest weight of the critic's x0-MSE (alpha^2 SNR is infinite at t = 0).

  Raises:
    UsageError: numbers out of range.
  """
  process, grid = parts.process, parts.make_grid(num_steps)
  if not 0 <= times[0] < times[1] <= 1:
    raise UsageError(f"vsd: times {times} must be (low, high) with 0 <= low < high <= 1")
  if random_guidance and not (len(random_guidance) == 2 and random_guidance[0] <= random_guidance[1]):
    raise UsageError(f"vsd: random_guidance {random_guidance} must be (g_min, g_max) with g_min <= g_max")
  if rank < 1:
    raise UsageError(f"vsd: rank {rank} must be at least 1")
  draw, scale = draw_times(parts), None if random_guidance else parts.guidance_scale
  teacher = guided_teacher(parts, scale)
  weight_fn = lambda process, t: jnp.minimum(lora_weight(process, t), weight_cap)  # noqa: E731

  def generator_loss(params, view, states, batch, keys):
    del batch
    x, cond = generate(parts, params, states, keys), states.cond
    if random_guidance:
      cond = {**cond, "guidance_scale": keys_lib.uniform(keys_lib.named(keys, "scale"), *random_guidance)}
    fake = bind(parts.critic, view.params["critic"]["net"])
    if guide_critic:
      fake = parts.guidance(scale)(fake)
    elif random_guidance:
      fake = lambda x_t, t, cond, unguided=fake: unguided(x_t, t, states.cond)  # noqa: E731
    loss, found = vsd_loss(process, teacher(view.teacher), parts.reflect_target(fake), x, draw(keys, "t", times),
                           draw_noise(keys, "eps", x), cond)
    return loss, {"gradient": jnp.sqrt(per_example(found["gradient"] ** 2))}

  def critic_player(params, view, states, batch, keys):
    del batch
    x, cond = stop(generate(parts, view.params["student"], states, keys)), states.cond
    if label_dropout:
      cond = drop_condition(parts, keys, label_dropout)(cond)
    loss, _ = critic_loss(process, bind(parts.critic, params["net"]), x, draw(keys, "critic_t"),
                          draw_noise(keys, "critic_eps", x), cond, weight_fn)
    return loss, {}

  players = (Player("student", generator_loss, period), Player("critic", critic_player))
  whole = generator("vsd", parts, grid, players, guided_teacher(parts, parts.guidance_scale), init_generator(parts))
  return low_rank(whole, {"critic": LoRA(rank)})
