r"""ECT-style consistency on digits, from data: r/t = 1/2, 3/4, ... in stages of 100 steps.

    python -m ddil_jax train --config=configs/digits_ect.py --workdir=runs/ect \
        --config.teacher.path=runs/digits_teacher
"""

from configs import common
from configs.digits_teacher import digits
from ml_collections import ConfigDict

from ddil_jax.sweep import product


def get_config(arg: str | None = None) -> ConfigDict:
  config = common.trajectory(digits(common.common()), name="ect", num_scales=32, sampler_steps=4, from_data=True,
                             stage_steps=100, q=2.0, ratio_limit=0.999, huber_c=0.06, weight="default")
  config.optimizer.name = "radam"
  return common.apply(config, arg)


def sweep() -> list[dict]:
  """From data and from the teacher, three seeds."""
  return product({"objective.from_data": (True, False), "seed": range(3)})
