"""The shards of `ddil prepare`: examples of a source are decoded, encoded and written, a shard at a time."""

import hashlib
import io
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from ddil_jax import files
from ddil_jax.data import captioned, folder, prepared
from ddil_jax.data.dataset import fit, to_unit
from ddil_jax.errors import RunError, UsageError
from ddil_jax.interop import diffusers, text, weights

DTYPES = ("float32", "float16")
_HALVED = ("latents", "text", "text_pooled")  # sizes above 2048 are no float16
_BATCH_PIXELS, _MOST_BATCH = 2**21, 64  # 8 images of 512 x 512
_SAY_EVERY = 10.0  # seconds


class Options(NamedTuple):
  """What is made.

  Attributes:
    vae: file of `ddil convert --component=vae`; "" keeps the pixels.
    text_encoder, text_encoder_2: files of `ddil convert`; "" is none. The second one is SDXL's.
    tokenizer: folder of the tokenizer, or of the pipeline.
    image_size: pixels of each side; 0 takes what the autoencoder was made for.
    shard_size: examples of a shard.
    keep_images: store the pixels next to the latents.
    dtype: of stored latents and text, one of DTYPES; they are computed, and read again, as float32.
  """
  vae: str = ""
  text_encoder: str = ""
  text_encoder_2: str = ""
  tokenizer: str = ""
  image_size: int = 0
  shard_size: int = 1000
  keep_images: bool = False
  dtype: str = "float32"


def duration(seconds: float) -> str:
  """In the unit in which one would say it."""
  minutes = seconds / 60
  return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def span_of(source: captioned.Source, settings: dict, number: int) -> range:
  """The examples of a shard, by their places in the source."""
  size = settings["shard_size"]
  return range(number * size, min((number + 1) * size, len(source.identities)))


def inputs_of(source: captioned.Source, settings: dict, number: int) -> str:
  """A hash of all that a shard is made from."""
  h = hashlib.sha256(json.dumps([prepared.FORMAT, settings], sort_keys=True).encode())
  for i in span_of(source, settings, number):
    h.update(source.identities[i].encode("utf-8", "replace") + b"\0\0")
  return h.hexdigest()


def _sidecar(out: pathlib.Path, number: int) -> pathlib.Path:
  return (out / prepared.shard_name(number)).with_suffix(".json")


def finished(out: pathlib.Path, number: int, inputs: str) -> dict | None:
  """What is written of a shard, if it is whole and made from these inputs."""
  path = _sidecar(out, number)
  if not path.is_file():
    return None
  try:
    about = files.read_json(path)
    shard, inputs_then = prepared.Shard(**about["shard"]), about["inputs"]
  except (UsageError, KeyError, TypeError):
    return None  # damaged: it is made anew
  file = out / prepared.shard_name(number)
  whole = not shard.count or file.is_file() and file.stat().st_size == shard.bytes
  return about if whole and inputs_then == inputs else None


def write_shards(out: pathlib.Path, encoder: "Encoder", source: captioned.Source, settings: dict, shards: list[str],
                 todo: list[int], say: Callable[[str], None]) -> None:
  """Makes the shards of the numbers `todo`; `shards` has the hash of what each of all is made from.

  Raises:
    RunError: a disk that fails.
  """
  total, done, start = sum(len(span_of(source, settings, i)) for i in todo), 0, time.perf_counter()
  said = start

  def progress(nth, looked_at):
    rate = looked_at / (time.perf_counter() - start)
    say(f"shard {nth:,} of {len(todo):,}: {looked_at:,} of {total:,} examples, {rate:.1f}/s,"
        f" {duration((total - looked_at) / rate)} left")

  for nth, number in enumerate(todo, 1):
    found = Found()
    path, span = out / prepared.shard_name(number), span_of(source, settings, number)
    _sidecar(out, number).unlink(missing_ok=True)  # it is of another shard
    with prepared.new_shard(path) as write:
      for seen, records in records_of(encoder, source, span, found):
        for record in records:
          write(record)
        if time.perf_counter() - said > _SAY_EVERY:
          progress(nth, done + seen)
          said = time.perf_counter()
    done += len(span)
    files.write_json(_sidecar(out, number), found.about(path, shards[number]))
  if todo:
    progress(len(todo), done)


def records_of(encoder: "Encoder", source: captioned.Source, span: range,
             found: "Found") -> Iterator[tuple[int, list[bytes]]]:
  """(examples looked at so far, records of the next batch) of a shard, in batches of one size."""
  batch, last = [], None
  for seen, i in enumerate(span, 1):
    image = found.read(source, i, encoder.image_size)
    batch += [image] if image else []
    if batch and (len(batch) == encoder.batch or seen == len(span)):
      started = seen, batch, encoder.start(batch)
      if last:  # the device works on a batch while the next one is read
        yield last[0], found.add(last[1], last[2]())
      batch, last = [], started
  if last:
    yield last[0], found.add(last[1], last[2]())


class Image(NamedTuple):
  """An example of the source, decoded."""
  key: str
  caption: str
  split: str
  pixels: np.ndarray | None  # uint8 [S,S,3]
  time_ids: np.ndarray  # float32 [6]: size as in the file, top and left of the crop, size of the result


class Found:
  """What is known of a shard when it is written."""

  def __init__(self):
    self.count, self.truncated, self.test, self.skipped = 0, 0, [], []
    self.fields: dict[str, Any] = {}
    self.moments: np.ndarray | None = None  # [5, c]: number, sum, sum of squares, lowest, highest of the latents

  def read(self, source: captioned.Source, i: int, size: int) -> Image | None:
    """An example; None if it cannot be used, which is noted."""
    key = source.identities[i].partition("\0")[0]
    try:
      example = source.read(i)
      key, caption = example.key, example.caption.encode("utf-8", "replace").decode()  # JSON can hold half characters
      if not caption.strip():
        raise ValueError("no caption")
      if example.image is None:
        return Image(key, caption, example.split, None, np.array([size, size, 0, 0, size, size], np.float32))
      image = folder.open_image(io.BytesIO(example.image), 3)
      (w, h), short = image.size, min(image.size)
      top, left = ((side * size / short - size) // 2 for side in (h, w))
      return Image(key, caption, example.split, np.asarray(fit(image, size)),
                    np.array([h, w, top, left, size, size], np.float32))
    except OSError as e:
      if e.errno is not None and not isinstance(e, FileNotFoundError | PermissionError):
        raise RunError(f"{source.name}: {key} cannot be read: {e}; run the same command again") from e
      self.skipped.append((key, folder.reason(e)))
    except Exception as e:  # decoders raise all sorts of things on damaged files
      self.skipped.append((key, folder.reason(e)))
    return None

  def add(self, batch: list[Image], encoded: tuple[dict[str, np.ndarray], np.ndarray]) -> list[bytes]:
    """The records of a batch."""
    arrays, cut = encoded
    records = []
    for i, image in enumerate(batch):
      row = {name: x[i] for name, x in arrays.items()}
      if bad := [name for name, x in row.items() if not np.isfinite(x).all()]:
        self.skipped.append((image.key, f"its {bad[0]} are not finite as {row[bad[0]].dtype}"))
        continue
      if image.split == "test" or not image.split and prepared.is_test(image.key):
        self.test.append(self.count)
      self.count += 1
      self.truncated += int(cut[i])
      if "latents" in row:
        self._measure(row["latents"])
      self.fields = {name: {"shape": list(x.shape), "dtype": str(x.dtype)} for name, x in row.items()}
      records.append(prepared.encode(image.key, image.caption, row))
    return records

  def _measure(self, latents: np.ndarray) -> None:
    x = latents.reshape(-1, latents.shape[-1]).astype(np.float64)
    here = np.stack([np.full(x.shape[1], len(x)), x.sum(0), (x**2).sum(0), x.min(0), x.max(0)])
    self.moments = here if self.moments is None else join_moments([self.moments, here])

  def about(self, path: pathlib.Path, inputs: str) -> dict:
    """What stands next to the shard."""
    if not self.count:
      path.unlink()
    shard = prepared.Shard(path.name if self.count else "", self.count, path.stat().st_size if self.count else 0,
                           weights.sha256(path) if self.count else "", tuple(self.test))
    return {"inputs": inputs, "shard": shard._asdict(), "fields": self.fields, "skipped": self.skipped,
            "truncated": self.truncated, "moments": None if self.moments is None else self.moments.tolist()}


def join_moments(moments: list[np.ndarray]) -> np.ndarray:
  """[5, c]: number, sum, sum of squares, lowest and highest of all together."""
  x = np.stack(moments)
  return np.stack([*x[:, :3].sum(0), x[:, 3].min(0), x[:, 4].max(0)])


# Networks -----------------------------------------------------------------------------------


class Encoder:
  """Batches of decoded examples -> their arrays.

  Latents are drawn from the autoencoder's posterior, as Stable Diffusion and LCM are trained, not its mean; once and
  for all, by a seed that is the example's key.
  """

  def __init__(self, options: Options, image_size: int, has_images: bool):
    self.image_size, self._has_images, self._keep = image_size, has_images, options.keep_images
    self._dtype = np.dtype(options.dtype)
    self.batch = max(1, min(_MOST_BATCH, _BATCH_PIXELS // image_size**2 if has_images and options.vae else _MOST_BATCH))
    encoders = [file for file in (options.text_encoder, options.text_encoder_2) if file]
    self._prompts = text.Prompts(encoders, options.tokenizer) if encoders else None
    self._sdxl = len(encoders) == 2
    self._encode = None
    if options.vae and has_images:
      vae = diffusers.load(options.vae)
      params = jax.device_put(vae.params)
      encode = jax.jit(lambda params, images: vae.module.apply({"params": params}, images, method="encode"))
      self._encode = lambda pixels: encode(params, to_unit(pixels, (0, 255)))

  def start(self, batch: list[Image]) -> Callable[[], tuple[dict[str, np.ndarray], np.ndarray]]:
    """Starts to encode n <= `batch` examples.

    Returns:
      A function that waits for the result: ({field: [n, ...]}, which prompts were cut: bool [n]).
    """
    n, full = len(batch), batch + batch[-1:] * (self.batch - len(batch))  # one size: one program
    pixels = np.stack([image.pixels for image in full]) if self._has_images else None
    encoded = self._prompts([image.caption for image in full]) if self._prompts else None
    posterior = self._encode(pixels) if self._encode else None

    def finish():
      arrays: dict[str, Any] = {}
      if encoded:
        arrays |= jax.device_get(encoded.cond) | {"tokens": encoded.tokens}
        if self._sdxl:
          arrays["time_ids"] = np.stack([image.time_ids for image in full])
      if posterior:
        mean, std = jax.device_get(posterior)
        arrays["latents"] = mean + std * np.stack([posterior_noise(image.key, mean.shape[1:]) for image in full])
      with np.errstate(over="ignore"):  # what is too large for it is skipped, and counted
        arrays |= {name: arrays[name].astype(self._dtype) for name in _HALVED if name in arrays}
      if pixels is not None and (self._keep or not posterior):
        arrays["pixels"] = pixels
      return {name: x[:n] for name, x in arrays.items()}, encoded.cut[:n] if encoded else np.zeros(n, bool)

    return finish

  def null(self) -> dict[str, np.ndarray]:
    """The condition of no prompt, without the batch axis; sizes and crops are no prompt. {} without text encoders."""
    return self._prompts.null(self.batch) if self._prompts else {}


def posterior_noise(key: str, shape: tuple[int, ...]) -> np.ndarray:
  """The standard normal with which an example's latents are drawn from the autoencoder's posterior; float32."""
  seed = int.from_bytes(hashlib.sha256(key.encode("utf-8", "replace")).digest()[:16], "big")
  return np.random.Generator(np.random.Philox(key=seed)).standard_normal(shape, np.float32)
