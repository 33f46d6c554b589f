"""sCM (FastGen): TrigFlow coordinates on noise levels and on the flow."""

import jax
import jax.numpy as jnp

from ddil_jax.diffusion import transforms
from ddil_jax.diffusion.process import expand
from ddil_jax.objectives.base import bind
from ddil_jax.objectives.scm import angle, scm_loss, to_trig, trig_output
from tests.oracle.cases.fg_cm import conditions, denoiser_of


def fg_scm(case):
  hyper = case.hyper
  process, denoiser = denoiser_of(hyper["schedule"])
  sigma_data = hyper["sigma_data"]
  x0, t = case["x"], case["t"]
  cond, null = conditions(case)
  tau = angle(process, t, sigma_data)
  cos, sin = jnp.cos(expand(tau, x0)), jnp.sin(expand(tau, x0))
  # Their noise is that of x^; x_t has the same image and noise.
  x_t = expand(process.alpha(t), x0) * x0 + expand(process.sigma(t), x0) * case["z"]
  x_hat = to_trig(process, x_t, t, sigma_data)
  case.check("t_hat", tau)
  case.check("x_t_hat", x_hat)
  if hyper["use_cd"]:
    teacher = bind(denoiser, case.net("teacher"))
    if hyper["guidance_scale"] is not None:
      teacher = transforms.guidance(hyper["guidance_scale"], null)(teacher)
  else:
    teacher = lambda x_t, t, cond: x0  # noqa: E731
  slope = sigma_data * trig_output(process, teacher, x_hat, t, cond, sigma_data)
  case.check("dxt_dt", slope)
  # Their differences are taken on the data's path, also where the slope is the teacher's.
  data_path = -sin * x0 + cos * sigma_data * case["z"]
  steps = hyper["tangent_warmup_steps"]
  warm = min(1.0, hyper["iteration"] / steps)
  case.check("warmup_r", jnp.asarray(warm, case.dtype))
  network_time = jnp.log(t) / 4 if hyper["schedule"] == "edm" else t

  def loss(params):
    lv = params["lv"]
    log_variance = lv[0] * network_time + lv[1]
    return scm_loss(process, bind(denoiser, params), x_t, t, slope, cond, warm, log_variance, sigma_data,
                    hyper["tangent_warmup_const"], hyper["prior_weighting_enabled"],
                    hyper["g_norm_spatial_invariance"], hyper["divide_x_0_spatial_dim"],
                    hyper["jvp_finite_diff_eps"] if hyper["use_jvp_finite_diff"] else 0.0, data_path), log_variance

  params = case.net("student")
  (per_example, found), log_variance = loss(params)
  case.check("F", found["F"])
  case.check("logvar", log_variance)
  case.check("x0_pred", cos * x_hat - sin * sigma_data * found["F"])
  case.check("F_jvp", found["derivative"])
  case.check("g", found["g"])
  case.check("g_norm", found["norm"])
  case.check("loss_unweighted", found["unweighted"])
  case.check("loss_per_example", per_example)
  case.check("loss", jnp.mean(per_example), mean_of="loss_per_example")
  case.check_grads("grad", jax.grad(lambda p: jnp.mean(loss(p)[0][0]))(params))


RUNNERS = {r"fg_scm_.*": fg_scm}
