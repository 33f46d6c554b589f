r"""Regression on digits: one step gives the image at the end of the teacher's walk of 8 steps.

    python -m ddil_jax train --config=configs/digits_regression.py:ddil --workdir=runs/regression \
        --config.teacher.path=runs/digits_teacher
"""

from configs import common
from configs.digits_teacher import digits
from ml_collections import ConfigDict

from ddil_jax.sweep import product


def get_config(arg: str | None = None) -> ConfigDict:
  config = digits(common.common())
  config.objective = ConfigDict(dict(name="regression", num_steps=4, label_steps=8))
  config.optimizer.update(name="adam", learning_rate=5e-4)
  config.train.update(steps=300, batch_size=64, log_every=50, ema=(0.99,))
  config.eval.update(ema="0.99", sampler_steps=(2, 1))
  return common.apply(config, arg)


def sweep() -> list[dict]:
  """Base, DDIL, reflected and both, three seeds."""
  return product({"arg": common.VARIANTS, "seed": range(3)})
