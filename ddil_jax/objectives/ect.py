"""ECT-style consistency: the pair of times comes closer in stages, its step given by a continuous rule.

    r   = max(t - t (1 - ratio) (1 + 8 sigmoid(-t)), r_min),   ratio = min(1 - 1/q^(stage + 1), limit), stage 0, 1, ...
    x_r = DDIM step t -> r with the clean image (training) or the teacher's x0 (distillation)
    L   = w(t, r) d(D(x_t, t), sg D(x_r, r)),   d = sqrt(|.|_2^2 + c^2) - c over all pixels of an image

D is the student as denoiser: at the clean end it is the identity without further scalings. With the clean
image it is defined on forward states and teacher pairs, and as no estimate of the teacher is used its guidance
scale must be 1; with `from_data=False` it is defined on every source. At ratio 0 r is the clean end and L
regresses on the image itself.

Source: arXiv 2406.14548; NVlabs/FastGen (golden vectors `fg_cm_*`; parts of `fg_parts`). Ours: the rule is in
the process' own time, in units of its range where that is not a noise level or a flow time; the stages.
"""

import math

import jax
import jax.numpy as jnp

from ddil_jax import keys as keys_lib
from ddil_jax.diffusion import solvers
from ddil_jax.diffusion.prediction import edm_scalings
from ddil_jax.diffusion.process import Process
from ddil_jax.errors import UsageError
from ddil_jax.objectives.base import Objective, Parts, Player, bind, draw_index, guided_teacher, stop, subset, unchanged
from ddil_jax.registry import unknown
from ddil_jax.types import Array, Cond, DenoiseFn

PAIR_WEIGHTS = {
    "default": lambda level, t, r: 1 / (t - r),
    "c_out": lambda level, t, r: 1 / edm_scalings(level)[1],
    "c_out_sq": lambda level, t, r: 1 / edm_scalings(level)[1] ** 2,
    "sqrt": lambda level, t, r: 1 / jnp.sqrt(t - r),
    "sigma_sq": lambda level, t, r: 1 / t**2,
}


def nearer_time(t: Array, ratio: Array | float, least: float) -> Array:
  """r [B] of t [B]: `max(t - t (1 - ratio) (1 + 8 sigmoid(-t)), least)`."""
  return jnp.maximum(t - t * (1 - ratio) * (1 + 8 * jax.nn.sigmoid(-t)), least)


def stage_ratio(stage: Array, q: float = 2.0, limit: float = 0.999) -> Array:
  """r/t far from the data at a stage 0, 1, ...: `min(1 - 1/q^(stage + 1), limit)`."""
  return jnp.minimum(1 - 1 / q ** (stage + 1.0), limit)


def norm_distance(a: Array, b: Array, c: float = 0.0, squared: bool = False) -> Array:
  """L2 norm over all pixels [B], pseudo-Huber `sqrt(n^2 + c^2) - c` with c > 0, or its square."""
  square = jnp.sum((a - b) ** 2, axis=tuple(range(1, a.ndim)))
  if squared:
    return square
  if c:
    return jnp.sqrt(square + c**2) - c
  # The norm has no gradient at 0.
  safe = jnp.where(square > 0, square, 1)
  return jnp.where(square > 0, jnp.sqrt(safe), 0)


def ect_loss(process: Process, student: DenoiseFn, target: DenoiseFn, x0_of: DenoiseFn, x_t: Array, t: Array, r: Array,
             cond: Cond, weight, c: float, squared: bool = False) -> tuple[Array, dict[str, Array]]:
  """The loss per example [B] and its intermediates x_r, prediction, target, unweighted.

  Args:
    x0_of: the clean image, or the teacher.
    weight: an entry of PAIR_WEIGHTS, (noise level, t, r) -> [B].
  """
  x_t = stop(x_t)
  x_r = stop(solvers.ddim_step(process, x_t, x0_of(x_t, t, cond), t, r))
  prediction, goal = student(x_t, t, cond), stop(target(x_r, r, cond))
  distance = norm_distance(prediction, goal, c, squared)
  scale = weight(process.sigma(t) / process.alpha(t), t, r)
  return scale * distance, {"x_r": x_r, "prediction": prediction, "target": goal, "unweighted": distance}


def make(parts: Parts, num_scales: int = 32, sampler_steps: int = 2, from_data: bool = True, stage_steps: int = 100,
         q: float = 2.0, ratio_limit: float = 0.999, huber_c: float = 1e-4, weight: str = "default") -> Objective:
  """ECT on a grid of `num_scales` times, from which t is drawn.

  Args:
    sampler_steps: steps of the student's re-noising sampler.
    from_data: the clean image leads from t to r; else the teacher.
    stage_steps: training steps of a stage.
    q, ratio_limit: of `stage_ratio`.
    huber_c: constant of the distance.
    weight: a name of PAIR_WEIGHTS.
  """
  if weight not in PAIR_WEIGHTS:
    raise UsageError(unknown("weight of ect", weight, PAIR_WEIGHTS))
  if stage_steps < 1 or q <= 1 or not 0 < ratio_limit < 1:
    raise UsageError(f"ect: stage_steps {stage_steps} must be at least 1, q {q} above 1, ratio_limit {ratio_limit} in"
                     " (0, 1)")
  if from_data and parts.guidance_scale != 1:
    raise UsageError(f"ect: from data no estimate of the teacher is used, so guidance scale {parts.guidance_scale:g}"
                     " has no meaning; set it to 1, or from_data to False")
  process, grid = parts.process, parts.make_grid(num_scales)
  teacher = guided_teacher(parts, parts.guidance_scale)
  unit = process.t_max if process.t_max > 1 and process.name != "edm" else 1.0

  def loss(params, view, states, batch, keys):
    del batch
    dropout = keys_lib.named(keys, "dropout")
    ratio = stage_ratio(view.step // stage_steps, q, ratio_limit).astype(states.t.dtype)
    t = states.t / unit
    r = jnp.minimum(nearer_time(t, ratio, process.t_min / unit), t - 1e-6 * jnp.maximum(t, 1))
    x0_of = (lambda x_t, t, cond: states.x0) if from_data else teacher(view.teacher)
    target = parts.reflect_target(bind(parts.student, stop(params), dropout))
    value, found = ect_loss(process, bind(parts.student, params, dropout), target, x0_of, states.x_t, states.t,
                            r * unit, states.cond, lambda level, *_: PAIR_WEIGHTS[weight](level, t, r), huber_c)
    # Per pixel, so that the learning rate does not depend on the size of the images.
    return value / math.prod(parts.image_shape), {"unweighted": found["unweighted"]}

  return Objective(
      name="ect", grid=grid, sampler_grid=subset(grid, sampler_steps), solver=solvers.renoise(), student=parts.student,
      teacher=teacher, init=lambda key, params: {"student": parts.init_student(key, params)},
      players=(Player("student", loss),), draw=draw_index(grid), condition=unchanged, needs_x0=from_data)
