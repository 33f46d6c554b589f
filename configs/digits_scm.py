r"""sCM on digits: continuous-time consistency along the teacher's flow.

    python -m ddil_jax train --config=configs/digits_scm.py:ddil --workdir=runs/scm \
        --config.teacher.path=runs/digits_teacher
"""

from configs import common
from configs.digits_teacher import digits
from ml_collections import ConfigDict

from ddil_jax.sweep import product


def get_config(arg: str | None = None) -> ConfigDict:
  # Differences: the teacher's derivative is of its fine time embedding (docs/methods.md).
  config = common.trajectory(digits(common.common()), name="scm", num_scales=32, sampler_steps=4, from_data=False,
                             warmup_steps=100, constant=0.1, sigma_data=0.5, difference=0.1)
  config.optimizer.name = "radam"
  return common.apply(config, arg)


def sweep() -> list[dict]:
  """Base, DDIL, reflected and both, three seeds."""
  return product({"arg": common.VARIANTS, "seed": range(3)})
