"""Prompts of a user's own as conditions of a text-conditional run."""

import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from ml_collections import ConfigDict

from ddil_jax import config_checks
from ddil_jax.data import prepared
from ddil_jax.data.dataset import Dataset
from ddil_jax.errors import UsageError
from ddil_jax.interop import text, weights


def encoder(config: ConfigDict, encoders: Sequence[str], tokenizer: str) -> text.Prompts:
  """The text encoders with which a run's prepared set was made.

  Args:
    config: of the run.
    encoders: files of `ddil convert --component=text_encoder`, one or two.
    tokenizer: folder of the tokenizer, or of the pipeline.

  Raises:
    UsageError: a run without prompts, other encoders than the set's, files that cannot be read.
  """
  if config.data.name != "prepared":
    raise UsageError(f"this run was trained on {config.data.name}, which has no prompts")
  made_of = prepared.read_index(config.data.path).settings["files"]
  named = [name for name in ("text_encoder", "text_encoder_2") if name in made_of]
  if not named:
    raise UsageError(f"{config.data.path} was prepared without a text encoder, so this run has no prompts")
  for i, name in enumerate(named):
    wanted = made_of[name]
    if i >= len(encoders) or not encoders[i]:
      raise UsageError(f"--{name}=FILE is needed: {wanted['name']}, with which {config.data.path} was prepared")
    if weights.sha256(encoders[i]) != wanted["sha256"]:
      raise UsageError(f"--{name}={encoders[i]} is not the {wanted['name']} with which {config.data.path} was prepared:"
                       " the network would not understand its states")
  if not tokenizer:
    raise UsageError(f"--tokenizer=FOLDER is needed: {made_of['tokenizer']['name']}, with which {config.data.path} was"
                     " prepared")
  return text.Prompts([file for file in encoders[:len(named)]], tokenizer)


def conditions(data: Dataset, encode: text.Prompts, prompts: Sequence[str], num: int,
               say: Callable[[str], None] = print) -> dict[str, np.ndarray]:
  """What `num` samples of each prompt are conditioned on, prompt after prompt: rows [P num, ...].

  Args:
    say: is told of prompts that were cut.

  Raises:
    UsageError: an encoder of another width than the set's.
  """
  found = encode(list(prompts))
  for prompt, cut in zip(prompts, found.cut):
    if cut:
      say(f"the prompt '{prompt[:40]}...' has more than {encode.length} tokens; the rest is left out, as CLIP does")
  rows = {name: np.asarray(value) for name, value in found.cond.items()}
  if "time_ids" in data.cond:
    height, width, _ = config_checks.pixel_shape(data)
    rows["time_ids"] = np.tile(np.float32([height, width, 0, 0, height, width]), (len(prompts), 1))
  for name, value in rows.items():
    if name not in data.cond or value.shape[1:] != data.cond[name].shape[1:]:
      raise UsageError(f"the text encoder gives {name} {list(value.shape[1:])}, the run's set has "
                       + (str(list(data.cond[name].shape[1:])) if name in data.cond else "none"))
  each = np.repeat(np.arange(len(prompts)), num)
  return {"label": np.zeros(len(each), np.int32), **{name: value[each] for name, value in rows.items()}}


def file_names(folder, prompts: Sequence[str], num: int) -> list[pathlib.Path]:
  """A file for each sample of `conditions`: FOLDER/00-a-red-heart-0.png; whatever a prompt holds, it stays in FOLDER."""
  words = ["".join(c if c.isascii() and c.isalnum() else "-" for c in prompt.lower())[:40].strip("-")
           for prompt in prompts]
  return [pathlib.Path(folder) / f"{i:02}-{name}-{k}.png" for i, name in enumerate(words) for k in range(num)]
