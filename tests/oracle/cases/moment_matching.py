"""Alternating moment matching, a third party's code: velocities, DDIM transitions, no weight."""

import jax
import jax.numpy as jnp

from ddil_jax.diffusion import prediction
from ddil_jax.diffusion import process as processes
from ddil_jax.diffusion.prediction import make_denoiser
from ddil_jax.diffusion.process import add_noise
from ddil_jax.objectives.base import bind, stop
from ddil_jax.objectives.moment_matching import aux_loss, student_loss, transition
from tests.oracle import toy
from tests.oracle.cases.sid import one_hot


def moment_matching(case):
  process, cond = processes.flow(), one_hot(case)
  denoiser = make_denoiser(toy.net, process, prediction.flow(), lambda t: t)
  s = case["s"]
  t = jnp.clip(s + case["dt_uniform"] / case.hyper["k"], 0, 1)
  z_t = add_noise(process, case["x"], case["z"], t)
  teacher = bind(denoiser, case.net("teacher"))

  def terms(student, aux):
    x = denoiser(student, z_t, t, cond)
    z_s = transition(process, "ddim", z_t, stop(x), t, s, jnp.zeros_like(x))
    d_aux, d_real = denoiser(aux, z_s, s, cond), teacher(z_s, s, cond)
    found = {"t": t, "z_t": z_t, "x_student": x, "z_s": z_s, "x_aux": d_aux, "x_teacher": d_real}
    return student_loss(x, d_aux, d_real).mean(), aux_loss(x, d_aux, d_real).mean(), found

  student, aux = case.net("student"), case.net("aux")
  (value, (_, found)), grads = jax.value_and_grad(
      lambda p: (lambda a, b, c: (a, (b, c)))(*terms(p, aux)), has_aux=True)(student)
  case.check("student_loss", value)
  case.check_grads("student_grad", grads)
  value, grads = jax.value_and_grad(lambda p: terms(student, p)[1])(aux)
  case.check("aux_loss", value)
  case.check_grads("aux_grad", grads)
  for name, array in found.items():
    case.check(name, array)


RUNNERS = {r"moment_matching_.*": moment_matching}
