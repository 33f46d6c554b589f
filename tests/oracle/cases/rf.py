"""Rectified flow (gnobitab/RectifiedFlow). Its time runs from noise to data, its velocity is x0 - noise."""

import jax
import jax.numpy as jnp

from ddil_jax.diffusion import distance, prediction, solvers
from ddil_jax.diffusion import process as processes
from ddil_jax.diffusion.prediction import make_denoiser
from ddil_jax.diffusion.process import add_noise
from ddil_jax.objectives.base import bind
from ddil_jax.objectives.rf import rf_loss
from tests.oracle import toy
from tests.oracle.walk import walk


def rf(case):
  hyper = case.hyper
  eps, scale = hyper["eps"], hyper["time_scale"]
  x0, noise = case["data"], case["z0"] * (hyper["noise_scale"] if hyper["mode"] == "1rf" else 1)
  schedule = hyper["reflow_t_schedule"]
  if "t_uniform" in case:
    theirs = case["t_uniform"] * (1 - eps) + eps
  elif "t_index" in case:
    theirs = case["t_index"] * (1 - eps) / int(schedule) + eps
  else:
    theirs = case.full({"t0": eps, "t1": 1.0}[schedule], x0)
  case.check("t", theirs.astype(case.dtype))
  t = 1 - theirs
  process = processes.flow()
  against = lambda params, x, time, cond, keys=None, features=(): -toy.net(params, x, time, cond)  # noqa: E731
  velocity = lambda params: lambda x, t, cond: against(params, x, scale * theirs, cond)  # noqa: E731
  z_t = add_noise(process, x0, noise, t)
  case.check("z_t", z_t)
  case.check("target", x0 - noise)

  images = distance.l1()

  def loss(params):
    """Half the sum, or the mean, over pixels; with perceptual distances, here l1, between images instead."""
    value, u = rf_loss(velocity(params), z_t, t, noise, x0, {}, distance.l2())
    value = value if hyper["reduce_mean"] else 0.5 * x0[0].size * value
    if "lpips" not in hyper["mode"]:
      return value, u
    moved = noise - u
    return images(moved, x0) + ("l2" in hyper["mode"]) * value, u

  params = case.net("student")
  per_example, u = loss(params)
  case.check("prediction", -u)
  case.check("losses_per_example", per_example)
  case.check("loss", jnp.mean(per_example), mean_of="losses_per_example")
  case.check_grads("grad", jax.grad(lambda p: jnp.mean(loss(p)[0]))(params))

  start = case["z0"]
  # Their steps are 1 / N long, at times that are (1 - eps) / N apart.
  denoiser = make_denoiser(against, process, prediction.flow(), lambda t: scale * ((1 - t) * (1 - eps) + eps))
  policy = solvers.ddim()(process, bind(denoiser, params))
  for name in sorted(case.outs):
    if name.startswith("euler_"):
      steps = int(name.rpartition("N")[2])
      case.check(name, walk(policy, start, [1 - i / steps for i in range(steps + 1)], {})[-1])
  for name in sorted(case.outs & {"rk45_ode", "sde_sampler"}):
    case.leave(name, "an adaptive and a stochastic sampler of this release, which ours are not")


RUNNERS = {r"rf_.*": rf}
