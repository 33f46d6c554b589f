r"""Reflow on digits: rectified flow on pairs of the teacher's noise and images.

A fresh batch of pairs at every step costs the teacher's rollout; with `--config.objective.num_scales=1` and
`sampler_steps=1` it is distillation to one step.

    python -m ddil_jax train --config=configs/digits_rf.py --workdir=runs/rf \
        --config.teacher.path=runs/digits_teacher
"""

from configs import common
from configs.digits_teacher import digits
from ml_collections import ConfigDict

from ddil_jax.sweep import product


def get_config(arg: str | None = None) -> ConfigDict:
  config = common.trajectory(digits(common.common()), name="rf", num_scales=32, sampler_steps=4, distance="l2")
  config.states.update(forward=0.0, pairs=1.0, replay=False)
  return common.apply(config, arg)


def sweep() -> list[dict]:
  """Three seeds."""
  return product({"seed": range(3)})
