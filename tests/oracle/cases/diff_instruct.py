"""Diff-Instruct: one critic round and one generator round on EDM networks."""

import jax

from ddil_jax.diffusion import prediction, weighting
from ddil_jax.diffusion import process as processes
from ddil_jax.diffusion.prediction import make_denoiser
from ddil_jax.diffusion.process import expand
from ddil_jax.objectives.base import bind
from ddil_jax.objectives.diff_instruct import ikl_loss
from ddil_jax.objectives.dmd2 import critic_loss
from tests.oracle import toy
from tests.oracle.cases.sid import lognormal, one_hot, per_pixel


def diff_instruct(case):
  hyper, cond = case.hyper, one_hot(case)
  process = processes.edm(time_scale=0.25)
  denoiser = make_denoiser(toy.net, process, prediction.edm(hyper["sigma_data"]))
  weight, first = weighting.edm(hyper["sigma_data"]), hyper["init_sigma"]

  def generate(params, z):
    return denoiser(params, first * z, case.full(first, z), cond)

  x, t = generate(case.net("generator"), case["critic_z"]), lognormal(case, "critic_normal")

  def critic(params):
    loss, found = critic_loss(process, bind(denoiser, params), x, t, case["critic_noise"], cond, weight)
    return hyper["critic_loss_scaling"] * loss.mean() * per_pixel(x), found

  (loss, found), grads = jax.value_and_grad(critic, has_aux=True)(case.net("critic"))
  case.check("critic_images", x)
  case.check("critic_sigma", t.reshape(case.raw("critic_sigma").shape))
  case.check("critic_loss_map", expand(weight(process, t), x) * (found["x0"] - x) ** 2)
  case.check("critic_loss", loss)
  case.check_grads("critic_grad", grads)

  t = lognormal(case, "gen_normal")
  teacher, fake = (bind(denoiser, case.net(name)) for name in ("teacher", "critic"))

  def generator(params):
    x = generate(params, case["gen_z"])
    loss, found = ikl_loss(process, teacher, fake, x, t, case["gen_noise"], cond)
    return hyper["loss_scaling"] * loss.sum() / len(x), (x, hyper["loss_scaling"] * loss, found)

  (loss, (x, each, found)), grads = jax.value_and_grad(generator, has_aux=True)(case.net("generator"))
  case.check("gen_images", x)
  case.check("gen_sigma", t.reshape(case.raw("gen_sigma").shape))
  case.check("teacher_denoised", found["d_real"])
  case.check("critic_denoised", found["d_fake"])
  case.check("gen_loss_map", each)
  case.check("gen_loss_per_example", each.reshape(len(x), -1).sum(1).reshape(case.raw("gen_loss_per_example").shape))
  case.check("gen_loss", loss)
  case.check_grads("gen_grad", grads)


RUNNERS = {r"diff_instruct_.*": diff_instruct}
