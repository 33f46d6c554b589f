"""Rectified flow, reflow and its k-step distillation: straight lines from noise to image.

In the coordinates y = x_t / (alpha + sigma), tau = sigma / (alpha + sigma) every process is the flow
y = (1 - tau) x0 + tau eps, and its velocity is u* = eps - x0:

    L = d(u(x_t, t), u*),   u = ((alpha + sigma)^-1 x_t - x0_hat) / tau

On forward states noise and image are independent: the first rectified flow. On teacher pairs the image is
that to which the teacher carries the noise: reflow, whose flow is straighter. With `num_scales` equal to
`sampler_steps` only the sampler's own times are trained, which is distillation to k steps (InstaFlow: k = 1).
The loss needs the coupling (eps, x0), so it is defined on forward states and teacher pairs, not on rollout
states, where no image belongs to x_t.

Source: arXiv 2209.03003, 2309.06380; gnobitab/RectifiedFlow (golden vectors `rf_*`; its time runs the other
way, its loss is half the sum or the mean over pixels). Ours: processes other than the flow, and the mean.
"""

from ddil_jax import keys as keys_lib
from ddil_jax.diffusion import distance as distances
from ddil_jax.diffusion import solvers
from ddil_jax.diffusion.process import velocity_from_x0
from ddil_jax.errors import UsageError
from ddil_jax.objectives.base import Objective, Parts, Player, bind, draw_index, guided_teacher, stop, subset, unchanged
from ddil_jax.types import Array, Cond


def rf_loss(velocity, x_t: Array, t: Array, noise: Array, x0: Array, cond: Cond, distance) -> tuple[Array, Array]:
  """The loss per example [B] and the predicted velocity.

  Args:
    velocity: (x_t, t, cond) -> u, an estimate of noise - x0.
    noise, x0: the coupling that x_t interpolates.
  """
  u = velocity(stop(x_t), t, cond)
  return distance(u, stop(noise - x0)), u


def make(parts: Parts, num_scales: int = 32, sampler_steps: int = 4, distance: str = "l2") -> Objective:
  """Rectified flow on a grid of `num_scales` times.

  Args:
    num_scales: training times; equal to sampler_steps it is k-step distillation.
    sampler_steps: steps of the student's Euler sampler, a subset of the training times.
    distance: between velocities, a name of `diffusion.distance`.
  """
  if not 1 <= sampler_steps <= num_scales:
    raise UsageError(f"rf: sampler_steps {sampler_steps} must lie between 1 and num_scales {num_scales}")
  process, grid = parts.process, parts.make_grid(num_scales)
  distance_fn = distances.make(distance)

  def loss(params, view, states, batch, keys):
    del view, batch
    x_t, t, x0 = states.x_t, states.t, states.x0
    denoise = bind(parts.student, params, keys_lib.named(keys, "dropout"))
    # The velocity of the line through x_t and x0 is noise - x0.
    target = velocity_from_x0(process, x_t, x0, t)
    return rf_loss(lambda x, t, cond: velocity_from_x0(process, x, denoise(x, t, cond), t), x_t, t, x0 + target, x0,
                   states.cond, distance_fn)[0], {}

  return Objective(
      name="rf", grid=grid, sampler_grid=subset(grid, sampler_steps), solver=solvers.ddim(), student=parts.student,
      teacher=guided_teacher(parts, parts.guidance_scale),
      init=lambda key, params: {"student": parts.init_student(key, params)},
      players=(Player("student", loss),), draw=draw_index(grid), condition=unchanged, needs_x0=True,
      own_source="pairs")
