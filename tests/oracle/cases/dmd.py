"""DMD, a third party's code: matching gradient, regression on pairs, critic, on EDM networks."""

import jax
import jax.numpy as jnp
import numpy as np

from ddil_jax.diffusion import distance, grids, prediction, weighting
from ddil_jax.diffusion import process as processes
from ddil_jax.diffusion.prediction import make_denoiser
from ddil_jax.objectives.base import bind, stop
from ddil_jax.objectives.dmd2 import critic_loss, dm_loss
from tests.oracle import toy
from tests.oracle.cases.sid import one_hot


def dmd(case):
  hyper, cond = case.hyper, one_hot(case)
  process = processes.edm(hyper["sigma_min"], hyper["sigma_max"], time_scale=0.25)
  denoiser = make_denoiser(toy.net, process, prediction.edm())
  levels = grids.karras_levels(hyper["timesteps"], hyper["sigma_min"], hyper["sigma_max"], hyper["rho"])
  table = jnp.asarray(np.append(levels, 0), case.dtype)
  t, first = table[-(case["t"] + 1)], jnp.full(case["t"].shape, table[1])
  case.check("generator_sigma", first)
  case.check("sigma_t", t)
  teacher, fake = (bind(denoiser, case.net(name)) for name in ("teacher", "critic"))

  def generate(params, z):
    return denoiser(params, z * table[1], first, cond)

  def generator(params):
    x, x_ref = generate(params, case["z"]), generate(params, case["z_ref"])
    dm, found = dm_loss(process, teacher, fake, x, t, case["noise"], cond)
    # Their distance acts on images in [0, 1].
    regression = distance.l1()(x_ref / 2, case["y_ref"] / 2)
    return dm.mean() + hyper["lambda_reg"] * regression.mean(), (x, x_ref, dm, found)

  (loss, (x, x_ref, dm, found)), grads = jax.value_and_grad(generator, has_aux=True)(case.net("generator"))
  factor = jnp.abs(x - found["d_real"]).mean((1, 2, 3)).reshape(case.raw("weighting_factor").shape)
  for name, value in {"x": x, "x_ref": x_ref, "fake_x0": found["d_fake"], "real_x0": found["d_real"],
                      "weighting_factor": factor, "dm_grad": found["gradient"], "loss_kl": dm.mean(),
                      "generator_kl_per_example": dm, "loss_generator": loss}.items():
    case.check(name, value)
  case.check_grads("generator_grad", grads)

  t = table[-(case["critic_t"] + 1)]

  def critic(params):
    loss, _ = critic_loss(process, bind(denoiser, params), stop(x), t, case["critic_noise"], cond, weighting.edm())
    return loss.mean()

  loss, grads = jax.value_and_grad(critic)(case.net("critic"))
  case.check("critic_sigma", t)
  case.check("loss_critic", loss)
  case.check_grads("critic_grad", grads)


RUNNERS = {r"dmd3p_.*": dmd}
