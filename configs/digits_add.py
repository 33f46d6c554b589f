r"""ADD on digits: a GAN on features of a small classifier, and the teacher's estimate of the student's noised images.

    python -m ddil_jax train --config=configs/digits_add.py:ddil --workdir=runs/add \
        --config.teacher.path=runs/digits_teacher
"""

from configs import common
from configs.digits_teacher import digits
from ml_collections import ConfigDict

from ddil_jax.sweep import product


def get_config(arg: str | None = None) -> ConfigDict:
  config = common.generator(digits(common.common()), name="add", num_steps=4, feature_net="",
                            layers=("conv_0", "conv_1", "features"), distill_weight=40.0, r1_gamma=0.1)
  config.states.update(forward=1.0, student=0.0)
  # A student that its discriminator cannot follow collapses.
  config.optimizer.update(learning_rate=4e-5, critic_learning_rate=4e-3)
  return common.apply(config, arg, {"ddil": common.half_forward})


def sweep() -> list[dict]:
  """Base and DDIL, reflected and not, three seeds."""
  return product({"arg": common.VARIANTS, "seed": range(3)})
