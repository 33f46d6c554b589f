"""What the launchers share that write a file for another system: its options, and how it is written."""

import argparse
import pathlib
import shlex
import sys
from collections.abc import Callable

from ddil_jax import files
from ddil_jax.errors import UsageError
from launch.local import checked_arguments

# Of a job that nobody watches. A step's compilation counts: one of Stable Diffusion's size took 45 minutes on two cores
# (docs/scaling.md), and larger networks take longer.
WATCHDOG_SECONDS = 3 * 3600


def parser(prog: str, about: str, out: str) -> argparse.ArgumentParser:
  """The options that all have; `out` is the file's default name."""
  args = argparse.ArgumentParser(prog=prog, description=about, allow_abbrev=False,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
  args.add_argument("--out", default=out, metavar="FILE")
  args.add_argument("--dry_run", action="store_true", help="print what would be written, write nothing")
  args.add_argument("arguments", nargs="+", metavar="-- train ...", help="of `python -m ddil_jax`")
  return args


def job_arguments(arguments: list[str]) -> list[str]:
  """Arguments of `ddil train`, checked, and with a watchdog where they set none. Raises UsageError."""
  return checked_arguments(arguments, WATCHDOG_SECONDS)


def deliver(prog: str, found: argparse.Namespace, render: Callable[[], str], start: str) -> int:
  """Prints or writes what is rendered and says by which command it starts; returns the exit code."""
  try:
    text = render()
    if found.dry_run:
      print(text, end="")
      return 0
    files.write_bytes(pathlib.Path(found.out), text.encode())
  except UsageError as error:
    print(f"{prog}: {error}", file=sys.stderr)
    return 2
  print(f"wrote {found.out}; start it with: {start} {shlex.quote(found.out)}")
  return 0
