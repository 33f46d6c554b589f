"""f-distill on digits: DMD2's gradient under the Jensen-Shannon divergence.

    python -m ddil_jax train --config=configs/digits_f_distill.py:ddil --workdir=runs/f_distill --config.teacher.path=runs/digits_teacher
"""

from ml_collections import ConfigDict

from configs import common
from configs.digits_teacher import digits

from ddil_jax.sweep import product


def get_config(arg: str | None = None) -> ConfigDict:
  config = common.generator(digits(common.common()), name="f_distill", num_steps=4, period=5, divergence="js",
                            critic_weight="v_mse", weight_cap=20.0, gan_weight=1e-3, ratio_bins=0)
  return common.apply(config, arg, {"ddil": common.half_forward})


def sweep() -> list[dict]:
  """Base and DDIL, reflected and not, three seeds."""
  return product({"arg": common.VARIANTS, "seed": range(3)})
