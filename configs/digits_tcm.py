"""TCM on digits, second stage: a student of the noisy times above a first stage.

The first stage, a run of `configs/digits_ect.py`, takes the teacher's place.

    python -m ddil_jax train --config=configs/digits_tcm.py --workdir=runs/tcm --config.teacher.path=runs/ect
"""

from configs import common
from configs.digits_teacher import digits
from ml_collections import ConfigDict

from ddil_jax.sweep import product


def get_config(arg: str | None = None) -> ConfigDict:
  config = common.trajectory(digits(common.common()), name="tcm", num_scales=32, sampler_steps=4, transition=1.0,
                             ratio=0.9, boundary_share=0.25, boundary_weight=0.1, huber_c=0.06)
  config.teacher.ema = "0.99"
  config.optimizer.name = "radam"
  return common.apply(config, arg)


def sweep() -> list[dict]:
  """Three seeds."""
  return product({"seed": range(3)})
