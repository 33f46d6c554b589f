"""SiD on digits: score identity with alpha 1, two steps, critic and student in turn.

    python -m ddil_jax train --config=configs/digits_sid.py:ddil --workdir=runs/sid --config.teacher.path=runs/digits_teacher
"""

from ml_collections import ConfigDict

from configs import common
from configs.digits_teacher import digits

from ddil_jax.sweep import product


def get_config(arg: str | None = None) -> ConfigDict:
  config = common.generator(digits(common.common()), name="sid", num_steps=2, alpha=1.0, critic_weight="v_mse",
                            weight_cap=20.0, through="last", times=(0.02, 0.98), critic_scale=1.0,
                            critic_training_scale=1.0, gan_weight=0.0)
  return common.apply(config, arg, {"ddil": common.half_forward})


def sweep() -> list[dict]:
  """Base and DDIL, reflected and not, three seeds."""
  return product({"arg": common.VARIANTS, "seed": range(3)})
