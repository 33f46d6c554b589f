"""Latent-consistency distillation on emoji: the student reads the guidance scale, 4-step sampling.

    python -m ddil_jax train --config=configs/emoji_lcm.py:ddil --workdir=runs/emoji/lcm --config.teacher.path=runs/emoji/teacher
"""

from configs import common, text
from configs.emoji_teacher import emoji
from ml_collections import ConfigDict

from ddil_jax.sweep import product


def get_config(arg: str | None = None) -> ConfigDict:
  config = emoji(common.common())
  config.objective = ConfigDict(dict(name="lcm", num_scales=50, sampler_steps=4, distance="pseudo_huber", huber_c=1e-3,
                                     target_decay=0.95, guidance_range=(1.0, 3.0)))
  config.model.guidance_embedding = 64
  config.teacher.guidance_scale = 2.0  # at which it is evaluated
  config.optimizer.update(name="adam", learning_rate=5e-4)
  config.train.update(steps=600, batch_size=32, log_every=50, ema=(0.99,))
  config.eval.update(ema="0.99", sampler_steps=(2,))
  return common.apply(config, arg, {"smoke": text.smoke})


def sweep() -> list[dict]:
  """Base, DDIL, reflected and both, three seeds."""
  return product({"arg": common.VARIANTS, "seed": range(3)})
