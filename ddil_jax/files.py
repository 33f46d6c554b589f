"""Files: written whole or not at all; arrays are read only if their hash is right. No pickles."""

import contextlib
import errno
import hashlib
import json
import math
import os
import pathlib
import secrets
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np
import safetensors
import safetensors.numpy

from ddil_jax.errors import RunError, UsageError


def write_bytes(path, data: bytes) -> None:
  """Writes a file through a temporary neighbour: a reader or a crash never sees half of it. Makes its folder.

  Raises:
    UsageError: not writable. RunError: no space.
  """
  with whole(path) as f:
    f.write(data)


@contextlib.contextmanager
def whole(path) -> Iterator[BinaryIO]:
  """A file to write that takes its place when all is written; see `write_bytes`."""
  path = pathlib.Path(path)
  # No process id: those of two machines or containers may be the same, on one file system.
  temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
      with open(temporary, "wb") as f:
        yield f
        f.flush()
        os.fsync(f.fileno())
      os.replace(temporary, path)
    except BaseException:
      temporary.unlink(missing_ok=True)
      raise
    sync_folder(path.parent)
  except OSError as e:
    raise cannot_write(path, e) from e


def write_json(path, value: Any) -> None:
  """Sorted, indented JSON; see `write_bytes`."""
  write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def read_json(path) -> Any:
  """Raises UsageError if the file is absent or damaged."""
  try:
    return json.loads(pathlib.Path(path).read_bytes())
  except OSError as e:
    raise UsageError(f"cannot read {path}: {e.strerror}") from e
  except ValueError as e:
    raise UsageError(f"{path} is damaged: {e}") from e


def make_folder(path) -> None:
  """Makes a folder and those above it, where they are not there. Raises as `cannot_write`."""
  try:
    pathlib.Path(path).mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise cannot_write(path, error) from error


def cannot_write(path, error: OSError) -> Exception:
  """The one-line error for a failed write: a RunError where space is the matter, else a UsageError."""
  if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
    return RunError(f"cannot write {path}: {error.strerror}; free space and run the same command again")
  return UsageError(f"cannot write {path}: {error.strerror or error}; give a path that can be written to")


def sync_folder(folder) -> None:
  """Makes a rename durable."""
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def digest(arrays: dict[str, np.ndarray], about="") -> str:
  """sha256 (hex) over names, dtypes, shapes and bytes, and over `about`, anything JSON can hold."""
  h = _begin(about)
  for name in sorted(arrays):
    _add(h, name, np.ascontiguousarray(arrays[name]))
  return h.hexdigest()


def digest_rows(name: str, shape: tuple[int, ...], batches: Iterable[np.ndarray]) -> str:
  """`digest` of one array by this name, of which batches of rows come one by one; at least one."""
  h = _begin("")
  for i, x in enumerate(batches):
    if not i:
      h.update(_header(name, x.dtype, shape))
    h.update(_bytes(np.ascontiguousarray(x)))
  return h.hexdigest()


def _begin(about):
  return hashlib.sha256(json.dumps(about, sort_keys=True).encode())


def _add(h, name, x):
  h.update(_header(name, x.dtype, x.shape))
  h.update(_bytes(x))


def _header(name, dtype, shape):
  return f"\0{name}\0{dtype.str}\0{tuple(shape)}\0".encode()


def _bytes(x):
  return x.reshape(-1).view(np.uint8).data if x.size else b""


def save_arrays(path, arrays: dict[str, np.ndarray], about) -> None:
  """Arrays as safetensors, with `about` as JSON and the hash of both in the file's header."""
  # One entry: safetensors writes several in any order, and equal content should be equal bytes.
  header = {"content": json.dumps({"about": about, "sha256": digest(arrays, about)}, sort_keys=True)}
  write_bytes(path, safetensors.numpy.save({k: np.ascontiguousarray(v) for k, v in arrays.items()}, header))


_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def stream_arrays(path, shapes: dict[str, tuple[int, ...]], read: Callable[[str], np.ndarray], about=None,
                  dtype: str = "float32", metadata: dict[str, str] | None = None) -> None:
  """Writes floats as safetensors with one array at a time in memory.

  Args:
    shapes: of the arrays.
    read: name -> array of that shape.
    about: makes it a file that `load_arrays` reads: the same as by `save_arrays`, for any number of arrays.
    dtype: float32, float16 or bfloat16.
    metadata: what the header says where there is no `about`.
  """
  size, names = np.dtype(dtype).itemsize, sorted(shapes)
  offsets = np.cumsum([0] + [math.prod(shapes[name]) * size for name in names]).tolist()

  def header(content):
    entries = {name: {"dtype": _DTYPES[dtype], "shape": list(shapes[name]), "data_offsets": offsets[i:i + 2]}
               for i, name in enumerate(names)}
    text = json.dumps({"__metadata__": content} | entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text

  def sealed(value):
    content = json.dumps({"about": about, "sha256": value}, sort_keys=True)
    return metadata or {} if about is None else {"content": content}

  h = _begin(about)
  with whole(path) as f:
    f.write(header(sealed("0" * 64)))  # as long as the real one, which is known at the end
    for name in names:
      x = np.ascontiguousarray(read(name), dtype)
      if x.shape != tuple(shapes[name]):
        raise ValueError(f"{name}: shape {x.shape}, not {shapes[name]}")
      _add(h, name, x)
      f.write(_bytes(x))
    f.seek(0)
    f.write(header(sealed(h.hexdigest())))


def load_arrays(path, remedy: str = "delete it, it is made again") -> tuple[dict[str, np.ndarray], object]:
  """What `save_arrays` wrote: (arrays, about).

  Args:
    remedy: what helps where the file is damaged, to end the message with.

  Raises:
    UsageError: the file is absent, damaged, or its content does not have the hash it claims.
  """
  arrays, content = _read(path, remedy, lambda f: {k: f.get_tensor(k) for k in f.keys()})
  if digest(arrays, content["about"]) != content["sha256"]:
    raise UsageError(f"{path} does not have the hash it claims; {remedy}")
  return arrays, content["about"]


def load_about(path, remedy: str = "delete it, it is made again"):
  """The `about` of such a file alone: quick, and without checking the hash. Raises as `load_arrays`."""
  return _read(path, remedy, lambda f: None)[1]["about"]


def _read(path, remedy, get):
  try:
    with safetensors.safe_open(str(path), framework="numpy") as f:
      content = json.loads((f.metadata() or {})["content"])
      if not {"about", "sha256"} <= set(content):
        raise KeyError("about")
      return get(f), content
  except FileNotFoundError as e:
    raise UsageError(f"no file {path}") from e
  except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError) as e:
    raise UsageError(f"{path} is damaged ({type(e).__name__}); {remedy}") from e
