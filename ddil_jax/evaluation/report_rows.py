"""What run directories hold, read and checked: rows of results.json, logs, configs, versions.

Nothing that is absent or damaged stops the reading: it is left out and named in a list of problems. A trial
of a sweep that failed has rows too, without values and with its error.
"""

import csv
import json
import math
import pathlib
import re
from typing import Any, NamedTuple

from ddil_jax.errors import UsageError
from ddil_jax.evaluation import report_labels
from ddil_jax.evaluation.report_labels import Setting

OBJECTIVES = ("teacher", "pd", "cd", "lcm", "dmd2")  # in the order of the tables
FILES = ("results.json", "metrics.jsonl", "config.json")
TRIALS, FAILED = "sweep.json", "failed.json"  # of a sweep: what it runs; why a trial ended


class Row(NamedTuple):
  """A checked row of results.json; numbers that are not finite are None. The teacher's variant is "".

  Attributes:
    intervals: {metric: (low, high)} of one run's samples, where they were resampled (`eval.bootstrap`).
    teacher: identity (hash) of the run's teacher; "" where it is not known.
    config: of the whole run, flat; {} where there is none.
    error: why a trial has no results; else "".
    step_seconds, step_bytes: of a training step, see `measure.Cost`.
    setting: what it is called among the given runs, see `report_labels.with_settings`.
  """

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
  intervals: dict[str, tuple[float, float]] = {}
  teacher: str = ""
  config: dict[str, Any] = {}
  error: str = ""
  step_seconds: float | None = None
  step_bytes: float | None = None
  setting: Setting = Setting("")

  @property
  def label(self):
    return self.setting.label

  @property
  def group(self):
    return self.objective, self.steps, self.guidance_scale

  @property
  def title(self):
    return f"{self.objective} {self.label}, {self.steps} steps, guidance scale {self.guidance_scale:g}"

  @property
  def fate(self):
    """What became of a trial without results."""
    return "diverged" if re.search("not finite|diverged", self.error) else "failed"


class Run(NamedTuple):
  """What a run directory held; empty where a file was absent."""

  name: str
  config: dict
  versions: dict
  log: list[dict]
  rows: list[Row]


def runs_of(run_dirs, missing: list[str]) -> list[Run]:
  """Reads run directories, sweeps, and the runs in sub-directories; what is absent is added to `missing`."""
  wholes = {}  # path: the run of which it is a stage, or itself
  for path in map(pathlib.Path, run_dirs):
    if not path.is_dir():
      raise UsageError(f"no run directory {path}; expected one with {', '.join(FILES)}, or of a sweep, with {TRIALS}")
    _walk(path.resolve(), None, wholes)
  runs = []
  for path, whole in wholes.items():
    runs.append(_load(path, whole, _name(path, wholes), missing))
    have = {row.group for run, of in zip(runs, wholes.values()) if of == whole for row in run.rows}
    runs[-1].rows.extend(_failed(path, runs[-1], have, missing))
  labelled = iter(report_labels.with_settings([row for run in runs for row in run.rows]))
  return [run._replace(rows=[next(labelled) for _ in run.rows]) for run in runs]


def _walk(path, whole, found):
  """Inner runs first: results merged over sub-directories must not count before a run's own rows."""
  for inner in _inner(path):
    _walk(inner, path if re.fullmatch(r"stage_\d+", inner.name) else None, found)
  found.setdefault(path, whole or path)


def _inner(path):
  return sorted({f.parent for name in (*FILES[:2], TRIALS, FAILED) for f in path.glob(f"*/{name}")})


def _name(path, paths):
  """The shortest end of the path that no other run's path has."""
  for n in range(1, len(path.parts)):
    if sum(p.parts[-n:] == path.parts[-n:] for p in paths) == 1:
      break
  return "/".join(path.parts[-n:])


def _load(path, whole, name, missing) -> Run:
  problems = []
  config, versions, results = (_json(path / file, kind, problems) for file, kind in (
      ("config.json", dict), ("versions.json", dict), ("results.json", list)))
  log = _log(path / "metrics.jsonl", problems)
  flat = report_labels.flatten(config if whole == path else _json(whole / "config.json", dict, []))
  rows = [row._replace(config=flat) for raw in results if (row := check(raw, problems, path, name))]
  if _inner(path) or (path / TRIALS).exists() or (path / FAILED).exists():
    problems = [p for p in problems if not p.endswith("is absent")]  # it need not be a run, or a whole one
  if (path / TRIALS).exists():
    names = [str(trial.get("name")) for trial in _json(path / TRIALS, list, problems) if isinstance(trial, dict)]
    no_results = [n for n in names if not any((path / n / file).exists() for file in (FILES[0], FAILED))]
    if no_results:
      problems.append(f"{len(no_results)} of {len(names)} trials have no results yet: {', '.join(no_results[:6])}"
                      + " ..." * (len(no_results) > 6))
  missing += [f"{name}: {p}" for p in dict.fromkeys(problems)]
  return Run(name, config, versions, log, rows)


def _failed(path, run, have, missing) -> list[Row]:
  """Rows that a failed trial would have had, but for the groups in `have`."""
  if not (path / FAILED).exists():
    return []
  problems = []
  failure = _json(path / FAILED, dict, problems)
  config = run.config or failure.get("config") or {}
  # What happened; what to do about it, and paths, are in the log.
  error = " ".join(str(failure.get("error") or "no reason given").partition(";")[0].split())
  try:
    wanted = attempted(config)
    seed, variant = int(config["seed"]), str(failure["variant"])
  except (KeyError, TypeError, ValueError, AttributeError, IndexError):
    missing.append(f"{run.name}: failed before its config was known: {error}")
    return []
  missing += [f"{run.name}: {p}" for p in problems]
  flat = report_labels.flatten(config)
  return [Row(objective, variant, steps, scale, seed, {}, [], None, None, "", path, run.name, config=flat, error=error)
          for objective, steps, scale in wanted if (objective, steps, scale) not in have]


def rows_of_table(path: pathlib.Path) -> list[Row]:
  """The rows of a sweep's `results.csv`, those of failed trials too; what was not run yet is left out.

  Their config has the fields that vary over the sweep.

  Raises:
    UsageError: no such table.
  """
  try:
    with open(path, newline="", encoding="utf-8") as file:
      found = list(csv.DictReader(file))
  except (OSError, UnicodeDecodeError, csv.Error) as error:
    raise UsageError(f"cannot read the table {path}: {getattr(error, 'strerror', None) or error}") from None
  if not found or not {"run", "status", "objective", "steps", "seed"} <= found[0].keys():
    raise UsageError(f"{path} is no table of a sweep, such as results.csv")
  rows = []
  for line in found:
    raw = {name: _cell(value) for name, value in line.items() if name and value}
    raw["metrics"] = {name: value for name, value in raw.items() if "@" in name}
    row = check(raw, [], path, line["run"])
    if row:
      config = {name.removeprefix("config."): value for name, value in raw.items() if name.startswith("config.")}
      rows.append(row._replace(config=config, error=line.get("error") or ""))
  return rows


def _cell(text: str):
  try:
    return json.loads(text)
  except ValueError:
    return text


def attempted(config: dict) -> list[tuple[str, int, float]]:
  """(objective, steps, guidance scale) of the rows that a run of this config ends with."""
  objective, evaluated, teacher = config["objective"], config["eval"], config["teacher"]
  counts = config["train"]["stages"] or [objective.get("sampler_steps", objective.get("num_steps"))]
  folded = teacher["folded_guidance_scale"]
  scales = [folded or g for g in evaluated["guidance_scales"] or [teacher["guidance_scale"]]]
  name = "teacher" if objective["name"] == "denoising" else objective["name"]
  return [(name, int(n), float(g))
          for count in counts for n in dict.fromkeys([count, *evaluated["sampler_steps"]]) for g in scales]


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
  intervals = raw["intervals"] if isinstance(raw.get("intervals"), dict) else {}
  ends = {str(k): (_number(v.get("low")), _number(v.get("high"))) for k, v in intervals.items() if isinstance(v, dict)}
  return Row(
      objective, variant, int(needed["steps"]), needed["guidance_scale"], int(needed["seed"]), setting=Setting(variant),
      metrics={str(k): _number(v) for k, v in metrics.items()},
      shift=[p for p in shift if isinstance(p, dict)],
      network_evaluations=_number(raw.get("network_evaluations")), seconds=_number(raw.get("seconds")),
      samples=str(raw.get("samples") or ""), path=path, run=run,
      intervals={name: pair for name, pair in ends.items() if None not in pair}, teacher=str(raw.get("teacher") or ""),
      step_seconds=_number(raw.get("step_seconds")), step_bytes=_number(raw.get("step_bytes")))


def _number(value):
  ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
  return float(value) if ok else None


def unique(rows: list[Row], missing: list[str]) -> list[Row]:
  """Rows in the tables' order, each once; where two contradict, the first counts and `missing` says so."""
  found = {}
  same = lambda row: (row.group, row.variant, row.seed, tuple(sorted(row.metrics.items())))  # noqa: E731
  known = {same(row) for row in rows if row.config}
  for row in rows:
    if not row.config and same(row) in known:  # merged results, of runs that are here themselves
      continue
    first = found.setdefault((row.group, row.label, row.seed, frozenset(row.metrics)), row)
    if first.metrics != row.metrics:
      missing.append(f"unlike rows for {row.title}, seed {row.seed}: that of {first.run} counts, "
                     f"that of {row.run} does not")
  return sorted(found.values(), key=lambda r: (order(r.group), r.setting.order, r.seed))


def teachers(rows: list[Row], missing: list[str]) -> None:
  """Adds to `missing` that seeds of one setting have unlike teachers: their spread is then not that of training."""
  found = {}
  for row in rows:
    if row.teacher:
      found.setdefault((row.objective, row.guidance_scale, row.label), {}).setdefault(row.teacher, set()).add(row.run)
  for (objective, scale, label), runs in found.items():
    if len(runs) > 1:
      of = "; ".join(f"{sorted(names)[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}" for names in
                     runs.values())
      missing.append(f"{objective} {label}, guidance scale {scale:g}: seeds of {len(runs)} unlike teachers are"
                     f" averaged ({of})")


def order(group):
  objective, steps, guidance = group
  place = OBJECTIVES.index(objective) if objective in OBJECTIVES else len(OBJECTIVES)
  return place, objective, guidance, -steps
