"""FastGen's LADD: the student's adversarial loss, and the head's with its penalty."""

import jax

from ddil_jax.objectives.base import stop
from tests.oracle.cases.fg_dmd2 import Setting


def ladd(case):
  setting = Setting(case)

  def total(params):
    x = setting.generate(params)
    x_t, t = setting.noised(x)
    return jax.nn.softplus(-setting.logits(case.net("disc"), x_t, t)).mean(), (x, x_t, t)

  setting.generate(case.net("student"), check=True)
  (loss, (x, x_t, t)), grads = jax.value_and_grad(total, has_aux=True)(case.net("student"))
  for name, value in {"gan_loss_gen": loss, "student_loss": case.hyper["gan_loss_weight_gen"] * loss, "gen_data": x,
                      "perturbed": x_t, "t": t}.items():
    case.check(name, value)
  scale = case.hyper["gan_loss_weight_gen"]
  case.check_grads("student_grad", {name: scale * value for name, value in grads.items()})
  setting.check_discriminator(stop(x))


RUNNERS = {r"fg_ladd_.*": ladd}
