"""Prompts as the networks of diffusers read them: tokens, and the states of one or two text encoders."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from ddil_jax.errors import UsageError
from ddil_jax.interop import clip, diffusers, weights
from ddil_jax.models.clip import TextEncoder

_TOKENIZERS = ("tokenizer", "tokenizer_2")


class Encoded(NamedTuple):
  """Prompts as arrays.

  Attributes:
    cond: what a UNet reads: "text" float32 [K,L,D], and of SDXL "text_pooled" float32 [K,P]; on the device, where they
      may still be being computed.
    tokens: int32 [K,L], of the first encoder.
    cut: bool [K], whose tokens were more than L.
  """
  cond: dict[str, jax.Array]
  tokens: np.ndarray
  cut: np.ndarray


class Prompts:
  """Encodes prompts.

      one encoder (Stable Diffusion 1, 2)   text = its states after the last layer, normalised
      two encoders (SDXL, SSD-1B)           text = both encoders' states before the last layer, side by side
                                            text_pooled = the second's projected state of the end token

  Args of the constructor:
    encoders: files of `ddil convert --component=text_encoder`, one or two.
    tokenizer: folder of the tokenizer; or a pipeline's, with `tokenizer/`, and `tokenizer_2/` for two encoders.

  Attributes:
    length: L, tokens of a prompt.

  Raises:
    UsageError: another kind of file, encoders or tokenizers that do not go together.
  """

  def __init__(self, encoders: Sequence, tokenizer):
    folders = tokenizer_folders(tokenizer, len(encoders))
    self._tokenizers = [clip.load_tokenizer(folder) for folder in folders]
    loaded = []
    for file, own, folder in zip(encoders, self._tokenizers, folders, strict=True):
      network = diffusers.load(file)
      if not isinstance(network.module, TextEncoder):
        raise UsageError(f"{file} holds {network.about['config'].get('_class_name', 'a network')}, no text encoder;"
                         " `ddil convert PIPELINE --component=text_encoder` makes one")
      if len(own) > network.module.vocabulary:
        raise UsageError(f"{folder} has {len(own):,} tokens, {file} knows {network.module.vocabulary:,}: they do not"
                         " belong together")
      loaded.append(network)
    modules = [network.module for network in loaded]
    if len({module.length for module in modules}) > 1:
      raise UsageError(f"{' and '.join(map(str, encoders))} read prompts of different lengths")
    if len(modules) == 2 and modules[1].dim is None:
      raise UsageError(f"{encoders[1]} has no projection: the second text encoder of SDXL is a"
                       " CLIPTextModelWithProjection")
    self.length = modules[0].length
    self._params = jax.device_put([network.params for network in loaded])
    self._zeros = len(modules) == 2 and _zeros_for_empty(pathlib.Path(tokenizer))

    @jax.jit
    def states(params, tokens):
      found = [module.apply({"params": p}, t) for module, p, t in zip(modules, params, tokens)]
      if len(found) == 1:
        return {"text": found[0].last}
      return {"text": jax.numpy.concatenate([f.penultimate for f in found], axis=-1), "text_pooled": found[1].pooled}

    self._states = states

  def __call__(self, prompts: Sequence[str]) -> Encoded:
    """Encodes K prompts; each K compiles its own program."""
    tokens, cut = zip(*(clip.token_ids(own, prompts, self.length) for own in self._tokenizers))
    return Encoded(self._states(self._params, tokens), tokens[0], np.any(cut, axis=0))

  def null(self, count: int = 1) -> dict[str, np.ndarray]:
    """`cond` of no prompt, without K: the empty one, or zeros where the pipeline's model_index.json says so (SDXL's).

    Args:
      count: prompts of a batch whose program is compiled already.
    """
    cond = {name: np.asarray(x)[0] for name, x in self([""] * count).cond.items()}
    return {name: np.zeros_like(x) for name, x in cond.items()} if self._zeros else cond


def tokenizer_folders(folder, count: int) -> list[pathlib.Path]:
  """The folders of so many tokenizers; UsageError if they are not there.

  SDXL's two pad in different ways, so one cannot stand for both.
  """
  folder = pathlib.Path(folder)
  inner = [folder / name for name in _TOKENIZERS[:count]]
  if all(path.is_dir() for path in inner):
    return inner
  if count > 1:
    raise UsageError(f"{folder}: two text encoders need the pipeline's folder, with {' and '.join(_TOKENIZERS)} in it")
  return [folder]


def _zeros_for_empty(folder: pathlib.Path) -> bool:
  index = folder / "model_index.json"
  return index.is_file() and weights.read_json(index).get("force_zeros_for_empty_prompt") is True
