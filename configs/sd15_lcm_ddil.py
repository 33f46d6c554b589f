"""LCM + DDIL on Stable Diffusion 1.5: the student reads the guidance scale, 4-step sampling.

    python -m ddil_jax train --config=configs/sd15_lcm_ddil.py --workdir=runs/sd15_lcm
    python -m ddil_jax plan --config=configs/sd15_lcm_ddil.py:planned --topology=v5e:4x4

models/sd15_unet.safetensors is of `ddil convert`, data/sd15 of `ddil prepare` (docs/user_guide.md).

From LCM's paper (arXiv 2310.04378): a skip of 20 (50 solver times), omega from 2 to 14, which is a guidance scale
g = 1 + omega from 3 to 15 here, the target's decay .95, batch 72, rate 8e-6. Pseudo-Huber is of its script. Ours: the
mixture (the DDIL paper states none), reflection off, length, averages. With `lora` the scale is folded in (7.5).
"""

from configs import common, text
from ml_collections import ConfigDict

from ddil_jax.sweep import product


def get_config(arg: str | None = None) -> ConfigDict:
  config = common.common()
  config.train.update(steps=40_000, batch_size=72)
  text.published(config, "models/sd15_unet.safetensors", "data/sd15")
  config.objective = ConfigDict(dict(name="lcm", num_scales=50, sampler_steps=4, distance="pseudo_huber", huber_c=1e-3,
                                     target_decay=0.95, guidance_range=(3.0, 15.0)))
  config.grid.name = "lcm"
  config.model.guidance_embedding = 256  # the paper's
  config.states.update(common.DDIL)
  config.optimizer.update(name="adamw", learning_rate=8e-6, schedule="constant", warmup_steps=500)
  config.eval.sampler_steps = (2,)
  return common.apply(config, arg, {"smoke": text.smoke, "lora": text.lora, "planned": text.of_size("sd15", 64)})


def sweep() -> list[dict]:
  """DDIL and DDIL with reflection."""
  return product({"arg": ("", "reflected")})
