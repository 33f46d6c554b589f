"""Teacher of captioned emoji (32x32, as latents 8x8x4): a UNet2DConditionModel of 1.1M parameters, v-prediction.

    python -m launch.demo_t2i --emoji=DIR --workdir=runs/emoji    # prepares, trains and distils
    python -m ddil_jax train --config=configs/emoji_teacher.py --workdir=runs/emoji/teacher
"""

from configs import common, text
from ml_collections import ConfigDict

from ddil_jax.sweep import product

METRICS = ("fd", "kd", "precision", "recall", "density", "coverage")


def emoji(config: ConfigDict) -> ConfigDict:
  """What every emoji config shares: the data, the network, and CLIP's features to measure with."""
  text.latents(config, "runs/emoji/data")
  config.model.file = text.unet("emoji")
  config.prediction.name = "v"
  clip = "clip:runs/emoji/models/clip.safetensors"
  config.eval.update(extractor=clip, captions=clip, metrics=METRICS, num_samples=1000,
                     batch_size=250, shift_samples=300)
  return config


def get_config(arg: str | None = None) -> ConfigDict:
  config = emoji(common.common())
  config.objective = ConfigDict(dict(name="denoising", weight="v_mse", label_dropout=0.1, sampler_steps=32))
  config.optimizer.update(name="adam", learning_rate=1e-3, schedule="cosine", warmup_steps=100)
  config.train.update(steps=5000, batch_size=32, log_every=100, checkpoint_every=1000)
  config.eval.update(sampler_steps=(4, 2), guidance_scales=(1.0, 2.0))
  return common.apply(config, arg, {"smoke": text.smoke})


def sweep() -> list[dict]:
  """Seeds of the teacher."""
  return product({"seed": range(3)})
