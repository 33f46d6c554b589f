"""UFOGen on digits: a diffusion GAN with reconstruction, 4 steps.

    python -m ddil_jax train --config=configs/digits_ufogen.py --workdir=runs/ufogen --config.teacher.path=runs/digits_teacher

Its loss needs clean data, so `:ddil` is refused.
"""

from ml_collections import ConfigDict

from configs import common
from configs.digits_teacher import digits

from ddil_jax.sweep import product


def get_config(arg: str | None = None) -> ConfigDict:
  config = common.generator(digits(common.common()), name="ufogen", num_steps=4, num_scales=64, reconstruction=1.0,
                            snr_cap=20.0)
  config.states.update(forward=1.0, student=0.0)
  return common.apply(config, arg)


def sweep() -> list[dict]:
  """Sampling steps, three seeds."""
  return product({"objective.num_steps": (1, 2, 4), "seed": range(3)})
