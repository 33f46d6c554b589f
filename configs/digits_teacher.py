"""Teacher on digits (8x8): a class-conditional UNet of 36k parameters, v-prediction, cosine log-SNR.

    python -m ddil_jax train --config=configs/digits_teacher.py --workdir=runs/digits_teacher
"""

from configs import common
from ml_collections import ConfigDict

from ddil_jax.sweep import product


def digits(config: ConfigDict) -> ConfigDict:
  """What every digits config shares: the data and the network."""
  config.data.name = "digits"
  config.model.update(channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(), num_heads=1)
  return config


def get_config(arg: str | None = None) -> ConfigDict:
  config = digits(common.common())
  config.objective = ConfigDict(dict(name="denoising", weight="v_mse", label_dropout=0.1, sampler_steps=32))
  config.optimizer.update(name="adam", learning_rate=3e-3, schedule="cosine")
  config.train.update(steps=2000, batch_size=128, log_every=100)
  config.eval.sampler_steps = (1, 2, 4, 8)
  return common.apply(config, arg)


def sweep() -> list[dict]:
  """Seeds of the teacher."""
  return product({"seed": range(3)})
