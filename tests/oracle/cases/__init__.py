"""Which runner computes which file. Each module of this folder says which files it covers:

    RUNNERS = {pattern of the file's stem: runner}     computed and compared
    NOT_COVERED = {pattern: reason}                    listed as skipped

A method that is not there yet has a module with its NOT_COVERED; adding the method replaces that.
"""

import importlib
import pkgutil
import re


def _claims() -> list[tuple]:
  """(pattern, runner or None, reason or None) of all modules."""
  found = []
  for each in pkgutil.iter_modules(__path__):
    module = importlib.import_module(f"{__name__}.{each.name}")
    found += [(pattern, runner, None) for pattern, runner in getattr(module, "RUNNERS", {}).items()]
    found += [(pattern, None, reason) for pattern, reason in getattr(module, "NOT_COVERED", {}).items()]
  return found


CLAIMS = _claims()


def find(name: str) -> tuple:
  """(runner, None) of a file by its stem, or (None, the reason why it is not run).

  A kind of file that no module knows, or that two claim, is a failure.
  """
  found = [(runner, reason) for pattern, runner, reason in CLAIMS if re.fullmatch(pattern, name)]
  if len(found) != 1:
    raise AssertionError(f"golden vectors '{name}': {len(found)} modules know this kind of file; there are: "
                         f"{', '.join(pattern for pattern, _, _ in CLAIMS)}")
  return found[0]
