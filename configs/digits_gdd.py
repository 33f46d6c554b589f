"""GDD on digits: a GAN alone, with the convolutions of the residual blocks frozen.

    python -m ddil_jax train --config=configs/digits_gdd.py:ddil --workdir=runs/gdd --config.teacher.path=runs/digits_teacher
"""

from ml_collections import ConfigDict

from configs import common
from configs.digits_teacher import digits

from ddil_jax.sweep import product


def get_config(arg: str | None = None) -> ConfigDict:
  config = common.generator(digits(common.common()), name="gdd", num_steps=1, kind="ns", r1_gamma=1.0)
  # A head that learns no faster than the student says nothing of its images after a few hundred steps.
  config.optimizer.update(learning_rate=4e-5, critic_learning_rate=4e-3)
  return common.apply(config, arg, {"ddil": common.half_forward})


def sweep() -> list[dict]:
  """Base and DDIL, reflected and not, three seeds."""
  return product({"arg": common.VARIANTS, "seed": range(3)})
