"""MeanFlow (FastGen), from data and from a teacher."""

import jax
import jax.numpy as jnp

from ddil_jax.diffusion import process as processes
from ddil_jax.diffusion import transforms
from ddil_jax.diffusion.process import add_noise, expand, velocity_from_x0
from ddil_jax.objectives.base import bind
from ddil_jax.objectives.meanflow import exponential_weight, meanflow_loss, polynomial_weight
from tests.oracle import toy
from tests.oracle.cases.fg_cm import conditions, denoiser_of


def weight_of(hyper):
  name, *numbers = hyper["norm_method"].split("_")
  return {"poly": polynomial_weight, "exp": exponential_weight}[name](*map(float, numbers), hyper["norm_const"])


def fg_meanflow(case):
  hyper, process = case.hyper, processes.flow()
  x0, noise, t, r = case["x"], case["z"], case["t"], case["r"]
  cond, null = conditions(case)
  guided = hyper["guidance_scale"] is not None
  x_t = add_noise(process, x0, noise, t)
  case.check("x_t", x_t)
  data = velocity_from_x0(process, x_t, x0, t)
  if hyper["use_cd"]:
    # The teacher is guided between two times only.
    within = (t >= hyper["guidance_t_start"]) & (t <= hyper["guidance_t_end"])
    scale = jnp.where(within, hyper["guidance_scale"] if guided else 1.0, 1.0).astype(case.dtype)
    teacher = bind(denoiser_of("rf")[1], case.net("teacher"))
    x0_of = transforms.guidance(scale, null)(teacher) if guided else teacher
    v = velocity_from_x0(process, x_t, x0_of(x_t, t, cond), t)
    case.check("dxt_dt", v)
  elif guided:
    case.leave("dxt_dt", "guidance of the data's velocity by the student's own estimates is not offered")
    v = case.expected("dxt_dt")
  else:
    v = data
    case.check("dxt_dt", v)
  if "condition_used" in case.outs:
    used = jnp.asarray(case.raw("condition_used"), case.dtype)
    case.leave("condition_used", "dropped conditions are the business of the batch")
    cond = {"embedding": used}

  def velocity(params):
    return lambda x, t, r, cond: toy.net(params, x, t, {**cond, "slot": r[:, None]})

  steps = hyper["tangent_warmup_steps"]
  warm = min(1.0, hyper["iteration"] / steps) if steps else 1.0
  by_tangent = hyper["loss_type"] == "opt_grad"
  loss = lambda params: meanflow_loss(process, velocity(params), x_t, t, r, cond, v, weight_of(hyper),  # noqa: E731
                                      warm, by_tangent, hyper["tangent_spatial_invariance"],
                                      hyper["jvp_finite_diff_eps"] if hyper["use_jvp_finite_diff"] else 0.0)
  params = case.net("student")
  per_example, found = loss(params)
  u = found["u"]
  case.check("u", u)
  case.check("x0_approx", x_t - expand(t, x_t) * u)
  case.check("v_loss", jnp.mean((u - (noise - x0)) ** 2, axis=(1, 2, 3)))
  case.check("warmup_weight", jnp.asarray(warm, case.dtype))
  case.check("u_jvp", found["derivative"])
  case.check("tangent", found["tangent" if by_tangent else "target"])
  case.check("loss_weight", found["weight"])
  case.check("loss_per_example", per_example)
  case.check("loss", jnp.mean(per_example), mean_of="loss_per_example")
  case.check_grads("grad", jax.grad(lambda p: jnp.mean(loss(p)[0]))(params))


RUNNERS = {r"fg_meanflow_.*": fg_meanflow}
