"""Ends a process that makes no steps any more, so that one that is stuck does not hold up all others in silence."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator

EXIT_CODE = 1  # as a run that failed: the same command continues it


class Watchdog:
  """Counts the seconds since the last step; `watch` makes one."""

  def __init__(self):
    self._last, self._step, self._paused = time.monotonic(), None, 0

  def step_done(self, step: int) -> None:
    self._last, self._step = time.monotonic(), step

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """While work goes on that is no step and may take its time."""
    self._paused += 1
    try:
      yield
    finally:
      self._last = time.monotonic()
      self._paused -= 1

  def idle(self) -> float:
    """Seconds without a step."""
    return 0.0 if self._paused else time.monotonic() - self._last

  def report(self, seconds: float) -> None:
    """Writes what hangs to stderr: the stacks of all threads."""
    where = "before the first step was done" if self._step is None else f"since step {self._step}"
    print(f"ddil: run failed: watchdog: no step for {seconds:g} s {where}; the stacks of all threads:",
          file=sys.stderr, flush=True)
    faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)


@contextlib.contextmanager
def watch(seconds: float) -> Iterator[Watchdog]:
  """Ends the process with EXIT_CODE when no step is done for some seconds; 0 never does.

  What hangs may hold the interpreter's lock, so that no Python thread can say so: then the C library's
  timer of `faulthandler`, which the thread sets again and again, writes the stacks and ends the process,
  after twice that time.
  """
  dog, ended = Watchdog(), threading.Event()
  if not seconds:
    yield dog
    return

  def look():
    while not ended.wait(min(1.0, seconds / 4)):
      faulthandler.dump_traceback_later(2 * seconds, exit=True, file=sys.__stderr__)
      if dog.idle() > seconds:
        dog.report(seconds)
        os._exit(EXIT_CODE)

  thread = threading.Thread(target=look, name="watchdog", daemon=True)
  thread.start()
  try:
    yield dog
  finally:
    ended.set()
    thread.join()
    faulthandler.cancel_dump_traceback_later()
