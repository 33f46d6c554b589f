"""A run's folder: what is in it, who may write to it, and whether it holds the same run.

  config.json      the resolved config        metrics.jsonl   one line per logged step
  versions.json    of the first start         tensorboard/    the same as event files
  checkpoints/     see `checkpoint.py`        .lock           held by the process that writes here
"""

import errno
import fcntl
import json
import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any, NamedTuple

from ddil_jax.errors import RunError, UsageError

CHECKPOINTS = "checkpoints"
# What `overwrite` removes: names that a run makes, and nothing else. The config goes last, so that
# an interrupted removal is never taken for a folder without a run.
MADE_BY_RUN = (CHECKPOINTS, "metrics.jsonl", "tensorboard", "samples", "results.json", "versions.json",
               "config.json")


class Workdir(NamedTuple):
  """A folder that this process may write to.

  Attributes:
    path: the folder.
    resumed: True if it held this run already.
    changed: {dotted field: (there, here)}, fields that differ and may.
    new_versions: {name: (first start, now)}; not empty: the continuation need not be bit-identical.
    lock: the open lock file; the lock dies with the process.
  """
  path: pathlib.Path
  resumed: bool
  changed: dict[str, tuple[Any, Any]]
  new_versions: dict[str, tuple[Any, Any]]
  lock: Any

  def release(self) -> None:
    self.lock.close()

  def __enter__(self):
    return self

  def __exit__(self, *exc):
    self.release()


def prepare(workdir, config: dict, versions: dict, overwrite: bool = False,
            may_change: Sequence[str] = ()) -> Workdir:
  """Takes a folder for a run: a new one, or the one that a run of the same config left.

  Args:
    workdir: the folder; made if absent.
    config: the resolved config, nested dicts of what JSON can hold.
    versions: what runs it, see `logging.versions`; kept from the first start.
    overwrite: start anew: remove what an earlier run left (MADE_BY_RUN; other files stay).
    may_change: dotted fields, or prefixes of them, in which a continued run may differ.

  Raises:
    UsageError: not a writable folder, in use by another process, or of another config.
    RunError: no space.
  """
  path = pathlib.Path(workdir)
  config = _plain(config)
  try:
    path.mkdir(parents=True, exist_ok=True)
    lock = _lock(path)
  except OSError as e:
    raise cannot_write(path, e) from e
  try:
    return _claim(path, config, versions, overwrite, may_change, lock)
  except BaseException as e:
    lock.close()
    if isinstance(e, OSError):
      raise cannot_write(path, e) from e
    raise


def _claim(path, config, versions, overwrite, may_change, lock) -> Workdir:
  if overwrite:
    for name in MADE_BY_RUN:
      _remove(path / name)
  if not (path / "config.json").exists():
    left = [name for name in MADE_BY_RUN[:3] if (path / name).exists()]
    if left:
      raise UsageError(f"{path} holds {' and '.join(left)} but no config.json to say of which run; "
                       "give another workdir, or remove them")
    write_json_atomic(path / "versions.json", versions)
    write_json_atomic(path / "config.json", config)
    return Workdir(path, False, {}, {}, lock)

  differ = differences(read_json(path / "config.json"), config)
  allowed = lambda field: any(field == f or field.startswith(f + ".") for f in may_change)  # noqa: E731
  refused = {field: pair for field, pair in differ.items() if not allowed(field)}
  if refused:
    raise UsageError(f"{path} holds a run of another config: {_sentence(refused)}; "
                     "give another workdir, or the config of that run")
  before = read_json(path / "versions.json") if (path / "versions.json").exists() else versions
  if differ:
    write_json_atomic(path / "config.json", config)
  return Workdir(path, True, differ, differences(before, versions), lock)


def differences(there: dict, here: dict) -> dict[str, tuple[Any, Any]]:
  """{dotted field: (value there, value here)} of the fields that differ; an absent field is "(absent)"."""
  there, here = flat(there), flat(here)
  get = lambda fields, name: fields.get(name, "(absent)")  # noqa: E731
  pairs = {name: (get(there, name), get(here, name)) for name in sorted(there.keys() | here.keys())}
  # Compared as text too: NaN differs from itself as a number.
  return {name: (a, b) for name, (a, b) in pairs.items() if a != b and json.dumps(a) != json.dumps(b)}


def flat(config: dict, prefix: str = "") -> dict[str, Any]:
  """{"a": {"b": 1}} -> {"a.b": 1}; an empty dict is a value."""
  out = {}
  for name, value in config.items():
    inner = isinstance(value, dict) and value
    out |= flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
  return out


def read_json(path) -> Any:
  """Raises UsageError if the file is absent or damaged."""
  try:
    return json.loads(pathlib.Path(path).read_bytes())
  except OSError as e:
    raise UsageError(f"cannot read {path}: {e.strerror}") from e
  except ValueError as e:
    raise UsageError(f"{path} is damaged: {e}") from e


def write_json_atomic(path, value: Any) -> None:
  """Sorted, indented JSON; see `write_bytes_atomic`."""
  write_bytes_atomic(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def write_bytes_atomic(path, data: bytes) -> None:
  """Writes a file through a temporary neighbour: a reader or a crash never sees half of it.

  Raises:
    UsageError: not writable. RunError: no space.
  """
  path = pathlib.Path(path)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    try:
      with open(temporary, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
      os.replace(temporary, path)
    except BaseException:
      temporary.unlink(missing_ok=True)
      raise
    sync_folder(path.parent)
  except OSError as e:
    raise cannot_write(path, e) from e


def cannot_write(path, error: OSError) -> Exception:
  """The one-line error for a failed write: a RunError where space is the matter, else a UsageError."""
  if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
    return RunError(f"cannot write {path}: {error.strerror}; free space and run the same command again")
  return UsageError(f"cannot write {path}: {error.strerror or error}; give a path that can be written to")


def _lock(path):
  """The lock file, open and locked; the kernel releases it when the process dies, however it dies."""
  lock = open(path / ".lock", "a+")  # noqa: SIM115 (held for as long as the run lives)
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as e:
    lock.seek(0)
    owner = lock.read().strip()
    lock.close()
    who = f" (process {owner})" if owner else ""
    raise UsageError(f"{path} is in use by another run{who}; wait for it, stop it,"
                     " or give another workdir") from e
  lock.truncate(0)
  lock.write(f"{os.getpid()}\n")
  lock.flush()
  return lock


def _plain(config: dict) -> dict:
  """The config as JSON will give it back: tuples become lists."""
  for name, value in flat(config).items():
    try:
      json.dumps(value)
    except TypeError as e:
      raise UsageError(f"config.{name} is {value!r}, which JSON cannot hold;"
                       " use numbers, strings, tuples") from e
  return json.loads(json.dumps(config))


def _sentence(differ: dict[str, tuple[Any, Any]], limit: int = 8) -> str:
  parts = [f"{name} is {a!r} there, {b!r} here" for name, (a, b) in differ.items()]
  more = f"; and {len(parts) - limit} more" if len(parts) > limit else ""
  return "; ".join(parts[:limit]) + more


def _remove(path) -> None:
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)


def sync_folder(folder) -> None:
  """Makes a rename durable."""
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
