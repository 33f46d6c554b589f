"""Denoising: the teacher's own training, and the base loss of everything.

    L = w(t) mean_pixels (D(x_t, t) - x0)^2,   x_t = alpha x0 + sigma eps

With w = snr it is the eps-MSE, with v_mse the v-MSE, with edm EDM's weight. It needs clean data,
so it is defined on forward states only.

Source: arXiv 2006.11239; 2202.00512 (weights); 2206.00364 (EDM).
"""

import jax.numpy as jnp

from ddil_jax import keys as keys_lib
from ddil_jax.diffusion import distance as distances
from ddil_jax.diffusion import solvers, weighting
from ddil_jax.diffusion import times as times_lib
from ddil_jax.errors import UsageError
from ddil_jax.objectives.base import Objective, Parts, Player, drop_condition
from ddil_jax.types import Array, Cond, Denoiser, Params

TIME_DISTRIBUTIONS = ("uniform", "lognormal", "logit_normal", "shifted")


def denoising_loss(process, denoiser: Denoiser, params: Params, x_t: Array, t: Array, x0: Array, cond: Cond,
                   weight, keys: Array | None = None) -> Array:
  """Weighted x0-MSE per example [B]; weight is (process, t) -> [B]."""
  return weight(process, t) * distances.l2()(denoiser(params, x_t, t, cond, keys), x0)


def make(parts: Parts, weight: str = "v_mse", label_dropout: float = 0.1, sampler_steps: int = 32,
         solver: str = "ddim", times: str = "uniform", mean: float = -1.2, std: float = 1.2,
         shift: float = 3.0) -> Objective:
  """Denoising in continuous time.

  Args:
    weight: a name of `diffusion.weighting`.
    label_dropout: share of labels, and prompts, replaced by none, so that the model can be guided.
    sampler_steps, solver: how samples are drawn for evaluation.
    times: an entry of TIME_DISTRIBUTIONS, see `diffusion.times`: "lognormal" are noise levels (EDM), "logit_normal"
      and "shifted" times of processes that end at 1.
    mean, std: of the two normal ones; the defaults are EDM's noise levels. shift: of "shifted".

  Raises:
    UsageError: times that do not exist, or not of this process.
  """
  process = parts.process
  weight_fn = weighting.make(weight)
  if times not in TIME_DISTRIBUTIONS:
    raise UsageError(f"denoising: unknown times '{times}'; there are: {', '.join(TIME_DISTRIBUTIONS)}")
  if times == "lognormal" and process.name != "edm":
    raise UsageError(f"denoising: times 'lognormal' are noise levels of the edm process, not of '{process.name}'")
  if times in ("logit_normal", "shifted") and process.t_max != 1:
    raise UsageError(f"denoising: times '{times}' lie between 0 and 1, those of process '{process.name}' go to"
                     f" {process.t_max:g}")
  if not std > 0 or not shift > 0:
    raise UsageError(f"denoising: std {std} and shift {shift} must be positive")
  bounds = process.t_min, process.t_max
  normal = lambda keys: keys_lib.normal_like(keys, jnp.zeros(keys.shape))  # noqa: E731
  time = {"uniform": lambda keys: keys_lib.uniform(keys, *bounds),
          "lognormal": lambda keys: times_lib.lognormal(keys_lib.uniform(keys), *bounds, mean, std),
          "logit_normal": lambda keys: times_lib.logit_normal(normal(keys), *bounds, mean, std),
          "shifted": lambda keys: times_lib.shifted(keys_lib.uniform(keys), *bounds, shift)}[times]

  def draw(keys):
    return jnp.zeros(keys.shape, jnp.int32), time(keys_lib.named(keys, "t"))

  def condition(keys, cond):
    return drop_condition(parts, keys, label_dropout)(cond) if cond and label_dropout else cond

  def loss(params, view, states, batch, keys):
    del view, batch
    dropout = keys_lib.named(keys, "dropout")
    return denoising_loss(process, parts.student, params, states.x_t, states.t, states.x0, states.cond,
                          weight_fn, dropout), {}

  grid = parts.make_grid(sampler_steps)
  return Objective(
      name="denoising", grid=grid, sampler_grid=grid, solver=solvers.make(solver), student=parts.student,
      teacher=None, init=lambda key, teacher: {"student": parts.init_student(key, teacher)},
      players=(Player("student", loss),), draw=draw, condition=condition, needs_x0=True)
