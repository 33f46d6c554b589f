"""Latent-consistency distillation on digits (in pixels): a skip of 1/16, 4-step sampling.

    python -m ddil_jax train --config=configs/digits_lcm.py:ddil --workdir=runs/lcm --config.teacher.path=runs/digits_teacher
"""

from configs import common
from configs.digits_teacher import digits
from ml_collections import ConfigDict

from ddil_jax.sweep import product


def guided(config: ConfigDict) -> ConfigDict:
  """Guidance scale drawn per sample and given to the student."""
  config.objective.guidance_range = (1.0, 5.0)
  config.model.guidance_embedding = 32
  config.teacher.guidance_scale = 3.0  # at which it is evaluated
  return config


def get_config(arg: str | None = None) -> ConfigDict:
  config = common.trajectory(digits(common.common()), name="lcm", num_scales=16, sampler_steps=4, distance="l2",
                             huber_c=1e-3, target_decay=0.95, guidance_range=())
  config.eval.sampler_steps = (2,)
  return common.apply(config, arg, {"guided": guided, "lora": common.lora})


def sweep() -> list[dict]:
  """Base, DDIL, reflected and both, three seeds."""
  return product({"arg": common.VARIANTS, "seed": range(3)})
