"""Schedules of feature caches: DeepCache's full steps, Faster Diffusion's key steps and groups. Integers, exact."""

import re

import numpy as np

from ddil_jax.diffusion import feature_cache


def schedules(case):
  for name in sorted(case.outs):
    if match := re.fullmatch(r"deepcache_sd_T(\d+)_iv(\d+)_uniform", name):
      case.check(name, feature_cache.every(*map(int, match.groups())))
    elif match := re.fullmatch(r"deepcache_sd_T(\d+)_iv(\d+)_c(\d+)_p([\d.]+)", name):
      steps, interval, center = map(int, match.groups()[:3])
      count = len(feature_cache.every(steps, interval))
      case.check(name, feature_cache.around(steps, count, center, float(match[4]))[0])
    elif match := re.fullmatch(r"deepcache_ddpm_T(\d+)_n(\d+)_c(\d+)_p([\d.]+?)(_final_pow)?", name):
      indices, power = feature_cache.around(*map(int, match.groups()[:3]), float(match[4]))
      case.check(name, np.array(power) if match[5] else indices)
    elif match := re.fullmatch(r"deepcache_quad_ldm_T(\d+)_n(\d+)_p([\d.]+)", name):
      case.check(name, feature_cache.early(int(match[1]), int(match[2]), float(match[3])))
    elif match := re.fullmatch(r"faster_diffusion_groups_(\w+)_n(\d+)", name):
      steps = int(match[2])
      case.check(name, feature_cache.groups(feature_cache.keys(match[1], steps), steps))
    elif match := re.fullmatch(r"faster_diffusion_(\w+)_n(\d+)", name):
      case.check(name, feature_cache.keys(match[1], int(match[2])))
    elif name.startswith("deepcache_skip_"):
      case.leave(name, "modules of diffusers' UNet, whose first convolution is a skip; ours has one skip a block")


RUNNERS = {r"feature_cache_schedules": schedules}
