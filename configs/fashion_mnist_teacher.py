"""Teacher on Fashion-MNIST (28x28 grey): a class-conditional UNet of 1.4M parameters.

    python -m ddil_jax train --config=configs/fashion_mnist_teacher.py --workdir=runs/fashion_teacher

Put the four original .gz files into data/fashion_mnist/, or give their folder as --config.data.manual_dir=DIR.
All numbers are ours: no paper that we follow has a recipe for this set.
"""

from configs import common
from ml_collections import ConfigDict

from ddil_jax.sweep import product


def fashion_mnist(config: ConfigDict) -> ConfigDict:
  """What every fashion_mnist config shares: the data and the network."""
  config.data.name = "fashion_mnist"
  config.model.update(channels=32, channel_mult=(1, 2, 2), num_res_blocks=2, attention_resolutions=(7,),
                      num_heads=4)
  config.eval.update(num_samples=5000, shift_samples=1000)
  return config


def get_config(arg: str | None = None) -> ConfigDict:
  config = fashion_mnist(common.common())
  config.objective = ConfigDict(dict(name="denoising", weight="v_mse", label_dropout=0.1, sampler_steps=32))
  config.optimizer.update(name="adam", learning_rate=1e-3, schedule="cosine", warmup_steps=500)
  config.train.update(steps=20_000, batch_size=128)
  config.eval.sampler_steps = (1, 2, 4, 8)
  return common.apply(config, arg)


def sweep() -> list[dict]:
  """Seeds of the teacher."""
  return product({"seed": range(3)})
