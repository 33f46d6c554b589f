"""Schedules, tables, conversions, preconditioning, EDM's and the consistency models' samplers, reflection."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from ddil_jax.diffusion import curriculum, grids, prediction, solvers, transforms, weighting
from ddil_jax.diffusion import process as processes
from ddil_jax.diffusion import reflected as reflect_lib
from ddil_jax.diffusion.prediction import make_denoiser
from ddil_jax.diffusion.process import expand
from ddil_jax.objectives.denoising import denoising_loss
from tests.oracle import toy
from tests.oracle.cases.samplers import HEADS
from tests.oracle.walk import walk


def schedules(case):
  """Tables are numpy in both runs."""
  sd = processes.sd_alphas_cumprod()
  tables = {
      "sd_betas": processes.sd_betas(), "sd_alphas_cumprod": sd,
      "ddpm_linear_alphas_cumprod": processes.ddpm_linear_alphas_cumprod(),
      "cosine_alphas_cumprod": processes.cosine_alphas_cumprod(),
      "sd_zero_snr_alphas_cumprod": processes.rescale_zero_terminal_snr(sd)}
  for name in sorted(case.outs):
    if name in tables:
      case.check_table(name, tables[name])
    elif match := re.fullmatch(r"karras_(\d+)", name):
      case.check(name, grids.karras(int(match[1])))
    elif match := re.fullmatch(r"dmd2_step_list/n(\d+)_T(\d+)", name):
      case.check(name, grids.dmd2_timesteps(int(match[1]), int(match[2])))
    elif match := re.fullmatch(r"(ema_and_scales/.*)/args", name):
      group, args = match[1], case.raw(name)
      counts = (int(count) for count in args[3:])
      schedule = curriculum.ema_and_scales(str(args[0]), float(args[1]), str(args[2]), *counts)
      rates, scales = zip(*(schedule(int(step)) for step in case.raw(f"{group}/step")))
      case.check(f"{group}/ema", np.array(rates))
      case.check(f"{group}/scales", np.array(scales))
      case.leave(name, "the arguments")
      case.leave(f"{group}/step", "the steps at which the schedule is asked")


def timestep_tables(case):
  num_train = case.hyper["num_train_timesteps"]
  for name in case.outs:
    if match := re.fullmatch(r"lcm_o(\d+)_n(\d+)", name):
      case.check(name, grids.lcm_timesteps(int(match[2]), int(match[1]), num_train))
    elif match := re.fullmatch(r"ddim_(\w+)_off(\d+)_n(\d+)", name):
      times = grids.ddim_timesteps(int(match[3]), match[1], int(match[2]), num_train, keep_surplus=True)
      case.check(name, times)


def conversions_vp(case):
  process = processes.noise_level()
  level = lambda log_snr: jnp.exp(-0.5 * log_snr)  # noqa: E731
  t, s = level(case["logsnr"]), level(case["logsnr_s"])
  z, x, eps, v = (case[name] for name in ("z", "x", "eps", "v"))
  alpha, sigma = expand(process.alpha(t), z), expand(process.sigma(t), z)

  case.check("forward_mean", alpha * x)
  case.check("forward_std", process.sigma(t))
  case.check("forward_var", process.sigma(t) ** 2)
  case.check("forward_logvar", 2 * jnp.log(process.sigma(t)))
  case.check("x_from_eps", prediction.eps().to_x0(eps, z, alpha, sigma))
  case.check("eps_from_x", processes.eps_from_x0(process, z, x, t))
  case.check("x_from_v", prediction.v().to_x0(v, z, alpha, sigma))
  case.check("v_from_x_eps", prediction.v().from_x0(x, eps, alpha, sigma))

  outputs = {"x": x, "eps": eps, "v": v, "both": jnp.concatenate([x, eps], -1)}
  for name in sorted(case.outs):
    if match := re.fullmatch(r"run_(\w+)_clip(\d)/(x|eps|v)", name):
      head, out = prediction.make(HEADS[match[1]]), outputs[match[1]]
      if match[2] == "1":
        head, out = prediction.x0(), transforms.clip()(head.to_x0(out, z, alpha, sigma))
      case.check(name, prediction.convert(out, z, alpha, sigma, head, prediction.make(HEADS[match[3]])))
    elif match := re.fullmatch(r"reverse_(small|large|medium_(.*))/mean", name):
      kind = "medium" if match[2] else match[1]
      mean, log_var = solvers.posterior(process, z, x, t, s, kind, float(match[2] or 0))
      group = name.removesuffix("mean")
      case.check(name, mean)
      case.check(group + "logvar", log_var)
      case.check(group + "std", jnp.exp(0.5 * log_var))
    elif match := re.fullmatch(r"logsnr_cosine(?:_(\d+))?", name):
      limits = (-float(match[1]), float(match[1])) if match[1] else (
          case.hyper["logsnr_min"], case.hyper["logsnr_max"])
      case.check(name, processes.cosine(*limits).log_snr(case["u"]), at_least=limits[1])


def reflected(case):
  x0, sigma, images, terms = case["x_orig"], case["sigma"], case.hyper["refls"], case.hyper["efs"]
  case.check("reflect", reflect_lib.reflect(case["points"]))
  case.check("sample_hk", reflect_lib.sample_kernel(x0, sigma, case["gauss"]))
  floor = 1e-12
  for name in sorted(case.outs):
    near = name.endswith("_near")
    x = case["x_near" if near else "x"]
    # Far from x_orig the density falls below the floor, and the series is a difference of roundings.
    tight = 1e-9 if near else 1e-6
    if match := re.fullmatch(r"score_refl_(\d+)(_near)?", name):
      case.check(name, reflect_lib.score_images(x, x0, sigma, int(match[1]), floor))
    elif name in ("score_hk", f"score_ef_{terms}") and not case.tight:
      case.leave(name, "at points of negligible density: a quotient of roundings in float32")
    elif match := re.fullmatch(r"score_ef_(\d+)(_near)?", name):
      case.check(name, reflect_lib.score_eigenfunctions(x, x0, sigma, int(match[1]), floor), tight)
    elif re.fullmatch(r"score_hk(_near)?", name):
      case.check(name, reflect_lib.score(x, x0, sigma, images, terms, case.hyper["min_cutoff"], floor), tight)


def edm_precond_loss_sampler(case):
  hyper = case.hyper
  sigma_data = hyper["sigma_data"]
  process = processes.edm(hyper["sigma_min"], hyper["sigma_max"], time_scale=0.25)
  denoiser = make_denoiser(toy.net, process, prediction.edm(sigma_data))
  params, sigma, x, cond = case.net("student"), case["sigma"], case["x"], {"embedding": case["labels"]}

  for name, value in zip(("c_skip", "c_out", "c_in"), prediction.edm_scalings(sigma, sigma_data)):
    case.check(name, value)
  case.check("c_noise", process.time_input(sigma))
  case.check("D", denoiser(params, x, sigma, cond))

  weight = weighting.edm(sigma_data)
  for name in sorted(case.outs):
    if match := re.fullmatch(r"(edm_loss_([^_]+)_([^_]+))/loss_map", name):
      t = jnp.exp(float(match[3]) * case["rnd_normal"] + float(match[2]))
      x_t = processes.add_noise(process, x, case["noise"], t)
      loss = lambda p: denoising_loss(process, denoiser, p, x_t, t, x, cond, weight)  # noqa: E731
      case.check(name, expand(weight(process, t), x) * (denoiser(params, x_t, t, cond) - x) ** 2)
      case.check(f"{match[1]}/loss_per_example", loss(params))
      case.check_grads(f"{match[1]}/grad", jax.grad(lambda p: jnp.mean(loss(p)))(params))

  n = hyper["num_steps"]
  grid = grids.karras(n, hyper["sigma_min"], hyper["sigma_max"], hyper["rho"])
  denoise = lambda x_t, t, c: denoiser(params, x_t, t, c)  # noqa: E731
  start, noise = hyper["sigma_max"] * case["latents"], case["churn_noise"]
  churn = solvers.heun(hyper["S_churn"], hyper["S_min"], hyper["S_max"], hyper["S_noise"], n)
  for name, solver in {"heun": solvers.heun(), "churn": churn, "euler": solvers.ddim()}.items():
    case.check(f"sampler_{name}", walk(solver(process, denoise), start, grid, cond, noise)[-1])


def ve_parts(case):
  hyper = case.hyper
  low, high, rho, sigma_data = (hyper[name] for name in ("sigma_min", "sigma_max", "rho", "sigma_data"))
  process = processes.edm(low, high)
  params, sigma, x = case.net("student"), case["sigma"], case["x"]
  heads = {"edm": prediction.edm(sigma_data), "boundary": prediction.edm(sigma_data, boundary_sigma_min=low)}
  scalings = {"edm": prediction.edm_scalings(sigma, sigma_data),
              "boundary": prediction.cm_scalings(sigma, sigma_data, low)}
  denoisers = {name: make_denoiser(toy.net, process, head) for name, head in heads.items()}
  bound = {name: lambda x_t, t, cond, d=d: d(params, x_t, t, cond) for name, d in denoisers.items()}

  weights = {"snr": "snr", "snrp1": "snr_plus_one", "karras": "edm", "truncated_snr": "snr_trunc",
             "uniform": "constant"}
  for name, ours in weights.items():
    options = {"sigma_data": sigma_data} if ours == "edm" else {}
    case.check(f"weight_{name}", weighting.make(ours, **options)(process, sigma))

  x_t = processes.add_noise(process, x, case["noise"], sigma)
  for name, denoiser in denoisers.items():
    for part, value in zip(("c_skip", "c_out", "c_in"), scalings[name]):
      case.check(f"{name}/{part}", value)
    case.check(f"denoise_{name}", bound[name](x, sigma, {}))
    loss = lambda p, w, d=denoiser: denoising_loss(process, d, p, x_t, sigma, x, {}, w)  # noqa: E731
    weight = weighting.edm(sigma_data)
    case.check(f"training_xs_mse_{name}", loss(params, weighting.constant()))
    case.check(f"training_loss_{name}", loss(params, weight))
    case.check_grads(f"training_grad_{name}", jax.grad(lambda p: jnp.mean(loss(p, weight)))(params))

  start = high * case["init"]
  for name in sorted(case.outs):
    if match := re.fullmatch(r"(heun|euler|progdist)_(\d+)", name):
      n = int(match[2])
      # Progressive distillation stops at sigma_min; the original's list of levels has one 0 more.
      grid = grids.karras(n, low, high, rho, clean_end=match[1] != "progdist")
      solver = solvers.heun() if match[1] == "heun" else solvers.ddim()
      levels = name.replace("progdist", "progdist_sigmas") if match[1] == "progdist" else f"sigmas_{n}"
      if levels in case.outs - case.seen:
        case.check(levels, np.append(grid, 0) if match[1] == "progdist" else grid)
      case.check(name, walk(solver(process, bound["edm"]), start, grid, {})[-1])
  case.check("onestep", bound["boundary"](start, case.full(high, start), {}))

  ladder = grids.karras_levels(hyper["multistep_steps"], low, high, rho)
  grid = ladder[hyper["multistep_ts"]]
  policy = solvers.renoise(sigma_offset=low)(process, bound["boundary"])
  case.check("multistep", walk(policy, start, grid, {}, case["multi_noise"])[-1])


RUNNERS = {r"schedules": schedules, r"timestep_tables": timestep_tables, r"conversions_vp": conversions_vp,
           r"reflected": reflected, r"edm_precond_loss_sampler": edm_precond_loss_sampler, r"ve_parts_cm": ve_parts}
