"""TRACT (apple/ml-tract): on the cosine schedule, and on Karras levels with a Heun step of the teacher."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ddil_jax.diffusion import grids, prediction, solvers, transforms, weighting
from ddil_jax.diffusion import process as processes
from ddil_jax.diffusion.prediction import make_denoiser
from ddil_jax.diffusion.process import add_noise, expand
from ddil_jax.objectives.base import bind
from ddil_jax.objectives.tract import debiased, tract_loss, tract_target
from tests.oracle import toy

TIGHT = 1e-7


def finish(case, loss, pixels):
  """loss: params -> [B], the mean over pixels; the original's sums over `pixels` of them."""
  params = case.net("student")
  per_example = pixels * loss(params)
  case.check("loss_per_example", per_example, TIGHT)
  case.check("loss", jnp.mean(per_example), TIGHT, mean_of="loss_per_example")
  case.check_grads("grad", jax.grad(lambda p: pixels * jnp.mean(loss(p)))(params), TIGHT)
  decay = debiased(case.hyper["sema"])(case.hyper["sema_step_before"])
  # The update is step `before` of the counter that starts at 0; the first one copies.
  case.check_grads("ema", optax.incremental_update(params, case.net("self_teacher"), 1 - decay))


def open_ended(process: processes.Process) -> processes.Process:
  """The cosine schedule as the original has it: u = 0 is the log-SNR there, not clean data."""
  return dataclasses.replace(process, alpha=lambda t: jnp.sqrt(jax.nn.sigmoid(process.log_snr(t))),
                             sigma=lambda t: jnp.sqrt(jax.nn.sigmoid(-process.log_snr(t))))


def tract(case):
  hyper = case.hyper
  total, schedule, phase = hyper["timesteps"], hyper["time_schedule"], hyper["phase"]
  small, block = total // schedule[phase], total // schedule[phase + 1]
  start = case["index_block"] * block - case["semi_draw"] * small
  mid, end = start - small, (case["index_block"] - 1) * block
  for name, index in (("start", start), ("mid", mid), ("end", end)):
    case.check(f"index_{name}", index)
  process = open_ended(processes.cosine(hyper["logsnr_min"], hyper["logsnr_max"]))
  t, m, e = (jnp.asarray(v, case.dtype) / total for v in (start, mid, end))
  for name, u in (("start", t), ("mid", m), ("end", e)):
    case.check(f"logsnr_{name}", process.log_snr(u), TIGHT, at_least=hyper["logsnr_max"])

  head = prediction.both() if hyper["predict_both"] else prediction.x0()
  denoiser = make_denoiser(toy.net, process, head, process.log_snr)
  clip = transforms.reflect(transforms.clip(*hyper["clip_x0"]))
  teacher, self_teacher = (clip(bind(denoiser, case.net(role))) for role in ("teacher", "self_teacher"))
  x_t = add_noise(process, case["x"], case["noise"], t)
  cond = {}
  if "label" in case:
    cond = {"embedding": jax.nn.one_hot(case["label"], hyper["num_classes"], dtype=case.dtype)}
  target, found = tract_target(process, teacher, self_teacher, x_t, t, m, e, cond)
  case.check("xt0", x_t, TIGHT)
  case.check("xt1", found["x_mid"], TIGHT)
  case.check("xt2", found["x_end"], TIGHT)
  case.check("target", target, TIGHT)
  case.check("pred_x", bind(denoiser, case.net("student"))(x_t, t, cond), TIGHT)
  case.check("teacher_out", toy.net(case.net("teacher"), x_t, process.log_snr(t), cond), TIGHT)
  case.check("self_teacher_out", toy.net(case.net("self_teacher"), found["x_mid"], process.log_snr(m), cond), TIGHT)
  weight = weighting.make("snr_trunc")
  finish(case, lambda params: tract_loss(process, bind(denoiser, params), teacher, self_teacher, x_t, t, m, e, cond,
                                         weight), x_t[0].size)


def tract_edm(case):
  hyper = case.hyper
  low, high, sigma_data = hyper["sigma_min"], hyper["sigma_max"], hyper["sigma_data"]
  levels = np.append(0, grids.karras_levels(hyper["timesteps"], low, high, hyper["rho"])[::-1])
  case.check_table("sigma_table", levels)
  block = hyper["timesteps"] // hyper["time_schedule"][1]
  start = case["index_block"] * block - case["semi_draw"]
  end = (case["index_block"] - 1) * block
  case.check("index", start)
  case.check("index_mid", jnp.maximum(start - 1, 1))
  case.check("index_end", end)
  levels = jnp.asarray(levels, case.dtype)
  # Ours goes on to the clean end where the original stays at its smallest level and takes the teacher's x0.
  t, m, e = levels[start], levels[start - 1], levels[end]
  case.check("sigma_start", t)
  case.check("sigma_mid", levels[jnp.maximum(start - 1, 1)])
  case.check("sigma_end", e)
  process = processes.edm(low, high, time_scale=0.25)
  head = prediction.edm(sigma_data)
  denoiser = make_denoiser(toy.net, process, head)
  teacher, plain = (bind(denoiser, case.net(role)) for role in ("teacher", "self_teacher"))

  def self_teacher(x, t, cond):
    """Clipped where the block ends at clean data, and only there."""
    x0 = plain(x, t, cond)
    return jnp.where(expand(e == 0, x0), jnp.clip(x0, -1, 1), x0)

  x_t = add_noise(process, case["x"], case["noise"], t)
  target, found = tract_target(process, teacher, self_teacher, x_t, t, m, e, {}, solvers.heun())
  case.check("xt", x_t)
  last = expand(start == 1, x_t)
  case.check("x_teacher", jnp.where(last, x_t, found["x_mid"]))
  case.check("x0_teacher", teacher(x_t, t, {}))
  # The original divides by small differences of levels of 80 in float64 in both of its runs.
  case.check("target_x", target, TIGHT, loose=1e-4)
  as_output = lambda x0: head.from_x0(x0, (x_t - x0) / expand(t, x_t), 1.0, expand(t, x_t))  # noqa: E731
  case.check("target_F", as_output(target), TIGHT)
  case.check("pred_F", toy.net(case.net("student"), x_t / expand(jnp.sqrt(t**2 + sigma_data**2), x_t),
                               jnp.log(t) / 4, {}))
  weight = weighting.make("edm", sigma_data=sigma_data)
  c_out = prediction.edm_scalings(t, sigma_data)[1]
  case.check("weight", weight(process, t) * c_out**2)
  finish(case, lambda params: tract_loss(process, bind(denoiser, params), teacher, self_teacher, x_t, t, m, e, {},
                                         weight, solvers.heun()), 1)


RUNNERS = {r"tract_\d+_.*": tract, r"tract_edm_.*": tract_edm}
