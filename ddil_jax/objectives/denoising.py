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
from ddil_jax.errors import UsageError
from ddil_jax.objectives.base import Objective, Parts, Player
from ddil_jax.types import Array, Cond, Denoiser, Params

TIME_DISTRIBUTIONS = ("uniform", "lognormal")


def denoising_loss(process, denoiser: Denoiser, params: Params, x_t: Array, t: Array, x0: Array, cond: Cond,
                   weight, keys: Array | None = None) -> Array:
  """Weighted x0-MSE per example [B]; weight is (process, t) -> [B]."""
  return weight(process, t) * distances.l2()(denoiser(params, x_t, t, cond, keys), x0)


def make(parts: Parts, weight: str = "v_mse", label_dropout: float = 0.1, sampler_steps: int = 32,
         solver: str = "ddim", times: str = "uniform", mean: float = -1.2, std: float = 1.2) -> Objective:
  """Denoising in continuous time.

  Args:
    weight: a name of `diffusion.weighting`.
    label_dropout: share of labels replaced by the null label, so that the model can be guided.
    sampler_steps, solver: how samples are drawn for evaluation.
    times: "uniform" over the process' range, or "lognormal" noise levels exp(mean + std n) (EDM).
  """
  process = parts.process
  weight_fn = weighting.make(weight)
  if times not in TIME_DISTRIBUTIONS:
    raise UsageError(f"denoising: unknown times '{times}'; there are: {', '.join(TIME_DISTRIBUTIONS)}")
  if times == "lognormal" and process.name != "edm":
    raise UsageError(f"denoising: times 'lognormal' are noise levels of the edm process, not of '{process.name}'")

  def draw(keys):
    if times == "lognormal":
      level = jnp.exp(mean + std * keys_lib.normal_like(keys_lib.named(keys, "t"), jnp.zeros(keys.shape)))
      t = jnp.clip(level, process.t_min, process.t_max)
    else:
      t = keys_lib.uniform(keys_lib.named(keys, "t"), process.t_min, process.t_max)
    return jnp.zeros(keys.shape, jnp.int32), t

  def condition(keys, cond):
    if "label" not in cond or not label_dropout:
      return cond
    dropped = keys_lib.uniform(keys_lib.named(keys, "label_dropout")) < label_dropout
    return {**cond, "label": jnp.where(dropped, parts.num_classes, cond["label"])}

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
