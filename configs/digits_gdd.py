"""GDD on digits: a GAN alone, with the convolutions of the residual blocks frozen.

    python -m ddil_jax train --config=configs/digits_gdd.py:ddil --workdir=runs/gdd --config.teacher.path=runs/digits_teacher
"""

from ml_collections import ConfigDict

from configs import common
from configs.digits_teacher import digits

from ddil_jax.sweep import product


def ddil(config: ConfigDict) -> ConfigDict:
  """Half forward data, half the student's own states."""
  config.states.update(forward=0.5, student=0.5, teacher=0.0)
  return config


def get_config(arg: str | None = None) -> ConfigDict:
  config = digits(common.common())
  config.objective = ConfigDict(dict(name="gdd", num_steps=1, kind="ns", r1_gamma=1e-4))
  config.states.update(forward=0.0, student=1.0)
  config.optimizer.update(name="adam", learning_rate=4e-4, critic_learning_rate=1e-3, schedule="linear")
  config.train.update(steps=1000, batch_size=64, log_every=50, ema=(0.99,))
  config.eval.ema = "0.99"
  return common.apply(config, arg, {"ddil": ddil})


def sweep() -> list[dict]:
  """Base and DDIL, reflected and not, three seeds."""
  return product({"arg": common.VARIANTS, "seed": range(3)})
