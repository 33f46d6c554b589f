r"""TwinFlow on digits: average velocities of the teacher's flow, and the student's own images at negative times.

    python -m ddil_jax train --config=configs/digits_twinflow.py:ddil --workdir=runs/twinflow \
        --config.teacher.path=runs/digits_teacher
"""

from configs import common
from configs.digits_teacher import digits
from ml_collections import ConfigDict

from ddil_jax.sweep import product


def get_config(arg: str | None = None) -> ConfigDict:
  config = common.trajectory(digits(common.common()), name="twinflow", num_scales=32, sampler_steps=4,
                             from_data=False, order=2, bound=1.0, target_decay=0.99)
  config.model.end_time_embedding = 32
  return common.apply(config, arg)


def sweep() -> list[dict]:
  """Base, DDIL, reflected and both, three seeds."""
  return product({"arg": common.VARIANTS, "seed": range(3)})
