"""TCM (FastGen): the second stage, with the permutation that picks the boundary's rows."""

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr, ndtri

from ddil_jax.diffusion.process import add_noise
from ddil_jax.objectives.base import bind, stop
from ddil_jax.objectives.ect import PAIR_WEIGHTS, ect_loss, nearer_time
from ddil_jax.objectives.tcm import truncated
from tests.oracle.cases.fg_cm import denoiser_of


def fg_tcm(case):
  hyper = case.hyper
  process, denoiser = denoiser_of("edm")
  x0, edge = case["x"], hyper["tr"]
  mean, std = hyper["train_p_mean"], hyper["train_p_std"]
  low, high = (ndtr((jnp.log(jnp.asarray(v, case.dtype)) - mean) / std) for v in (hyper["min_t"], hyper["max_t"]))
  t = jnp.exp(mean + std * ndtri(case["t_uniform"] * (high - low) + low))
  count = int(len(t) * hyper["bp"])
  held = jnp.zeros(len(t), bool).at[case["perm"][:count]].set(True)
  t = jnp.where(held, edge + 1e-8, t)
  r = nearer_time(t, hyper["ratio"], hyper["min_r"])
  case.check("t", t)
  case.check("r", r)
  case.check("boundary_mask", held)
  x_t = add_noise(process, x0, case["eps"], t)
  first = bind(denoiser, case.net("cm_teacher"))

  def loss(params):
    target = truncated(bind(denoiser, stop(params)), first, jnp.where(held, jnp.inf, edge))
    per_example, found = ect_loss(process, bind(denoiser, params), target, lambda x, t, cond: x0, x_t, t, r, {},
                                  PAIR_WEIGHTS[hyper["weighting"]], hyper["huber_const"])
    boundary = jnp.sum(jnp.where(held, per_example, 0)) / count
    rest = jnp.sum(jnp.where(held, 0, per_example)) / (len(t) - count)
    return rest + hyper["w"] * boundary, (per_example, found, rest, boundary)

  params = case.net("student")
  (total, (per_example, found, rest, boundary)), grads = jax.value_and_grad(loss, has_aux=True)(params)
  case.check("y_t", x_t)
  case.check("y_r", found["x_r"])
  case.check("D_yt", found["prediction"])
  case.check("D_yr", found["target"])
  case.check("loss_per_example", per_example)
  case.check("loss/cm_loss", rest, mean_of="loss_per_example")
  case.check("loss/loss_boundary", boundary, mean_of="loss_per_example")
  case.check("loss/total_loss", total, mean_of="loss_per_example")
  unweighted = jnp.sum(jnp.where(held, 0, found["unweighted"])) / (len(t) - count)
  case.check("loss/unweighted_cm_loss", unweighted, mean_of="loss_per_example")
  case.check_grads("grad", grads)


RUNNERS = {r"fg_tcm_.*": fg_tcm}
