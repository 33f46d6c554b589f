"""What run directories hold, read and checked: rows of results.json, logs, configs, versions.

Nothing that is absent or damaged stops the reading: it is left out and named in a list of problems.
"""

import json
import math
import pathlib
from typing import NamedTuple

from ddil_jax.errors import UsageError

OBJECTIVES = ("teacher", "pd", "cd", "lcm", "dmd2")  # in the order of the tables
VARIANTS = ("base", "+ddil", "+reflected", "+ddil+reflected")
FILES = ("results.json", "metrics.jsonl", "config.json")


class Row(NamedTuple):
  """A checked row of results.json; numbers that are not finite are None. The teacher's variant is ""."""

  objective: str
  variant: str
  steps: int
  guidance_scale: float
  seed: int
  metrics: dict[str, float | None]
  shift: list[dict]
  network_evaluations: float | None
  seconds: float | None
  samples: str
  path: pathlib.Path
  run: str

  @property
  def group(self):
    return self.objective, self.steps, self.guidance_scale

  @property
  def label(self):
    return f"{self.objective} {self.variant}, {self.steps} steps, guidance scale {self.guidance_scale:g}"


class Run(NamedTuple):
  """What a run directory held; empty where a file was absent."""

  name: str
  config: dict
  versions: dict
  log: list[dict]
  rows: list[Row]


def runs_of(run_dirs, missing: list[str]) -> list[Run]:
  """Reads run directories, and the runs in their sub-directories; what is absent is added to `missing`."""
  paths = []
  for path in map(pathlib.Path, run_dirs):
    if not path.is_dir():
      raise UsageError(f"no run directory {path}; expected one with {', '.join(FILES)}")
    # Results merged over sub-directories come last: a run's own rows go before them.
    paths += [*_inner(path), path]
  paths = list(dict.fromkeys(path.resolve() for path in paths))
  return [_load(path, _name(path, paths), missing) for path in paths]


def _inner(path):
  return sorted({f.parent for name in FILES[:2] for f in path.glob(f"*/{name}")})


def _name(path, paths):
  """The shortest end of the path that no other run's path has."""
  for n in range(1, len(path.parts)):
    if sum(p.parts[-n:] == path.parts[-n:] for p in paths) == 1:
      break
  return "/".join(path.parts[-n:])


def _load(path, name, missing) -> Run:
  problems = []
  config, versions, results = (_json(path / file, kind, problems) for file, kind in (
      ("config.json", dict), ("versions.json", dict), ("results.json", list)))
  log = _log(path / "metrics.jsonl", problems)
  rows = [row for raw in results if (row := check(raw, problems, path, name))]
  if _inner(path):  # a directory of runs need not be a run itself
    problems = [p for p in problems if not p.endswith("is absent")]
  missing += [f"{name}: {p}" for p in dict.fromkeys(problems)]
  return Run(name, config, versions, log, rows)


def _json(path, kind, problems):
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    problems.append(f"{path.name} is absent")
  except (OSError, ValueError, RecursionError) as e:
    problems.append(f"{path.name} cannot be read: {getattr(e, 'strerror', None) or e}")
  else:
    if isinstance(value, kind):
      return value
    problems.append(f"{path.name} holds a {type(value).__name__}, expected a {kind.__name__}")
  return kind()


def _log(path, problems) -> list[dict]:
  """Finite numbers of metrics.jsonl by step; where a resumed run wrote a step again, the last line counts."""
  try:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
  except OSError as e:
    absent = isinstance(e, FileNotFoundError)
    problems.append(f"{path.name} is absent" if absent else f"{path.name} cannot be read: {e.strerror}")
    return []
  found, damaged = {}, 0
  for line in filter(str.strip, lines):
    try:
      value = json.loads(line)
      line = {str(k): n for k, v in value.items() if (n := _number(v)) is not None}
      # An evaluation in mid-run writes a second line for its step.
      found[int(value["step"])] = found.get(int(value["step"]), {}) | line
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
      damaged += 1
  if damaged:
    problems.append(f"{damaged} damaged line{'s' * (damaged > 1)} of {path.name} left out")
  return [found[step] for step in sorted(found)]


def check(raw, problems: list[str], path=pathlib.Path(), run: str = "") -> Row | None:
  """A row of results.json, or None and a problem if it does not say what was evaluated."""
  raw = raw if isinstance(raw, dict) else {}
  needed = {"objective": raw.get("objective") or None} | {
      k: _number(raw.get(k)) for k in ("steps", "guidance_scale", "seed")}
  absent = [k for k, v in needed.items() if v is None]
  if absent:
    problems.append(f"a row of results.json without {', '.join(absent)} is left out")
    return None
  metrics = raw["metrics"] if isinstance(raw.get("metrics"), dict) else {}
  shift = raw["shift"] if isinstance(raw.get("shift"), list) else []
  objective = str(needed["objective"])
  variant = "" if objective == "teacher" else str(raw.get("variant") or "base")
  return Row(
      objective, variant, int(needed["steps"]), needed["guidance_scale"], int(needed["seed"]),
      metrics={str(k): _number(v) for k, v in metrics.items()},
      shift=[p for p in shift if isinstance(p, dict)],
      network_evaluations=_number(raw.get("network_evaluations")), seconds=_number(raw.get("seconds")),
      samples=str(raw.get("samples") or ""), path=path, run=run)


def _number(value):
  ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
  return float(value) if ok else None


def unique(rows: list[Row], missing: list[str]) -> list[Row]:
  """Rows in the tables' order, each once; where two contradict, the first counts and `missing` says so."""
  found = {}
  for row in rows:
    first = found.setdefault((row.group, row.variant, row.seed, frozenset(row.metrics)), row)
    if first.metrics != row.metrics:
      missing.append(f"unlike rows for {row.label}, seed {row.seed}: that of {first.run} counts, "
                     f"that of {row.run} does not")
  return sorted(found.values(), key=lambda r: (order(r.group), variant_order(r.variant), r.seed))


def variant_order(variant):
  return VARIANTS.index(variant) if variant in VARIANTS else len(VARIANTS), variant


def order(group):
  objective, steps, guidance = group
  place = OBJECTIVES.index(objective) if objective in OBJECTIVES else len(OBJECTIVES)
  return place, objective, guidance, -steps
