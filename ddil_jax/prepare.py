"""`ddil prepare`: captioned images to latents and text embeddings on disk, as `data/prepared.py` reads them.

The examples of the source are cut into shards of equal length. A shard is made from its examples alone, so shards can
be made in any order, by any process, and again, with the same bytes.
"""

import hashlib
import json
import pathlib
import shutil
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ddil_jax import files
from ddil_jax.data import captioned, prepared
from ddil_jax.errors import RunError, UsageError
from ddil_jax.interop import diffusers, text, weights
from ddil_jax.models.autoencoder_kl import AutoencoderKL
from ddil_jax.prepare_shards import (DTYPES, Encoder, Found, Options, duration, finished, inputs_of, join_moments,
                                     records_of, span_of, write_shards)
from ddil_jax.registry import unknown

SETTINGS = "settings.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json")


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
  shards = [inputs_of(opened, settings, i) for i in range(-(-len(opened.identities) // options.shard_size))]
  todo = [i for i in range(process[0], len(shards), process[1]) if finished(out, i, shards[i]) is None]
  say(f"{opened.kind} {source}: {len(opened.identities):,} examples in {len(shards):,} shards, {len(todo):,} of them"
      f" to be made here; {len(opened.skipped):,} files are none")
  encoder = None
  if todo or not all((out / name).is_file() for name in _companions(settings)):
    encoder = Encoder(options, settings["image_size"], opened.has_images)
  if todo:
    _say_estimate(_measure(encoder, opened, settings, todo), out, opened, settings, todo, say)
  if dry_run:
    return None
  if encoder:
    (out / prepared.INDEX).unlink(missing_ok=True)  # it would speak of what changes
    files.write_json(out / SETTINGS, settings)
    _write_companions(out, encoder, options, settings)
    write_shards(out, encoder, opened, settings, shards, todo, say)
  done = [finished(out, i, inputs) for i, inputs in enumerate(shards)]
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


# Estimate -----------------------------------------------------------------------------------


class _Estimate(NamedTuple):
  bytes: float  # of an example
  seconds: float


def _measure(encoder: Encoder, source, settings, todo) -> _Estimate:
  """What an example takes: the first batch, after one that compiles."""
  for number in todo:
    seconds, sizes, span = 0.0, [], span_of(source, settings, number)[:encoder.batch]
    for _ in range(2):
      start = time.perf_counter()
      sizes = [len(record) for _, records in records_of(encoder, source, span, Found()) for record in records]
      seconds = time.perf_counter() - start
    if sizes:
      return _Estimate(sum(sizes) / len(sizes), seconds / len(span))
  return _Estimate(0.0, 0.0)  # shards of nothing but damaged files


def _say_estimate(estimate, out, source, settings, todo, say) -> None:
  here = sum(len(span_of(source, settings, i)) for i in todo)
  need = here * estimate.bytes
  say(f"about {_size(len(source.identities) * estimate.bytes)} in all; here {here:,} examples, {_size(need)},"
      f" {duration(here * estimate.seconds)}; an example takes {_size(estimate.bytes)} and {estimate.seconds:.3g} s")
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


# What belongs to all shards -----------------------------------------------------------------


def _companions(settings: dict) -> list[str]:
  """Files of a set next to its shards."""
  return [prepared.NULL] * ("text_encoder" in settings["files"]) + [prepared.DECODER] * ("vae" in settings["files"])


def _write_companions(out: pathlib.Path, encoder: Encoder, options: Options, settings: dict) -> None:
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
    lines.append(f"warning: {index.truncated:,} "
                 + (f"prompt has more than {length} tokens and was cut" if index.truncated == 1 else
                    f"prompts have more than {length} tokens and were cut"))
  return "\n".join(lines)
