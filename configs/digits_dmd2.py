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


def lora(config: ConfigDict) -> ConfigDict:
  """Student and critic train LoRAs of rank 4: of the three networks only the teacher's is kept."""
  config.model.update(lora=4, critic_lora=4)
  return config


def get_config(arg: str | None = None) -> ConfigDict:
  config = common.generator(digits(common.common()), name="dmd2", num_steps=4, period=5, critic_weight="v_mse",
                            weight_cap=20.0, gan_weight=0.0, gan_critic_weight=1e-2, gan_balance="fixed")
  return common.apply(config, arg, {"two_steps": two_steps, "lora": lora, "ddil": common.half_forward})


def sweep() -> list[dict]:
  """Base, DDIL, reflected and both, three seeds."""
  return product({"arg": common.VARIANTS, "seed": range(3)})
