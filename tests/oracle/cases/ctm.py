"""Consistency trajectory models (the authors' CIFAR-10 release), with l2 in the place of LPIPS."""

import jax
import jax.numpy as jnp

from ddil_jax.diffusion import distance, grids, prediction, solvers, weighting
from ddil_jax.diffusion import process as processes
from ddil_jax.diffusion.prediction import make_denoiser
from ddil_jax.diffusion.process import add_noise
from ddil_jax.objectives.base import bind, stop
from ddil_jax.objectives.ctm import (advance, ctm_loss, half_lognormal, outer_coefficients, outer_form,
                                     step_probabilities)
from ddil_jax.objectives.denoising import denoising_loss
from tests.oracle import toy
from tests.oracle.cases.ve import WEIGHTS


def net(params, x, t, cond, keys=None, features=()):
  """The second time enters as 0.0005 of its time input."""
  slot = {"slot": 0.0005 * cond["end_time"][:, None]} if "end_time" in cond else {}
  return toy.net(params, x, t, {**cond, **slot})


def ctm(case):
  hyper = case.hyper
  low, high, sigma_data = hyper["sigma_min"], hyper["sigma_max"], hyper["sigma_data"]
  count, outer = hyper["num_heun_step_used"], hyper["outer_parametrization"]
  process = processes.edm(low, high, time_scale=250.0)
  grid = jnp.asarray(grids.karras_levels(hyper["start_scales"], low, high, hyper["rho"]), case.dtype)
  x0, k = case["x"], case["index"]
  t, u, s = grid[k], grid[k + count], grid[case["s_index"]]
  for name, value in (("t", t), ("t_dt", u), ("s", s)):
    case.check(name, value)
  boundary = low if hyper["inner_parametrization"] == "cm" else None
  student = outer_form(make_denoiser(net, process, prediction.edm(sigma_data, boundary_sigma_min=boundary)), outer)
  teacher = make_denoiser(toy.net, process, prediction.edm(sigma_data))
  x_t = add_noise(process, x0, case["noise"], t)
  policy = solvers.heun()(process, bind(teacher, case.net("teacher")))
  x_u = advance(policy, x_t, grid, k, jnp.full_like(k, count), count, {})
  case.check("x_t", x_t)
  case.check("x_t_dt", x_u)

  weight = weighting.make(WEIGHTS.get(hyper["weight_schedule"], hyper["weight_schedule"]))
  weights = hyper["weight_schedule_multiplier"] * weight(process, t)
  case.check("weights", weights)
  average = bind(student, case.net("target"))
  metric, end = distance.l2(), jnp.full_like(t, low)

  def consistency(params):
    inner = average if hyper["ctm_target_inner_type"] == "target_model_sg" else bind(student, stop(params))
    value, found = ctm_loss(process, bind(student, params), inner, average, x_t, x_u, t, u, s, end, {}, metric,
                            estimate_end=u if hyper["ctm_target_matching"] else None)
    return weights * value, found

  params = case.net("student")
  per_example, found = consistency(params)
  for name, key in (("estimate", "estimate"), ("target", "target"), ("G_student", "G")):
    case.check(name, found[key])
  case.check("consistency_loss_per_example", per_example)
  case.check("consistency_loss", jnp.mean(per_example), mean_of="consistency_loss_per_example")
  by_consistency = jax.grad(lambda p: jnp.mean(consistency(p)[0]))(params)
  case.check_grads("consistency_grad", by_consistency)

  levels = half_lognormal(case["dsm_lognormal"], case["dsm_uniform"], low, high, share=hyper["diffusion_mult"])
  sigma = jnp.concatenate(levels)
  case.check("dsm_sigma", sigma)
  edm = weighting.make("edm", sigma_data=sigma_data)
  case.check("dsm_weight", edm(process, sigma))
  noisy, cond = add_noise(process, x0, case["dsm_noise"], sigma), {"end_time": sigma}
  case.check("dsm_denoised", student(params, noisy, sigma, cond))
  dsm = lambda params: denoising_loss(process, student, params, noisy, sigma, x0, cond, edm)  # noqa: E731
  case.check("dsm_loss_per_example", dsm(params))
  case.check("dsm_loss", jnp.mean(dsm(params)), mean_of="dsm_loss_per_example")
  by_dsm = jax.grad(lambda p: jnp.mean(dsm(p)))(params)
  case.check_grads("dsm_grad", by_dsm)
  # Their balance of the two terms, by the gradients at the last layer; our weight is a number.
  length = lambda grads: jnp.sqrt(jnp.sum(grads["W2"] ** 2))  # noqa: E731
  balance = jnp.clip(length(by_consistency) / (length(by_dsm) + 1e-4), 0, 1e4)
  case.check("balance_weight", balance)
  case.check("balanced_dsm_loss_per_example", balance * dsm(params))
  case.check_grads("balanced_dsm_grad", jax.tree.map(lambda g: balance * g, by_dsm))

  for name in sorted(case.outs):
    if name.startswith("num_heun_step_probability"):
      case.check(name, step_probabilities(int(name.rpartition("_")[2])).astype(case.dtype))
    elif name.startswith("parts/outer_") and name.endswith("c_skip"):
      form = name.removeprefix("parts/outer_").removesuffix("/c_skip")
      c_skip, c_out = outer_coefficients(case["parts_t"], case["parts_s"], form, sigma_data, low)
      case.check(name, c_skip)
      case.check(name.replace("c_skip", "c_out"), c_out)


RUNNERS = {r"ctm_.*": ctm}
