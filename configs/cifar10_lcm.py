"""Latent-consistency distillation on CIFAR-10 (in pixels): a skip of 1/50, 4-step sampling.

    python -m ddil_jax train --config=configs/cifar10_lcm.py:ddil --workdir=runs/cifar10_lcm --config.teacher.path=runs/cifar10_teacher --config.train.parallel=mesh

From the paper (arXiv 2310.04378, Stable Diffusion): 50 solver times, the target's decay .95, pseudo-Huber with
c = 1e-3, clipping at 1, 4 steps. From consistency distillation's CIFAR-10 recipe (arXiv 2303.01469): RAdam
with rate 4e-4, average .9999. Ours: batch and length (theirs are 512 and 800,000), and the guidance range.
"""

from configs import common
from configs.cifar10_teacher import cifar10
from ml_collections import ConfigDict

from ddil_jax.sweep import product


def guided(config: ConfigDict) -> ConfigDict:
  """Guidance scale drawn per sample and given to the student."""
  config.objective.guidance_range = (1.0, 3.0)
  config.model.guidance_embedding = 256  # the paper's
  config.teacher.guidance_scale = 1.5  # at which it is evaluated
  return config


def get_config(arg: str | None = None) -> ConfigDict:
  config = cifar10(common.common())
  config.objective = ConfigDict(dict(name="lcm", num_scales=50, sampler_steps=4, distance="pseudo_huber",
                                     huber_c=1e-3, target_decay=0.95, guidance_range=()))
  config.optimizer.update(name="radam", learning_rate=4e-4, schedule="constant")
  config.train.update(steps=100_000, batch_size=256, ema=(0.9999,), checkpoint_every=5000)
  config.states.capacity = 16 * config.train.batch_size
  config.eval.update(ema="0.9999", sampler_steps=(1, 2))
  return common.apply(config, arg, {"guided": guided})


def sweep() -> list[dict]:
  """Base, DDIL, reflected and both, three seeds."""
  return product({"arg": common.VARIANTS, "seed": range(3)})
