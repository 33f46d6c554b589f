r"""Adapter guidance distillation on digits: adapters on the frozen teacher take the place of its second evaluation.

Trained on the guided teacher's own rollouts, each with a scale of its own. The learning rate is the release's: a tenth
of the steps up, then a cosine down to 1e-4 of it. Beside a network as small as that of digits, adapters of width 16 are
as large as it; of width 4 they are a tenth, and learn less.

    python -m ddil_jax train --config=configs/digits_agd.py --workdir=runs/agd --config.teacher.path=runs/digits_teacher
"""

from configs import common
from configs.digits_teacher import digits
from ml_collections import ConfigDict

from ddil_jax.sweep import product


def get_config(arg: str | None = None) -> ConfigDict:
  config = common.trajectory(digits(common.common()), name="agd", hidden=16, num_scales=32, sampler_steps=8,
                             guidance_range=(1.0, 6.0), loss="l2", weight="v_mse", weight_cap=1e4)
  config.states.update(forward=0.0, teacher=1.0)
  config.optimizer.update(name="adamw", learning_rate=5e-3, schedule="cosine", warmup_steps=30, start=1e-4, end=1e-4,
                          weight_decay=0.0)
  config.teacher.guidance_scale = 3.0  # at which it is evaluated
  config.eval.sampler_steps = (4,)
  return common.apply(config, arg)


def sweep() -> list[dict]:
  """Base, DDIL, reflected and both, three seeds."""
  return product({"arg": common.VARIANTS, "seed": range(3)})
