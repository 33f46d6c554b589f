"""DMD2 + DDIL on Stable Diffusion 1.5: 4 steps, half the states of forward-diffused data, half of the student's own.

    python -m ddil_jax train --config=configs/sd15_dmd2_ddil.py --workdir=runs/sd15_dmd2
    python -m ddil_jax plan --config=configs/sd15_dmd2_ddil.py:planned --topology=v5p:2x2x2

models/sd15_unet.safetensors is of `ddil convert`, data/sd15 of `ddil prepare` (docs/user_guide.md).

The period and 4 steps at 999, 749, 499, 249 are DMD2's (arXiv 2405.14867). All other numbers are ours.
"""

from configs import common, text
from ml_collections import ConfigDict

from ddil_jax.sweep import product


def get_config(arg: str | None = None) -> ConfigDict:
  config = common.common()
  config.train.update(steps=40_000, batch_size=64)
  text.published(config, "models/sd15_unet.safetensors", "data/sd15")
  config.objective = ConfigDict(dict(name="dmd2", num_steps=4, period=5, critic_weight="snr", weight_cap=100.0,
                                     gan_weight=5e-3, gan_critic_weight=1e-2, gan_balance="fixed"))
  config.grid.name = "dmd2"
  common.half_forward(config)
  config.optimizer.update(name="adamw", learning_rate=5e-7, schedule="constant", warmup_steps=500)
  return common.apply(config, arg, {"smoke": text.smoke, "lora": text.lora, "planned": text.of_size("sd15", 64)})


def sweep() -> list[dict]:
  """DDIL and DDIL with reflection."""
  return product({"arg": ("", "reflected")})
