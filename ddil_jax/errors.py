"""Errors that the command line shows in one line, without a traceback."""


class UsageError(ValueError):
  """The user's mistake: a name, a value, a path. Exit code 2."""


class RunError(RuntimeError):
  """A run that failed and can be resumed: no space, non-finite losses. Exit code 1."""
