"""Text-to-image sets for tests: sources as users have them, and tiny networks of Stable Diffusion's kinds."""

import io
import json
import math
import pathlib
import tarfile
import zipfile

import flax
import numpy as np
from PIL import Image

from ddil_jax.interop import configs, diffusers, weights
from ddil_jax.main import main

WORDS = ("red", "green", "blue", "square", "circle", "a", "big")
SIZE = 16
VAE = dict(block_out_channels=[4, 8], layers_per_block=1, norm_num_groups=2, latent_channels=4, scaling_factor=0.2,
           down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, sample_size=SIZE)
TEXT = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, vocab_size=99,
            max_position_embeddings=12, bos_token_id=97, eos_token_id=98, hidden_act="gelu", projection_dim=16)


def pixels(i: int, height=SIZE, width=SIZE, channels=3) -> np.ndarray:
  """uint8 noise [H,W,C]."""
  return np.random.default_rng(i).integers(0, 256, (height, width, channels), dtype=np.uint8)


def png(array: np.ndarray) -> bytes:
  out = io.BytesIO()
  Image.fromarray(array).save(out, "png")
  return out.getvalue()


def caption(i: int) -> str:
  return f"a {WORDS[i % 3]} {WORDS[3 + i % 2]}"


def captions(count: int) -> str:
  return "".join(json.dumps({"file": f"{i:03d}.png", "caption": caption(i)}) + "\n" for i in range(count))


def write_folder(folder: pathlib.Path, count: int) -> pathlib.Path:
  """Images 000.png ... and captions.jsonl."""
  folder.mkdir(parents=True)
  for i in range(count):
    (folder / f"{i:03d}.png").write_bytes(png(pixels(i)))
  (folder / "captions.jsonl").write_text(captions(count))
  return folder


def write_zip(path: pathlib.Path, members: dict[str, bytes]) -> pathlib.Path:
  with zipfile.ZipFile(path, "w") as archive:
    for name, data in members.items():
      archive.writestr(zipfile.ZipInfo(name), data)
  return path


def write_tar(path: pathlib.Path, members: dict[str, bytes], links: dict[str, str] | None = None) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, "w") as tar:
    for name, data in members.items():
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))
    for name, target in (links or {}).items():
      info = tarfile.TarInfo(name)
      info.type, info.linkname = tarfile.SYMTYPE, target
      tar.addfile(info)


def write_tokenizer(folder: pathlib.Path, pad: str = "<|endoftext|>") -> None:
  """CLIP's two files, with a token for each of WORDS and for each letter."""
  folder.mkdir(parents=True)
  vocabulary, merges = {"!": 0}, []
  for letter in "abcdefghijklmnopqrstuvwxyz":
    for token in (letter, f"{letter}</w>"):
      vocabulary[token] = len(vocabulary)
  for word in WORDS:
    parts = [*word[:-1], f"{word[-1]}</w>"]
    while len(parts) > 1:
      pair, joined = parts[:2], parts[0] + parts[1]
      if (line := " ".join(pair)) not in merges:
        merges.append(line)
      vocabulary.setdefault(joined, len(vocabulary))
      parts[:2] = [joined]
  vocabulary |= {"<|startoftext|>": 97, "<|endoftext|>": 98}
  (folder / "vocab.json").write_text(json.dumps(vocabulary))
  (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
  (folder / "tokenizer_config.json").write_text(json.dumps(
      {"tokenizer_class": "CLIPTokenizer", "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
       "unk_token": "<|endoftext|>", "pad_token": pad, "model_max_length": 12}))


def draw(rng, path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
  """A parameter of about the size that trained ones have; biases and gains too."""
  fan_in = math.prod(shape[:-1]) if path[-1] == "kernel" else 4
  return (rng.standard_normal(shape) / fan_in**0.5 + (path[-1] == "scale")).astype(np.float32)


def write_pipeline(folder: pathlib.Path) -> None:
  """A pipeline of random weights: vae, two text encoders and tokenizers; beside each network its converted file."""
  named = {"vae": VAE | {"_class_name": "AutoencoderKL"}, "text_encoder": TEXT | {"architectures": ["CLIPTextModel"]},
           "text_encoder_2": TEXT | {"architectures": ["CLIPTextModelWithProjection"], "hidden_size": 20}}
  rng = np.random.default_rng(0)
  for name, config in named.items():
    module, _ = configs.make(config)
    flat = flax.traverse_util.flatten_dict(weights.template(module, *module.example())["params"])
    params = {path: draw(rng, path, leaf.shape) for path, leaf in flat.items()}
    diffusers.export(flax.traverse_util.unflatten_dict(params), {"config": config}, folder / name)
    assert main(["convert", str(folder), f"--component={name}", f"--out={folder / name}.safetensors"]) == 0
  (folder / "model_index.json").write_text(json.dumps({"force_zeros_for_empty_prompt": True}))
  write_tokenizer(folder / "tokenizer")
  write_tokenizer(folder / "tokenizer_2", "!")
