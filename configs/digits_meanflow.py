r"""MeanFlow on digits: average velocities of the teacher's flow, jumps of any length.

    python -m ddil_jax train --config=configs/digits_meanflow.py:ddil --workdir=runs/meanflow \
        --config.teacher.path=runs/digits_teacher
"""

from configs import common
from configs.digits_teacher import digits
from ml_collections import ConfigDict

from ddil_jax.sweep import product


def get_config(arg: str | None = None) -> ConfigDict:
  # A difference over an interval of the grid: the teacher's derivative is of its fine time embedding (docs/methods.md).
  # Its velocities have no noise, and a power above 0 would favour the examples that need the least.
  config = common.trajectory(digits(common.common()), name="meanflow", num_scales=32, sampler_steps=4,
                             from_data=False, same_share=0.5, power=0.0, constant=1e-3, difference=1 / 32)
  config.model.end_time_embedding = 32
  return common.apply(config, arg)


def sweep() -> list[dict]:
  """Base, DDIL, reflected and both, three seeds."""
  return product({"arg": common.VARIANTS, "seed": range(3)})
