"""Samplers step by step: each step starts from the stored sample, so that errors do not add up."""

import jax.numpy as jnp
import numpy as np

from ddil_jax.diffusion import grids, prediction, solvers, transforms
from ddil_jax.diffusion import process as processes
from ddil_jax.diffusion.prediction import lcm_scalings, make_denoiser
from ddil_jax.objectives.base import bind
from ddil_jax.objectives.lcm import consistency_function
from tests.oracle import toy
from tests.oracle.walk import walk

PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
HEADS = {"eps": "eps", "x": "x0", "v": "v", "both": "both"}


def projection(config):
  """diffusers' thresholding options as a projection of x0."""
  if config["thresholding"]:
    return transforms.dynamic(config["dynamic_thresholding_ratio"], 1.0, config["sample_max_value"])
  if config["clip_sample"]:
    return transforms.clip(-config["clip_sample_range"], config["clip_sample_range"])
  return transforms.identity()


def ddim(case):
  hyper, config = case.hyper, case.hyper["config"]
  num_train = config["num_train_timesteps"]
  process = processes.discrete(case.table("alphas_cumprod"), config["set_alpha_to_one"])
  n = hyper["num_inference_steps"]
  times = grids.ddim_timesteps(n, config["timestep_spacing"], config["steps_offset"], num_train,
                               keep_surplus=True)
  case.check("timesteps", times)
  params, project = case.net("student"), projection(config)
  head = prediction.make(PREDICTIONS[config["prediction_type"]])
  denoise = bind(make_denoiser(toy.net, process, head), params)
  projected = transforms.reflect(project)(denoise)
  # By default diffusers projects x0 and keeps eps; with use_clipped_model_output it recomputes it.
  if hyper["use_clipped_model_output"]:
    policy = solvers.ddim(hyper["eta"])(process, projected)
  else:
    policy = solvers.ddim(hyper["eta"], project)(process, denoise)

  x, outputs = case.expected("sample"), []
  for j, (t, s) in enumerate(zip(times, grids.ddim_previous(times, n, num_train))):
    t, s = case.full(t, x[j]), case.full(s, x[j])
    noise = case["variance_noise"][j] if "variance_noise" in case else jnp.zeros_like(x[j])
    after, _ = policy.step(policy.init(x[j]), x[j], t, s, {}, noise)
    outputs.append((toy.net(params, x[j], t, {}), projected(x[j], t, {}), after))
  model_output, x0, after = (jnp.stack(each) for each in zip(*outputs))
  case.check("sample", jnp.concatenate([case["init"][None], after[:-1]]))
  case.check("model_output", model_output)
  case.check("pred_original_sample", x0)
  case.check("prev_sample", after)


def lcm_sampler(case):
  hyper, config = case.hyper, case.hyper["config"]
  # The last step returns the estimate, whatever the scheduler's final alpha.
  process = processes.discrete(case.table("alphas_cumprod"))
  times = hyper["custom_timesteps"]
  if times is None:
    original = hyper["original_inference_steps"] or config["original_inference_steps"]
    times = grids.lcm_timesteps(hyper["num_inference_steps"], original, config["num_train_timesteps"],
                                hyper["strength"])
  times = np.asarray(times)
  case.check("timesteps", times)
  params, project, scaling = case.net("student"), projection(config), config["timestep_scaling"]
  head = make_denoiser(toy.net, process, prediction.make(PREDICTIONS[config["prediction_type"]]))
  # The estimate is projected before the boundary condition mixes x_t in.
  projected = lambda p, x_t, t, cond, keys=None, features=(): project(head(p, x_t, t, cond))  # noqa: E731
  policy = solvers.renoise()(process, bind(consistency_function(projected, scaling), params))
  denoise = bind(consistency_function(projected, scaling), params)

  x, outputs = case.expected("sample"), []
  for j, (t, s) in enumerate(zip(times, [*times[1:], -1])):
    t, s = case.full(t, x[j]), case.full(s, x[j])
    noise = case["noise"][j] if s[0] >= 0 else jnp.zeros_like(x[j])
    after, _ = policy.step(policy.init(x[j]), x[j], t, s, {}, noise)
    outputs.append((toy.net(params, x[j], t, {}), denoise(x[j], t, {}), after))
  model_output, denoised, after = (jnp.stack(each) for each in zip(*outputs))
  case.check("sample", jnp.concatenate([case["init"][None], after[:-1]]))
  case.check("model_output", model_output)
  case.check("denoised", denoised)
  case.check("prev_sample", after)
  c_skip, c_out = lcm_scalings(jnp.asarray(times, case.dtype), timestep_scaling=scaling)
  case.check("c_skip", c_skip)
  case.check("c_out", c_out)


def euler(case):
  """DDIM in noise levels y = x / alpha, which is Euler's method there."""
  hyper, config = case.hyper, case.hyper["config"]
  betas = config["num_train_timesteps"], config["beta_start"], config["beta_end"]
  table = {"scaled_linear": processes.sd_alphas_cumprod, "linear": processes.ddpm_linear_alphas_cumprod}[
      config["beta_schedule"]](*betas)
  implemented = {"rescale_betas_zero_snr": False, "use_beta_sigmas": False, "interpolation_type": "linear",
                 "timestep_type": "discrete", "final_sigmas_type": "zero", "trained_betas": None,
                 "sigma_min": None, "sigma_max": None}
  for option, only in implemented.items():
    assert config.get(option, only) == only, f"euler: {option}={config[option]} is not implemented"
  kinds = [kind for kind in ("karras", "exponential") if config.get(f"use_{kind}_sigmas")]
  levels = kinds[0] if kinds else "interpolated"
  times, sigmas = grids.discrete_levels(table, hyper["num_inference_steps"], config["timestep_spacing"],
                                        config["steps_offset"], levels)
  case.check_table("timesteps", times)
  case.check_table("sigmas", sigmas)
  spread = config["timestep_spacing"] in ("linspace", "trailing")
  start = sigmas[0] if spread else np.sqrt(sigmas[0] ** 2 + 1)
  case.check_table("init_noise_sigma", start)

  # The original's levels and times are float32 numbers: the steps are compared on exactly those.
  sigmas, times = case.expected("sigmas"), case.expected("timesteps")
  process = processes.noise_level(
      float(sigmas[0]), lambda level: jnp.interp(level, sigmas[:-1][::-1], times[::-1]))
  params = case.net("student")
  head = prediction.make(PREDICTIONS[config["prediction_type"]])
  denoise = bind(make_denoiser(toy.net, process, head), params)
  policy = solvers.ddim()(process, denoise)
  y, outputs = case.expected("sample"), []
  for j, (t, s) in enumerate(zip(sigmas[:-1], sigmas[1:])):
    t, s = case.full(t, y[j]), case.full(s, y[j])
    x_t = y[j] * process.alpha(t)[0]
    after, _ = policy.step(policy.init(x_t), x_t, t, s, {}, jnp.zeros_like(x_t))
    outputs.append((x_t, toy.net(params, x_t, process.time_input(t), {}), denoise(x_t, t, {}),
                    after / process.alpha(s)[0]))
  scaled, model_output, x0, after = (jnp.stack(each) for each in zip(*outputs))
  first = case.expected("init_noise_sigma") * case["init"]
  case.check("sample", jnp.concatenate([first[None], after[:-1]]))
  case.check("scaled", scaled)
  case.check("model_output", model_output)
  case.check("pred_original_sample", x0)
  case.check("prev_sample", after)


def pd_sample(case):
  """Whole trajectories: the file has no single steps."""
  hyper = case.hyper
  process = processes.cosine(hyper["logsnr_min"], hyper["logsnr_max"])
  params, n = case.net("student"), hyper["num_steps"]
  head = prediction.make(HEADS[hyper["head"]])
  denoise = bind(make_denoiser(toy.net, process, head, process.log_snr), params)
  if hyper["clip_x"]:
    denoise = transforms.reflect(transforms.clip())(denoise)
  grid, start = grids.uniform(n, process), case["init"]
  noise = case["noise"][::-1]  # noise[i] belongs to the step that ends at i / n
  trajectory = walk(solvers.ddim()(process, denoise), start, grid, {})
  case.check("ddim_traj", trajectory, 1e-7)
  case.check("ddim_final", trajectory[-1], 1e-7)
  for name in sorted(case.outs):
    if name.startswith("noisy_fixed_"):
      variance, _, fraction = name.removeprefix("noisy_fixed_").removesuffix("_traj").partition("_")
      policy = solvers.ancestral(variance, float(fraction or 0))(process, denoise)
      case.check(name, walk(policy, start, grid, {}, noise), 1e-7)


RUNNERS = {r"ddim_\d+_.*": ddim, r"lcm_sampler_\d+_.*": lcm_sampler, r"euler_\d+_.*": euler, r"pd_sample_.*": pd_sample}
