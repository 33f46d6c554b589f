"""What a run tells: metrics as JSON lines and TensorBoard events, a steady line, the versions."""

import contextlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ddil_jax.errors import UsageError
from ddil_jax.files import cannot_write, write_bytes

with contextlib.ExitStack() as _hidden:
  # tensorboardX imports PyTorch where it is installed, for types of its own: seconds of the start of every command.
  if "torch" not in sys.modules:
    sys.modules["torch"] = None
    _hidden.callback(sys.modules.pop, "torch")
  from tensorboardX import summary
  from tensorboardX.proto import event_pb2
  from tensorboardX.record_writer import RecordWriter

PACKAGES = ("ddil-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class MetricWriter:
  """Appends to `metrics.jsonl` and to an event file in `tensorboard/`.

  A line is `{"step": 10, "time": 1.7e9, "student/loss": 0.5, ...}`, valid JSON always: a value that
  is not finite is null. Every write is synchronous, so that a full disk is an error at the step
  where it happens, and the last line of a killed run is whole.

  Args:
    workdir: an existing folder.
    step: the step from which the run continues, 0 for a new one. Lines of later steps, which a
      killed run left after its last checkpoint, are dropped: they will be written again.

  Raises:
    UsageError: the folder cannot be written to. RunError: no space.
  """

  def __init__(self, workdir, step: int = 0):
    self._path = pathlib.Path(workdir) / "metrics.jsonl"
    if self._path.exists():
      kept = [line for line in read_metrics(self._path) if line["step"] <= step]
      write_bytes(self._path, "".join(json.dumps(line) + "\n" for line in kept).encode())
    try:
      self._lines = open(self._path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
      self._events = _EventFile(pathlib.Path(workdir) / "tensorboard", step)
    except OSError as e:
      raise cannot_write(self._path.parent, e) from e

  def write(self, step: int, scalars: Mapping[str, Any],
            images: Mapping[str, np.ndarray] | None = None) -> None:
    """Writes one line, and the same to the event file.

    Args:
      step: the number of steps done.
      scalars: {name: number, or array of one element}.
      images: {name: uint8 [H,W,C] with C of 1, 3 or 4}, to the event file only.
    """
    step, now = int(step), time.time()
    values = {name: _number(name, value) for name, value in scalars.items()}
    line = json.dumps({"step": step, "time": round(now, 3)} | values, allow_nan=False) + "\n"
    try:
      data = line.encode()
      while data:  # a nearly full disk takes a part first, and fails at the rest
        data = data[self._lines.write(data):]
      self._events.write(step, now, values, images or {})
    except OSError as e:
      raise cannot_write(self._path.parent, e) from e

  def close(self) -> None:
    self._lines.close()
    self._events.close()

  def __enter__(self):
    return self

  def __exit__(self, *exc):
    self.close()


def read_metrics(path) -> list[dict[str, Any]]:
  """The lines of a `metrics.jsonl`; a line that a kill cut off is left out.

  Raises:
    UsageError: no such file.
  """
  try:
    text = pathlib.Path(path).read_text(encoding="utf-8", errors="replace")
  except OSError as e:
    raise UsageError(f"cannot read {path}: {e.strerror}") from e
  lines = []
  for text_line in text.splitlines():
    try:
      line = json.loads(text_line)
    except ValueError:
      continue
    if isinstance(line, dict) and isinstance(line.get("step"), int):
      lines.append(line)
  return lines


def _number(name: str, value) -> int | float | None:
  if name in ("step", "time"):
    raise ValueError(f"a metric cannot be named {name!r}: the line has a field of that name")
  if isinstance(value, int) and not isinstance(value, bool):
    return value
  array = np.asarray(value)
  if array.size != 1:
    raise ValueError(f"metric {name} has shape {array.shape}; a metric is one number")
  number = float(array.reshape(()))
  return number if math.isfinite(number) else None


class _EventFile:
  """One TensorBoard event file.

  tensorboardX's SummaryWriter is not used: it writes in a thread, which dies on a full disk and then
  blocks its caller for ever; and its file names carry the host's name.
  """

  def __init__(self, folder, step: int):
    folder.mkdir(exist_ok=True)
    name = f"events.out.tfevents.{time.time_ns() // 1000}.{os.getpid()}"
    self._records = RecordWriter(str(folder / name))
    self._put(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))
    if step:
      # TensorBoard then hides what an earlier file has from this step on.
      start = event_pb2.SessionLog(status=event_pb2.SessionLog.SessionStatus.Value("START"))
      self._put(event_pb2.Event(wall_time=time.time(), step=step + 1, session_log=start))
    self._records.flush()

  def write(self, step: int, now: float, values: Mapping[str, float | None],
            images: Mapping[str, np.ndarray]) -> None:
    summaries = [summary.scalar(name, value) for name, value in values.items() if value is not None]
    for name, image in images.items():
      image = np.asarray(image)
      if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] not in (1, 3, 4):
        raise ValueError(f"image {name} is {image.dtype}{list(image.shape)};"
                         " give uint8 [H,W,C], C of 1, 3 or 4")
      summaries.append(summary.image(name, image, dataformats="HWC"))
    for value in summaries:
      self._put(event_pb2.Event(wall_time=now, step=step, summary=value))
    self._records.flush()

  def _put(self, event) -> None:
    self._records.write(event.SerializeToString())

  def close(self) -> None:
    # All is flushed by `write`; what a full disk refused there is refused here once more.
    with contextlib.suppress(OSError):
      self._records.close()


class Progress:
  """A steady line on long work: `name 120/4000 (3%)  loss 0.213  57.1 steps/s  1:08 left`.

  On a terminal the line is rewritten at most once a second; elsewhere (a log file) a new line comes
  every `every` seconds. The first and the last step always show, but for `after`.

  Args:
    total: steps in all.
    name: what is being done.
    every: seconds between lines where the output is not a terminal.
    unit: what is counted, in the plural.
    after: seconds before the first line; work that ends sooner shows none.
  """

  def __init__(self, total: int, name: str, every: float = 10.0, stream=None,
               clock=time.monotonic, unit: str = "steps", after: float = 0.0):
    self._total, self._name, self._stream, self._clock = total, name, stream or sys.stdout, clock
    self._unit, self._silent = unit, after > 0
    self._terminal = self._stream.isatty()
    self._every = 1.0 if self._terminal else every
    self._begun = self._measured = clock()
    self._first = None
    self._next, self._width, self._open = self._begun + after, 0, False

  def update(self, step: int, **values) -> None:
    """Says that `step` steps are done; `values` (e.g. loss=array) are only read when the line is printed."""
    now = self._clock()
    if self._first is None:
      # Up to here it compiled: the rate is that of the steps after.
      self._first, self._measured = step, now
    if now < self._next and (step < self._total or self._silent):
      return
    self._next, self._silent = now + self._every, False
    line = "  ".join([self._head(step), *(f"{k} {float(np.asarray(v)):.4g}" for k, v in values.items()),
                      *self._rate(step, now)])
    if self._terminal:
      self._stream.write("\r" + line.ljust(self._width))
      self._width, self._open = len(line), True
    else:
      self._stream.write(line + "\n")
    self._stream.flush()

  def _head(self, step: int) -> str:
    percent = f" ({100 * step // self._total}%)" if self._total else ""
    return f"{self._name} {step}/{self._total}{percent}"

  def _rate(self, step: int, now: float) -> list[str]:
    done, seconds = step - self._first, now - self._measured
    parts = []
    if done > 0 and seconds > 0:
      rate = done / seconds
      parts = [f"{rate:.1f} {self._unit}/s" if rate >= 1 else f"{1 / rate:.1f} s/{self._unit[:-1]}"]
      if step < self._total:
        parts.append(f"{duration((self._total - step) / rate)} left")
    return parts if step < self._total else [*parts, f"{duration(now - self._begun)} in all"]

  def close(self) -> None:
    """Ends the line, so that what is printed next begins on its own."""
    if self._open:
      self._stream.write("\n")
      self._stream.flush()
      self._open = False

  def __enter__(self):
    return self

  def __exit__(self, *exc):
    self.close()


def duration(seconds: float) -> str:
  """75 -> "1:15", 4000 -> "1:06:40"."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def versions() -> dict[str, str]:
  """Versions of Python, the packages and this code, and the kind of device; no paths, no host names."""
  out = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}",
         "platform": jax.default_backend(), "device": jax.devices()[0].device_kind}
  for name in PACKAGES:
    try:
      out[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      out[name] = "not installed as a package"
  commit = _commit(pathlib.Path(__file__).parent)
  return out | ({"git": commit} if commit else {})


def _commit(folder: pathlib.Path) -> str | None:
  """The commit of the checkout that this file belongs to, with "+changes" if tracked files differ from it."""
  def git(*arguments) -> str | None:
    try:
      done = subprocess.run(["git", "-C", str(folder), *arguments],
                            capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
      return None
    return done.stdout.strip() if done.returncode == 0 else None

  # A package installed into an environment that lies in a checkout does not belong to it.
  if git("ls-files", "--error-unmatch", "__init__.py") is None:
    return None
  commit = git("rev-parse", "HEAD")
  return commit and commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
