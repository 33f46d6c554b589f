"""Progressive distillation + DDIL on Stable Diffusion 1.5: 8 -> 4 -> 2 steps, guidance 7.5 folded in by the first stage.

    python -m ddil_jax train --config=configs/sd15_pd_ddil.py --workdir=runs/sd15_pd
    python -m ddil_jax plan --config=configs/sd15_pd_ddil.py:planned --topology=v5e:4x4

models/sd15_unet.safetensors is of `ddil convert`, data/sd15 of `ddil prepare` (docs/user_guide.md).

The DDIL paper names the method and the network, and no more: all numbers are ours.
"""

from configs import common, text
from ml_collections import ConfigDict

from ddil_jax.sweep import product


def get_config(arg: str | None = None) -> ConfigDict:
  config = common.common()
  config.train.update(steps=10_000, batch_size=64, stages=(8, 4, 2))
  text.published(config, "models/sd15_unet.safetensors", "data/sd15")
  config.objective = ConfigDict(dict(name="pd", num_steps=8, weight="snr_trunc", snr_cap=1e6))
  config.states.update(common.DDIL)
  config.optimizer.update(name="adamw", learning_rate=1e-5, schedule="linear", warmup_steps=500)
  return common.apply(config, arg, {"smoke": text.smoke, "lora": text.lora, "planned": text.of_size("sd15", 64)})


def sweep() -> list[dict]:
  """DDIL and DDIL with reflection."""
  return product({"arg": ("", "reflected")})
