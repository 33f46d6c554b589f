"""Knowledge distillation on stored paths (FastGen)."""

import re

import jax
import jax.numpy as jnp

from ddil_jax.objectives.base import bind
from ddil_jax.objectives.regression import regression_loss
from tests.oracle.cases.fg_cm import denoiser_of


def fg_kd(case):
  process, denoiser = denoiser_of("edm")
  x0, params = case["x"], case.net("student")
  for steps in sorted({int(re.match(r"steps(\d+)/", name)[1]) for name in case.outs}):
    if steps == 1:
      x_t, t = case["noise"], case.full(process.t_max, x0)  # the noise is the path's start, scaled already
    else:
      times = jnp.asarray(case.hyper[f"t_list_steps{steps}"], case.dtype)
      index = case["index"]
      x_t, t = case["path"][jnp.arange(len(index)), 2 * index], times[index]
    prefix = f"steps{steps}/"
    case.check(prefix + "input_student", x_t)
    case.check(prefix + "t_student", t)
    case.check(prefix + "gen_data", denoiser(params, x_t, t, {}))
    loss = lambda params: jnp.mean(regression_loss(bind(denoiser, params), x_t, t, x0, {}))  # noqa: B023, E731
    case.check(prefix + "loss", loss(params))
    case.check_grads(prefix + "grad", jax.grad(loss)(params))


RUNNERS = {r"fg_kd": fg_kd}
