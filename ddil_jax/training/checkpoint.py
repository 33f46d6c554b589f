"""Checkpoints of a run: Orbax underneath; checksums, fallback and one-line errors on top.

A checkpoint is a folder `<step>/` with `state/` (the arrays, by Orbax) and `record.json`: the caller's
meta, the metrics, dtype and shape of every array, and the sha256 of every file, sealed by a digest.
It is written as `<step>.partial/` and renamed when all is there, so a folder `<step>/` is whole or it
is not one of ours. Orbax alone would take flipped bits and empty folders for checkpoints.
"""

import errno
import hashlib
import json
import math
import os
import pathlib
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from ddil_jax.errors import RunError, UsageError
from ddil_jax.registry import unknown
from ddil_jax.training.params import describe, digest, load_params, require_same, unflatten
from ddil_jax.files import cannot_write, sync_folder, write_json
from ddil_jax.training.workdir import CHECKPOINTS
from ddil_jax.types import Params

PARTIAL = ".partial"


class Damaged(Exception):
  """A checkpoint that cannot be trusted; the message says why."""


class Checkpoints:
  """The checkpoints of one run; one writer, any number of readers.

  Args:
    directory: made if absent, unless `read_only`.
    keep: how many of the newest to keep.
    keep_best, best_metric, best_mode: how many more to keep that had the lowest ("min") or highest
      ("max") of that metric; a checkpoint saved without it, or with NaN, is none of them.
    asynchronous: write in the background; `save` returns when the arrays are copied to the host.
    read_only: only restore; leaves alone what a writer may be working on.
    warn: called with one line about each damaged checkpoint; default: prints it to stderr.

  Raises:
    UsageError: a bad option, or a directory that cannot be made.
  """

  def __init__(self, directory, keep: int = 2, keep_best: int = 0, best_metric: str | None = None,
               best_mode: str = "min", asynchronous: bool = True, read_only: bool = False,
               warn: Callable[[str], None] | None = None):
    if keep < 1 or keep_best < 0:
      raise UsageError(f"keep must be at least 1 and keep_best at least 0, not {keep} and {keep_best}")
    if keep_best and not best_metric:
      raise UsageError("keep_best needs best_metric, the name of the metric to judge by")
    if best_mode not in ("min", "max"):
      raise UsageError(unknown("best_mode", best_mode, ("min", "max")))
    self._directory = pathlib.Path(directory).absolute()
    self._keep, self._keep_best, self._best_metric = keep, keep_best, best_metric
    self._sign = 1 if best_mode == "min" else -1
    self._asynchronous, self._read_only = asynchronous, read_only
    self._warn = warn or (lambda line: print(line, file=sys.stderr, flush=True))
    self._saving: tuple[int, threading.Thread, list[Exception]] | None = None
    self._damaged: set[int] = set()
    self._own: set[int] = set()  # restored from, or saved, by this object
    if not read_only:
      try:
        self._directory.mkdir(parents=True, exist_ok=True)
        self._sweep()
      except OSError as e:
        raise cannot_write(self._directory, e) from e
    handler = ocp.CompositeCheckpointHandler()
    self._orbax = ocp.Checkpointer(handler) if read_only else ocp.AsyncCheckpointer(handler)

  def steps(self) -> list[int]:
    """The complete checkpoints, oldest first."""
    return [step for step in self._folders() if (self._folder(step) / "record.json").is_file()]

  def latest(self) -> int | None:
    return max(self.steps(), default=None)

  def best(self) -> int | None:
    """The step with the best value of `best_metric`; of equals the newest."""
    self.wait()
    return next(iter(self._ranked(self.steps())), None)

  def save(self, step: int, state, meta: dict, metrics: dict[str, float] | None = None) -> bool:
    """Saves a state; when it returns, the state may be donated.

    Args:
      state: a pytree of arrays.
      meta: what JSON can hold: the data position, the config.
      metrics: of this state, for `keep_best`.

    Returns:
      False if the step is saved already, by this object or the run that it continues; else True.

    Raises:
      RunError: this save or the one before failed; the older checkpoints are untouched.
    """
    if self._read_only:
      raise ValueError("these checkpoints were opened read-only")
    step = int(step)
    record = {"step": step, "meta": meta, "metrics": metrics or {}, "arrays": describe(state, hashes=False)}
    record = json.loads(json.dumps(record))  # as it will be read back: tuples are lists
    self.wait()
    self._set_damaged_aside(step)
    if self._folder(step).exists():
      if step in self._own:
        return False
      raise RunError(f"checkpoint {self._folder(step)} exists and is not of this run; remove it, or continue "
                     "from the newest checkpoint")
    self._reserve(step, state)
    try:
      # Returns when the arrays are on the host, not yet on disk.
      self._orbax.save(self._folder(step, PARTIAL),
                       args=ocp.args.Composite(state=ocp.args.StandardSave(state)))
    except Exception as e:
      raise self._failed(step, e) from e
    errors: list[Exception] = []
    thread = threading.Thread(target=self._finish, args=(step, record, errors), name=f"checkpoint {step}")
    thread.start()
    self._saving = (step, thread, errors)
    if not self._asynchronous:
      self.wait()
    return True

  def wait(self) -> None:
    """Returns when the save in progress, if any, is on disk.

    Raises:
      RunError: it failed.
    """
    if self._saving is None:
      return
    (step, thread, errors), self._saving = self._saving, None
    thread.join()
    if jax.process_count() > 1:  # the first process seals and renames; nobody looks before that
      multihost_utils.sync_global_devices(f"checkpoint {step}")
    if errors:
      raise self._failed(step, errors[0]) from errors[0]
    self._own.add(step)

  def restore(self, template, step: int | None = None) -> tuple[Any, dict, int] | None:
    """The newest intact checkpoint, or that of `step`: (state, meta, step); None if there is none at all.

    A damaged one is reported and the next older one taken.

    Args:
      template: a pytree of arrays or ShapeDtypeStructs; gives structure, dtypes and shardings.

    Raises:
      UsageError: a checkpoint of another architecture; or `step` is damaged or not there.
      RunError: there are checkpoints, and all are damaged.
    """
    record = self._intact(step)
    if record is None:
      return None
    folder = self._folder(record["step"])
    require_same(record["arrays"], describe(template, hashes=False), f"checkpoint {folder}")
    state = self._read(folder, ocp.args.StandardRestore(jax.tree.map(_target, template)))
    self._own.add(record["step"])
    return state, record["meta"], record["step"]

  def restore_part(self, which: str | None = None,
                   step: int | None = None) -> tuple[Params, dict, int, str] | None:
    """One network of the newest intact checkpoint, without a template: (params, meta, step, which).

    Args:
      which: "params/<player>" or "ema/<name>"; None takes what the meta names as "weights", else the
        only EMA, else "params/student".

    Raises:
      As `restore`; UsageError also for a part that is not there, or None where there are several EMAs.
    """
    record = self._intact(step)
    if record is None:
      return None
    which = _choose(record, which)
    target = unflatten({name: _target(jax.ShapeDtypeStruct(entry["shape"], np.dtype(entry["dtype"])))
                        for name, entry in record["arrays"].items() if name.startswith(which + "/")})
    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    tree = self._read(self._folder(record["step"]),
                      ocp.args.PyTreeRestore(target, restore_args=restore_args, partial_restore=True))
    for key in which.split("/"):
      tree = tree[key]
    return tree, record["meta"], record["step"], which

  def close(self) -> None:
    """Waits for the save in progress and stops the background thread."""
    try:
      self.wait()
    finally:
      self._orbax.close()

  def __enter__(self):
    return self

  def __exit__(self, kind, *exc):
    try:
      self.close()
    except RunError as e:
      if kind is None:
        raise
      self._warn(str(e))  # the error that is on its way out goes first

  def _folder(self, step: int, suffix: str = "") -> pathlib.Path:
    return self._directory / f"{step}{suffix}"

  def _folders(self) -> list[int]:
    if not self._directory.is_dir():
      return []
    names = [path.name for path in self._directory.iterdir() if path.is_dir()]
    return sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name)

  def _finish(self, step: int, record: dict, errors: list[Exception]) -> None:
    """Runs beside the training: waits for Orbax, seals, removes what is superfluous."""
    try:
      self._orbax.wait_until_finished()
      if jax.process_index() == 0:
        partial = self._folder(step, PARTIAL)
        record |= {"files": {path.relative_to(partial).as_posix(): _file_hash(path)
                             for path in sorted(partial.rglob("*")) if path.is_file()}}
        write_json(partial / "record.json", record | {"sha256": digest(record)})
        partial.rename(self._folder(step))
        sync_folder(self._directory)
        self._prune(step)
    except Exception as e:  # a thread has nobody to raise to: `wait` does
      errors.append(e)

  def _prune(self, saved: int) -> None:
    """Removes what neither `keep` nor `keep_best` holds; newer ones than `saved` are not its business."""
    steps = [step for step in self.steps() if step <= saved and step not in self._damaged]
    kept = {*steps[-self._keep:], *(self._ranked(steps)[:self._keep_best] if self._keep_best else ())}
    for step in set(steps) - kept:
      # Renamed first: a kill in the middle of the removal leaves nothing that looks like a checkpoint.
      self._folder(step).rename(self._folder(step, PARTIAL))
    self._sweep()

  def _ranked(self, steps: list[int]) -> list[int]:
    """Those of `steps` that have the metric, best first."""
    values = {}
    for step in steps:
      try:
        value = self._record(step)["metrics"].get(self._best_metric)
      except Damaged:
        continue
      if isinstance(value, int | float) and math.isfinite(value):
        values[step] = value
    return sorted(values, key=lambda s: (self._sign * values[s], -s))

  def _record(self, step: int) -> dict:
    """The record of a checkpoint. Raises Damaged."""
    try:
      record = json.loads((self._folder(step) / "record.json").read_bytes())
      seal = record.pop("sha256")
    except FileNotFoundError as e:
      raise Damaged("it has no record.json") from e
    except (OSError, ValueError, KeyError, AttributeError) as e:
      raise Damaged(f"record.json cannot be read: {_line(e)}") from e
    if digest(record) != seal or record["step"] != step:
      raise Damaged("record.json does not have its checksum")
    return record

  def _verified(self, step: int) -> dict:
    """The record, after all files were compared with their checksums. Raises Damaged."""
    record = self._record(step)
    for name, expected in record["files"].items():
      try:
        found = _file_hash(self._folder(step) / name)
      except OSError as e:
        raise Damaged(f"{name}: {e.strerror}") from e
      if found != expected:
        raise Damaged(f"{name} does not have its checksum")
    return record

  def _intact(self, step: int | None) -> dict | None:
    """The record of `step`, or of the newest intact checkpoint; None if there is none at all."""
    self.wait()
    folders = self._folders()
    if step is not None and step not in folders:
      raise UsageError(f"no checkpoint {step} in {self._directory}; there are: "
                       f"{', '.join(map(str, self.steps())) or 'none'}")
    candidates = [step] if step is not None else folders[::-1]
    for i, candidate in enumerate(candidates):
      try:
        return self._verified(candidate)
      except Damaged as e:
        self._damaged.add(candidate)
        line = f"checkpoint {self._folder(candidate)} is damaged ({e})"
        if step is not None:
          others = ", ".join(str(s) for s in folders if s != step) or "none"
          raise UsageError(f"{line}; others: {others}") from e
        if i + 1 == len(candidates):
          raise RunError(f"{line}, and so is every newer one; "
                         f"restore {self._directory} from a copy, or remove it to start anew") from e
        self._warn(f"{line}: falling back to {candidates[i + 1]}")
    return None

  def _read(self, folder: pathlib.Path, args):
    try:
      return self._orbax.restore(folder, args=ocp.args.Composite(state=args))["state"]
    except Exception as e:  # its files are as they were written, so this is no damage
      raise RunError(f"cannot restore checkpoint {folder}: {_line(e)}") from e

  def _set_damaged_aside(self, step: int) -> None:
    """Renames what a restore found damaged, and what lies damaged at `step`: never deleted, never counted."""
    if step not in self._damaged | self._own and self._folder(step).exists():
      try:
        self._verified(step)
      except Damaged:
        self._damaged.add(step)
    for damaged in sorted(self._damaged):
      source = self._folder(damaged)
      if source.exists() and jax.process_index() == 0:
        count = len(list(self._directory.glob(f"{damaged}.damaged*")))
        source.rename(self._folder(damaged, f".damaged{count or ''}"))
        self._warn(f"checkpoint {source} is damaged: kept as {damaged}.damaged{count or ''}")
    self._own -= self._damaged
    self._damaged.clear()

  def _reserve(self, step: int, state) -> None:
    """Takes the space for a moment, and gives it back for the save to use.

    A disk that fills up under Orbax's threads does no harm to the older checkpoints, but fills the
    terminal with their tracebacks; a disk that is too full before they begin is one line.
    """
    if jax.process_index() != 0 or not hasattr(os, "posix_fallocate"):  # macOS has none
      return
    leaves = jax.tree.leaves(state)
    size = int(1.02 * sum(leaf.nbytes for leaf in leaves)) + 2048 * len(leaves) + 2**17  # metadata: about
    try:
      with tempfile.TemporaryFile(dir=self._directory) as f:
        os.posix_fallocate(f.fileno(), 0, size)
    except OSError as e:
      if e.errno in (errno.ENOSPC, errno.EDQUOT):
        raise self._failed(step, e) from e

  def _sweep(self) -> None:
    """Removes what a killed or failed save or removal left."""
    if jax.process_index() == 0:
      for path in self._directory.glob(f"*{PARTIAL}*"):
        shutil.rmtree(path, ignore_errors=True)

  def _failed(self, step: int, error: Exception) -> RunError:
    self._sweep()
    latest = self.latest()
    again = "it starts from the beginning" if latest is None else f"it resumes from step {latest}"
    return RunError(f"cannot write checkpoint {step} in {self._directory}: {_line(error)}; "
                    f"free space and run the same command again: {again}")


class Loaded(NamedTuple):
  """A network from disk; `origin` says from where, in one line."""
  params: Params
  meta: dict
  origin: str


def load_any(path, which: str | None = None) -> Loaded:
  """A network from a run's workdir, its checkpoints folder, one checkpoint, or a file of `save_params`.

  Args:
    which: see `Checkpoints.restore_part`; not for a file, which holds one network.

  Raises:
    UsageError: nothing of the kind at `path`, damaged, or no such part. RunError: all are damaged.
  """
  path = pathlib.Path(path)
  if path.is_file():
    return Loaded(*load_params(path), str(path))
  if not path.exists():
    raise UsageError(f"no file or folder {path}; give a run's workdir, a checkpoint, or a .safetensors file")
  step = int(path.name) if path.name.isdecimal() and (path / "record.json").is_file() else None
  inner = path / CHECKPOINTS
  folder = path.parent if step is not None else inner if inner.is_dir() else path
  with Checkpoints(folder, read_only=True) as checkpoints:
    found = checkpoints.restore_part(which, step)
  if found is None:
    stages = [str(stage) for stage in sorted(path.glob("stage_*")) if (stage / CHECKPOINTS).is_dir()]
    if stages:
      raise UsageError(f"{path} is a run in stages; give one of {', '.join(stages)}")
    raise UsageError(f"{folder} holds no checkpoint; give a run's workdir, a checkpoint, or a .safetensors"
                     " file")
  params, meta, step, part = found
  return Loaded(params, meta, f"{folder / str(step)} {part}")


def _choose(record: dict, which: str | None) -> str:
  """The part that is asked for."""
  pairs = dict.fromkeys("/".join(name.split("/")[:2]) for name in record["arrays"])
  parts = [pair for pair in pairs if pair.startswith(("params/", "ema/"))]
  averages = [part for part in parts if part.startswith("ema/")]
  which = which or record["meta"].get("weights")
  if which is None:
    if len(averages) > 1:
      raise UsageError(f"the checkpoint has several averages; name one of: {', '.join(parts)}")
    which = averages[0] if averages else "params/student"
  if which not in parts:
    raise UsageError(unknown("network of the checkpoint", which, parts))
  return which


def _target(leaf) -> jax.ShapeDtypeStruct:
  """Where and as what to restore; always with a sharding, else Orbax takes that of the saving machine."""
  sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _file_hash(path: pathlib.Path) -> str:
  with open(path, "rb") as f:
    return hashlib.file_digest(f, "sha256").hexdigest()


def _line(error: BaseException) -> str:
  """The kernel's words if there are any in the chain of causes, else the first line of the message."""
  cause: BaseException | None = error
  while cause is not None:
    for phrase in ("No space left on device", "Disk quota exceeded", "File too large"):
      if phrase in str(cause):
        return phrase
    cause = cause.__cause__ or cause.__context__
  text = str(error).strip().splitlines()
  return f"{type(error).__name__}: {text[0] if text else ''}"[:160]
