r"""Consistency trajectory model on digits: jumps on a grid of 17 times, with the denoising term.

    python -m ddil_jax train --config=configs/digits_ctm.py:ddil --workdir=runs/ctm \
        --config.teacher.path=runs/digits_teacher
"""

from configs import common
from configs.digits_teacher import digits
from ml_collections import ConfigDict

from ddil_jax.sweep import product


def get_config(arg: str | None = None) -> ConfigDict:
  config = digits(common.common())
  config.objective = ConfigDict(dict(name="ctm", num_scales=17, sampler_steps=4, max_teacher_steps=4, solver="ddim",
                                     dsm_weight=1.0, dsm_cap=100.0, target_decay=0.99))
  config.model.end_time_embedding = 32
  config.optimizer.update(name="adam", learning_rate=5e-4)
  config.train.update(steps=300, batch_size=64, log_every=50, ema=(0.99,))
  config.eval.update(ema="0.99", sampler_steps=(2, 1))
  return common.apply(config, arg)


def sweep() -> list[dict]:
  """Base, DDIL, reflected and both, three seeds."""
  return product({"arg": common.VARIANTS, "seed": range(3)})
