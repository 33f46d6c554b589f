"""DMD2 on CIFAR-10: critic on every step, generator on every fifth, backward simulation, a GAN term.

The base method trains on the student's own states; `ddil` adds forward-diffused data.

    python -m ddil_jax train --config=configs/cifar10_dmd2.py:ddil --workdir=runs/cifar10_dmd2 --config.teacher.path=runs/cifar10_teacher --config.train.parallel=mesh

From the paper (arXiv 2405.14867, its ImageNet-64 recipe): the period, the GAN weights 3e-3 and 1e-2, AdamW with
decay .01, clipping at 10, 500 steps of warm-up. Ours: 4 steps (theirs is 1), the critic's weight, the rate
(theirs is 2e-6 for a network of 300M parameters), batch (280) and length.
"""

from configs import common
from configs.cifar10_teacher import cifar10
from ml_collections import ConfigDict

from ddil_jax.sweep import product


def one_step(config: ConfigDict) -> ConfigDict:
  """A student of one step, as in the paper."""
  config.objective.num_steps = 1
  return config


def ddil(config: ConfigDict) -> ConfigDict:
  """Half forward data, half backward simulation."""
  config.states.update(forward=0.5, student=0.5, teacher=0.0)
  return config


def get_config(arg: str | None = None) -> ConfigDict:
  config = cifar10(common.common())
  config.objective = ConfigDict(dict(name="dmd2", num_steps=4, period=5, critic_weight="snr_trunc",
                                     weight_cap=100.0, gan_weight=3e-3, gan_critic_weight=1e-2,
                                     gan_balance="fixed"))
  config.states.update(forward=0.0, student=1.0)
  config.optimizer.update(name="adamw", learning_rate=1e-5, schedule="constant", warmup_steps=500, clip=10.0,
                          weight_decay=0.01)
  config.train.update(steps=200_000, batch_size=256, ema=(0.999,), checkpoint_every=5000)
  config.states.capacity = 16 * config.train.batch_size
  return common.apply(config, arg, {"one_step": one_step, "ddil": ddil})


def sweep() -> list[dict]:
  """Base, DDIL, reflected and both, three seeds."""
  return product({"arg": common.VARIANTS, "seed": range(3)})
