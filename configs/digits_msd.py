r"""Multi-student distillation on digits: DMD2 with two students, one for 0 to 4 and one for 5 to 9.

    python -m ddil_jax train --config=configs/digits_msd.py:ddil --workdir=runs/msd \
        --config.teacher.path=runs/digits_teacher
"""

from configs import common
from configs.digits_teacher import digits
from ml_collections import ConfigDict

from ddil_jax.sweep import product


def get_config(arg: str | None = None) -> ConfigDict:
  config = common.generator(digits(common.common()), name="msd", students=2, partition=(), base="dmd2", vectorize=False,
                            num_steps=2, period=2, critic_weight="v_mse", weight_cap=20.0)
  return common.apply(config, arg, {"ddil": common.half_forward})


def sweep() -> list[dict]:
  """Base and DDIL, reflected and not, three seeds."""
  return product({"arg": common.VARIANTS, "seed": range(3)})
