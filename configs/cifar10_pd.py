"""Progressive distillation on CIFAR-10: 16 -> 8 -> 4 -> 2 -> 1 steps.

    python -m ddil_jax train --config=configs/cifar10_pd.py:ddil --workdir=runs/cifar10_pd --config.teacher.path=runs/cifar10_teacher --config.train.parallel=mesh

From the paper (arXiv 2202.00512): 50,000 updates a stage, batch 128, Adam with rate 5e-5 falling linearly to 0
in every stage, clipping at 1, the truncated SNR weight, no dropout, no decay, no average. Ours: the start at 16
steps (theirs is 8,192), and the cap of the weight.
"""

from configs import common
from configs.cifar10_teacher import cifar10
from ml_collections import ConfigDict

from ddil_jax.sweep import product


def guided(config: ConfigDict) -> ConfigDict:
  """The first stage's teacher is guided; later ones have it folded in."""
  config.teacher.guidance_scale = 1.5
  return config


def get_config(arg: str | None = None) -> ConfigDict:
  config = cifar10(common.common())
  config.objective = ConfigDict(dict(name="pd", num_steps=8, weight="snr_trunc", snr_cap=1e6))
  config.train.stages = (8, 4, 2, 1)
  config.optimizer.update(name="adam", learning_rate=5e-5, schedule="linear")
  config.train.update(steps=50_000, batch_size=128, ema=(), checkpoint_every=5000)
  config.states.capacity = 16 * config.train.batch_size
  config.eval.ema = "raw"
  return common.apply(config, arg, {"guided": guided})


def sweep() -> list[dict]:
  """Base, DDIL, reflected and both, three seeds."""
  return product({"arg": common.VARIANTS, "seed": range(3)})
