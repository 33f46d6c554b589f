"""How a run's network is sampled: its step counts, grids and guidance scales, the teacher's turns, diffusers' terms."""

import functools
import itertools
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ddil_jax import keys as keys_lib
from ddil_jax.diffusion import feature_cache, grids, solvers, transforms
from ddil_jax.diffusion.rollout import prior, rollout
from ddil_jax.diffusion.solvers import Policy
from ddil_jax.errors import UsageError
from ddil_jax.interop import release
from ddil_jax.objectives.base import bind, completed, guided_teacher, subset
from ddil_jax.types import Array, Cond, Params

if TYPE_CHECKING:
  from ddil_jax.build import Built  # which checks the samplers of what it builds


class Sampler(NamedTuple):
  """One way to draw images from a trained network.

  Attributes:
    steps, guidance_scale: as reported; the scale is None where cond["guidance_scale"] says it at each call.
    network_evaluations: per image; of a step with cached features the share of the network's operations that is left.
    grid: [steps+1] times.
    policy: params -> Policy.
    condition: cond -> cond of the sampler (a guidance scale for students that read it).
    sample: (params, keys [B], cond) -> images [B,H,W,C]; all noise comes from the keys.
    with_teacher: the teacher takes some of the steps: the params of `sample` are (student's, teacher's).
  """
  steps: int
  guidance_scale: float | None
  network_evaluations: float
  grid: np.ndarray
  policy: Callable[[Params], Policy]
  condition: Callable[[Cond], Cond]
  sample: Callable[[Params, Array, Cond], Array]
  with_teacher: bool = False


def samplers(config: ConfigDict, built: "Built", steps: int | None = None) -> list[Sampler]:
  """The samplers with which a run is evaluated; with `steps`, only that step count.

  Raises:
    UsageError: more steps or other times than the student was trained for, a grid that does not decrease, guidance
      scales that it cannot take, features that its network does not have.
  """
  counts = [steps] if steps is not None else [len(built.objective.sampler_grid) - 1, *config.eval.sampler_steps]
  scales = config.eval.guidance_scales or (config.teacher.guidance_scale,)
  reads_scale = reads_guidance(config)
  folded = config.teacher.folded_guidance_scale
  own = folded or config.teacher.guidance_scale
  if not reads_scale and built.objective.name != "denoising" and any(g != own for g in config.eval.guidance_scales):
    raise UsageError(f"config.eval.guidance_scales={tuple(scales)}: this student has the scale {own:g} folded in and"
                     " reads no other; set it to ()")
  own = config.eval.sampler_times
  walks = [_own_grid(built, own)] if own and steps is None else [_sampler_grid(built, n) for n in dict.fromkeys(counts)]
  shift, cache = time_shift(config, built), feature_cache_of(config, built)
  found = [_sampler(built, shift, cache, grid, float(g), reads_scale, folded) for grid in walks for g in scales]
  return [_with_teacher(built, sampler, config) for sampler in found] if config.eval.teacher_acts else found


def reads_guidance(config: ConfigDict) -> bool:
  """Whether a run's student is given the guidance scale with each call."""
  return bool(getattr(config.objective, "guidance_range", ()))


def of_student(config: ConfigDict, built: "Built", steps: int, guidance_scale: float | None) -> Sampler:
  """The run's network alone in a number of steps; with None, cond["guidance_scale"] [B] says the scale at each call.

  Raises:
    UsageError: more steps than the student was trained for.
  """
  return _sampler(built, time_shift(config, built), feature_cache_of(config, built), _sampler_grid(built, steps),
                  guidance_scale, reads_guidance(config), config.teacher.folded_guidance_scale)


def of_teacher(config: ConfigDict, built: "Built", steps: int, guidance_scale: float | None) -> Sampler:
  """The DDIM of the teacher of a student's run, as `of_student`; its `sample` takes the teacher's parameters."""
  def policy(params):
    return solvers.ddim()(built.parts.process, guided_teacher(built.parts, guidance_scale)(params))

  def sample(params, keys, cond):
    x_T = prior(built.parts.process, keys, jnp.zeros(keys.shape + built.parts.image_shape))
    return rollout(policy(params), x_T, grid, cond, keys)

  grid = built.parts.make_grid(steps)
  calls = steps * (1 if guidance_scale == 1 else 2)
  return Sampler(steps, config.teacher.folded_guidance_scale or guidance_scale, calls, grid, policy, lambda cond: cond,
                 sample)


def _with_teacher(built: "Built", sampler: Sampler, config: ConfigDict) -> Sampler:
  """The sampler with the steps `eval.teacher_acts` taken by the teacher's DDIM, guided and reflected as in training."""
  acts, steps = config.eval.teacher_acts, sampler.steps
  if built.objective.teacher is None:
    raise UsageError(f"config.eval.teacher_acts={acts}: objective '{built.objective.name}' has no teacher; set it to"
                     " ()")
  if not all(i in range(steps) for i in acts):
    raise UsageError(f"config.eval.teacher_acts={acts}: the steps of a sampler of {steps} are 0 to {steps - 1}")
  turns = [i in acts for i in range(steps)]

  def sample(params, keys, cond):
    student, teacher = params
    x = prior(built.parts.process, keys, jnp.zeros(keys.shape + built.parts.image_shape))
    start = 0
    for acting, turn in itertools.groupby(turns):
      stop = start + len(list(turn))
      policy = teacher_policy(built, teacher) if acting else sampler.policy(student)
      x = rollout(policy, x, sampler.grid[start:stop + 1], sampler.condition(cond), keys_lib.numbered(keys, start))
      start = stop
    return x

  guided = config.teacher.guidance_scale != 1
  return sampler._replace(sample=sample, with_teacher=True,
                          network_evaluations=sampler.network_evaluations + len(set(acts)) * guided)


def _own_grid(built: "Built", times: tuple[float, ...]) -> np.ndarray:
  """A grid that the user gave; a student takes only times at which it was trained."""
  try:
    grid = grids.check_grid(times)
  except UsageError as error:
    raise UsageError(f"config.eval.sampler_times={times}: {error}") from None
  if built.objective.name != "denoising":
    trained = built.objective.grid
    for t in grid[:-1]:
      if not np.isclose(trained[:-1], t, rtol=1e-6, atol=1e-9).any():
        raise UsageError(f"config.eval.sampler_times={times}: this student was not trained at {t:g}, but at "
                         + ", ".join(f"{v:g}" for v in trained[:-1]))
  return grid


def time_shift(config: ConfigDict, built: "Built") -> transforms.Transform:
  """`eval.time_shift` with the variance of the data. Raises UsageError for a negative one."""
  # Configs of older runs have no such fields.
  window, cutoff = config.eval.get("time_shift", 0.0), config.eval.get("time_shift_cutoff", 0.0)
  images = built.dataset.images
  variance = float(images.reshape(len(images), -1).var(axis=1).mean()) if window else 0.0
  try:
    return transforms.shift_time(built.parts.process, window, cutoff, variance)
  except UsageError as error:
    raise UsageError(f"config.eval.time_shift: {error}") from None


class FeatureCache(NamedTuple):
  """Cached features of a sampler: see `feature_cache.cached_policy`.

  Attributes:
    feature: which.
    full: steps -> indices of the full steps.
    batched: one call for the decoder of the steps that share features.
    share: of the network's operations, what a step with the feature taken costs.
  """
  feature: str
  full: Callable[[int], np.ndarray]
  batched: bool
  share: float


def feature_cache_of(config: ConfigDict, built: "Built") -> FeatureCache | None:
  """`eval.cache`, `eval.cache_steps` and `eval.cache_batched`; None where no features are cached.

  Raises:
    UsageError: features that the student's network does not have, an unknown schedule, and what does not go together.
  """
  # Configs of older runs have no such fields.
  feature, text, batched = (config.eval.get(name, default) for name, default in (
      ("cache", ""), ("cache_steps", "every:2"), ("cache_batched", False)))
  if not feature:
    return None
  if not re.fullmatch(r"skips|deep\d+", feature):
    raise UsageError(f"config.eval.cache={feature}: 'skips' or 'deep0', 'deep1', ... is expected, or '' for none")
  if config.eval.teacher_acts:
    raise UsageError(f"config.eval.cache={feature}: features are those of one network; set config.eval.teacher_acts to"
                     " ()")
  if batched and feature != "skips":
    raise UsageError(f"config.eval.cache_batched: with '{feature}' a step reads its own state, so there is nothing to"
                     " compute ahead; it goes with config.eval.cache=skips")
  if batched and config.eval.get("time_shift", 0.0):
    raise UsageError("config.eval.cache_batched: shifted times are not known ahead; set config.eval.time_shift to 0")

  def full(steps):
    try:
      return feature_cache.schedule(text, steps)
    except UsageError as error:
      raise UsageError(f"config.eval.cache_steps={text}: {error}") from None

  return FeatureCache(feature, full, batched, _share(built, feature))


def _share(built: "Built", feature: str) -> float:
  """Operations of a call that takes a feature, over those of one that computes everything."""
  objective, parts = built.objective, built.parts
  entries = parts.cond | {name: jax.ShapeDtypeStruct((1,), jnp.float32) for name in objective.reads}
  x, t = jax.ShapeDtypeStruct((1, *parts.image_shape), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)

  def student(key):
    teacher = built.init_teacher(key) if built.init_teacher else ()
    return completed(objective, objective.init(key, teacher)["student"], teacher)

  def call(features, params, x, t, cond, *reuse):
    return objective.student(params, x, t, cond, None, features, *reuse)

  params = jax.eval_shape(student, jax.random.key(0))
  try:
    taken = jax.eval_shape(functools.partial(call, (feature,)), params, x, t, entries)[1]
    counts = [jax.jit(functools.partial(call, ())).lower(params, x, t, entries, *reuse).cost_analysis()["flops"]
              for reuse in ((taken,), ())]
  except UsageError as error:
    raise UsageError(f"config.eval.cache={feature}: {error}") from None
  return counts[0] / counts[1]


def _sampler(built: "Built", shift: transforms.Transform, cache: FeatureCache | None, grid: np.ndarray,
             guidance_scale: float | None, reads_scale: bool, folded: float) -> Sampler:
  objective, parts, steps = built.objective, built.parts, len(grid) - 1
  is_teacher = objective.name == "denoising"
  full = cache.full(steps) if cache else np.arange(steps)

  def of(denoise):
    guide = parts.guidance(guidance_scale) if is_teacher else lambda denoise: denoise
    return objective.solver(parts.process, parts.reflect_sampler(shift(guide(denoise))))

  def policy(params):
    if len(full) == steps:  # nothing is reused: the sampler itself
      return of(bind(objective.student, params))
    read = {"guidance_scale": jax.ShapeDtypeStruct((1,), jnp.float32)} if guidance_scale is None else {}
    cond = condition(parts.cond | read)
    return feature_cache.cached_policy(of, objective.student, params, (cache.feature,), full, grid, cond, cache.batched)

  def condition(cond):
    if not reads_scale or guidance_scale is None:
      return cond
    return {**cond, "guidance_scale": jnp.zeros(cond["label"].shape, jnp.float32) + guidance_scale}

  def sample(params, keys, cond):
    x_T = prior(parts.process, keys, jnp.zeros(keys.shape + parts.image_shape))
    return rollout(policy(params), x_T, grid, condition(cond), keys)

  work = len(full) + (steps - len(full)) * (cache.share if cache else 1)
  calls = work * (2 if is_teacher and guidance_scale != 1 else 1)
  return Sampler(steps, folded or guidance_scale, calls, grid, policy, condition, sample)


def _sampler_grid(built: "Built", steps: int) -> np.ndarray:
  objective = built.objective
  if steps < 1 or steps != int(steps):
    raise UsageError(f"{steps} sampling steps; at least 1, and a whole number, is needed")
  if objective.name == "denoising":
    return built.parts.make_grid(steps)
  trained = len(objective.grid) - 1
  if steps > trained:
    raise UsageError(f"this student was trained at {trained} times and cannot take {steps} steps")
  return np.concatenate([subset(objective.grid, steps)[:-1], objective.sampler_grid[-1:]])


def teacher_policy(built: "Built", teacher: Params) -> Policy:
  """The teacher's own DDIM walk, guided and reflected as configured."""
  return solvers.ddim()(built.parts.process, built.objective.teacher(teacher))


# How the students of a method are sampled, in diffusers' terms.
_RELEASED = {"denoising": "ddim", "pd": "ddim", "lcm": "lcm", "dmd2": "lcm"}


def sampling_of(config: ConfigDict, built: "Built") -> release.Sampling:
  """What diffusers has to know of how a run's student is sampled.

  Raises:
    UsageError: a run whose student no scheduler of diffusers samples.
  """
  name, method = config.process.name, config.objective.name
  if name not in release.TABLES or method not in _RELEASED:
    raise UsageError(f"no scheduler of diffusers samples a student of '{method}' on process '{name}'; known are"
                     f" {', '.join(_RELEASED)} on {' and '.join(release.TABLES)}")
  times = [round(float(t)) for t in built.objective.sampler_grid[:-1]]
  kind = _RELEASED[method]
  own = grids.ddim_timesteps if kind == "ddim" else grids.lcm_timesteps
  return release.Sampling(
      kind, len(times), config.prediction.name, () if own(len(times)).tolist() == times else tuple(times),
      config.teacher.folded_guidance_scale or config.teacher.guidance_scale,
      bool(config.process.get("zero_terminal_snr", False)), name, config.objective.get("timestep_scaling", 10.0),
      config.reflect.kind != "identity" and config.reflect.sampler, method == "denoising")
