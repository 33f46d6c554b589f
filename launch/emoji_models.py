"""The small networks of the text-to-image demo, trained from scratch: an autoencoder, a tokenizer and a CLIP.

    python -m launch.emoji_models --data=FOLDER --out=DIR

They take the places that the published ones have in Stable Diffusion, in the same kinds of files. What is in DIR
already is not made again.
"""

import argparse
import functools
import pathlib
import string
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ddil_jax import files
from ddil_jax.data.dataset import to_unit
from ddil_jax.errors import UsageError
from ddil_jax.evaluation import grids, perceptual
from ddil_jax.evaluation.features import in_batches
from ddil_jax.interop import clip, configs, diffusers, extractors
from ddil_jax.types import Params
from launch import emoji as emoji_lib
from launch.emoji import Emoji
from launch.sweep import exit_code

VAE, TOKENIZER, CLIP, TEXT_ENCODER, REPORT = ("vae.safetensors", "tokenizer", "clip.safetensors",
                                              "text_encoder.safetensors", "emoji_models.json")
RECONSTRUCTIONS = "reconstructions.png"
LENGTH = 16  # the longest caption has 14 tokens
# 32x32x3 -> 8x8x4. The first level is where the time goes, so it is narrow.
VAE_CONFIG = {
    "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "sample_size": 32, "latent_channels": 4,
    "block_out_channels": [8, 16, 32], "layers_per_block": 1, "norm_num_groups": 2, "act_fn": "silu",
    "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3,
    "mid_block_add_attention": True}
_TOWER = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
CLIP_CONFIG = {
    "model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": 64,
    "vision_config": _TOWER | {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4,
                               "num_attention_heads": 4, "image_size": 32, "patch_size": 8},
    "text_config": _TOWER | {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3,
                             "num_attention_heads": 4, "vocab_size": 2048, "max_position_embeddings": LENGTH,
                             "bos_token_id": 0, "eos_token_id": 1}}


class Size(NamedTuple):
  """How much is trained: steps, examples a step and the highest learning rate, of each network."""
  vae: tuple[int, int, float] = (2500, 16, 3e-3)
  clip: tuple[int, int, float] = (600, 128, 1e-3)


KL_WEIGHT = 1e-3
# Brightness, yellow to blue and green to magenta, of red, green and blue. The last varies least in images, so that
# an autoencoder would give it up first, or learn it last: red and orange would be one colour. So it counts more.
OPPONENT = np.float32([[1, 1, 1], [1, 0, -1], [1, -2, 1]]).T / np.sqrt(np.float32([3, 2, 6])) * np.float32([1, 1.5, 3])
SMOKE = Size((2, 4, 1e-3), (2, 4, 1e-3))


def fit(loss: Callable, params: Params, batch: Callable[[int], tuple], size: tuple[int, int, float], what: str,
        decay: float = 0.0) -> tuple[Params, dict]:
  """Minimises a loss by AdamW; the learning rate rises for a twentieth of the steps, then falls to 0 as a cosine.

  Args:
    loss: (params, key, *arrays) -> (scalar, {name: scalar}).
    batch: step -> arrays.
    size: steps, examples a step, highest learning rate.
    decay: weight decay of matrices.

  Returns:
    (parameters, {"loss": of the last tenth of the steps, the other numbers likewise, "steps", "seconds"}).
  """
  steps, _, rate = size
  schedule = optax.warmup_cosine_decay_schedule(0, rate, steps // 20 + 1, steps + 1)
  matrices = lambda params: jax.tree.map(lambda x: x.ndim > 1, params)  # noqa: E731
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=decay, mask=matrices))

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, state, key, *arrays):
    (value, numbers), gradient = jax.value_and_grad(loss, has_aux=True)(params, key, *arrays)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, {"loss": value} | numbers

  state, root, history, began = optimizer.init(params), jax.random.key(0), [], time.monotonic()
  for i in range(steps):
    params, state, numbers = step(params, state, jax.random.fold_in(root, i), *batch(i))
    history.append({name: float(value) for name, value in numbers.items()})
    if i == 0:
      compiled = time.monotonic()
    elif i % 50 == 0 or i == steps - 1:
      each = (time.monotonic() - compiled) / i
      print(f"{what} {i + 1}/{steps}: {_said(history[-50:])}, {1 / each:.1f} steps/s,"
            f" {each * (steps - 1 - i):.0f} s left", flush=True)
  last = history[-max(1, steps // 10):]
  return params, {name: float(np.mean([h[name] for h in last])) for name in last[0]} | {
      "steps": steps, "seconds": round(time.monotonic() - began, 1)}


def _said(history):
  return ", ".join(f"{name} {np.mean([h[name] for h in history]):.4f}" for name in history[0])


def pick(rng: np.random.Generator, concepts: np.ndarray, count: int) -> np.ndarray:
  """Indices [count] of images of different concepts, as far as there are so many: of each one of its skin tones."""
  order = rng.permutation(len(concepts))
  _, first = np.unique(concepts[order], return_index=True)
  chosen = rng.permutation(order[first])
  return np.resize(chosen, count)


def train_vae(emoji: Emoji, size: tuple[int, int, float]) -> tuple[Params, dict, dict]:
  """The autoencoder, of means over pixels and latents:

      loss = |d| + d^2 + |c| + c^2 + KL_WEIGHT KL(posterior | N(0, 1)),   d = y - x,   c = OPPONENT mean_4x4(d)

  Images are mirrored at random, texts and all: it has to reproduce them, not to read them.

  Returns:
    (parameters, config with the scaling factor that gives latents a deviation of 1, numbers; "test_psnr" in dB is of
    images held out).
  """
  module = configs.make(VAE_CONFIG | {"scaling_factor": 1.0})[0]
  train, test = emoji.where(~emoji.is_test), emoji.where(emoji.is_test)
  rng = np.random.default_rng(0)

  def batch(i):
    x = to_unit(train.images[pick(rng, train.concepts, size[1])], (0, 255))
    mirrored = rng.random(len(x)) < 0.5
    x[mirrored] = x[mirrored, :, ::-1]
    return (x,)

  def loss(params, key, x):
    mean, std = module.apply({"params": params}, x, method="encode")
    z = mean + std * jax.random.normal(key, mean.shape)
    wrong = module.apply({"params": params}, z, method="decode") - x
    kl = 0.5 * jnp.mean(mean**2 + std**2 - 1 - 2 * jnp.log(std))
    l1, l2 = jnp.abs(wrong).mean(), jnp.square(wrong).mean()
    colour = nn.avg_pool(wrong, (4, 4), (4, 4)) @ OPPONENT
    colour = jnp.abs(colour).mean() + jnp.square(colour).mean()
    return l1 + l2 + colour + KL_WEIGHT * kl, {"l1": l1, "l2": l2, "colour": colour, "kl": kl}

  params, numbers = fit(loss, _init(module, *module.example()), batch, size, "autoencoder")
  encode = jax.jit(lambda x: module.apply({"params": params}, x, method="encode"))
  mean, std = in_batches(encode, to_unit(train.images, (0, 255)))
  config = VAE_CONFIG | {"scaling_factor": round(float(1 / mean.std()), 5)}
  again = reconstruct(params, config, test.images)
  error = np.mean(np.square(again - to_unit(test.images, (0, 255))), axis=(1, 2, 3))
  return params, config, numbers | {
      "latent_mean": [round(float(v), 3) for v in mean.mean(axis=(0, 1, 2))], "latent_std": float(mean.std()),
      "posterior_std": float(std.mean()), "test_psnr": float(np.mean(10 * np.log10(4 / error)))}


def reconstruct(params: Params, config: dict, images: np.ndarray) -> np.ndarray:
  """images uint8 [N,S,S,3] as the autoencoder gives them back, float32 in [-1, 1]."""
  module = configs.make(config)[0]
  again = in_batches(jax.jit(lambda x: module.apply({"params": params}, x)), to_unit(images, (0, 255)))
  return np.clip(again, -1, 1)


def picture(images: np.ndarray, again: np.ndarray) -> np.ndarray:
  """Rows of images uint8 [N,S,S,3], each above a row of what became of them, [N,S,S,3] in [-1, 1]; full rows only."""
  columns, shape = min(16, len(images)), images.shape[1:]
  full = len(images) // columns * columns
  pairs = np.stack([x[:full].reshape(-1, columns, *shape) for x in (to_unit(images, (0, 255)), again)], axis=1)
  return grids.image_grid(pairs.reshape(-1, *shape), columns, scale=2)


def train_tokenizer(emoji: Emoji, folder: pathlib.Path) -> None:
  """CLIP's tokenizer with the byte-pair merges of these captions and keywords.

  Raises:
    UsageError: transformers is not installed.
  """
  try:
    from transformers import CLIPTokenizer
  except ImportError as e:
    raise UsageError("a tokenizer is made by transformers: `pip install transformers`") from e
  # The last line: every character may end a word, whether one of these words ends so or not.
  texts = [*emoji.captions, *(word for words in emoji.keywords for word in words),
           *string.ascii_lowercase, *string.digits, *string.punctuation]
  size = CLIP_CONFIG["text_config"]["vocab_size"]
  CLIPTokenizer().train_new_from_iterator(texts, size, show_progress=False).save_pretrained(folder)


def train_clip(emoji: Emoji, tokenizer: pathlib.Path, size: tuple[int, int, float]) -> tuple[Params, dict]:
  """CLIP, by which of a batch's texts belongs to which of its images.

  A text is the caption, or some of the keywords. Images are moved by up to two pixels; they are not mirrored, since
  captions tell left from right and there are letters.

  Returns:
    (parameters, numbers with `retrieval` of the images of the training and of those held out).
  """
  module = clip.make(**clip.fields_of(CLIP_CONFIG))
  train, test = emoji.where(~emoji.is_test), emoji.where(emoji.is_test)
  rng = np.random.default_rng(1)
  tokens = np.stack([clip.tokenize(tokenizer, texts, LENGTH) for texts in _texts(rng, train)], axis=1)

  def batch(i):
    index = pick(rng, train.concepts, size[1])
    which = rng.integers(-tokens.shape[1] + 2, tokens.shape[1], len(index)).clip(0)
    return _moved(rng, train.images[index]), tokens[index, which]

  def loss(params, key, images, tokens):
    x = images.astype(jnp.float32) / 127.5 - 1
    logits, _ = module.apply({"params": params}, x, tokens)
    own = jnp.arange(len(x))
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    value = 0.5 * (cross_entropy(logits, own) + cross_entropy(logits.T, own)).mean()
    return value, {"accuracy": jnp.mean(logits.argmax(axis=1) == own), "scale": jnp.exp(params["logit_scale"][0])}

  shapes = extractors.KINDS["clip"].inputs(module)
  params, numbers = fit(loss, _init(module, *shapes), batch, size, "CLIP", 0.2)
  for name, part in (("train", train), ("test", test)):
    numbers |= {f"{name}_{metric}": value for metric, value in retrieval(module, params, part, tokenizer).items()}
  return params, numbers


def retrieval(module, params: Params, emoji: Emoji, tokenizer: pathlib.Path) -> dict[str, float]:
  """How often an image's own caption is the first, and among the first five, of 100; one image of each concept."""
  _, one = np.unique(emoji.concepts, return_index=True)
  captions, own = np.unique(np.array(emoji.captions)[one], return_inverse=True)
  tokens = clip.tokenize(tokenizer, captions.tolist(), LENGTH)
  texts = perceptual.text_features(module, {"params": params}, tokens)
  images = in_batches(jax.jit(lambda x: module.apply({"params": params}, x)[1]), to_unit(emoji.images[one], (0, 255)))
  candidates = min(100, len(captions))
  return {"candidates": candidates, "clip_score": float(perceptual.clip_scores(images, texts[own]).mean())} | {
      f"top{top}": float(perceptual.retrieved(images, texts, own, candidates, top).mean()) for top in (1, 5)}


def _texts(rng, emoji, variants=8):
  yield emoji.captions
  for _ in range(variants - 1):
    yield [", ".join(rng.permutation(words)[:rng.integers(1, 4)]) if words else caption
           for caption, words in zip(emoji.captions, emoji.keywords)]


def _moved(rng, images, most=2):
  padded = np.pad(images, ((0, 0), (most, most), (most, most), (0, 0)), constant_values=255)
  size = images.shape[1]
  at = rng.integers(0, 2 * most + 1, (len(images), 2))
  return np.stack([x[i:i + size, j:j + size] for x, (i, j) in zip(padded, at)])


def _init(module, *shapes) -> Params:
  arguments = [jnp.zeros(s.shape, s.dtype) for s in shapes]
  return jax.jit(module.init)(jax.random.key(0), *arguments)["params"]


def main(argv: list[str] | None = None) -> int:
  """Returns the exit code: 0, 2 for wrong usage, 1 for a failure, 130 when interrupted."""
  args = argparse.ArgumentParser(prog="launch.emoji_models", description=__doc__.splitlines()[0])
  args.add_argument("--data", required=True, metavar="FOLDER", help=f"of {emoji_lib.ARCHIVE} and {emoji_lib.CAPTIONS}")
  args.add_argument("--out", required=True, metavar="DIR", help="where the networks go")
  args.add_argument("--smoke", action="store_true", help="two steps of each")
  args = args.parse_args(argv)

  def run() -> int:
    train(args.data, args.out, args.smoke)
    return 0

  return exit_code(run)


def train(data, out, smoke: bool = False) -> None:
  """Makes what is not there yet.

  The folder `out` has afterwards vae.safetensors and text_encoder.safetensors as `ddil convert` writes them,
  clip.safetensors as `ddil convert-extractor --kind=clip` does, tokenizer/ in CLIP's files, reconstructions.png (images
  that the autoencoder has not seen, and below what it gives back), and emoji_models.json, numbers of both trainings.

  Args:
    data: folder of the images and captions, see `emoji.load`.
    out: folder of the networks.
    smoke: two steps of each.

  Raises:
    UsageError: data that is absent or damaged; transformers is not installed.
  """
  out, size = pathlib.Path(out), SMOKE if smoke else Size()
  if not all((out / name).exists() for name in (TOKENIZER, VAE, CLIP, TEXT_ENCODER)):
    emoji = emoji_lib.load(data)
    print(f"{len(emoji.images)} images of {len(np.unique(emoji.concepts))} emoji, {emoji.is_test.mean():.0%} held out",
          flush=True)
  if not (out / TOKENIZER).exists():
    half = out / f".{TOKENIZER}"
    train_tokenizer(emoji, half)
    half.rename(out / TOKENIZER)
  if not (out / VAE).exists():
    params, config, numbers = train_vae(emoji, size.vae)
    unseen = emoji.images[emoji.is_test][::4][:64]
    grids.save_png(out / RECONSTRUCTIONS, picture(unseen, reconstruct(params, config, unseen)))
    _report(out, "vae", numbers)
    diffusers.save(out / VAE, params, _about(config))
  if not all((out / name).exists() for name in (CLIP, TEXT_ENCODER)):
    params, numbers = train_clip(emoji, out / TOKENIZER, size.clip)
    _report(out, "clip", numbers)
    text = CLIP_CONFIG["text_config"] | {"model_type": "clip_text_model", "architectures": ["CLIPTextModel"]}
    diffusers.save(out / TEXT_ENCODER, {"text_model": params["text_model"]}, _about(text))
    extractors.save(out / CLIP, "clip", clip.fields_of(CLIP_CONFIG), {"params": params}, {})
  for part, numbers in files.read_json(out / REPORT).items():
    print(f"{part}: " + ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                                  for name, value in numbers.items()))


def _about(config: dict) -> dict:
  return {"kind": diffusers.KIND, "config": config, "source": "launch.emoji_models", "license": ""}


def _report(out: pathlib.Path, part: str, numbers: dict) -> None:
  path = out / REPORT
  files.write_json(path, (files.read_json(path) if path.exists() else {}) | {part: numbers})


if __name__ == "__main__":
  sys.exit(main())
