"""What configs of text-conditional networks share: Stable Diffusion's process on latents with prompts."""

import os
import pathlib

from configs import common
from ml_collections import ConfigDict


def unet(name: str) -> str:
  """Path of a network's config.json in configs/unets/."""
  path = pathlib.Path(__file__).parent / "unets" / f"{name}.json"
  return os.path.relpath(path) if path.is_relative_to(pathlib.Path.cwd()) else str(path)


def latents(config: ConfigDict, path: str) -> ConfigDict:
  """Latents and prompts that `ddil prepare` wrote to `path`, and the process of Stable Diffusion."""
  config.data.update(name="prepared", path=path)
  config.process.name, config.grid.name = "stable_diffusion", "ddim"
  with config.reflect.ignore_type():
    config.reflect.lo = config.reflect.hi = ()  # of each channel of the latents
  return config


def smoke(config: ConfigDict) -> ConfigDict:
  """Two steps of a tiny network on made-up prompts."""
  common.smoke(config)
  config.data.update(name="fake_text", path="")
  config.model.update(file=unet("tiny"), dtype="float32", remat="none")
  for name in ("lora", "critic_lora"):
    config.model[name] = min(config.model[name], 4)  # larger factors are larger than its kernels
  config.teacher.update(path="", dtype="float32")
  config.eval.update(extractor="", captions="", metrics=("fd", "saturation"))
  return config


def lora(config: ConfigDict) -> ConfigDict:
  """The student trains a LoRA of rank 64 over the frozen teacher, which diffusers' format can hold; so does a critic.

  So the student of LCM has no embedding of the guidance scale, which would be trained whole: the teacher's scale is
  folded in. Rank and scale are ours.
  """
  config.model.update(lora=64, guidance_embedding=0)
  if "guidance_range" in config.objective:
    config.objective.guidance_range = ()
  if "period" in config.objective:
    config.model.critic_lora = 64
  return config


def of_size(name: str, latent_size: int):
  """The modifier `planned`: the network at full size without its weights or data, for `ddil plan`."""
  def planned(config: ConfigDict) -> ConfigDict:
    config.data.update(name="fake_text", path="", image_size=latent_size)
    config.model.file = unet(name)
    config.eval.update(extractor="", captions="", num_samples=100, shift_samples=0)
    return config
  return planned


def published(config: ConfigDict, model: str, data: str) -> ConfigDict:
  """What configs of Stable Diffusion's networks share: converted weights, prepared data, and accelerators.

  All of it is ours: bfloat16, the mesh, the averages, and 30,000 images for the FID.
  """
  latents(config, data)
  config.prediction.name = "eps"
  config.model.update(file=model, dtype="bfloat16")
  config.teacher.update(dtype="bfloat16", guidance_scale=7.5)
  config.states.update(teacher_steps=16, capacity=16 * config.train.batch_size)
  config.train.update(parallel="mesh", checkpoint_every=1000, ema=(0.999,))
  config.eval.update(extractor="inception:models/inception.safetensors", metrics=("fd", "density", "coverage"),
                     captions="clip:models/clip.safetensors", num_samples=30_000, batch_size=64,
                     reference="test", shift_samples=0)
  return config
