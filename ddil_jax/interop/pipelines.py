"""A teacher's pipeline with the student in the place of its UNet, as a folder that diffusers loads whole.

    FOLDER/model_index.json    the class of the pipeline, and the class of each component
    FOLDER/COMPONENT/          unet and scheduler are the student's; vae, text encoders, tokenizers and others are copies
"""

import pathlib
import re
import shutil
from typing import Any, NamedTuple

from ddil_jax import files
from ddil_jax.errors import UsageError
from ddil_jax.interop import diffusers, weights
from ddil_jax.registry import unknown

CLASSES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
INDEX = "model_index.json"
_OWN = ("unet", "scheduler")
# Whose classes a pipeline may name: others are code that comes with it.
_LIBRARIES = ("diffusers", "transformers", "stable_diffusion")
_COPIED = (".json", ".txt", ".safetensors")
_VARIANT = r"(.+)\.(fp16|non_ema)(\..+|-\d.+)"
# What a student shares with the UNet that was in the pipeline.
_SHARED = ("in_channels", "out_channels", "cross_attention_dim", "addition_embed_type", "addition_time_embed_dim",
           "projection_class_embeddings_input_dim")


class Pipeline(NamedTuple):
  """What is taken over: the content of model_index.json, and {path in the folder: file}."""
  index: dict[str, Any]
  copies: dict[str, pathlib.Path]


def read(folder, config: dict[str, Any]) -> Pipeline:
  """What a student's pipeline takes over from its teacher's; only looks.

  Args:
    folder: of the teacher's pipeline.
    config: config.json of the student's UNet.

  Raises:
    UsageError: no pipeline, one of another class or with code of its own, for another UNet, with missing or pickled
      weights, or with links out of its folder.
  """
  with weights.reading(folder):
    return _read(pathlib.Path(folder), config)


def _read(folder: pathlib.Path, config: dict[str, Any]) -> Pipeline:
  path = folder / INDEX
  if not path.is_file():
    raise UsageError(f"{folder} is no folder of a pipeline: it has no {INDEX}; give that of the teacher")
  index = weights.read_json(path)
  if index.get("_class_name") not in CLASSES:
    raise UsageError(f"{path}: {unknown('pipeline', str(index.get('_class_name'))[:80], CLASSES)}")
  _require_its_unet(folder, config)
  copies = {}
  for name, value in index.items():
    if isinstance(value, list) and value != [None, None] and name not in _OWN:
      if not re.fullmatch(r"\w+", name) or len(value) != 2 or value[0] not in _LIBRARIES:
        raise UsageError(f"{path}: {name[:40]}={str(value)[:80]} is no component of {' or '.join(_LIBRARIES)}")
      copies |= {f"{name}/{file.name}": file for file in _files(folder, name)}
  return Pipeline(index, copies | {file.name: file for file in sorted(folder.glob("LICENSE*")) if file.is_file()})


def write(folder, pipeline: Pipeline, unet: str, scheduler: str) -> None:
  """Writes the copies and, last, model_index.json, next to a student's `unet/` and `scheduler/` of these classes."""
  folder = pathlib.Path(folder)
  for name, file in pipeline.copies.items():
    with files.whole(folder / name) as f, open(file, "rb") as given:
      shutil.copyfileobj(given, f)
  own = dict(zip(_OWN, (["diffusers", unet], ["diffusers", scheduler])))
  files.write_json(folder / INDEX, {k: v for k, v in pipeline.index.items() if k != "_name_or_path"} | own)


def _require_its_unet(folder: pathlib.Path, config: dict[str, Any]) -> None:
  path = folder / "unet" / "config.json"
  if not path.is_file():
    return  # the student is another one anyway
  theirs = weights.read_json(path)
  for name in _SHARED:
    if theirs.get(name) != config.get(name):
      raise UsageError(f"{path}: {name}={str(theirs.get(name))[:60]}, but the student's is {config.get(name)}: give the"
                       " pipeline of its teacher")


def _files(folder: pathlib.Path, name: str) -> list[pathlib.Path]:
  """The files of a component that are copied: no pickles, no second precision of the same weights."""
  inside = folder / name
  if not inside.is_dir():
    raise UsageError(f"{folder / INDEX} names {name}, but {inside} is no folder")
  there = sorted(path for path in inside.iterdir() if path.is_file())
  weighty = [path.name for path in there if path.suffix == ".safetensors"]
  if not weighty and (pickles := [path.name for path in there if path.suffix in diffusers.PICKLES]):
    raise UsageError(f"{inside} has its weights as {pickles[0]}, a pickle, which is not passed on; where it is trusted,"
                     " load the pipeline with diffusers and save_pretrained it again")
  names = {path.name for path in there}
  kept = [path for path in there if path.suffix in _COPIED
          and not ((found := re.fullmatch(_VARIANT, path.name)) and found[1] + found[3] in names)]
  for path in kept:
    # A snapshot of the Hub is links into its own cache.
    if not any(path.resolve().is_relative_to(root.resolve()) for root in (folder, folder / ".." / ".." / "blobs")):
      raise UsageError(f"{path} is a link out of {folder}")
  if "config.json" in names and not weighty:
    raise UsageError(f"{inside} has a config.json and no weights as safetensors")
  return kept
