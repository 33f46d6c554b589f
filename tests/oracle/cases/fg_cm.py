"""ECT-style consistency models (FastGen), from data and from a teacher, on noise levels and on the flow."""

import jax
import jax.numpy as jnp

from ddil_jax.diffusion import grids, prediction, transforms
from ddil_jax.diffusion import process as processes
from ddil_jax.diffusion.prediction import make_denoiser
from ddil_jax.diffusion.process import add_noise
from ddil_jax.objectives.base import bind, stop
from ddil_jax.objectives.ect import PAIR_WEIGHTS, ect_loss, nearer_time
from tests.oracle import toy

TIGHT = 1e-8
SCHEDULES = {"edm": (processes.edm(time_scale=0.25), prediction.edm(0.5)), "rf": (processes.flow(), prediction.flow())}


def denoiser_of(schedule: str):
  """(process, denoiser) of the toy net on FastGen's schedule `edm` or `rf`; its flow time is not scaled."""
  process, head = SCHEDULES[schedule]
  return process, make_denoiser(toy.net, process, head, jnp.asarray if schedule == "rf" else None)


def conditions(case):
  """(cond, null) of FastGen's files."""
  cond = {"embedding": case["cond"]} if "cond" in case else {}
  return cond, lambda cond: {**cond, "embedding": case["neg_cond"]}


def fg_cm(case):
  hyper = case.hyper
  process, denoiser = denoiser_of(hyper["schedule"])
  cond, null = conditions(case)
  t = case["t"]
  r = nearer_time(t, hyper["ratio"], hyper["min_r"])
  if hyper["quantize"]:  # both to the nearest of a thousand levels, t at least one above r
    levels = jnp.asarray(grids.karras_levels(1000), case.dtype)
    i, j = (jnp.argmin(jnp.abs(levels[None] - v[:, None]), axis=1) for v in (t, r))
    t, r = levels[jnp.minimum(i, j - 1)], levels[j]
  t = jnp.where(r >= t - 1e-6, r + 1e-6, t)
  case.check("t", t)
  case.check("r", r)
  x_t = add_noise(process, case["x"], case["eps"], t)
  x0_of = lambda x_t, t, cond: case["x"]  # noqa: E731
  if hyper["use_cd"]:
    scale = hyper["guidance_scale"] or 1
    x0_of = transforms.guidance(scale, null)(bind(denoiser, case.net("teacher")))
  loss = lambda params: ect_loss(process, bind(denoiser, params), bind(denoiser, stop(params)), x0_of, x_t,  # noqa: E731
                                 t, r, cond, PAIR_WEIGHTS[hyper["weighting_ct_loss"]], hyper["huber_const"],
                                 hyper["use_squared_l2"])
  params = case.net("student")
  per_example, found = loss(params)
  case.check("y_t", x_t)
  case.check("y_r", found["x_r"], TIGHT)
  case.check("D_yt", found["prediction"])
  case.check("D_yr", found["target"], TIGHT)
  case.check("loss_unweighted", found["unweighted"], TIGHT)
  case.check("loss_per_example", per_example, TIGHT)
  case.check("loss", jnp.mean(per_example), TIGHT, mean_of="loss_per_example")
  case.check_grads("grad", jax.grad(lambda p: jnp.mean(loss(p)[0]))(params), TIGHT)


RUNNERS = {r"fg_cm_.*": fg_cm}
