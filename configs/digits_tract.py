r"""TRACT on digits: 2 blocks of 8 small teacher steps each.

    python -m ddil_jax train --config=configs/digits_tract.py:ddil --workdir=runs/tract \
        --config.teacher.path=runs/digits_teacher
"""

from configs import common
from configs.digits_teacher import digits
from ml_collections import ConfigDict

from ddil_jax.sweep import product


def get_config(arg: str | None = None) -> ConfigDict:
  config = common.trajectory(digits(common.common()), name="tract", num_steps=2, block_size=8, weight="snr_trunc",
                             snr_cap=1e4, self_decay=0.5, solver="ddim")
  config.eval.sampler_steps = (1,)
  return common.apply(config, arg)


def sweep() -> list[dict]:
  """Base, DDIL, reflected and both, three seeds."""
  return product({"arg": common.VARIANTS, "seed": range(3)})
