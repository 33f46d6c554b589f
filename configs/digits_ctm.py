r"""Consistency trajectory model on digits: jumps on a grid of 17 times, with the denoising term.

    python -m ddil_jax train --config=configs/digits_ctm.py:ddil --workdir=runs/ctm \
        --config.teacher.path=runs/digits_teacher
"""

from configs import common
from configs.digits_teacher import digits
from ml_collections import ConfigDict

from ddil_jax.sweep import product


def get_config(arg: str | None = None) -> ConfigDict:
  # With this weight both terms have gradients of about one norm, as the original makes them.
  config = common.trajectory(digits(common.common()), name="ctm", num_scales=17, sampler_steps=4, max_teacher_steps=4,
                             solver="ddim", dsm_weight=0.04, dsm_cap=100.0, target_decay=0.99)
  config.model.end_time_embedding = 32
  return common.apply(config, arg)


def sweep() -> list[dict]:
  """Base, DDIL, reflected and both, three seeds."""
  return product({"arg": common.VARIANTS, "seed": range(3)})
