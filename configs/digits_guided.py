r"""Guided distillation on digits, stage one: a student that is told the guidance scale.

With `lora` it trains a LoRA and the embedding of the scale alone. Stage two is progressive distillation of its student.

    python -m ddil_jax train --config=configs/digits_guided.py:ddil --workdir=runs/guided \
        --config.teacher.path=runs/digits_teacher
    python -m ddil_jax train --config=configs/digits_pd.py:stage_two --workdir=runs/guided_pd \
        --config.teacher.path=runs/guided
"""

from configs import common
from configs.digits_teacher import digits
from ml_collections import ConfigDict

from ddil_jax.sweep import product


def get_config(arg: str | None = None) -> ConfigDict:
  config = common.trajectory(digits(common.common()), name="guided", num_scales=32, sampler_steps=8,
                             guidance_range=(1.0, 5.0), weight="v_mse", weight_cap=1e4)
  config.model.guidance_embedding = 32
  config.teacher.guidance_scale = 3.0  # at which it is evaluated
  config.eval.sampler_steps = (4,)
  return common.apply(config, arg, {"lora": common.lora})


def sweep() -> list[dict]:
  """Base, DDIL, reflected and both, three seeds."""
  return product({"arg": common.VARIANTS, "seed": range(3)})
