"""Consistency trajectory models: a network that jumps from any time t to any time s along the teacher's path.

    G(x_t, t, s)  = DDIM step t -> s with x0 = g(x_t, t, s)            so G(x, t, t) = x
    x_u           = h solver steps of the teacher from x_t,  h in 1..H with p(h) ~ h
    L_ctm = d( G_ema(G(x_t, t, s), s, 0),  sg G_ema(G_sg(x_u, u, s), s, 0) ),   t > u >= s
    L_dsm = w(tau) mean_pixels (g(x_tau, tau, tau) - x0)^2,   w = 1/c_out^2
    L     = L_ctm + dsm_weight L_dsm

Both sides are compared at the clean end, where the frozen average of the student carries them; the gradient
passes through it into the inner jump. g is the student as denoiser, told s by cond["end_time"]; s = t is the
denoiser itself. The labels need the state only, so it runs on every source; the images of L_dsm are those
of the batch, never rollout states.

Source: arXiv 2310.02279; Kim-Dongjun/ctm-cifar10 (golden vectors `ctm_*`: the losses, gradients and the three
outer forms below). The original balances the two terms by the norms of their gradients at the last layer, a
quantity of the whole batch; here the weight is a number. Its GAN term, which the vectors do not run, is in
`adversarial`. Ours: processes other than EDM, which jump by DDIM and draw tau uniformly.
"""

import jax
import jax.numpy as jnp

from ddil_jax import keys as keys_lib
from ddil_jax.diffusion import distance as distances
from ddil_jax.diffusion import solvers, weighting
from ddil_jax.diffusion.process import Process, add_noise, expand
from ddil_jax.errors import UsageError
from ddil_jax.objectives.base import (Objective, Parts, Player, bind, draw_index, guided_teacher, stop, subset,
                                      unchanged)
from ddil_jax.objectives.denoising import denoising_loss
from ddil_jax.registry import unknown
from ddil_jax.states.base import cond_of
from ddil_jax.types import Array, Cond, Denoiser, DenoiseFn

OUTER = ("euler", "variance", "euler_variance_mixed")


def outer_coefficients(t: Array, s: Array, outer: str = "euler", sigma_data: float = 0.5,
                       sigma_min: float = 0.002) -> tuple[Array, Array]:
  """(c_skip, c_out) of G = c_skip x + c_out g between noise levels t and s [B].

  c_out is 1 - s/t. c_skip is s/t ("euler"), the ratio of the standard deviations of noisy data ("variance"), or
  their mean with weights t and 1 ("euler_variance_mixed").
  """
  euler = s / t
  variance = jnp.sqrt(((s - sigma_min) ** 2 + sigma_data**2) / ((t - sigma_min) ** 2 + sigma_data**2))
  mixed = (t * euler + variance) / (t + 1)
  return {"euler": euler, "variance": variance, "euler_variance_mixed": mixed}[outer], 1 - euler


def outer_form(denoiser: Denoiser, outer: str) -> Denoiser:
  """The x0 estimate with which a DDIM step to cond["end_time"] is the jump of another outer form.

  x0 = g + x (c_skip - s/t) / (1 - s/t), and its limit where the jump has no length: there it is the denoiser.
  """
  if outer == "euler":
    return denoiser

  def estimate(params, x_t, t, cond, keys=None, features=(), *reuse):
    end = cond.get("end_time", t)
    skip = lambda s: outer_coefficients(t, s, outer)[0]  # noqa: E731
    rest = 1 - end / t
    limit = 1 - t * jax.jvp(skip, (t,), (jnp.ones_like(t),))[1]
    surplus = jnp.where(rest > 0, (skip(end) - end / t) / jnp.where(rest > 0, rest, 1), limit)
    out = denoiser(params, x_t, t, cond, keys, features, *reuse)
    move = lambda x0: x0 + expand(surplus, x_t) * x_t  # noqa: E731
    return (move(out[0]), out[1]) if features else move(out)

  return estimate


def jump(process: Process, denoise: DenoiseFn, x_t: Array, t: Array, s: Array, cond: Cond) -> Array:
  """G(x_t, t, s): where the student's jump from t to s <= t leads; x_t itself for s = t."""
  x_s = solvers.ddim_step(process, x_t, denoise(x_t, t, {**cond, "end_time": s}), t, s)
  return jnp.where(expand(s >= t, x_t), x_t, x_s)


def ctm_loss(process: Process, student: DenoiseFn, inner_target: DenoiseFn, target: DenoiseFn, x_t: Array, x_u: Array,
             t: Array, u: Array, s: Array, end: Array, cond: Cond, distance,
             estimate_end: Array | None = None) -> tuple[Array, dict[str, Array]]:
  """The consistency loss per example [B] and its intermediates G, estimate, target.

  Args:
    student: g of the inner jump of the estimate, which has the gradient.
    inner_target: g of the inner jump of the target: the student under stop-gradient, or its average.
    target: g of the outer jumps, the average.
    estimate_end: where the estimate's inner jump ends, default s.
  """
  estimate_end = s if estimate_end is None else estimate_end
  go = lambda denoise, x, a, b: jump(process, denoise, x, a, b, cond)  # noqa: E731
  inner = go(student, stop(x_t), t, estimate_end)
  estimate = go(target, inner, estimate_end, end)
  goal = stop(go(target, go(inner_target, stop(x_u), u, s), s, end))
  return distance(estimate, goal), {"G": inner, "estimate": estimate, "target": goal}


def advance(policy: solvers.Policy, x: Array, grid: Array, k: Array, count: Array, most: int, cond: Cond) -> Array:
  """`count` [B] <= most steps of a deterministic policy from grid[k], per example, not beyond the grid's end."""
  def body(x, i):
    at = jnp.minimum(k + i, len(grid) - 2)
    moved, _ = policy.step(policy.init(x), x, grid[at], grid[at + 1], cond, jnp.zeros_like(x))
    return jnp.where(expand(i < count, x), moved, x), None
  return jax.lax.scan(body, x, jnp.arange(most))[0]


def weighted_count(keys: Array, most: int) -> Array:
  """int32 [B] in {1, ..., most} with probability proportional to itself."""
  cumulative = jnp.cumsum(step_probabilities(most))
  u = keys_lib.uniform(keys)
  return 1 + jnp.sum(u[:, None] >= cumulative[None, :-1], axis=1).astype(jnp.int32)


def step_probabilities(most: int) -> Array:
  """p(h) of h = 1 .. most, proportional to h."""
  h = jnp.arange(1, most + 1)
  return h / h.sum()


def half_lognormal(normal: Array, uniform: Array, sigma_min: float, sigma_max: float, mean: float = -1.2,
                   std: float = 1.2, rho: float = 7.0, share: float = 0.7) -> tuple[Array, Array]:
  """Two draws of noise levels for L_dsm: exp(mean + std n), and Karras' levels at the share u of their range."""
  top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
  return jnp.exp(mean + std * normal), (top + share * uniform * (bottom - top)) ** rho


def make(parts: Parts, num_scales: int = 18, sampler_steps: int = 4, max_teacher_steps: int = 4, solver: str = "heun",
         distance: str = "l2", dsm_weight: float = 1.0, dsm_cap: float = 1e3, target_decay: float = 0.999,
         outer: str = "euler") -> Objective:
  """CTM on a grid of `num_scales` times.

  Args:
    sampler_steps: jumps of the student's sampler.
    max_teacher_steps: H, the most teacher steps between t and u.
    dsm_weight, dsm_cap: of the denoising term, and the largest weight in it.
    outer: form of the jump, an entry of OUTER; on noise levels (edm) only, elsewhere "euler".
  """
  if num_scales < 3 or not 1 <= max_teacher_steps < num_scales or not 1 <= sampler_steps < num_scales:
    raise UsageError(f"ctm: max_teacher_steps {max_teacher_steps} and sampler_steps {sampler_steps} must lie between 1"
                     f" and num_scales - 1 = {num_scales - 1}")
  if outer not in OUTER:
    raise UsageError(unknown("outer form of ctm", outer, OUTER))
  process = parts.process
  edm = process.name == "edm"
  if outer != "euler" and not edm:
    raise UsageError(f"ctm: the outer form '{outer}' is one of noise levels (process edm), not of '{process.name}'")
  student = outer_form(parts.student, outer)
  grid = parts.make_grid(num_scales)[:-1] if edm else parts.make_grid(num_scales - 1)
  teacher, step = guided_teacher(parts, parts.guidance_scale), solvers.make(solver)
  distance_fn, weight_fn = distances.make(distance), weighting.make("edm", cap=dsm_cap)

  def dsm_time(keys, like):
    uniform = keys_lib.uniform(keys_lib.named(keys, "u"))
    if not edm:
      return (process.t_min + (process.t_max - process.t_min) * uniform).astype(like.dtype)
    normal = keys_lib.normal_like(keys_lib.named(keys, "n"), jnp.zeros_like(uniform))
    levels = half_lognormal(normal, uniform, process.t_min, process.t_max)
    level = jnp.where(keys_lib.uniform(keys_lib.named(keys, "half")) < 0.5, *levels)
    return jnp.clip(level, process.t_min, process.t_max).astype(like.dtype)

  def dsm(params, batch, keys):
    x0 = batch["image"]
    tau = dsm_time(keys, x0)
    x_tau = add_noise(process, x0, keys_lib.normal_like(keys_lib.named(keys, "eps"), x0), tau)
    return denoising_loss(process, student, params, x_tau, tau, x0, {**cond_of(batch), "end_time": tau},
                          weight_fn, keys_lib.named(keys, "dropout"))

  def loss(params, view, states, batch, keys):
    x_t, k, times = stop(states.x_t), states.k, jnp.asarray(grid, states.t.dtype)
    last = len(grid) - 1
    count = jnp.minimum(weighted_count(keys_lib.named(keys, "teacher_steps"), max_teacher_steps), last - k)
    x_u = advance(step(process, teacher(view.teacher)), x_t, times, k, count, max_teacher_steps, states.cond)
    to = keys_lib.randint(keys_lib.named(keys, "s"), k + count, last + 1)
    dropout = keys_lib.named(keys, "dropout")
    average = parts.reflect_target(bind(student, stop(view.ema["target"]), dropout))
    value, _ = ctm_loss(process, bind(student, params, dropout), bind(student, stop(params), dropout),
                        average, x_t, x_u, states.t, times[k + count], times[to], jnp.full_like(states.t, times[-1]),
                        states.cond, distance_fn)
    metrics = {"ctm": value}
    if dsm_weight:
      metrics["dsm"] = dsm(params, batch, keys_lib.named(keys, "dsm"))
      value = value + dsm_weight * metrics["dsm"]
    return value, metrics

  return Objective(
      name="ctm", grid=grid, sampler_grid=subset(grid, sampler_steps), solver=solvers.ddim(tell_end=True),
      student=student, teacher=teacher, init=lambda key, params: {"student": parts.init_student(key, params)},
      players=(Player("student", loss),), draw=draw_index(grid), condition=unchanged,
      targets={"target": target_decay}, reads=("end_time",))
