"""`ddil prepare`: captioned images to latents and text embeddings on disk, as `data/prepared.py` reads them.

The examples of the source are cut into shards of equal length. A shard is made from its examples alone, so shards can
be made in any order, by any process, and again, with the same bytes.
"""

import hashlib
import io
import json
import pathlib
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from ddil_jax import files
from ddil_jax.data import captioned, folder, prepared
from ddil_jax.data.dataset import fit, to_unit
from ddil_jax.errors import RunError, UsageError
from ddil_jax.interop import diffusers, text, weights
from ddil_jax.models.autoencoder_kl import AutoencoderKL
from ddil_jax.registry import unknown

SETTINGS = "settings.json"
DTYPES = ("float32", "float16")
_HALVED = ("latents", "text", "text_pooled")  # sizes above 2048 are no float16
_BATCH_PIXELS, _MOST_BATCH = 2**21, 64  # 8 images of 512 x 512
_SAY_EVERY = 10.0  # seconds
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json")


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


def prepare(source: str, out: str, options: Options = Options(), process: tuple[int, int] = (0, 1),
            dry_run: bool = False, say: Callable[[str], None] = print) -> prepared.Index | None:
  """Makes the shards that are not there yet, and the index when all are.

  Args:
    source: see `captioned.open_source`.
    out: folder of the set.
    process: (I, N): this process makes every N-th shard from the I-th on; the one that finishes last makes the index.
    dry_run: measure and say what it would take; write nothing.
    say: what is done with a line about the progress.

  Returns:
    The index; None where other processes have not finished, or on a dry run.

  Raises:
    UsageError: a source, option or network that cannot be used; `out` holds a set of other settings.
    RunError: no space, or a disk that fails.
  """
  out = pathlib.Path(out)
  _check(options, process)
  opened = captioned.open_source(source)
  if options.keep_images and not opened.has_images:
    raise UsageError(f"--keep_images: {source} has prompts only")
  settings = _settings(opened, options)
  _require_same(out, settings)
  if not opened.identities:
    raise _nothing(source, opened.skipped)
  shards = [_inputs(opened, settings, i) for i in range(-(-len(opened.identities) // options.shard_size))]
  todo = [i for i in range(process[0], len(shards), process[1]) if _finished(out, i, shards[i]) is None]
  say(f"{opened.kind} {source}: {len(opened.identities):,} examples in {len(shards):,} shards, {len(todo):,} of them"
      f" to be made here; {len(opened.skipped):,} files are none")
  encoder = None
  if todo or not all((out / name).is_file() for name in _companions(settings)):
    encoder = _Encoder(options, settings["image_size"], opened.has_images)
  if todo:
    _say_estimate(_measure(encoder, opened, settings, todo), out, opened, settings, todo, say)
  if dry_run:
    return None
  if encoder:
    (out / prepared.INDEX).unlink(missing_ok=True)  # it would speak of what changes
    files.write_json(out / SETTINGS, settings)
    _write_companions(out, encoder, options, settings)
    _write_shards(out, encoder, opened, settings, shards, todo, say)
  done = [_finished(out, i, inputs) for i, inputs in enumerate(shards)]
  if missing := done.count(None):
    say(f"{missing:,} of {len(shards):,} shards are left to other processes; the last one writes {prepared.INDEX}")
    return None
  return _write_index(out, source, opened, settings, done, say)


# Checks -------------------------------------------------------------------------------------


def _check(options: Options, process: tuple[int, int]) -> None:
  if options.text_encoder_2 and not options.text_encoder:
    raise UsageError("--text_encoder_2 needs --text_encoder, the first of the two")
  if bool(options.text_encoder) != bool(options.tokenizer):
    raise UsageError("--text_encoder and --tokenizer need each other: give both or none")
  if options.keep_images and not options.vae:
    raise UsageError("--keep_images needs --vae: without it the pixels are what is stored")
  if options.dtype not in DTYPES:
    raise UsageError(unknown("dtype", options.dtype, DTYPES))
  for name, least in (("image_size", 0), ("shard_size", 1)):
    if getattr(options, name) < least:
      raise UsageError(f"--{name}={getattr(options, name)}: at least {max(least, 1)} is expected")
  if not 0 <= process[0] < process[1]:
    raise UsageError(f"--process={process[0]}/{process[1]}: I/N with I from 0 to N - 1 is expected")


def _settings(source: captioned.Source, options: Options) -> dict[str, Any]:
  """All that decides what is written; what differs between two runs is refused."""
  named = {name: getattr(options, name) for name in ("vae", "text_encoder", "text_encoder_2")}
  found = {name: {"name": pathlib.Path(file).name, "sha256": weights.sha256(file)}
           for name, file in named.items() if file}
  if options.tokenizer:
    parts = hashlib.sha256()
    for path in text.tokenizer_folders(options.tokenizer, 2 if options.text_encoder_2 else 1):
      for name in _TOKENIZER_FILES:
        if (path / name).is_file():
          parts.update(f"\0{name}\0".encode() + (path / name).read_bytes())
    found["tokenizer"] = {"name": pathlib.Path(options.tokenizer).resolve().name, "sha256": parts.hexdigest()}
  return {"source": {"kind": source.kind, "name": source.name}, "files": found,
          "image_size": _image_size(source, options), "shard_size": options.shard_size,
          "keep_images": options.keep_images,
          **({"dtype": options.dtype} if options.dtype != "float32" else {})}  # older sets do not name it


def _image_size(source: captioned.Source, options: Options) -> int:
  module, about = _autoencoder(options.vae) if options.vae else (None, None)
  size = options.image_size
  if not size and about:
    size = about["config"].get("sample_size")
  if not isinstance(size, int) or not size:
    shape = "the shape of what is to be generated" if not source.has_images else "images are resized to it"
    raise UsageError(f"give --image_size=N, pixels of each side: {shape}")
  if module and size % 2**(len(module.down) - 1):
    raise UsageError(f"--image_size={size} is no multiple of {2**(len(module.down) - 1)}, by which the autoencoder"
                     " shrinks images")
  return size


def _autoencoder(file) -> tuple[AutoencoderKL, dict]:
  module, about = diffusers.architecture(file)
  if not isinstance(module, AutoencoderKL) or module.channels != 3:
    raise UsageError(f"{file} is no autoencoder of colour images; `ddil convert PIPELINE --component=vae` makes one")
  return module, about


def _require_same(out: pathlib.Path, settings: dict) -> None:
  """Raises UsageError if the folder holds something else."""
  if out.exists() and not out.is_dir():
    raise UsageError(f"--out={out} is a file; the name of a folder is expected")
  if not (out / SETTINGS).is_file():
    if out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()):
      raise UsageError(f"--out={out} holds other things; give a new folder")
    return
  before = files.read_json(out / SETTINGS)
  for name in sorted(settings | before):
    if settings.get(name) != before.get(name):
      was, now = (json.dumps(v.get(name)) for v in (before, settings))
      raise UsageError(f"{out} was prepared with other settings: {name} was {was}, now {now}; give another --out")


def _nothing(source, skipped) -> UsageError:
  first = f"; the first of {len(skipped):,} that failed: {': '.join(skipped[0])}" if skipped else ""
  return UsageError(f"{source} has no example that can be used{first}")


# Shards -------------------------------------------------------------------------------------


def _span(source: captioned.Source, settings: dict, number: int) -> range:
  size = settings["shard_size"]
  return range(number * size, min((number + 1) * size, len(source.identities)))


def _inputs(source: captioned.Source, settings: dict, number: int) -> str:
  """A hash of all that a shard is made from."""
  h = hashlib.sha256(json.dumps([prepared.FORMAT, settings], sort_keys=True).encode())
  for i in _span(source, settings, number):
    h.update(source.identities[i].encode("utf-8", "replace") + b"\0\0")
  return h.hexdigest()


def _sidecar(out: pathlib.Path, number: int) -> pathlib.Path:
  return (out / prepared.shard_name(number)).with_suffix(".json")


def _finished(out: pathlib.Path, number: int, inputs: str) -> dict | None:
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


def _write_shards(out, encoder, source, settings, shards, todo, say) -> None:
  total, done, start = sum(len(_span(source, settings, i)) for i in todo), 0, time.perf_counter()
  said = start

  def progress(nth, looked_at):
    rate = looked_at / (time.perf_counter() - start)
    say(f"shard {nth:,} of {len(todo):,}: {looked_at:,} of {total:,} examples, {rate:.1f}/s,"
        f" {_duration((total - looked_at) / rate)} left")

  for nth, number in enumerate(todo, 1):
    found = _Found()
    path, span = out / prepared.shard_name(number), _span(source, settings, number)
    _sidecar(out, number).unlink(missing_ok=True)  # it is of another shard
    with prepared.new_shard(path) as write:
      for seen, records in _records(encoder, source, span, found):
        for record in records:
          write(record)
        if time.perf_counter() - said > _SAY_EVERY:
          progress(nth, done + seen)
          said = time.perf_counter()
    done += len(span)
    files.write_json(_sidecar(out, number), found.about(path, shards[number]))
  if todo:
    progress(len(todo), done)


def _records(encoder: "_Encoder", source: captioned.Source, span: range,
             found: "_Found") -> Iterator[tuple[int, list[bytes]]]:
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


class _Image(NamedTuple):
  """An example of the source, decoded."""
  key: str
  caption: str
  split: str
  pixels: np.ndarray | None  # uint8 [S,S,3]
  time_ids: np.ndarray  # float32 [6]: size as in the file, top and left of the crop, size of the result


class _Found:
  """What is known of a shard when it is written."""

  def __init__(self):
    self.count, self.truncated, self.test, self.skipped = 0, 0, [], []
    self.fields: dict[str, Any] = {}
    self.moments: np.ndarray | None = None  # [5, c]: number, sum, sum of squares, lowest, highest of the latents

  def read(self, source: captioned.Source, i: int, size: int) -> _Image | None:
    """An example; None if it cannot be used, which is noted."""
    key = source.identities[i].partition("\0")[0]
    try:
      example = source.read(i)
      key, caption = example.key, example.caption.encode("utf-8", "replace").decode()  # JSON can hold half characters
      if not caption.strip():
        raise ValueError("no caption")
      if example.image is None:
        return _Image(key, caption, example.split, None, np.array([size, size, 0, 0, size, size], np.float32))
      image = folder.open_image(io.BytesIO(example.image), 3)
      (w, h), short = image.size, min(image.size)
      top, left = ((side * size / short - size) // 2 for side in (h, w))
      return _Image(key, caption, example.split, np.asarray(fit(image, size)),
                    np.array([h, w, top, left, size, size], np.float32))
    except OSError as e:
      if e.errno is not None and not isinstance(e, FileNotFoundError | PermissionError):
        raise RunError(f"{source.name}: {key} cannot be read: {e}; run the same command again") from e
      self.skipped.append((key, folder.reason(e)))
    except Exception as e:  # decoders raise all sorts of things on damaged files
      self.skipped.append((key, folder.reason(e)))
    return None

  def add(self, batch: list[_Image], encoded: tuple[dict[str, np.ndarray], np.ndarray]) -> list[bytes]:
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


class _Encoder:
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

  def start(self, batch: list[_Image]) -> Callable[[], tuple[dict[str, np.ndarray], np.ndarray]]:
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


# Estimate -----------------------------------------------------------------------------------


class _Estimate(NamedTuple):
  bytes: float  # of an example
  seconds: float


def _measure(encoder: _Encoder, source, settings, todo) -> _Estimate:
  """What an example takes: the first batch, after one that compiles."""
  for number in todo:
    seconds, sizes, span = 0.0, [], _span(source, settings, number)[:encoder.batch]
    for _ in range(2):
      start = time.perf_counter()
      sizes = [len(record) for _, records in _records(encoder, source, span, _Found()) for record in records]
      seconds = time.perf_counter() - start
    if sizes:
      return _Estimate(sum(sizes) / len(sizes), seconds / len(span))
  return _Estimate(0.0, 0.0)  # shards of nothing but damaged files


def _say_estimate(estimate, out, source, settings, todo, say) -> None:
  here = sum(len(_span(source, settings, i)) for i in todo)
  need = here * estimate.bytes
  say(f"about {_size(len(source.identities) * estimate.bytes)} in all; here {here:,} examples, {_size(need)},"
      f" {_duration(here * estimate.seconds)}; an example takes {_size(estimate.bytes)} and {estimate.seconds:.3g} s")
  there = next(path for path in (out.absolute(), *out.absolute().parents) if path.is_dir())
  if need > (free := shutil.disk_usage(there).free):
    raise RunError(f"{out}: {_size(need)} are needed, {_size(free)} are free; free space, or give another --out")


def _size(count: float) -> str:
  for unit in ("B", "KiB", "MiB", "GiB"):
    if count < 1024:
      break
    count /= 1024
  else:
    unit = "TiB"
  return f"{count:.3g} {unit}" if count < 100 else f"{count:.0f} {unit}"


def _duration(seconds: float) -> str:
  minutes = seconds / 60
  return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


# What belongs to all shards -----------------------------------------------------------------


def _companions(settings: dict) -> list[str]:
  """Files of a set next to its shards."""
  return [prepared.NULL] * ("text_encoder" in settings["files"]) + [prepared.DECODER] * ("vae" in settings["files"])


def _write_companions(out: pathlib.Path, encoder: "_Encoder", options: Options, settings: dict) -> None:
  if null := encoder.null():
    files.save_arrays(out / prepared.NULL, null, {"kind": "null condition", "files": settings["files"]})
  if options.vae and not (out / prepared.DECODER).is_file():  # latents are worth nothing without it
    with files.whole(out / prepared.DECODER) as f, open(options.vae, "rb") as given:
      shutil.copyfileobj(given, f)


def _write_index(out, source_path, source, settings, shards, say) -> prepared.Index:
  skipped = [*source.skipped, *(tuple(row) for about in shards for row in about["skipped"])]
  kept = [about for about in shards if about["shard"]["count"]]
  if not kept:
    raise _nothing(source_path, skipped)
  fields = kept[0]["fields"]
  latents = shape = None
  if "vae" in settings["files"]:
    module, _ = _autoencoder(out / prepared.DECODER)
    side = settings["image_size"] // 2**(len(module.down) - 1)
    shape = (side, side, module.latent_channels)
    if "latents" in fields:
      latents = _statistics(join_moments([np.array(about["moments"]) for about in kept]), module)
  shape = shape or (settings["image_size"],) * 2 + (3,)
  null = out / prepared.NULL
  index = prepared.Index(
      settings, fields, tuple(prepared.Shard(**about["shard"]) for about in kept), shape, latents,
      files.digest(*files.load_arrays(null)) if "text_encoder" in settings["files"] else "",
      dict(Counter(reason for _, reason in skipped)), sum(about["truncated"] for about in kept))
  for path in out.glob("shard-*"):  # of a source that had more examples
    if int(path.stem[6:]) >= len(shards):
      path.unlink()
  lines = "".join(json.dumps({"file": name, "reason": reason}) + "\n" for name, reason in skipped)
  files.write_bytes(out / prepared.SKIPPED, lines.encode())
  prepared.write_index(out, index)
  say(_summary(out, index))
  return index


def _statistics(moments: np.ndarray, module: AutoencoderKL) -> dict:
  number, total, squares, lower, upper = moments
  mean = total / number
  std = np.sqrt(np.maximum(squares / number - mean**2, 0))
  return {"scaling_factor": module.scaling, "shift_factor": module.shift, "lower": lower.tolist(),
          "upper": upper.tolist(), "mean": mean.tolist(), "std": std.tolist()}


def _summary(out, index: prepared.Index) -> str:
  count, test = sum(s.count for s in index.shards), sum(len(s.test) for s in index.shards)
  lines = [f"{out}: {count:,} examples, {test:,} of them test; {', '.join(index.fields) or 'captions'}"]
  if index.skipped:
    top = "; ".join(f"{n:,} {reason}" for reason, n in Counter(index.skipped).most_common(5))
    lines.append(f"{sum(index.skipped.values()):,} skipped: {top}; all in {prepared.SKIPPED}")
  if index.truncated:
    length = index.fields["tokens"]["shape"][0]
    lines.append(f"warning: {index.truncated:,} prompts have more than {length} tokens and were cut")
  return "\n".join(lines)
