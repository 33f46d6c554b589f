"""DMD2 on emoji, from the teacher guided at scale 2: four steps, the critic on every step, the generator on every third.

    python -m ddil_jax train --config=configs/emoji_dmd2.py:ddil --workdir=runs/emoji/dmd2 --config.teacher.path=runs/emoji/teacher
"""

from configs import common, text
from configs.emoji_teacher import emoji
from ml_collections import ConfigDict

from ddil_jax.sweep import product


def get_config(arg: str | None = None) -> ConfigDict:
  config = common.generator(emoji(common.common()), name="dmd2", num_steps=4, period=3, critic_weight="v_mse",
                            weight_cap=20.0, gan_weight=0.0, gan_critic_weight=1e-2, gan_balance="fixed")
  config.train.update(steps=600, batch_size=32)
  config.grid.name = "dmd2"
  config.teacher.guidance_scale = 2.0
  return common.apply(config, arg, {"smoke": text.smoke, "ddil": common.half_forward})


def sweep() -> list[dict]:
  """Base, DDIL, reflected and both, three seeds."""
  return product({"arg": common.VARIANTS, "seed": range(3)})
