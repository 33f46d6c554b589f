"""A run's folder: what is in it, who may write to it, and whether it holds the same run.

  config.json      the resolved config        metrics.jsonl   one line per logged step
  versions.json    of the first start         tensorboard/    the same as event files
  checkpoints/     see `checkpoint.py`        .lock           held by the process that writes here
"""

import fcntl
import json
import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any, NamedTuple

from ddil_jax import files
from ddil_jax.errors import UsageError

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
            may_change: Sequence[str] = (), defaults: dict | None = None) -> Workdir:
  """Takes a folder for a run: a new one, or the one that a run of the same config left.

  Args:
    workdir: the folder; made if absent.
    config: the resolved config, nested dicts of what JSON can hold.
    versions: what runs it, see `logging.versions`; kept from the first start.
    overwrite: start anew: remove what an earlier run left (MADE_BY_RUN; other files stay).
    may_change: dotted fields, or prefixes of them, in which a continued run may differ.
    defaults: of fields that came later than the run: what its config lacks has these values.

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
    raise files.cannot_write(path, e) from e
  try:
    return _claim(path, config, versions, overwrite, may_change, defaults or {}, lock)
  except BaseException as e:
    lock.close()
    if isinstance(e, OSError):
      raise files.cannot_write(path, e) from e
    raise


def _claim(path, config, versions, overwrite, may_change, defaults, lock) -> Workdir:
  if overwrite:
    for name in MADE_BY_RUN:
      _remove(path / name)
  if not (path / "config.json").exists():
    left = [name for name in MADE_BY_RUN[:3] if (path / name).exists()]
    if left:
      raise UsageError(f"{path} holds {' and '.join(left)} but no config.json to say of which run; "
                       "give another workdir, or remove them")
    files.write_json(path / "versions.json", versions)
    files.write_json(path / "config.json", config)
    return Workdir(path, False, {}, {}, lock)

  differ = differences(with_defaults(files.read_json(path / "config.json"), _plain(defaults)), config)
  allowed = lambda field: any(field == f or field.startswith(f + ".") for f in may_change)  # noqa: E731
  refused = {field: pair for field, pair in differ.items() if not allowed(field)}
  if refused:
    raise UsageError(f"{path} holds a run of another config: {_sentence(refused)}; "
                     "give another workdir, or the config of that run")
  before = files.read_json(path / "versions.json") if (path / "versions.json").exists() else versions
  if differ:
    files.write_json(path / "config.json", config)
  return Workdir(path, True, differ, differences(before, versions), lock)


def differences(there: dict, here: dict) -> dict[str, tuple[Any, Any]]:
  """{dotted field: (value there, value here)} of the fields that differ; an absent field is "(absent)"."""
  there, here = flat(there), flat(here)
  get = lambda fields, name: fields.get(name, "(absent)")  # noqa: E731
  pairs = {name: (get(there, name), get(here, name)) for name in sorted(there.keys() | here.keys())}
  # Compared as text too: NaN differs from itself as a number.
  return {name: (a, b) for name, (a, b) in pairs.items() if a != b and json.dumps(a) != json.dumps(b)}


def with_defaults(config: dict, defaults: dict) -> dict:
  """The config with the fields that it lacks from `defaults`; groups that it lacks stay away."""
  filled = dict(config)
  for name, value in defaults.items():
    if isinstance(value, dict):
      if isinstance(config.get(name), dict):
        filled[name] = with_defaults(config[name], value)
    else:
      filled.setdefault(name, value)
  return filled


def flat(config: dict, prefix: str = "") -> dict[str, Any]:
  """{"a": {"b": 1}} -> {"a.b": 1}; an empty dict is a value."""
  out = {}
  for name, value in config.items():
    inner = isinstance(value, dict) and value
    out |= flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
  return out


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
