"""Moment matching on digits: ancestral sampling in 8 steps.

    python -m ddil_jax train --config=configs/digits_moment_matching.py:ddil --workdir=runs/moment_matching --config.teacher.path=runs/digits_teacher
"""

from ml_collections import ConfigDict

from configs import common
from configs.digits_teacher import digits

from ddil_jax.sweep import product


def get_config(arg: str | None = None) -> ConfigDict:
  config = common.generator(digits(common.common()), name="moment_matching", num_steps=8, weight="constant",
                            kind="posterior")
  return common.apply(config, arg, {"ddil": common.half_forward})


def sweep() -> list[dict]:
  """Base and DDIL, reflected and not, three seeds."""
  return product({"arg": common.VARIANTS, "seed": range(3)})
