"""DMD2 + DDIL on SSD-1B: 4 steps, half the states of forward-diffused data, half of the student's own.

    python -m ddil_jax train --config=configs/ssd1b_dmd2_ddil.py --workdir=runs/ssd1b_dmd2
    python -m ddil_jax plan --config=configs/ssd1b_dmd2_ddil.py:planned --topology=v5p:2x2x2 --batch=8

models/ssd1b_unet.safetensors is of `ddil convert`, data/ssd1b of `ddil prepare` (docs/user_guide.md).

Batch 7 and 40,000 updates are those of the DDIL paper (arXiv 2410.11971); on several devices give a batch that they
divide. The period and 4 steps at 999, 749, 499, 249 are DMD2's (arXiv 2405.14867). All other numbers are ours.
"""

from configs import common, text
from ml_collections import ConfigDict

from ddil_jax.sweep import product


def get_config(arg: str | None = None) -> ConfigDict:
  config = common.common()
  config.train.update(steps=40_000, batch_size=7)
  text.published(config, "models/ssd1b_unet.safetensors", "data/ssd1b")
  config.objective = ConfigDict(dict(name="dmd2", num_steps=4, period=5, critic_weight="snr", weight_cap=100.0,
                                     gan_weight=5e-3, gan_critic_weight=1e-2, gan_balance="fixed"))
  config.grid.name = "dmd2"
  common.half_forward(config)
  config.optimizer.update(name="adamw", learning_rate=5e-7, schedule="constant", warmup_steps=500)
  return common.apply(config, arg, {"smoke": text.smoke, "lora": text.lora, "planned": text.of_size("ssd1b", 128)})


def sweep() -> list[dict]:
  """DDIL and DDIL with reflection."""
  return product({"arg": ("", "reflected")})
