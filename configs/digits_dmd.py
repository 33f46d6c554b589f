"""DMD on digits: distribution matching, and regression on teacher pairs, which are half of the states.

    python -m ddil_jax train --config=configs/digits_dmd.py:ddil --workdir=runs/dmd --config.teacher.path=runs/digits_teacher
"""

from ml_collections import ConfigDict

from configs import common
from configs.digits_teacher import digits

from ddil_jax.sweep import product


def ddil(config: ConfigDict) -> ConfigDict:
  """A quarter forward data, a quarter states of the student, half pairs."""
  config.states.update(forward=0.25, student=0.25, teacher=0.0, pairs=0.5)
  return config


def get_config(arg: str | None = None) -> ConfigDict:
  config = common.generator(digits(common.common()), name="dmd", num_steps=1, regression=0.5, distance="l2",
                            critic_weight="v_mse", weight_cap=20.0)
  config.states.update(student=0.5, pairs=0.5)
  return common.apply(config, arg, {"ddil": ddil})


def sweep() -> list[dict]:
  """Base and DDIL, reflected and not, three seeds."""
  return product({"arg": common.VARIANTS, "seed": range(3)})
