"""Consistency distillation on digits: pairs on a grid of 17 times, DDIM steps of the teacher.

    python -m ddil_jax train --config=configs/digits_cd.py:ddil --workdir=runs/cd --config.teacher.path=runs/digits_teacher
"""

from configs import common
from configs.digits_teacher import digits
from ml_collections import ConfigDict

from ddil_jax.sweep import product


def get_config(arg: str | None = None) -> ConfigDict:
  config = common.trajectory(digits(common.common()), name="cd", num_scales=17, sampler_steps=4, distance="l2",
                             weight="constant", solver="ddim", target_decay=0.0)
  config.optimizer.update(name="radam", learning_rate=4e-4)
  config.eval.sampler_steps = (2,)
  return common.apply(config, arg)


def sweep() -> list[dict]:
  """Grid sizes, three seeds."""
  return product({"objective.num_scales": (9, 17, 33), "seed": range(3)})
