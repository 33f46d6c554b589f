"""Progressive distillation and its base loss on the cosine schedule (the original release)."""

import jax
import jax.numpy as jnp

from ddil_jax.diffusion import prediction, weighting
from ddil_jax.diffusion import process as processes
from ddil_jax.diffusion.prediction import make_denoiser
from ddil_jax.diffusion.process import expand
from ddil_jax.objectives.base import bind
from ddil_jax.objectives.denoising import denoising_loss
from ddil_jax.objectives.pd import pd_loss, x_target
from tests.oracle import toy
from tests.oracle.cases.samplers import HEADS

TIGHT = 1e-7


def setup(case):
  process = processes.cosine(case.hyper["logsnr_min"], case.hyper["logsnr_max"])
  head = prediction.make(HEADS[case.hyper["head"]])
  return process, head, make_denoiser(toy.net, process, head, process.log_snr)


def check_predictions(case, process, names, out, head, z, t):
  """Compares an output in the parameterisations (x, eps, v) under the given names."""
  alpha, sigma = expand(process.alpha(t), z), expand(process.sigma(t), z)
  for name, target in zip(names, ("x0", "eps", "v")):
    case.check(name, prediction.convert(out, z, alpha, sigma, head, prediction.make(target)), TIGHT)


def check_losses(case, loss):
  """loss: (params, weight) -> [B]."""
  params = case.net("student")
  for name in sorted(case.outs):
    if name.startswith("loss/"):
      weight = weighting.make(name.removeprefix("loss/"))
      case.check(name, loss(params, weight), TIGHT)
      grads = jax.grad(lambda p: jnp.mean(loss(p, weight)))(params)
      case.check_grads(name.replace("loss/", "grad/"), grads, TIGHT)


def check_student(case, process, head, z, t):
  out = toy.net(case.net("student"), z, process.log_snr(t), {})
  check_predictions(case, process, ("student_x", "student_eps", "student_v"), out, head, z, t)


def pd_vp(case):
  process, head, denoiser = setup(case)
  n = case.hyper["num_steps"]
  i = case["i"].astype(case.dtype)
  t, mid, s = (i + 1) / n, (i + 0.5) / n, i / n
  z = processes.add_noise(process, case["x"], case["eps"], t)
  teacher = bind(denoiser, case.net("teacher"))
  target, steps = x_target(process, teacher, z, t, mid, s, {})
  case.check("logsnr", process.log_snr(t), TIGHT, at_least=case.hyper["logsnr_max"])
  case.check("logsnr_mid", process.log_snr(mid), TIGHT, at_least=case.hyper["logsnr_max"])
  case.check("z", z, TIGHT)
  case.check("z_mid", steps["x_mid"], TIGHT)
  for number, x_t, time in ((1, z, t), (2, steps["x_mid"], mid)):
    out = toy.net(case.net("teacher"), x_t, process.log_snr(time), {})
    alpha, sigma = expand(process.alpha(time), z), expand(process.sigma(time), z)
    case.check(f"teacher_x_{number}", steps["x0_first" if number == 1 else "x0_second"], TIGHT)
    eps = prediction.convert(out, x_t, alpha, sigma, head, prediction.eps())
    case.check(f"teacher_eps_{number}", eps, TIGHT)
  check_predictions(case, process, ("x_target", "eps_target", "v_target"), target, prediction.x0(), z, t)
  check_student(case, process, head, z, t)
  check_losses(case, lambda params, weight: pd_loss(
      process, bind(denoiser, params), teacher, z, t, mid, s, {}, weight))


def vp_denoise(case):
  process, head, denoiser = setup(case)
  x0 = case["x"]
  t = case["u"] if "u" in case else (case["i"].astype(case.dtype) + 1) / case.hyper["num_steps"]
  z = processes.add_noise(process, x0, case["eps"], t)
  case.check("logsnr", process.log_snr(t), TIGHT, at_least=case.hyper["logsnr_max"])
  if "z" in case.outs:
    case.check("z", z, TIGHT)
    check_predictions(case, process, ("x_target", "eps_target", "v_target"), x0, prediction.x0(), z, t)
    check_student(case, process, head, z, t)
  check_losses(case, lambda params, weight: denoising_loss(process, denoiser, params, z, t, x0, {}, weight))


RUNNERS = {r"pd_vp_.*": pd_vp, r"vp_denoise_.*": vp_denoise}
