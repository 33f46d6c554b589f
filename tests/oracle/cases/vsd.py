"""SwiftBrush: the generator's turn and that of the critic, guided noise predictions on a table."""

import jax
import jax.numpy as jnp

from ddil_jax.diffusion import prediction, transforms
from ddil_jax.diffusion import process as processes
from ddil_jax.diffusion.prediction import make_denoiser
from ddil_jax.diffusion.process import expand
from ddil_jax.objectives.base import bind, stop
from ddil_jax.objectives.dmd2 import critic_loss
from ddil_jax.objectives.vsd import lora_weight, vsd_loss
from tests.oracle import toy


def swiftbrush(case):
  hyper, prompt, z = case.hyper, case["prompt_embeds"], case["z"]
  process = processes.discrete(case.table("alphas_cumprod"))
  denoiser = make_denoiser(toy.net, process, prediction.eps())
  null = jnp.broadcast_to(case["null_embeds"], prompt.shape)
  guidance = transforms.guidance(hyper["guidance_scale"], lambda cond: {"embedding": null})
  guided = make_denoiser(toy.guided(guidance), process, prediction.eps())
  cond = {"embedding": prompt}

  def generate(params):
    """The release's first step: its own constants instead of the table's last entry."""
    eps = toy.net(params, z, case.full(hyper["t_generator"], z), cond)
    return prediction.eps().to_x0(eps, z, hyper["alpha_T"], hyper["sigma_T"])

  t = case["timesteps_vsd"].astype(case.dtype)

  def generator(params):
    x = generate(params)
    loss, found = vsd_loss(process, bind(guided, case.net("teacher")), bind(guided, case.net("critic")), x, t,
                           case["noise_vsd"], cond)
    return loss.mean(), (x, loss, found)

  (loss, (x, each, found)), grads = jax.value_and_grad(generator, has_aux=True)(case.net("generator"))
  case.check("x0", x)
  case.check("sigma_t", process.sigma(t))
  case.check("teacher_pred", toy.guided(guidance)(case.net("teacher"), found["x_t"], t, cond))
  case.check("score_gradient", found["gradient"])
  case.check("loss_vsd", loss)
  case.check("loss_vsd_per_example", each)
  case.check_grads("gen_grad", grads)

  t, noise = case["timesteps_lora"].astype(case.dtype), case["noise_lora"]
  cond = {"embedding": jnp.where(case["null_uniform"] < 0.1, null, prompt)}

  def critic(params):
    loss, found = critic_loss(process, bind(denoiser, params), stop(x), t, noise, cond, lora_weight)
    return loss.mean(), (loss, found)

  (loss, (each, found)), grads = jax.value_and_grad(critic, has_aux=True)(case.net("critic"))
  alpha = expand(process.alpha(t), x)
  # The images are 15 times too large (x0 at the last step), and an x0 estimate rounds with them.
  rounding = 4 * float(jnp.finfo(jnp.float32).eps * jnp.abs(x).max() / process.sigma(t).min())
  case.check("lora_out", alpha * toy.net(case.net("critic"), found["x_t"], t, cond))
  case.check("lora_target", alpha * noise)
  case.check("loss_lora", loss, rounding=rounding)
  case.check("loss_lora_per_example", each, rounding=rounding)
  case.check_grads("critic_grad", grads, rounding=rounding)


RUNNERS = {r"swiftbrush_.*": swiftbrush}
