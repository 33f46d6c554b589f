"""FastGen's parts: times, grids, conversions, the curriculum of ECT, f-distill's weights."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np

from ddil_jax.diffusion import grids, prediction, times
from ddil_jax.diffusion import process as processes
from ddil_jax.diffusion.process import expand, snr
from ddil_jax.objectives.base import subset
from ddil_jax.objectives.ect import nearer_time, stage_ratio
from ddil_jax.objectives.f_distill import WEIGHTS, density_ratio, f_weight

# What a velocity dx_t/dt is on each schedule: time is the noise level, the flow's, or TrigFlow's angle.
FLOW = {"edm": "eps", "rf": "flow", "trig": "v"}


def numbers(text):
  return [float(each) for each in re.findall(r"-?\d*\.?\d+", text)]


def fg_parts(case):
  hyper, u = case.hyper, case["u"]
  edm, flow = processes.edm(), dataclasses.replace(processes.flow(), t_max=0.999)
  levels = grids.karras_levels(1000)  # decreasing; theirs ascend
  case.check("edm_lognormal", times.lognormal(u, edm.t_min, edm.t_max, *numbers(hyper["edm_lognormal"])))
  case.check("edm_uniform", times.uniform(u, edm.t_min, edm.t_max))
  case.check("edm_polynomial", jnp.asarray(levels[::-1], case.dtype)[case["idx"]])
  case.check("edm_sigmas", levels[::-1])
  case.check("rf_logitnormal", times.logit_normal(case["n"], flow.t_min, flow.t_max, *numbers(hyper["rf_logitnormal"])))
  case.check("rf_shifted5", times.shifted(u, flow.t_min, flow.t_max, 5.0))

  # FastGen's clock of noise levels leaves out the first and the last two of the thousand.
  inner = np.append(levels[1:-2], 0)
  # The angle of TrigFlow is that of a noise level.
  trig = processes.noise_level()
  schedules = {"edm": (edm, case["t"]), "rf": (flow, case["t01"]), "trig": (trig, jnp.tan(case["th"]))}
  for name in sorted(case.outs):
    if match := re.fullmatch(r"t_list_(edm|rf)_(\d+)", name):
      n = int(match[2])
      case.check(name, subset(inner, n) if match[1] == "edm" else grids.uniform(n, flow))
    elif match := re.fullmatch(r"(edm|rf|trig)_(x0|eps|flow)_to_(x0|eps|flow)", name):
      process, t = schedules[match[1]]
      source, target = (prediction.make(FLOW[match[1]] if head == "flow" else head) for head in match.groups()[1:])
      alpha, sigma = (expand(scale(t), case["xt"]) for scale in (process.alpha, process.sigma))
      case.check(name, prediction.convert(case["o"], case["xt"], alpha, sigma, source, target))
    elif match := re.fullmatch(r"(edm|rf|trig)_sqrt_snr", name):
      case.check(name, jnp.sqrt(snr(*schedules[match[1]])))
    elif match := re.fullmatch(r"t_to_r_sigmoid_(.*)", name):
      case.check(name, nearer_time(case["t"], float(match[1]), edm.t_min))
    elif match := re.fullmatch(r"f_weight_(\w+)", name):
      weight = WEIGHTS[match[1]](case["ratio"])
      case.check(name, weight.mean() if match[1] == "rkl" else weight)  # theirs of rkl is one number
    elif match := re.fullmatch(r"h_(\w+)", name):
      case.check(name, f_weight(match[1], density_ratio(case["logits"].mean(1)), lambda v: v.mean(0)))

  case.check("edm_c_out", prediction.edm_scalings(case["t"])[1])
  q, limit, thousands, batch = numbers(hyper["ct_schedule"])
  stage = case["ct_iteration"] * int(batch) // int(1000 * thousands)
  case.check("ct_schedule_ratio", stage_ratio(stage, q, limit).astype(case.dtype))


RUNNERS = {r"fg_parts": fg_parts}
