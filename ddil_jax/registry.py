"""Parts by name: the file is the registration."""

import difflib
import importlib
import pkgutil

from ddil_jax.errors import UsageError


def names(package: str) -> list[str]:
  """The parts in a sub-package, e.g. names("objectives"): its modules except `base`."""
  module = importlib.import_module(f"ddil_jax.{package}")
  return sorted(m.name for m in pkgutil.iter_modules(module.__path__) if m.name != "base")


def load(package: str, name: str):
  """The module of a part. Raises UsageError with the nearest names and all that exist."""
  known = names(package)
  if name not in known:
    raise UsageError(unknown(package.rstrip("s"), name, known))
  return importlib.import_module(f"ddil_jax.{package}.{name}")


def unknown(what: str, name: str, known) -> str:
  """'unknown WHAT 'NAME'; did you mean ...; there are: ...'."""
  near = difflib.get_close_matches(str(name), list(known), n=3)
  hint = f"did you mean {' or '.join(near)}? " if near else ""
  return f"unknown {what} '{name}'; {hint}there are: {', '.join(sorted(known))}"
