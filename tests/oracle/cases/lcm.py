"""Latent consistency distillation (diffusers' training script)."""

import re

import jax
import jax.numpy as jnp
import optax

from ddil_jax.diffusion import distance, grids, prediction, solvers, transforms
from ddil_jax.diffusion import process as processes
from ddil_jax.diffusion.prediction import lcm_scalings, make_denoiser
from ddil_jax.diffusion.process import add_noise, expand
from ddil_jax.models.layers import guidance_embedding
from ddil_jax.objectives.base import bind
from ddil_jax.objectives.cd import consistency_loss
from ddil_jax.objectives.lcm import consistency_function
from tests.oracle import toy
from tests.oracle.cases.samplers import PREDICTIONS


def parts(case):
  process = processes.discrete(case.table("alphas_cumprod"))
  n, num_train = case.hyper["num_ddim_timesteps"], len(case.table("alphas_cumprod"))
  times = grids.lcm_training_timesteps(n, num_train)
  previous = grids.lcm_training_previous(times, num_train)
  as_time = lambda t: jnp.asarray(t, case.dtype)  # noqa: E731
  case.check("ddim_timesteps", times)
  case.check("ddim_alpha_cumprods", process.alpha(as_time(times)) ** 2)
  case.check("ddim_alpha_cumprods_prev", process.alpha(as_time(previous)) ** 2)

  t, s = as_time(times)[case["index"]], as_time(previous)[case["index"]]
  x_t = add_noise(process, case["pred_x0"], case["pred_noise"], t)
  case.check("ddim_step", solvers.ddim_step(process, x_t, case["pred_x0"], t, s))

  t, z, out = as_time(case["timesteps"]), case["sample"], case["model_output"]
  alpha, sigma = expand(process.alpha(t), z), expand(process.sigma(t), z)
  for name in sorted(case.outs):
    if match := re.fullmatch(r"scalings_(.*)/c_skip", name):
      c_skip, c_out = lcm_scalings(t, case.hyper["sigma_data"], float(match[1]))
      case.check(name, c_skip)
      case.check(f"scalings_{match[1]}/c_out", c_out)
    elif match := re.fullmatch(r"w_embedding_(\d+)", name):
      case.check(name, guidance_embedding(case["w"], int(match[1])))
    elif match := re.fullmatch(r"(x0|eps)_(epsilon|sample|v_prediction)", name):
      source, target = prediction.make(PREDICTIONS[match[2]]), prediction.make(match[1])
      case.check(name, prediction.convert(out, z, alpha, sigma, source, target))


def skipped(case):
  """(process, times from which, times to which) of a training batch; their indices are checked."""
  hyper = case.hyper
  times = grids.lcm_training_timesteps(hyper["num_ddim_timesteps"], hyper["num_train_timesteps"])
  start = times[case["index"]]
  end = grids.lcm_training_previous(times, hyper["num_train_timesteps"])[case["index"]]
  case.check("start_timesteps", start)
  case.check("timesteps", end)
  return (processes.discrete(case.table("alphas_cumprod")), jnp.asarray(start, case.dtype),
          jnp.asarray(end, case.dtype))


def lcm(case):
  hyper = case.hyper
  process, t, s = skipped(case)
  scaling = hyper["timestep_scaling"], hyper["sigma_data"]
  for name, time in (("_start", t), ("", s)):
    c_skip, c_out = lcm_scalings(time, hyper["sigma_data"], hyper["timestep_scaling"])
    case.check("c_skip" + name, c_skip)
    case.check("c_out" + name, c_out)

  # Their guidance is c + w (c - u), ours u + g (c - u).
  g = 1 + case["w"]
  case.check("w_embedding", guidance_embedding(case["w"], hyper["embedding_dim"]))
  cond = {"embedding": case["prompt_embeds"], "guidance_scale": g}
  null = lambda cond: {**cond, "embedding": case["uncond_prompt_embeds"]}  # noqa: E731
  head = prediction.make(PREDICTIONS[hyper["prediction_type"]])
  denoiser = make_denoiser(toy.net, process, head)
  teacher = bind(denoiser, case.net("teacher"))
  guidance = transforms.guidance(None, null)
  guided = bind(make_denoiser(toy.guided(guidance), process, head), case.net("teacher"))
  f = consistency_function(denoiser, *scaling)
  options = {"c": hyper["huber_c"]} if hyper["loss_type"] == "huber" else {}
  metric = distance.make({"huber": "pseudo_huber"}.get(hyper["loss_type"], hyper["loss_type"]), **options)

  z = add_noise(process, case["latents"], case["noise"], t)
  loss = lambda params: consistency_loss(  # noqa: E731
      process, bind(f, params), bind(f, case.net("target")), guided, solvers.ddim(), z, t, s, cond, metric)
  params = case.net("student")
  per_example, steps = loss(params)
  case.check("noisy_model_input", z)
  case.check("student_raw", toy.net(params, z, t, cond))
  case.check("teacher_cond_x0", teacher(z, t, cond))
  case.check("teacher_uncond_x0", teacher(z, t, null(cond)))
  case.check("cfg_x0", guidance(teacher)(z, t, cond))
  case.check("cfg_noise", processes.eps_from_x0(process, z, guided(z, t, cond), t))
  case.check("x_prev", steps["x_s"])
  case.check("model_pred", steps["prediction"])
  case.check("target", steps["target"])
  case.check("loss_per_example", per_example)
  case.check("loss", jnp.mean(per_example), mean_of="loss_per_example")
  case.check_grads("grad", jax.grad(lambda p: jnp.mean(loss(p)[0]))(params))
  # The training step's moving average, which moves towards the student by 1 - decay.
  case.check_grads("ema", optax.incremental_update(params, case.net("target"), 1 - hyper["ema_rate"]))


RUNNERS = {r"lcm_parts_.*": parts, r"lcm_\d+_.*": lcm}
