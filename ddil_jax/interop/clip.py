"""CLIP folders in the layout of Hugging Face: config.json, model.safetensors, the tokenizer's files."""

import pathlib
from collections.abc import Sequence

import numpy as np

from ddil_jax.errors import UsageError
from ddil_jax.interop import weights
from ddil_jax.models.clip import ACTIVATIONS, CLIP, MEAN, STD, Tower

# Fields that a config may leave out, with the values of the original models.
_VISION = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=224,
               patch_size=32, hidden_act="quick_gelu", layer_norm_eps=1e-5)
_TEXT = dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8, vocab_size=49408,
             max_position_embeddings=77, hidden_act="quick_gelu", layer_norm_eps=1e-5, eos_token_id=49407)
_BICUBIC = 3  # Pillow's number


def read_folder(folder) -> tuple[dict, dict[str, np.ndarray], dict[str, str]]:
  """A CLIP model's folder: (fields of `make`, tensors by name, {file: sha256}).

  Raises:
    UsageError: files that are absent, damaged, or of another model.
  """
  folder = pathlib.Path(folder)
  path = folder / "config.json"
  config = weights.read_json(path)
  if config.get("model_type") != "clip":
    raise UsageError(f"{path} describes a model of type '{config.get('model_type')}'; 'clip' is expected")
  try:
    fields = fields_of(config)
  except UsageError as e:
    raise UsageError(f"{path}: {e}") from e
  prepared = folder / "preprocessor_config.json"
  if prepared.exists():
    given = weights.read_json(prepared)
    if given.get("resample", _BICUBIC) != _BICUBIC or not given.get("do_center_crop", True):
      raise UsageError(f"{prepared}: bicubic resizing (resample {_BICUBIC}) and a centre crop are expected")
    fields |= {"mean": given.get("image_mean", fields["mean"]), "std": given.get("image_std", fields["std"])}
  tensors = weights.read_safetensors(folder / "model.safetensors")
  return fields, tensors, {name: weights.sha256(folder / name) for name in ("config.json", "model.safetensors")}


def fields_of(config: dict) -> dict:
  """Fields of `make` from a config.json. Raises UsageError for an unknown activation or heads that do not fit."""
  vision, text = (defaults | {k: v for k, v in (config.get(part) or {}).items() if k in defaults}
                  for part, defaults in (("vision_config", _VISION), ("text_config", _TEXT)))
  for part in (vision, text):
    if part["hidden_act"] not in ACTIVATIONS:
      raise UsageError(f"hidden_act '{part['hidden_act']}'; known are {', '.join(ACTIVATIONS)}")
    if part["hidden_size"] % part["num_attention_heads"]:
      raise UsageError(f"hidden_size {part['hidden_size']} is not divisible by {part['num_attention_heads']} heads")
  tower = lambda part: [part["hidden_size"], part["intermediate_size"], part["num_hidden_layers"],  # noqa: E731
                        part["num_attention_heads"], part["hidden_act"], part["layer_norm_eps"]]
  end = text["eos_token_id"]
  return dict(vision=tower(vision), text=tower(text), dim=config.get("projection_dim", 512),
              size=vision["image_size"], patch=vision["patch_size"], vocabulary=text["vocab_size"],
              length=text["max_position_embeddings"],
              # Old configs name 2, which is no end of text: such models read off the largest token.
              end=None if end == 2 else end, mean=list(MEAN), std=list(STD))


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
