"""Caches on disk: written whole or not at all, read only if their hash is right. No pickles."""

import errno
import hashlib
import json
import os
import pathlib
import tempfile

import numpy as np
import safetensors
import safetensors.numpy

from ddil_jax.errors import RunError, UsageError


def write_bytes(path, data: bytes) -> None:
  """Writes a file through a temporary neighbour, so that a reader never sees half of it."""
  path = pathlib.Path(path)
  temporary = None
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(descriptor, "wb") as f:
      f.write(data)
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)
  except OSError as e:
    if temporary is not None and os.path.exists(temporary):
      os.unlink(temporary)
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
      raise RunError(f"no space left for {path}; free some and run again") from e
    raise UsageError(f"cannot write {path}: {e.strerror}; give a writable place") from e


def digest(arrays: dict[str, np.ndarray], about="") -> str:
  """sha256 (hex) over names, dtypes, shapes and bytes, and over `about`, anything JSON can hold."""
  h = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
  for name in sorted(arrays):
    x = np.ascontiguousarray(arrays[name])
    h.update(f"\0{name}\0{x.dtype.str}\0{x.shape}\0".encode())
    h.update(x.data.cast("B") if x.size else b"")
  return h.hexdigest()


def save_arrays(path, arrays: dict[str, np.ndarray], about) -> None:
  """Arrays as safetensors, with `about` as JSON and the hash of both in the file's header."""
  # One entry: safetensors writes several in any order, and equal content should be equal bytes.
  header = {"content": json.dumps({"about": about, "sha256": digest(arrays, about)}, sort_keys=True)}
  write_bytes(path, safetensors.numpy.save({k: np.ascontiguousarray(v) for k, v in arrays.items()}, header))


def load_arrays(path) -> tuple[dict[str, np.ndarray], object]:
  """What `save_arrays` wrote: (arrays, about).

  Raises:
    UsageError: the file is absent, damaged, or its content does not have the hash it claims.
  """
  try:
    with safetensors.safe_open(str(path), framework="numpy") as f:
      content = json.loads((f.metadata() or {})["content"])
      arrays = {k: f.get_tensor(k) for k in f.keys()}
    about, claimed = content["about"], content["sha256"]
  except FileNotFoundError as e:
    raise UsageError(f"no file {path}") from e
  except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError) as e:
    raise UsageError(f"{path} is damaged ({type(e).__name__}); delete it, it is made again") from e
  if digest(arrays, about) != claimed:
    raise UsageError(f"{path} does not have the hash it claims; delete it, it is made again")
  return arrays, about
