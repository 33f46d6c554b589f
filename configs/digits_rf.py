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
  config = digits(common.common())
  config.objective = ConfigDict(dict(name="rf", num_scales=32, sampler_steps=4, distance="l2"))
  config.states.update(forward=0.0, pairs=1.0, replay=False)
  config.optimizer.update(name="adam", learning_rate=5e-4)
  config.train.update(steps=300, batch_size=64, log_every=50, ema=(0.99,))
  config.eval.update(ema="0.99", sampler_steps=(2, 1))
  return common.apply(config, arg)


def sweep() -> list[dict]:
  """Three seeds."""
  return product({"seed": range(3)})
