"""Teacher on CIFAR-10 (32x32 colour): a class-conditional UNet of 47M parameters, for accelerators.

    python -m ddil_jax train --config=configs/cifar10_teacher.py --workdir=runs/cifar10_teacher --config.train.parallel=mesh

Put cifar-10-binary.tar.gz into data/cifar10/, or give its folder as --config.data.manual_dir=DIR.

From the paper (arXiv 2202.00512, its CIFAR-10 recipe): 256 channels on three levels of the same width, 3 blocks,
attention at 16 and 8 with 1 head, dropout .2, cosine log-SNR, the truncated SNR weight, Adam with rate 2e-4,
decay 1e-3 and 1,000 steps of warm-up, clipping at 1, batch 128, average .9999, flips. Ours: labels with
dropout .1 (theirs is unconditional), v-prediction (theirs is of x), the number of steps.
"""

from configs import common
from ml_collections import ConfigDict

from ddil_jax.sweep import product


def cifar10(config: ConfigDict) -> ConfigDict:
  """What every cifar10 config shares: the data and the network, without dropout."""
  config.data.update(name="cifar10", flip=True)
  config.model.update(channels=256, channel_mult=(1, 1, 1), num_res_blocks=3, attention_resolutions=(8, 16),
                      num_heads=1)
  config.teacher.ema = "0.9999"
  config.eval.update(num_samples=10_000, shift_samples=1000)
  return config


def get_config(arg: str | None = None) -> ConfigDict:
  config = cifar10(common.common())
  config.model.dropout = 0.2
  config.objective = ConfigDict(dict(name="denoising", weight="snr_trunc", label_dropout=0.1, sampler_steps=64))
  config.optimizer.update(name="adamw", learning_rate=2e-4, schedule="constant", warmup_steps=1000,
                          weight_decay=1e-3)
  config.train.update(steps=500_000, batch_size=128, ema=(0.9999,), checkpoint_every=10_000)
  config.eval.update(ema="0.9999", sampler_steps=(1, 2, 4, 8, 16))
  return common.apply(config, arg)


def sweep() -> list[dict]:
  """Seeds of the teacher."""
  return product({"seed": range(3)})
