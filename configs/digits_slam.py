r"""SLAM on digits (in pixels): sub-paths of a grid of 50 intervals, 4-step sampling.

    python -m ddil_jax train --config=configs/digits_slam.py:ddil --workdir=runs/slam \
        --config.teacher.path=runs/digits_teacher
"""

from configs import common
from configs.digits_teacher import digits
from ml_collections import ConfigDict

from ddil_jax.sweep import product


def get_config(arg: str | None = None) -> ConfigDict:
  # The original's intervals. On longer ones the path's points are further from the noise that the network is told.
  config = common.trajectory(digits(common.common()), name="slam", num_scales=50, sampler_steps=4,
                             distance="pseudo_huber", huber_c=1e-3, target_decay=0.95)
  config.model.guidance_embedding = 32
  return common.apply(config, arg)


def sweep() -> list[dict]:
  """Base, DDIL, reflected and both, three seeds."""
  return product({"arg": common.VARIANTS, "seed": range(3)})
