"""CLIP folders in the layout of Hugging Face: config.json, model.safetensors, the tokenizer's files."""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from ddil_jax.errors import UsageError
from ddil_jax.interop import configs, weights
from ddil_jax.models.clip import CLIP, MEAN, STD, Tower

_BICUBIC = 3  # Pillow's number


def read_folder(folder) -> tuple[dict, dict[str, np.ndarray], dict[str, str]]:
  """A CLIP model's folder: (fields of `make`, tensors by name, {file: sha256}).

  Raises:
    UsageError: files that are absent, damaged, or of another model, and numbers that are no sensible sizes.
  """
  folder = pathlib.Path(folder)
  path = folder / "config.json"
  config = weights.read_json(path)
  if config.get("model_type") != "clip":
    raise UsageError(f"{path} describes a model of type '{str(config.get('model_type'))[:60]}'; 'clip' is expected")
  try:
    fields = fields_of(config)
  except UsageError as e:
    raise UsageError(f"{path}: {e}") from e
  prepared = folder / "preprocessor_config.json"
  with weights.reading(prepared):
    fields |= _colours(prepared) if prepared.exists() else {}
  tensors = weights.read_safetensors(folder / "model.safetensors")
  return fields, tensors, {name: weights.sha256(folder / name) for name in ("config.json", "model.safetensors")}


def fields_of(config: dict) -> dict:
  """Fields of `make` from a config.json; what it leaves out is as in the original base-patch32.

  Raises:
    UsageError: an unknown activation, heads that do not fit, numbers that are no sensible sizes.
  """
  both = configs.Fields(config)
  vision, text = (both.get(name, {}) for name in ("vision_config", "text_config"))
  for name, part in (("vision_config", vision), ("text_config", text)):
    if not isinstance(part, dict):
      raise UsageError(f"{name}: an object is expected")
  vision, text = configs.Fields(vision), configs.Fields(text)
  seen, read = configs.clip_tower(vision, 768, 3072, 12), configs.clip_tower(text)
  size, patch = vision.integer("image_size", 224), vision.integer("patch_size", 32)
  if patch > size:
    raise UsageError(f"patch_size={patch} is larger than image_size={size}")
  vocabulary, length, end = configs.clip_tokens(text)
  return dict(vision=list(dataclasses.astuple(seen)), text=list(dataclasses.astuple(read)),
              dim=both.integer("projection_dim", 512), size=size, patch=patch, vocabulary=vocabulary, length=length,
              end=end, mean=list(MEAN), std=list(STD))


def _colours(path: pathlib.Path) -> dict[str, list[float]]:
  """"mean" and "std" of preprocessor_config.json. Raises UsageError if images are prepared otherwise than here."""
  given = weights.read_json(path)
  if given.get("resample", _BICUBIC) != _BICUBIC or not given.get("do_center_crop", True):
    raise UsageError(f"{path}: bicubic resizing (resample {_BICUBIC}) and a centre crop are expected")
  found = {"mean": given.get("image_mean", list(MEAN)), "std": given.get("image_std", list(STD))}
  for name, values in found.items():
    if (not isinstance(values, list) or len(values) != 3 or not all(type(v) in (int, float) for v in values)
        or not all((0 < v if name == "std" else 0 <= v) and v <= 1 for v in values)):
      raise UsageError(f"{path}: image_{name} has to be three numbers of colours in [0, 1]")
  return found


def make(vision: Sequence, text: Sequence, mean: Sequence, std: Sequence, **fields) -> CLIP:
  """The module from fields that JSON can hold."""
  return CLIP(Tower(*vision), Tower(*text), mean=tuple(mean), std=tuple(std), **fields)


def tokenize(folder, texts: Sequence[str], length: int = 77) -> np.ndarray:
  """Token ids int32 [K,length] of texts, cut and padded, by the tokenizer in a CLIP model's folder.

  Raises:
    UsageError: transformers is not installed, or the folder has no tokenizer.
  """
  return token_ids(load_tokenizer(folder), texts, length)[0]


def load_tokenizer(folder):
  """CLIP's tokenizer of transformers from the files in a folder. Raises UsageError as `tokenize`."""
  folder = pathlib.Path(folder)
  if not (folder / "tokenizer.json").is_file() and not ((folder / "vocab.json").is_file()
                                                        and (folder / "merges.txt").is_file()):
    raise UsageError(f"{folder} has no tokenizer: tokenizer.json, or vocab.json and merges.txt, are expected")
  try:
    from transformers import CLIPTokenizer
  except ImportError as e:
    raise UsageError("texts need CLIP's tokenizer: `pip install transformers`, or give token ids") from e
  try:
    return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
  except Exception as e:  # of two libraries, on damaged files
    raise UsageError(f"the tokenizer in {folder} cannot be read: {' '.join(str(e).split())[:200]}") from e


def token_ids(tokenizer, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
  """(int32 [K,length], bool [K]): token ids, cut and padded as the tokenizer says, and which texts were cut."""
  out = np.full((len(texts), length), tokenizer.pad_token_id, np.int32)
  cut = np.zeros(len(texts), bool)
  for i, ids in enumerate(tokenizer(list(texts), verbose=False)["input_ids"]):
    cut[i] = len(ids) > length
    kept = [*ids[:length - 1], ids[-1]] if cut[i] else ids  # the end of the text stays
    out[i, :len(kept)] = kept
  return out, cut
