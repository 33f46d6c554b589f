"""DMD2 on digits: critic on every step, generator on every fifth, backward simulation.

The base method trains on the student's own states; `ddil` adds forward-diffused data.

    python -m ddil_jax train --config=configs/digits_dmd2.py:ddil --workdir=runs/dmd2 --config.teacher.path=runs/digits_teacher
"""

from configs import common
from configs.digits_teacher import digits
from ml_collections import ConfigDict

from ddil_jax.sweep import product


def two_steps(config: ConfigDict) -> ConfigDict:
  """A student of two steps."""
  config.objective.num_steps = 2
  return config


def ddil(config: ConfigDict) -> ConfigDict:
  """Half forward data, half backward simulation."""
  config.states.update(forward=0.5, student=0.5, teacher=0.0)
  return config


def get_config(arg: str | None = None) -> ConfigDict:
  config = digits(common.common())
  config.objective = ConfigDict(dict(name="dmd2", num_steps=4, period=5, critic_weight="v_mse", weight_cap=20.0,
                                     gan_weight=0.0, gan_critic_weight=1e-2,
                                     gan_balance="fixed"))
  config.states.update(forward=0.0, student=1.0)
  # A critic that learns faster than the student follows it better in a run this short.
  config.optimizer.update(name="adam", learning_rate=4e-4, critic_learning_rate=1e-3, schedule="linear")
  config.train.update(steps=1000, batch_size=64, log_every=50, ema=(0.99,))
  config.eval.ema = "0.99"
  return common.apply(config, arg, {"two_steps": two_steps, "ddil": ddil})


def sweep() -> list[dict]:
  """Base, DDIL, reflected and both, three seeds."""
  return product({"arg": common.VARIANTS, "seed": range(3)})
