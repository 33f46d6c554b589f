"""Progressive distillation on Fashion-MNIST: 16 -> 8 -> 4 -> 2 -> 1 steps.

    python -m ddil_jax train --config=configs/fashion_mnist_pd.py:ddil --workdir=runs/fashion_pd --config.teacher.path=runs/fashion_teacher

From the paper (arXiv 2202.00512, its CIFAR-10 recipe): the truncated SNR weight, Adam, a rate that falls
linearly to 0 in every stage, clipping at 1. Ours: the short chain of stages, their length, rate and average.
"""

from configs import common
from configs.fashion_mnist_teacher import fashion_mnist
from ml_collections import ConfigDict

from ddil_jax.sweep import product


def guided(config: ConfigDict) -> ConfigDict:
  """The first stage's teacher is guided; later ones have it folded in."""
  config.teacher.guidance_scale = 3.0
  return config


def get_config(arg: str | None = None) -> ConfigDict:
  config = fashion_mnist(common.common())
  config.objective = ConfigDict(dict(name="pd", num_steps=8, weight="snr_trunc", snr_cap=1e6))
  config.train.stages = (8, 4, 2, 1)
  config.optimizer.update(name="adam", learning_rate=2e-4, schedule="linear")
  config.train.update(steps=5000, batch_size=128)
  config.states.capacity = 16 * config.train.batch_size
  return common.apply(config, arg, {"guided": guided})


def sweep() -> list[dict]:
  """Base, DDIL, reflected and both, three seeds."""
  return product({"arg": common.VARIANTS, "seed": range(3)})
