r"""Regression on digits: one step gives the image at the end of the teacher's walk of 8 steps.

    python -m ddil_jax train --config=configs/digits_regression.py:ddil --workdir=runs/regression \
        --config.teacher.path=runs/digits_teacher
"""

from configs import common
from configs.digits_teacher import digits
from ml_collections import ConfigDict

from ddil_jax.sweep import product


def get_config(arg: str | None = None) -> ConfigDict:
  config = common.trajectory(digits(common.common()), name="regression", num_steps=4, label_steps=8)
  return common.apply(config, arg)


def sweep() -> list[dict]:
  """Base, DDIL, reflected and both, three seeds."""
  return product({"arg": common.VARIANTS, "seed": range(3)})
