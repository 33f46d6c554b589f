"""Latent-consistency distillation on Fashion-MNIST (in pixels): a skip of 1/16, 4-step sampling.

    python -m ddil_jax train --config=configs/fashion_mnist_lcm.py:ddil --workdir=runs/fashion_lcm --config.teacher.path=runs/fashion_teacher

From the paper (arXiv 2310.04378): the target's decay .95, the pseudo-Huber constant, 4 steps. Ours: the
coarser skip (theirs is 1/50), the l2 distance, optimizer, length and batch.
"""

from configs import common
from configs.fashion_mnist_teacher import fashion_mnist
from ml_collections import ConfigDict

from ddil_jax.sweep import product


def guided(config: ConfigDict) -> ConfigDict:
  """Guidance scale drawn per sample and given to the student."""
  config.objective.guidance_range = (1.0, 5.0)
  config.model.guidance_embedding = 32
  config.teacher.guidance_scale = 3.0  # at which it is evaluated
  return config


def get_config(arg: str | None = None) -> ConfigDict:
  config = fashion_mnist(common.common())
  config.objective = ConfigDict(dict(name="lcm", num_scales=16, sampler_steps=4, distance="l2", huber_c=1e-3,
                                     target_decay=0.95, guidance_range=()))
  config.optimizer.update(name="adam", learning_rate=2e-4, schedule="constant")
  config.train.update(steps=10_000, batch_size=128)
  config.states.capacity = 16 * config.train.batch_size
  config.eval.sampler_steps = (1, 2)
  return common.apply(config, arg, {"guided": guided})


def sweep() -> list[dict]:
  """Base, DDIL, reflected and both, three seeds."""
  return product({"arg": common.VARIANTS, "seed": range(3)})
