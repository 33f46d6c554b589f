"""VSD on digits: the critic is the teacher with a LoRA of rank 4.

    python -m ddil_jax train --config=configs/digits_vsd.py:ddil --workdir=runs/vsd --config.teacher.path=runs/digits_teacher
"""

from ml_collections import ConfigDict

from configs import common
from configs.digits_teacher import digits

from ddil_jax.sweep import product


def get_config(arg: str | None = None) -> ConfigDict:
  config = common.generator(digits(common.common()), name="vsd", num_steps=1, rank=4, guide_critic=True,
                            random_guidance=(), weight_cap=20.0)
  config.optimizer.critic_learning_rate = 1e-2  # a LoRA of rank 4 follows the student at ten times a whole critic's
  return common.apply(config, arg, {"ddil": common.half_forward})


def sweep() -> list[dict]:
  """Base and DDIL, reflected and not, three seeds."""
  return product({"arg": common.VARIANTS, "seed": range(3)})
