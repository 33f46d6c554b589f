"""Compiled programs that are kept on disk, what a start costs, and a trace of some steps."""

import contextlib
import os
import pathlib
import time
from collections.abc import Iterator

import jax

from ddil_jax.errors import UsageError

FOLDER = "DDIL_COMPILE_CACHE"  # the variable that names the folder, or says "off"
OFF = "off"
_COMPILE = "/jax/core/compile/backend_compile_duration"  # the time of a hit counts too
_HIT = "/jax/compilation_cache/cache_hits"


def keep_programs(folder: str = "", least_seconds: float = 0.1) -> str:
  """Keeps compiled programs in a folder, from which later processes take them.

  A cache that JAX was told of already (`JAX_COMPILATION_CACHE_DIR`) stays. It is no error when there is no place
  for one: it only saves time.

  Args:
    folder: "" is $DDIL_COMPILE_CACHE, or else ddil_jax/compiled in the user's cache folder; "off" keeps nothing.
    least_seconds: what compiles faster is not worth a file.

  Returns:
    The folder, "" where nothing is kept.

  Raises:
    UsageError: a folder was given, and cannot be written to.
  """
  if jax.config.jax_compilation_cache_dir:
    return jax.config.jax_compilation_cache_dir
  given = folder or os.environ.get(FOLDER, "")
  if given == OFF:
    return ""
  try:
    # Without a home directory there is no place for it.
    place = pathlib.Path(given or pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
                         / "ddil_jax" / "compiled")
    place.mkdir(parents=True, exist_ok=True)
    if not os.access(place, os.W_OK):
      raise PermissionError(13, "Permission denied")
  except (OSError, RuntimeError) as error:
    if given:
      raise UsageError(f"compile cache {given}: {getattr(error, 'strerror', None) or error}; give a folder that can be"
                       f" written to, or {OFF}") from None
    return ""
  jax.config.update("jax_compilation_cache_dir", str(place))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", least_seconds)
  return str(place)


class Tally:
  """What was compiled since this began.

  Attributes:
    programs: how many, those of the cache included.
    cached: how many came from the cache.
    seconds: of both.
  """

  def __init__(self):
    self.programs, self.cached, self.seconds = 0, 0, 0.0
    self._began = time.monotonic()

  def __str__(self):
    of_cache = f", {self.cached} of them from the compile cache" if self.cached else ""
    return (f"first step after {time.monotonic() - self._began:.1f} s ({process_age():.1f} s after the process began);"
            f" {self.seconds:.1f} s of it compiling {self.programs} programs{of_cache}")


@contextlib.contextmanager
def tally() -> Iterator[Tally]:
  """Counts what is compiled in the block, in this whole process."""
  found = Tally()

  def compiled(name, seconds, **about):
    if name == _COMPILE:
      found.programs += 1
      found.seconds += seconds

  def hit(name, **about):
    found.cached += name == _HIT

  jax.monitoring.register_event_duration_secs_listener(compiled)
  jax.monitoring.register_event_listener(hit)
  try:
    yield found
  finally:
    jax.monitoring.unregister_event_duration_listener(compiled)
    jax.monitoring.unregister_event_listener(hit)


def peak_bytes(compiled: jax.stages.Compiled) -> int:
  """Memory of a device for a compiled program: arguments, results that do not replace them, temporary."""
  memory = compiled.memory_analysis()
  return (memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
          + memory.temp_size_in_bytes)


def process_age() -> float:
  """Seconds since this process was started, its imports included."""
  ticks = int(pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # field 22, starttime
  return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


class Profile:
  """A trace of the steps first to last, counted from 1, for TensorBoard or xprof; of every process its own.

  Args:
    steps: (first, last), or () for none.
    folder: where `plugins/profile/` will lie.
  """

  def __init__(self, steps: tuple[int, ...], folder: pathlib.Path):
    self._steps, self._folder, self._tracing = range(steps[0], steps[1] + 1) if steps else (), folder, False

  def before(self, step: int) -> None:
    """To be called before a step is given to the device."""
    if step in self._steps and not self._tracing:
      jax.profiler.start_trace(self._folder)
      self._tracing = True

  def after(self, step: int, metrics) -> None:
    """To be called after it; metrics: what it returned."""
    if self._tracing and step == self._steps[-1]:
      jax.block_until_ready(metrics)
      self.close()

  def close(self) -> None:
    """Ends a trace that is under way."""
    if self._tracing:
      jax.profiler.stop_trace()
      self._tracing = False


def check_profile_steps(steps) -> None:
  """Raises UsageError for anything but () or two numbers 1 <= first <= last."""
  if steps and (len(steps) != 2 or any(not isinstance(n, int) or isinstance(n, bool) for n in steps)
                or not 1 <= steps[0] <= steps[1]):
    raise UsageError(f"config.train.profile_steps={tuple(steps)}: the first and the last step to trace are needed, such"
                     " as (100,105)")
