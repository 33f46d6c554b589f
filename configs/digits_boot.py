r"""BOOT on digits: no images are seen; the teacher's walk of 31 steps in two, and in one as published.

    python -m ddil_jax train --config=configs/digits_boot.py --workdir=runs/boot \
        --config.teacher.path=runs/digits_teacher
"""

from configs import common
from configs.digits_teacher import digits
from ml_collections import ConfigDict

from ddil_jax.sweep import product


def get_config(arg: str | None = None) -> ConfigDict:
  config = common.trajectory(digits(common.common()), name="boot", num_steps=2, num_scales=32, boundary_weight=1.0)
  config.states.update(forward=0.0, student=1.0)
  config.model.end_time_embedding = 32
  config.eval.sampler_steps = (1,)
  return common.apply(config, arg)


def sweep() -> list[dict]:
  """Base, DDIL, reflected and both, three seeds."""
  return product({"arg": common.VARIANTS, "seed": range(3)})
