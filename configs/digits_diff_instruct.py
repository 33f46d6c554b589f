"""Diff-Instruct on digits: the integral KL divergence, one step.

    python -m ddil_jax train --config=configs/digits_diff_instruct.py:ddil --workdir=runs/diff_instruct --config.teacher.path=runs/digits_teacher
"""

from ml_collections import ConfigDict

from configs import common
from configs.digits_teacher import digits

from ddil_jax.sweep import product


def get_config(arg: str | None = None) -> ConfigDict:
  config = common.generator(digits(common.common()), name="diff_instruct", num_steps=1, weight="constant",
                            critic_weight="v_mse", weight_cap=20.0)
  return common.apply(config, arg, {"ddil": common.half_forward})


def sweep() -> list[dict]:
  """Base and DDIL, reflected and not, three seeds."""
  return product({"arg": common.VARIANTS, "seed": range(3)})
