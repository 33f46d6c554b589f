"""Several processes of one run on this machine, and again after a failure: the smallest of the launchers.

    python -m launch.local --processes=2 -- train --config=configs/digits_dmd2.py:ddil --workdir=runs/dmd2 \\
        --config.train.parallel=mesh --config.teacher.path=runs/teacher

Each process gets --coordinator, --num_processes and --process_id, and where there are GPUs one of its own (--gpus).
If one of them dies the others cannot go on: they are ended, and with --restarts=N all are started again from the last
checkpoint, up to N times, but not when the launcher was asked to stop.
The exit code is that of `ddil train`: 0, 1 the run failed, 2 wrong usage, 130 stopped by a signal.
"""

import argparse
import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from ddil_jax import config as config_lib
from ddil_jax import main as cli
from ddil_jax.errors import UsageError

GRACE = 60.0  # seconds in which a process that is asked to stop may finish its step and save
STOPPED = 130
SETTLED = (0, 2, STOPPED)  # done, wrong usage, stopped: starting again would not help
WATCHDOG = "train.watchdog_seconds"


def commands(processes: int, port: int, arguments: list[str], gpus: int = 0) -> list[list[str]]:
  """One command a process; with `gpus` > 0 each has as many of its own, else it sees all."""
  def own(i):  # read by jax.distributed.initialize
    return ["env", f"JAX_LOCAL_DEVICE_IDS={','.join(map(str, range(i * gpus, (i + 1) * gpus)))}"] if gpus else []

  return [[*own(i), sys.executable, "-m", "ddil_jax", *arguments, f"--coordinator=localhost:{port}",
           f"--num_processes={processes}", f"--process_id={i}"] for i in range(processes)]


def checked_arguments(arguments: list[str], watchdog_seconds: int = 0) -> list[str]:
  """Arguments of `ddil train` that several processes can run.

  Args:
    watchdog_seconds: added where neither the arguments nor their config set a watchdog.

  Raises:
    UsageError: arguments of something else, a mistake in them, or a run of one process.
  """
  known, rest = cli.parser().parse_known_args(arguments)
  if known.command != "train" or not known.config:
    raise UsageError("`train --config=FILE.py[:ARG] --workdir=DIR ...` is needed after --")
  overrides = cli.overrides_of(rest, "train")
  train = config_lib.load(known.config, overrides).train
  if train.parallel != "mesh":
    raise UsageError(f"train.parallel is {train.parallel}; several processes need --config.train.parallel=mesh")
  if not watchdog_seconds or train.watchdog_seconds or WATCHDOG in overrides:
    return arguments
  return [*arguments, f"--config.{WATCHDOG}={watchdog_seconds}"]


def free_port() -> int:
  """A port that nobody listens at now."""
  with socket.socket() as s:
    s.bind(("localhost", 0))
    return s.getsockname()[1]


def environment(devices: int) -> dict[str, str]:
  """Of a process; with `devices` > 0 it has that many virtual CPU devices.

  And twice as many threads (NPROC): on fewer cores than devices a collective may else wait for ever for work that is
  queued behind it.
  """
  flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip()
  return dict(os.environ) | (
      {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "NPROC": str(2 * devices)} if devices else {})


def run(processes: int, devices: int, arguments: list[str], restarts: int = 0, grace: float = GRACE,
        gpus: int = 0) -> int:
  """Runs all processes to their end, and again where one failed and nobody asked to stop.

  Args:
    devices: virtual CPU devices of each process; 0 leaves the devices alone.
    restarts: how often to start again.
    grace: seconds that the others get when one has ended badly.
    gpus: of each process; 0 leaves them alone.
  """
  with _requests() as asked:
    for attempt in range(restarts + 1):
      codes = _once(commands(processes, free_port(), arguments, gpus), environment(devices), grace, asked)
      if asked:  # the signal itself ends a process that does not train yet
        codes = [STOPPED if code < 0 else code for code in codes]
      failed = any(code not in SETTLED for code in codes)
      if not failed or asked or attempt == restarts:
        break
      print(f"launch: exit codes {codes}; starting again ({attempt + 1} of {restarts})", file=sys.stderr, flush=True)
  return 1 if failed else max(codes)


@contextlib.contextmanager
def _requests() -> Iterator[list[int]]:
  """The requests to stop that have come: SIGINT and SIGTERM."""
  asked = []
  old = {s: signal.signal(s, lambda number, frame: asked.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
  try:
    yield asked
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)


def _once(all_commands, env, grace, asked: Sequence[int] = ()) -> list[int]:
  """The exit codes; each request to stop is passed on, and the processes may save."""
  started, passed_on, deadline = [], 0, None
  try:
    for command in all_commands:
      started.append(subprocess.Popen(command, env=env, start_new_session=True))
    while any(process.poll() is None for process in started):
      time.sleep(0.05)
      if len(asked) > passed_on:
        passed_on = len(asked)
        for process in started:
          process.terminate()
      if deadline is None and any(process.poll() not in (None, 0) for process in started):
        deadline = time.monotonic() + grace
      if deadline is not None and time.monotonic() > deadline:
        for process in started:
          process.kill()
  finally:
    for process in started:
      process.kill()
      process.wait()
  return [process.returncode for process in started]


def main(argv: list[str] | None = None) -> int:
  """Returns the exit code."""
  args = argparse.ArgumentParser(prog="launch.local", description=__doc__, allow_abbrev=False,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
  args.add_argument("--processes", type=int, default=2)
  args.add_argument("--devices", type=int, default=0, help="virtual CPU devices of each process; 0: the real ones")
  args.add_argument("--gpus", type=int, help="of each process; default: 1, or all where there is one process only")
  args.add_argument("--restarts", type=int, default=0, help="starts after a failure")
  args.add_argument("--dry_run", action="store_true", help="print the commands, run nothing")
  args.add_argument("arguments", nargs="+", metavar="-- train ...", help="of `python -m ddil_jax`")
  found = args.parse_args(argv)
  gpus = int(found.processes > 1 and not found.devices) if found.gpus is None else found.gpus
  try:
    if found.processes < 1 or found.devices < 0 or found.restarts < 0 or gpus < 0:
      raise UsageError("--processes of at least 1, --devices, --gpus and --restarts of at least 0 are needed")
    if gpus and found.devices:
      raise UsageError("--devices are of the CPU: with them there are no --gpus")
    arguments = checked_arguments(found.arguments)
    if found.dry_run:
      print("\n".join(map(shlex.join, commands(found.processes, free_port(), arguments, gpus))))
      return 0
    return run(found.processes, found.devices, arguments, found.restarts, gpus=gpus)
  except UsageError as error:
    print(f"launch.local: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
  sys.exit(main())
