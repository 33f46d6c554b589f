r"""SCott on digits: consistency over three stochastic teacher steps, 4-step sampling.

    python -m ddil_jax train --config=configs/digits_scott.py:ddil --workdir=runs/scott \
        --config.teacher.path=runs/digits_teacher
"""

from configs import common
from configs.digits_teacher import digits
from ml_collections import ConfigDict

from ddil_jax.sweep import product


def get_config(arg: str | None = None) -> ConfigDict:
  config = common.trajectory(digits(common.common()), name="scott", num_scales=17, sampler_steps=4, solver_steps=3,
                             eta=0.3, distance="l2", weight="constant", target_decay=0.95)
  return common.apply(config, arg)


def sweep() -> list[dict]:
  """Base, DDIL, reflected and both, three seeds."""
  return product({"arg": common.VARIANTS, "seed": range(3)})
