"""LADD on digits: a GAN on features of the frozen teacher.

    python -m ddil_jax train --config=configs/digits_ladd.py:ddil --workdir=runs/ladd --config.teacher.path=runs/digits_teacher
"""

from ml_collections import ConfigDict

from configs import common
from configs.digits_teacher import digits

from ddil_jax.sweep import product


def get_config(arg: str | None = None) -> ConfigDict:
  config = common.generator(digits(common.common()), name="ladd", num_steps=4, r1_weight=100.0)
  # Heads that learn no faster than the student say nothing of its images after a few hundred steps.
  config.optimizer.update(learning_rate=1e-5, critic_learning_rate=4e-3)
  return common.apply(config, arg, {"ddil": common.half_forward})


def sweep() -> list[dict]:
  """Base and DDIL, reflected and not, three seeds."""
  return product({"arg": common.VARIANTS, "seed": range(3)})
