"""Sweeps: a config file's `sweep()` as a list of trials, and what became of them as one table.

`sweep()` gives a list of dicts, one a trial: {"arg": the config's argument, "FIELD": value, ...};
"config" names another file than its own; {"teacher": {"config": "FILE", "FIELD": value, ...}} has as its teacher the
run of another trial of the list, which is the same but for what is named (a field of None it does not have). `product`,
`zipped` and `cross` make such lists.

A sweep's folder holds `sweep.json` (the trials), one run directory a trial, `results.csv` and
`results.parquet`. A trial that failed has a `failed.json` in its folder that says why.
"""

import csv
import io
import itertools
import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ddil_jax import config as config_lib
from ddil_jax import files
from ddil_jax.errors import UsageError
from ddil_jax.evaluation.report_rows import FAILED, TRIALS, attempted
from ddil_jax.training.workdir import with_defaults

# Fields that name a place, not a setting.
PLACES = ("teacher.path", "data.data_dir", "data.manual_dir")


class Trial(NamedTuple):
  """One run of a sweep.

  Attributes:
    name: of its folder.
    spec: config file and argument, "configs/digits_pd.py:ddil".
    overrides: {field: text}, as on the command line.
    after: the trial whose run is its teacher; "" is none.
  """
  name: str
  spec: str
  overrides: dict[str, str]
  after: str = ""

  def config(self):
    return config_lib.load(self.spec, self.overrides)


def product(fields: Mapping[str, Iterable]) -> list[dict]:
  """Every combination: {"a": (1, 2), "seed": range(3)} gives 6 trials, the last field changing fastest."""
  return [dict(zip(fields, values)) for values in itertools.product(*fields.values())]


def zipped(fields: Mapping[str, Sequence]) -> list[dict]:
  """Values taken together: {"a": (1, 2), "b": (3, 4)} gives (1, 3) and (2, 4). UsageError for unlike lengths."""
  lengths = {name: len(values) for name, values in fields.items()}
  if len(set(lengths.values())) > 1:
    raise UsageError(f"zipped fields need as many values each, not {lengths}")
  return [dict(zip(fields, values)) for values in zip(*fields.values())]


def cross(*lists: list[dict]) -> list[dict]:
  """Every combination of trials of several lists: `cross(zipped(...), product({"seed": range(5)}))`."""
  return [{name: v for part in parts for name, v in part.items()} for parts in itertools.product(*lists)]


def trials(spec: str, overrides: Mapping[str, str] | None = None, workdir: pathlib.Path = pathlib.Path()) -> list[Trial]:
  """The trials of a config file's `sweep()`.

  Args:
    spec: the file, and an argument that is put before the argument of every trial.
    overrides: {field: text} for every trial; a trial's own value counts more.
    workdir: where the runs will lie, for trials whose teacher is one of them.

  Raises:
    UsageError: no sweep(), an entry that makes no config, or one whose teacher is no earlier trial of the list.
  """
  file, _, common_arg = spec.partition(":")
  module = config_lib.module(spec)
  if not hasattr(module, "sweep"):
    raise UsageError(f"config file {file} has no function sweep(); it gives a list such as"
                     " [{'arg': 'ddil', 'seed': 0}]")
  entries = module.sweep()
  if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
    raise UsageError(f"sweep() of {file} must give a list of dicts, at least one")
  varying = [name for name in dict.fromkeys(itertools.chain(*entries))
             if name != "teacher" and len({repr(entry.get(name)) for entry in entries}) > 1]
  out: dict[str, Trial] = {}
  for entry in entries:
    arg = ",".join(a for a in (common_arg, entry.get("arg", "")) if a)
    own = {name: value if isinstance(value, str) else repr(value)
           for name, value in entry.items() if name not in ("arg", "config", "teacher")}
    name, after = _name(entry, varying), ""
    if "teacher" in entry:
      first = {name: value for name, value in (entry | {"teacher": None} | entry["teacher"]).items()
               if value is not None}
      after = _name(first, varying)
      if after not in out or first not in entries:
        raise UsageError(f"sweep() of {file}: the teacher of trial {name} must be an earlier trial of the list, which"
                         f" has {first}")
      own["teacher.path"] = str(workdir / after)
    trial = Trial(name, f"{entry.get('config', file)}:{arg}", dict(overrides or {}) | own, after)
    trial.config()  # a mistake is found before anything runs
    if trial.name in out:
      raise UsageError(f"sweep() of {file} has the trial {trial.name} twice")
    out[trial.name] = trial
  return list(out.values())


def _name(entry, varying) -> str:
  parts = []
  for field in sorted(varying or ["seed"], key=lambda name: name == "seed"):
    value = entry.get(field, "" if field == "arg" else None)
    if field == "config" and value:
      parts.append(pathlib.Path(value).stem)
    elif field == "arg":
      parts.append(str(value).replace(",", "+") or "base")
    elif value not in (None, ()):
      text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
      parts.append(f"{field.rpartition('.')[2]}={text}")
  return re.sub(r"[^A-Za-z0-9_.,+=-]+", "_", "-".join(parts)).strip("_") or "run"


def save(found: list[Trial], workdir: pathlib.Path) -> None:
  """Writes `sweep.json`, or checks that the one there has the same trials.

  Raises:
    UsageError: a folder of another sweep.
  """
  path = workdir / TRIALS
  if path.exists():
    differ = sorted({t.name for t in set_difference(load(workdir), found)})
    if differ:
      raise UsageError(f"{workdir} holds another sweep; unlike trials: {', '.join(differ[:6])}"
                       f"{' ...' if len(differ) > 6 else ''}; give another --workdir")
    return
  files.write_json(path, [trial._asdict() for trial in found])


def set_difference(a: list[Trial], b: list[Trial]) -> list[Trial]:
  """Trials that only one of two lists has."""
  key = lambda trial: json.dumps(trial, sort_keys=True)  # noqa: E731
  a, b = {key(t): t for t in a}, {key(t): t for t in b}
  return [a.get(k) or b[k] for k in a.keys() ^ b.keys()]


def load(workdir: pathlib.Path) -> list[Trial]:
  """The trials of a sweep's folder. Raises UsageError where it holds none."""
  if not (workdir / TRIALS).exists():
    raise UsageError(f"{workdir} holds no sweep: it has no {TRIALS}; start one with --config=FILE.py")
  return [Trial(**trial) for trial in files.read_json(workdir / TRIALS)]


def status(trial: Trial, workdir: pathlib.Path) -> str:
  """done: trained and evaluated with this very config; failed: its last try ended in an error; else open."""
  folder = workdir / trial.name
  if (folder / FAILED).exists():
    return "failed"
  if (folder / "results.json").exists() and (folder / "config.json").exists():
    saved = with_defaults(files.read_json(folder / "config.json"), config_lib.to_dict(config_lib.defaults()))
    if saved == config_lib.to_dict(trial.config()):
      return "done"
  return "open"


# The table ----------------------------------------------------------------------------------


def gather(found: list[Trial], workdir: pathlib.Path) -> list[dict[str, Any]]:
  """One flat row for each row of results of each trial; without results there are the rows all the same, with why.

  Returns:
    [{"run", "status", "error", FIELD..., "objective", "variant", "steps", "seed", "guidance_scale",
    "network_evaluations", "seconds", "step_seconds", "step_bytes", METRIC...}] with the config fields that vary over
    the trials.
  """
  configs = {trial.name: config_lib.flatten(config_lib.to_dict(trial.config())) for trial in found}
  fields = varying_fields(list(configs.values()))
  rows = []
  for trial in found:
    folder, state = workdir / trial.name, status(trial, workdir)
    failure = files.read_json(folder / FAILED) if state == "failed" else {"error": ""}
    about = {"run": trial.name, "status": state, "error": failure["error"]}
    about |= {f"config.{name}": _cell(configs[trial.name].get(name)) for name in fields}
    results = (files.read_json(folder / "results.json") if state == "done"
               else _without_results(configs[trial.name]["seed"], failure))
    for row in results:
      same = {name: row.get(name) for name in (
          "objective", "variant", "steps", "seed", "guidance_scale", "network_evaluations", "seconds", "step_seconds",
          "step_bytes")}
      rows.append(about | same | row.get("metrics", {}))
  return rows


def _without_results(seed, failure) -> list[dict[str, Any]]:
  """What the rows of a trial would have been about: of one that failed when its config was known, each of them."""
  wanted = attempted(failure["config"]) if "config" in failure else ()
  return [{"seed": seed, "objective": objective, "variant": failure["variant"], "steps": steps, "guidance_scale": scale}
          for objective, steps, scale in wanted] or [{"seed": seed}]


def varying_fields(configs: list[dict[str, Any]]) -> list[str]:
  """Dotted fields in which flat configs differ; places and the seed apart."""
  names = sorted(set().union(*configs)) if configs else []
  return [name for name in names if name not in (*PLACES, "seed")
          and len({json.dumps(config.get(name)) for config in configs}) > 1]


def _cell(value):
  return json.dumps(value) if isinstance(value, list | dict | tuple) else value


def write_table(rows: list[dict[str, Any]], workdir: pathlib.Path) -> None:
  """`results.csv` and `results.parquet` of `gather`'s rows."""
  names = list(dict.fromkeys(itertools.chain(*rows)))
  text = io.StringIO()
  writer = csv.DictWriter(text, names, lineterminator="\n")
  writer.writeheader()
  writer.writerows(rows)
  files.write_bytes(workdir / "results.csv", text.getvalue().encode())

  import pyarrow as pa  # here: it takes half a second
  import pyarrow.parquet as pq

  def column(values):
    try:
      return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # values of several kinds, a number here, a schedule there
      return pa.array([None if v is None else str(v) for v in values])

  sink = io.BytesIO()
  pq.write_table(pa.table({name: column([row.get(name) for row in rows]) for name in names}), sink)
  files.write_bytes(workdir / "results.parquet", sink.getvalue())
