"""Config files and overrides: ConfigDict in, checked ConfigDict out.

A config is `FILE.py[:arg]` with `get_config(arg)`; overrides are dotted fields with Python literals.
"""

import ast
import difflib
import importlib.util
import math
import pathlib

from ml_collections import ConfigDict

from ddil_jax.errors import UsageError
from ddil_jax.registry import unknown


def load(spec: str, overrides: dict[str, str] | None = None) -> ConfigDict:
  """The config of `FILE.py[:arg]` with overrides {"a.b": "literal"}.

  Files are looked up here, then among the project's own configs.

  Raises:
    UsageError: no such file, argument or field, or a value of a wrong type.
  """
  loaded = module(spec)
  if not hasattr(loaded, "get_config"):
    raise UsageError(f"config file {loaded.__file__} has no function get_config(arg)")
  try:
    config = loaded.get_config(spec.partition(":")[2] or None)
  except UsageError:
    raise
  except Exception as error:  # as in `module`: the user's file
    raise UsageError(f"config file {loaded.__file__}: get_config fails: {type(error).__name__}: {error}") from error
  if not isinstance(config, ConfigDict):
    raise UsageError(f"config file {loaded.__file__}: get_config gives {type(config).__name__}, not a ConfigDict")
  for field, text in (overrides or {}).items():
    override(config, field, text)
  config.lock()
  return config


def defaults(overrides: dict[str, str] | None = None) -> ConfigDict:
  """The fields that every config has, with overrides. Raises UsageError as `load`."""
  from configs import common
  config = common.common()
  for field, text in (overrides or {}).items():
    override(config, field, text)
  config.lock()
  return config


def module(spec: str):
  """The Python module of a config file (without its argument)."""
  path = find(spec.partition(":")[0])
  spec_ = importlib.util.spec_from_file_location(f"ddil_config_{path.stem}", path)
  loaded = importlib.util.module_from_spec(spec_)
  try:
    spec_.loader.exec_module(loaded)
  except UsageError:
    raise
  except Exception as error:  # the user's file: any error in it is theirs to see, in one line
    raise UsageError(f"config file {path} does not load: {type(error).__name__}: {error}") from error
  return loaded


def folder() -> pathlib.Path:
  """Where the project's own configs lie."""
  import configs
  return pathlib.Path(configs.__file__).parent


def find(name: str) -> pathlib.Path:
  """A config file by path, or by name among the project's own."""
  for path in (pathlib.Path(name), folder().parent / name, folder() / pathlib.Path(name).name):
    if path.suffix == ".py" and path.is_file():
      return path
  # By the stem: all paths are alike in the rest.
  near = [f"configs/{each}.py" for each in difflib.get_close_matches(pathlib.Path(name).stem, available())]
  hint = f"did you mean {' or '.join(near)}? " if near else ""
  raise UsageError(f"unknown config file '{name}'; {hint}`ddil list` shows those that there are")


def available() -> list[str]:
  """The project's own configs by name."""
  return sorted(p.stem for p in folder().glob("*.py") if p.stem not in ("__init__", "common", "text"))


def override(config: ConfigDict, field: str, text: str) -> None:
  """Sets a dotted field from its text, keeping its type (an int is taken for a float)."""
  *parents, last = field.split(".")
  node, where = config, "config"
  for name in parents:
    if not isinstance(node, ConfigDict) or name not in node:
      _no_such_field(node, name, where, field)
    node, where = node[name], f"{where}.{name}"
  if not isinstance(node, ConfigDict) or last not in node:
    _no_such_field(node, last, where, field)
  old = node[last]
  if isinstance(old, ConfigDict):
    raise UsageError(f"config.{field} is a group; set one of its fields: {', '.join(sorted(old))}")
  value = _parse(field, text, old)
  if type(value) is type(old):
    node[last] = value
  else:  # checked above: some fields have two types
    with node.ignore_type():  # slow, on large configs
      node[last] = value


# Fields of two types: a prior is a number or a schedule, a bound a number or one per channel.
PRIORS = tuple(f"states.{name}" for name in ("forward", "student", "teacher", "dagger", "pairs"))
BOUNDS = ("reflect.lo", "reflect.hi")


def _no_such_field(node, name, where, field):
  if not isinstance(node, ConfigDict):
    raise UsageError(f"config.{field}: {where} is a single value and has no field '{name}'")
  raise UsageError(unknown(f"field of {where}", name, list(node)))


def _parse(field, text, old):
  if isinstance(old, str):
    return text
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):
    value = text
  if isinstance(old, bool):
    value = {"true": True, "false": False}.get(str(text).lower(), value)
  if field in PRIORS and tuple in (type(old), type(value)):
    return _prior(field, text, value)
  if field in BOUNDS and isinstance(value, tuple) and all(isinstance(v, int | float) for v in value):
    return tuple(float(v) for v in value)
  if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
    value = float(value)
  if isinstance(old, int) and not isinstance(old, bool) and isinstance(value, float) and value.is_integer():
    value = int(value)  # 1e3
  if isinstance(old, tuple) and not isinstance(value, tuple):
    value = tuple(value) if isinstance(value, list) else (value,) if not isinstance(value, str) else value
  if type(value) is not type(old):
    raise UsageError(f"config.{field}={text}: {type(old).__name__} expected, such as {old!r},"
                     f" not {type(value).__name__}")
  if isinstance(value, float) and not math.isfinite(value):  # 1e400
    raise UsageError(f"config.{field}={text}: this number is not finite")
  return _elements(field, text, value, old) if isinstance(value, tuple) else value


def _prior(field, text, value):
  """A number, or a schedule: a kind and numbers."""
  number = lambda v: isinstance(v, int | float) and not isinstance(v, bool)  # noqa: E731
  if number(value):
    return float(value)
  if isinstance(value, tuple) and value and isinstance(value[0], str) and all(map(number, value[1:])):
    return value
  raise UsageError(f"config.{field}={text}: a number or a schedule expected, such as 0.5 or ('linear', 0.0, 0.5, 1.0)")


def _elements(field, text, value, old):
  """A tuple with elements like those of the default; of numbers where the default is empty."""
  kind = (str,) if any(isinstance(v, str) for v in old) else (int, float)
  whole = bool(old) and all(isinstance(v, int) for v in old)
  value = tuple(int(v) if whole and isinstance(v, float) and v.is_integer() else v for v in value)
  for v in value:
    if not isinstance(v, kind) or isinstance(v, bool) or (whole and not isinstance(v, int)):
      expected = "texts" if kind == (str,) else "whole numbers" if whole else "numbers"
      raise UsageError(f"config.{field}={text}: a tuple of {expected} expected, such as {old!r}; {v!r} is none")
  return value


def flatten(config, prefix: str = "") -> dict:
  """{"a.b": value} of a nested config, tuples as lists as JSON has them."""
  flat = {}
  for name, value in dict(config).items():
    nested = isinstance(value, dict | ConfigDict)
    flat |= flatten(value, f"{prefix}{name}.") if nested else {prefix + name: value}
  return flat


def to_dict(config: ConfigDict) -> dict:
  """A plain nested dict, JSON-ready."""
  def plain(value):
    if isinstance(value, dict | ConfigDict):
      return {k: plain(v) for k, v in dict(value).items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value
  return plain(config)


def from_dict(plain: dict) -> ConfigDict:
  """The ConfigDict of a saved run: what `to_dict` gave, lists as tuples again."""
  def restore(value):
    if isinstance(value, dict):
      return {k: restore(v) for k, v in value.items()}
    return tuple(restore(v) for v in value) if isinstance(value, list) else value
  return ConfigDict(restore(plain)).lock()
