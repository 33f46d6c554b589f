"""DMD2 on Fashion-MNIST: critic on every step, generator on every fifth, backward simulation, a GAN term.

The base method trains on the student's own states; `ddil` adds forward-diffused data.

    python -m ddil_jax train --config=configs/fashion_mnist_dmd2.py:ddil --workdir=runs/fashion_dmd2 --config.teacher.path=runs/fashion_teacher

From the paper (arXiv 2405.14867, its ImageNet-64 recipe): the period, the GAN weights 3e-3 and 1e-2, AdamW
with decay .01, clipping at 10, 500 steps of warm-up. Ours: the critic's weight, rate, length and batch.
"""

from configs import common
from configs.fashion_mnist_teacher import fashion_mnist
from ml_collections import ConfigDict

from ddil_jax.sweep import product


def two_steps(config: ConfigDict) -> ConfigDict:
  """A student of two steps."""
  config.objective.num_steps = 2
  return config


def ddil(config: ConfigDict) -> ConfigDict:
  """Half forward data, half backward simulation."""
  config.states.update(forward=0.5, student=0.5, teacher=0.0)
  return config


def get_config(arg: str | None = None) -> ConfigDict:
  config = fashion_mnist(common.common())
  config.objective = ConfigDict(dict(name="dmd2", num_steps=4, period=5, critic_weight="snr_trunc",
                                     weight_cap=100.0, gan_weight=3e-3, gan_critic_weight=1e-2,
                                     gan_balance="fixed"))
  config.states.update(forward=0.0, student=1.0)
  config.optimizer.update(name="adamw", learning_rate=5e-5, schedule="constant", warmup_steps=500, clip=10.0,
                          weight_decay=0.01)
  config.train.update(steps=20_000, batch_size=128)
  config.states.capacity = 16 * config.train.batch_size
  return common.apply(config, arg, {"two_steps": two_steps, "ddil": ddil})


def sweep() -> list[dict]:
  """Base, DDIL, reflected and both, three seeds."""
  return product({"arg": common.VARIANTS, "seed": range(3)})
