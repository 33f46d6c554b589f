"""Adapter guidance distillation: a frozen network with adapters gives in one call what guidance takes two for.

    D_g = u + g (c - u),  g ~ U[g_min, g_max]         c, u the teacher with and without class
    L   = f d(sqrt(w(t)) D_a(x_t, t, c, g), sqrt(w(t)) sg D_g)

D_a is the teacher's network with adapters in its blocks that read guidance scale, time and class; they alone learn,
and they alone are the student (`Objective.complete`): the base is the teacher's parameters, an argument of the step.
d is the mean square, or the mean absolute difference ("l1"). f is 1, or for "cos" how far guidance turns the noise,
|1 - cos(eps_c, eps_g)| / 2, or for "noise" sigma(t). With w = SNR the compared quantity is the noise, as in the
release. Adapters that are 0 make D_a = c, and L = f w (g - 1)^2 mean (c - u)^2.

The label needs the state only, so it runs on every source; the method's own are the guided teacher's rollouts, each
with the scale of its example.

Source: arXiv 2503.07274 and the authors' code (golden vectors `agd_*`: the adapter, four losses, gradients, learning
rate). Ours: states are walked with DDIM when they are needed (the release stores 1000 DDPM steps); w = 1 + SNR by
default, since at pure noise an error of the noise says nothing of x0; an adapter follows each residual block of
the UNet (in the release each attention of a DiT).
"""

import jax.numpy as jnp

from ddil_jax import keys as keys_lib
from ddil_jax.diffusion import distance as distances
from ddil_jax.diffusion import solvers, weighting
from ddil_jax.diffusion.process import Process, eps_from_x0, expand
from ddil_jax.errors import UsageError
from ddil_jax.objectives.base import (Objective, Parts, Player, bind, draw_guidance, draw_index, guided_teacher, stop,
                                      subset)
from ddil_jax.registry import unknown
from ddil_jax.types import Array


def turned(process: Process, x_t: Array, t: Array, conditional: Array, guided: Array) -> Array:
  """How far guidance turns the noise, `|1 - cos(eps_c, eps_g)| / 2` [B], from x0 estimates [B,H,W,C] at t [B]."""
  a, b = (eps_from_x0(process, x_t, x0, t).reshape(len(x_t), -1) for x0 in (conditional, guided))
  return 0.5 * jnp.abs(1 - (a * b).sum(1) / jnp.sqrt((a**2).sum(1) * (b**2).sum(1)))


# The distance of a loss, and its factor f of (process, x_t, t, conditional, guided); None is 1.
LOSSES = {"l2": (distances.l2(), None), "l1": (distances.l1(), None), "cos": (distances.l2(), turned),
          "noise": (distances.l2(), lambda process, x_t, t, conditional, guided: process.sigma(t))}


def agd_loss(process: Process, x_t: Array, t: Array, own: Array, conditional: Array, guided: Array, kind: str = "l2",
             weight_fn: weighting.Weighting = weighting.make("snr")) -> tuple[Array, dict[str, Array]]:
  """The loss per example [B], and the factor f as "weight".

  Args:
    x_t, t: states [B,H,W,C] at [B].
    own, conditional, guided: x0 estimates of the adapted network and of the teacher [B,H,W,C].
    kind: an entry of LOSSES.
    weight_fn: (process, t) -> w [B].
  """
  distance, factor = LOSSES[kind]
  size = expand(jnp.sqrt(weight_fn(process, t)), x_t)
  f = jnp.ones_like(t) if factor is None else factor(process, x_t, t, conditional, guided)
  return stop(f) * distance(size * own, stop(size * guided)), {"weight": f}


def make(parts: Parts, hidden: int = 16, num_scales: int = 32, sampler_steps: int = 8,
         guidance_range: tuple[float, ...] = (1.0, 6.0), loss: str = "l2", weight: str = "v_mse",
         weight_cap: float = 1e6) -> Objective:
  """Adapters on the frozen teacher, on a grid of `num_scales` times.

  Args:
    hidden: width of the adapters.
    sampler_steps: DDIM steps of the student's sampler, a subset of the training times.
    guidance_range: (g_min, g_max), drawn per example and given to the adapters.
    loss: l2 | l1 | cos | noise.
    weight, weight_cap: a name of `diffusion.weighting` and the largest weight.

  Raises:
    UsageError: no classes, a network without adapters, an unknown loss, numbers out of range.
  """
  if parts.adapt is None:
    raise UsageError("agd: a network of config.model.file has no adapters; use the project's UNet")
  if not parts.num_classes:
    raise UsageError("agd: the data has no classes, so there is no guidance to distil")
  if loss not in LOSSES:
    raise UsageError(unknown("loss of objective agd:", loss, LOSSES))
  if hidden < 1:
    raise UsageError(f"agd: hidden {hidden} must be at least 1")
  if not 1 <= sampler_steps <= num_scales:
    raise UsageError(f"agd: sampler_steps {sampler_steps} must lie between 1 and num_scales {num_scales}")
  if not guidance_range:
    raise UsageError("agd: guidance_range must be (g_min, g_max): the adapters learn every scale between them")
  process, grid, adapted = parts.process, parts.make_grid(num_scales), parts.adapt(hidden)
  teacher, weight_fn = guided_teacher(parts, None), weighting.make(weight, cap=weight_cap)

  def complete(own, base):
    return {"base": base, "adapter": own}

  def player(params, view, states, batch, keys):
    del batch
    x_t, t, cond = stop(states.x_t), states.t, states.cond
    base = stop(view.teacher)
    own = bind(adapted.denoiser, complete(params, base), keys_lib.named(keys, "dropout"))(x_t, t, cond)
    # The compiler computes it once: it is a part of the guided estimate.
    conditional = bind(parts.teacher, base)(x_t, t, {"label": cond["label"]})
    return agd_loss(process, x_t, t, own, conditional, teacher(base)(x_t, t, cond), loss, weight_fn)[0], {}

  return Objective(
      name="agd", grid=grid, sampler_grid=subset(grid, sampler_steps), solver=solvers.ddim(), student=adapted.denoiser,
      teacher=teacher, init=lambda key, base: {"student": adapted.init(key, base)},
      players=(Player("student", player, trainable=adapted.learns),), draw=draw_index(grid),
      condition=draw_guidance("agd", guidance_range), own_source="teacher", complete=complete)
