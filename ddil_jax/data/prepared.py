"""Prepared text-to-image sets: examples as arrays in array_record shards, and how they are read.

    DIR/index.json                     what there is: see `Index`
    DIR/shard-00000.array_record       examples; each is the bytes of a safetensors file
    DIR/shard-00000.json               what the shard was made from, and what is in it: see `Shard`
    DIR/null.safetensors               the null condition
    DIR/vae.safetensors                the autoencoder that decodes the latents
    DIR/skipped.jsonl                  what could not be used, and why

An example has "key" and "caption" (UTF-8 as uint8 [n]), and of these what was asked for: "latents" float [h,w,c],
"pixels" uint8 [H,W,3], "tokens" int32 [L], "text" float [L,D], "text_pooled" float [P], "time_ids" float32 [6]. A float
is float32 or, where the set was prepared so, float16; whoever reads the set gets float32.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from array_record.python import array_record_module

from ddil_jax import files
from ddil_jax.data.dataset import Dataset, check_choice, to_unit
from ddil_jax.errors import RunError, UsageError

FORMAT = 1
INDEX, SKIPPED, NULL, DECODER = "index.json", "skipped.jsonl", "null.safetensors", "vae.safetensors"
COND = ("text", "text_pooled", "time_ids")
_TEST_EVERY = 20
_IN_MEMORY = 2**30  # bytes; larger sets stay on disk
_BLOCK = 256
_THREADS = 8
_AGAIN = "run the same `ddil prepare` again: it makes what is missing or damaged anew"


class Shard(NamedTuple):
  """A file of examples.

  Attributes:
    file: its name; "" where no example of it could be used.
    count: of examples.
    bytes, sha256: of the file.
    test: positions of the examples of the test split.
  """
  file: str
  count: int
  bytes: int
  sha256: str
  test: tuple[int, ...]


class Index(NamedTuple):
  """What a prepared set has; `index.json`.

  Attributes:
    settings: what the set was made from.
    fields: {name: {"shape", "dtype"}} of an example's arrays, but for "key" and "caption".
    shards: in their order.
    image_shape: [H,W,C] of what is trained on: latents, else pixels; also where there are only prompts.
    latents: {"scaling_factor", "shift_factor", "lower", "upper", "mean", "std"}, the last four per channel and over
      all examples; None where there are no latents.
    null: sha256 of the null condition; "" where there is none.
    skipped: {reason: count}.
    truncated: prompts whose tokens were cut.
  """
  settings: dict[str, Any]
  fields: dict[str, dict[str, Any]]
  shards: tuple[Shard, ...]
  image_shape: tuple[int, ...]
  latents: dict[str, Any] | None
  null: str
  skipped: dict[str, int]
  truncated: int


# Writing ------------------------------------------------------------------------------------


def encode(key: str, caption: str, arrays: dict[str, np.ndarray]) -> bytes:
  """An example as a record."""
  texts = {name: np.frombuffer(text.encode("utf-8", "replace"), np.uint8)
           for name, text in (("key", key), ("caption", caption))}
  return safetensors.numpy.save(texts | {name: np.ascontiguousarray(x) for name, x in arrays.items()})


def is_test(key: str) -> bool:
  """Whether an example belongs to the test split: about every 20th, by its key alone."""
  return int.from_bytes(hashlib.sha256(key.encode("utf-8", "replace")).digest()[:8], "big") % _TEST_EVERY == 0


def shard_name(number: int) -> str:
  return f"shard-{number:05d}.array_record"


@contextlib.contextmanager
def new_shard(path: pathlib.Path) -> Iterator[Callable[[bytes], None]]:
  """A function that adds a record to a shard, which takes its place when all is written.

  Raises:
    RunError: no space, or another failure of the disk. UsageError: not writable.
  """
  temporary = path.with_name(f".{path.name}.tmp")  # one process writes a shard: the next attempt overwrites this

  def checked(call, *arguments):
    try:
      return call(*arguments)
    except RuntimeError as e:  # all that array_record raises
      raise RunError(f"cannot write {path}: {' '.join(str(e).split())[:200]}; mend that and run the same command again"
                     ) from e

  try:
    # One record a group, for random access; floats hardly compress.
    writer = checked(array_record_module.ArrayRecordWriter, str(temporary), "group_size:1,uncompressed")
    try:
      yield lambda record: checked(writer.write, record)
      checked(writer.close)
    except BaseException:
      with contextlib.suppress(RuntimeError):
        writer.close()
      temporary.unlink(missing_ok=True)
      raise
    with open(temporary, "rb") as f:
      os.fsync(f.fileno())
    os.replace(temporary, path)
    files.sync_folder(path.parent)
  except OSError as e:
    raise files.cannot_write(path, e) from e


def write_index(folder: pathlib.Path, index: Index) -> None:
  """Writes `index.json`, which makes the set whole."""
  value = index._asdict() | {"shards": [shard._asdict() for shard in index.shards], "format": FORMAT,
                             "count": sum(shard.count for shard in index.shards),
                             "test_count": sum(len(shard.test) for shard in index.shards)}
  files.write_json(folder / INDEX, value)


# Reading ------------------------------------------------------------------------------------


def read_index(folder: str | os.PathLike) -> Index:
  """The index of a prepared set. Raises UsageError if there is none, or of another version, or damaged."""
  folder = pathlib.Path(folder)
  path = folder / INDEX
  if not path.is_file():
    hint = "; `ddil prepare` has not finished there" if (folder / "settings.json").is_file() else ""
    raise UsageError(f"{folder} is no prepared set: it has no {INDEX}{hint}")
  value = files.read_json(path)
  try:
    if value["format"] != FORMAT:
      raise UsageError(f"{path} has format {value['format']}; this version reads {FORMAT}: prepare the set anew")
    shards = tuple(Shard(**(shard | {"test": tuple(shard["test"])})) for shard in value["shards"])
    if not shards:
      raise KeyError("no shards")
    if any(pathlib.PurePath(shard.file).name != shard.file for shard in shards):
      raise UsageError(f"{path} names a shard out of its folder")
    return Index(**{name: value[name] for name in Index._fields} |
                 {"shards": shards, "image_shape": tuple(value["image_shape"])})
  except (KeyError, TypeError, AttributeError) as e:
    raise UsageError(f"{path} is damaged ({type(e).__name__}: {e}); {_AGAIN}") from e


def load(path: str | os.PathLike, split: str = "train", image_size: int | None = None) -> Dataset:
  """Loads a split of a set that `ddil prepare` wrote.

  A split below 1 GiB is read into memory. A larger one stays on disk: all fields of a batch are read at once, when the
  first of them is asked for.

  Args:
    path: the folder.
    split: "train" or "test", about every 20th example.
    image_size: as the set was prepared with, or None.

  Returns:
    Dataset: `images` are latents float32 [N,h,w,c] times the scaling factor, or pixels in [-1, 1] where there was no
    autoencoder, or NaN of that shape where there were only prompts; `cond` has "text" [N,L,D], and of SDXL "text_pooled"
    [N,P] and "time_ids" [N,6]; `null` the first two, since guidance keeps sizes and crops.

  Raises:
    UsageError: no such set or split, another size; shards that are missing or damaged, also when rows are read.
  """
  check_choice("split", split, ("train", "test"))
  folder, index = pathlib.Path(path), read_index(path)
  if image_size not in (None, index.settings["image_size"]):
    raise UsageError(f"{folder} was prepared with image_size {index.settings['image_size']}, not {image_size}; leave"
                     " data.image_size out")
  decoder = folder / DECODER if "vae" in index.settings["files"] else None
  if decoder and not decoder.is_file():
    raise UsageError(f"{decoder} is missing; {_AGAIN}")
  records = _Records(folder, index, split)
  fields = {name: (tuple(field["shape"]), np.dtype(field["dtype"])) for name, field in index.fields.items()}
  columns = {name: _Column(records, name, *field) for name, field in fields.items()}
  captions: Sequence[str] = _Captions(records)
  if sum(column.dtype.itemsize * int(np.prod(column.shape)) for column in columns.values()) < _IN_MEMORY:
    records.verify()
    columns, captions = _read_all(records, columns)
  images = columns.get("latents", columns.get("pixels"))
  if images is None:
    images = _NoImages((len(records), *index.image_shape))
  latents = index.latents
  bounds = (tuple(latents["lower"]), tuple(latents["upper"])) if latents else None
  return Dataset(
      "prepared", images, np.zeros(len(records), np.int32), 1,
      (min(bounds[0]), max(bounds[1])) if bounds else (0.0, 255.0), split, _skipped(folder),
      cond={name: columns[name] for name in COND if name in columns}, null=_null(folder, index), captions=captions,
      tokens=columns.get("tokens"),
      pixels=columns.get("pixels") if latents else None,
      decoder=str(decoder or ""), bounds=bounds)


def _skipped(folder: pathlib.Path) -> tuple[tuple[str, str], ...]:
  try:
    lines = (folder / SKIPPED).read_text().splitlines()
    return tuple((row["file"], row["reason"]) for row in map(json.loads, lines))
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise UsageError(f"{folder / SKIPPED} is absent or damaged; {_AGAIN}") from e


def _null(folder: pathlib.Path, index: Index) -> dict[str, np.ndarray]:
  if not index.null:
    return {}
  arrays, about = files.load_arrays(folder / NULL, _AGAIN)
  if files.digest(arrays, about) != index.null:
    raise UsageError(f"{folder / NULL} is not the one that {INDEX} names; {_AGAIN}")
  return arrays


class _Records:
  """The examples of a split by their position in it; keeps those of the last call of each thread."""

  def __init__(self, folder: pathlib.Path, index: Index, split: str):
    self._paths, self._shards = [folder / shard.file for shard in index.shards], index.shards
    for path, shard in zip(self._paths, index.shards):
      if not path.is_file():
        raise UsageError(f"{path} is missing; {_AGAIN}")
      if path.stat().st_size != shard.bytes:
        raise UsageError(f"{path} has {path.stat().st_size:,} bytes where {shard.bytes:,} were written; {_AGAIN}")
    tested = [np.isin(np.arange(shard.count), shard.test) == (split == "test") for shard in index.shards]
    self._shard = np.concatenate([np.full(t.sum(), i, np.int32) for i, t in enumerate(tested)])
    self._position = np.concatenate([np.flatnonzero(t) for t in tested])
    if not len(self._shard):
      raise UsageError(f"{folder} has no {split} examples: of {sum(s.count for s in index.shards)}, about every"
                       f" {_TEST_EVERY}th is test")
    self._readers: dict[int, Any] = {}
    self._last = threading.local()  # batches are read ahead, each by one thread
    self._pool = concurrent.futures.ThreadPoolExecutor(_THREADS)

  def __len__(self) -> int:
    return len(self._shard)

  def __getitem__(self, index: np.ndarray) -> list[dict[str, np.ndarray]]:
    """The arrays of the examples at these positions."""
    at = np.arange(len(self))[index]  # as numpy reads an index: bounds, negative ones, slices
    key = at.tobytes()
    if getattr(self._last, "key", None) != key:
      found: list[Any] = [None] * len(at)
      shards = np.unique(self._shard[at])
      for shard, rows in zip(shards, self._pool.map(lambda s: self._read(s, at[self._shard[at] == s]), shards)):
        for i, row in zip(np.flatnonzero(self._shard[at] == shard), rows, strict=True):
          found[i] = row
      self._last.key, self._last.rows = key, found
    return self._last.rows

  def verify(self) -> None:
    """Raises UsageError if a file is another one than the index names; reads them all."""
    for path, shard in zip(self._paths, self._shards):
      with open(path, "rb") as f:
        if hashlib.file_digest(f, "sha256").hexdigest() != shard.sha256:
          raise UsageError(f"{path} does not have the hash that {INDEX} names; delete it, then {_AGAIN}")

  def _read(self, shard: int, at: np.ndarray) -> list[dict[str, np.ndarray]]:
    path = self._paths[shard]
    try:
      if shard not in self._readers:
        self._readers[shard] = array_record_module.ArrayRecordReader(
            str(path), "readahead_buffer_size:0,max_parallelism:0", file_reader_buffer_size=2**15)
      return [safetensors.numpy.load(record) for record in self._readers[shard].read(self._position[at].tolist())]
    except Exception as e:  # of array_record and safetensors
      raise UsageError(f"{path} is damaged ({' '.join(str(e).split())[:120]}); delete it, then {_AGAIN}") from e


class _Column:
  """One field of all examples, read when it is asked for; pixels become floats in [-1, 1], half floats float32."""

  def __init__(self, records: _Records, name: str, shape: tuple[int, ...], dtype: np.dtype):
    self._records, self._name = records, name
    self.shape = (len(records), *shape)
    self.dtype = np.dtype(np.float32) if name == "pixels" or dtype == np.float16 else dtype

  def __len__(self) -> int:
    return self.shape[0]

  def __getitem__(self, index) -> np.ndarray:
    rows = np.stack([row[self._name] for row in self._records[index]])
    return to_unit(rows, (0, 255)) if self._name == "pixels" else rows.astype(self.dtype, copy=False)


class _NoImages:
  """NaN in the shape of images [N,H,W,C], for prompts alone: nothing can learn from them unnoticed."""
  dtype = np.dtype(np.float32)

  def __init__(self, shape: tuple[int, ...]):
    self.shape = shape

  def __len__(self) -> int:
    return self.shape[0]

  def __getitem__(self, index) -> np.ndarray:
    return np.full((len(np.arange(len(self))[index]), *self.shape[1:]), np.nan, np.float32)


class _Captions(Sequence):
  """The captions of all examples, read when they are asked for."""

  def __init__(self, records: _Records):
    self._records = records

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return [_text(row["caption"]) for row in self._records[index]]
    return _text(self._records[np.asarray([index])][0]["caption"])


def _text(data: np.ndarray) -> str:
  return data.tobytes().decode()


def _read_all(records: _Records, columns: dict[str, _Column]) -> tuple[dict[str, np.ndarray], list[str]]:
  """All columns as arrays, and the captions."""
  arrays = {name: np.empty(column.shape, column.dtype) for name, column in columns.items()}
  captions: list[str] = []
  for start in range(0, len(records), _BLOCK):
    block = slice(start, start + _BLOCK)
    for name, column in columns.items():
      arrays[name][block] = column[block]
    captions += _Captions(records)[block]
  return arrays, captions
