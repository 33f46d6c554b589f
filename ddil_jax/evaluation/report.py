"""One self-contained HTML file from run directories; tables as Markdown or CSV, figures as files.

A run directory may hold `config.json`, `versions.json`, `metrics.jsonl` and `results.json`; what is
absent is named in the report. A sweep's directory stands for its trials. Values are compared only under one full
metric name (`fd@2000/test/digits-cnn-1a2b3c4d`) and, between settings, only over the seeds that both have.
"""

import base64
import datetime
import json
import pathlib
import struct
from typing import Any

import jinja2
import numpy as np

from ddil_jax import files
from ddil_jax.errors import UsageError
from ddil_jax.evaluation import comparisons, meanings, report_figures, report_labels, report_plots, report_rows
from ddil_jax.evaluation import report_table
from ddil_jax.evaluation.report_table import fmt, terminal_table

__all__ = ["compare", "load", "report", "terminal_table", "write_report"]

OBJECTIVES = {"pd": "progressive distillation (PD)", "cd": "consistency distillation (CD)",
              "lcm": "latent-consistency-style distillation (LCM)",
              "dmd2": "distribution matching distillation (DMD2)"}
_WIDEST = 64  # letters of labels that the summary shows side by side


def load(run_dirs) -> list[report_rows.Row]:
  """The rows of run and sweep directories, labelled, each once. Raises UsageError where there is none."""
  return _load(run_dirs)[1]


def compare(run_dirs, baseline: str | None = None, metric: str | None = None) -> list[dict[str, Any]]:
  """`comparisons.compare` of run and sweep directories."""
  return comparisons.compare(load(run_dirs), baseline, metric)


def report(run_dirs, out, baseline: str | None = None, metric: str | None = None, figures=None, table=None) -> str:
  """What `ddil report` does: writes the page and, where asked, figures and a table.

  Args:
    run_dirs: of runs, directories of runs, sweeps.
    out: path of the HTML file.
    baseline, metric: see `comparisons.summarise`.
    figures: a directory for every figure as SVG and PNG.
    table: a path that ends in .md or .csv.

  Returns:
    The comparison and what was written, as text.

  Raises:
    UsageError: nothing there, unknown names, runs that cannot be compared, a path that cannot be written.
  """
  writers = {".md": report_table.markdown, ".csv": report_table.to_csv}
  if table and pathlib.Path(table).suffix not in writers:
    raise UsageError(f"--table={table}: a file that ends in {' or '.join(writers)} is needed")
  if pathlib.Path(out).suffix not in (".html", ".htm"):
    raise UsageError(f"--out={out}: a file that ends in .html is needed")
  runs, rows, missing = _load(run_dirs)
  found = comparisons.compare(rows, baseline, metric)
  if table and not found:
    raise UsageError(f"no run has a Frechet distance for --table; give another --metric: {_kinds(rows)}")
  said = [report_table.markdown(found)] if found else []
  written = [_write_page(runs, rows, missing, out, TITLE, metric, baseline, figures)["out"]]
  if table:
    files.write_bytes(table, writers[pathlib.Path(table).suffix](found).encode())
    written.append(str(table))
  if missing:
    said.append(f"{len(missing)} thing{'s' * (len(missing) > 1)} missing or left out; the page lists them")
  return "\n".join([*said, f"wrote {', '.join(written)}" + (f", figures in {figures}" if figures else "")])


def _kinds(rows) -> str:
  return ", ".join(sorted({m.partition("@")[0] for r in rows for m in r.metrics})) or "there is none"


TITLE = "Diffusion distillation with imitation learning"


def write_report(run_dirs, out, title: str = TITLE, metric: str | None = None, baseline: str | None = None) -> dict:
  """Writes one self-contained HTML file about the runs; opening it makes no request.

  Args:
    run_dirs: directories of runs; one that holds runs in sub-directories stands for these.
    out: path of the file; replaced whole or not at all.
    title: heading of the page.
    metric, baseline: see `comparisons.summarise`.

  Returns:
    {"out", "runs", "rows", "missing": [what was absent], "tables": as `summarise`, cells as dicts}.

  Raises:
    UsageError: a directory does not exist, no run holds anything, an unknown metric or baseline, or `out`
      cannot be written.
  """
  return _write_page(*_load(run_dirs), out, title, metric, baseline)


def _load(run_dirs):
  """(runs, their rows, each once, what is missing)."""
  missing = []
  runs = report_rows.runs_of(run_dirs, missing)
  if not any(run.config or run.log or run.rows for run in runs):
    raise UsageError(f"nothing to report in {', '.join(map(str, run_dirs)) or 'no directory'}; "
                     f"expected one of {', '.join(report_rows.FILES)} in each run")
  rows = report_rows.unique([row for run in runs for row in run.rows], missing)
  report_rows.teachers(rows, missing)
  return runs, rows, missing


def _write_page(runs, rows, missing, out, title, metric, baseline, figures_dir=None) -> dict:
  students = [r for r in rows if r.objective != "teacher"]
  num_runs = len({r.run for r in rows} | {run.name for run in runs if run.log or run.config})
  tables = comparisons.summarise(rows, metric, baseline)
  evaluated = [r for r in rows if not r.error]
  plots, curves = report_plots.draw(tables), report_figures.draw(runs, evaluated)
  environment = jinja2.Environment(
      loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent), autoescape=True,
      undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
  environment.filters["num"] = lambda *args, **kwargs: fmt(*args, **kwargs).replace("-", "−")
  environment.filters["svg"] = report_figures.svg
  environment.filters["paint"] = lambda colour: colour.replace(report_figures.INK, "currentColor")
  page = environment.get_template("report.html.j2").render(
      title=title, date=datetime.date.today().isoformat(), num_runs=num_runs, rows=evaluated, tables=tables,
      subject=meanings.of(metric or "fd"), kind=(metric or "fd").partition("@")[0],
      wide=[sum(map(len, t["labels"])) <= _WIDEST for t in tables],
      legends=[report_table.legend(t["metric"], t["comparisons"], t["baselines"], t["unnamed"]) for t in tables],
      reasons=[list(dict.fromkeys(why for g in t["groups"] for c in g["cells"].values()
                                  for _, why in c.failed.values())) for t in tables],
      objectives=[OBJECTIVES.get(o, o) for o in dict.fromkeys(r.objective for r in students)],
      student_steps=sorted({r.steps for r in students}, reverse=True),
      variants=list(dict.fromkeys(r.variant for r in sorted(students, key=lambda r: r.setting.order))),
      data=sorted({c["data.name"] for run in runs if (c := _flatten(run.config)).get("data.name")}),
      columns=_columns(rows), meanings=meanings.METRICS, samples=_sample_sections(evaluated, missing),
      plots=plots, figures=curves,
      configs=_split({run.name: _flatten(run.config) for run in runs if run.config}),
      versions=_split({run.name: _flatten(run.versions) for run in runs if run.versions}), missing=missing)
  files.write_bytes(out, page.encode("utf-8", "replace"))
  if figures_dir:
    report_figures.save([*plots, *(d for of in curves["shift"].values() for d in of), *curves["sources"],
                         *curves["training"]], figures_dir)
  plain = lambda group: group | {"cells": {label: _plain(c) for label, c in group["cells"].items()}}  # noqa: E731
  return {"out": str(out), "runs": num_runs, "rows": len(evaluated), "missing": missing, "tables": [
      t | {part: [plain(g) for g in t[part]] for part in ("teacher", "groups")} for t in tables]}


def _plain(cell):
  difference = cell.difference._asdict() if cell.difference else None
  return {"values": cell.values, "mean": cell.mean, "interval": cell.interval and cell.interval._asdict(),
          "failed": cell.failed, "baseline": cell.baseline, "difference": difference, "mark": cell.mark}


def _columns(rows):
  """The metrics of the full table: (name, kind, typical size)."""
  columns = []
  for name in {m for r in rows for m in r.metrics}:
    kind = name.partition("@")[0]
    sizes = [abs(v) for r in rows if (v := r.metrics.get(name)) is not None]
    place = list(meanings.METRICS).index(kind) if kind in meanings.METRICS else len(meanings.METRICS)
    columns.append((place, name, kind, float(np.median(sizes or [0]))))
  return [column[1:] for column in sorted(columns)]


def _sample_sections(rows, missing):
  """[(guidance scale, {line: [picture]})]: the teacher, most steps first, then each student's first seed."""
  sections, shown, absent = {}, set(), []
  for row in rows:
    if (row.group, row.label) in shown:
      continue
    picture = _picture(row)
    if picture is None:
      absent.append(f"{row.run}: no sample grid of {row.title}, seed {row.seed}")
      continue
    shown.add((row.group, row.label))
    line = row.objective if row.objective == "teacher" else f"{row.objective}, {row.steps} steps"
    sections.setdefault(row.guidance_scale, {}).setdefault(line, []).append(picture)
  missing += absent
  return sorted(sections.items())


def _picture(row):
  """The row's sample grid as data URI, or None if there is no PNG inside its run directory."""
  try:
    path = (row.path / row.samples).resolve()
    data = path.read_bytes() if row.samples and path.is_relative_to(row.path.resolve()) else b""
  except (OSError, ValueError):
    data = b""
  if data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR" or len(data) < 24:
    return None
  width, height = struct.unpack(">II", data[16:24])
  src = "data:image/png;base64," + base64.b64encode(data).decode()
  return dict(row=row, src=src, width=width, height=height)


def _flatten(config) -> dict[str, str]:
  return {field: value if isinstance(value, str) and value else json.dumps(value)
          for field, value in report_labels.flatten(config).items()}


def _split(by_run) -> dict:
  """Fields that differ between runs, and the fields with one value in all of them."""
  fields = sorted({f for fields in by_run.values() for f in fields})
  common = {f: next(iter(by_run.values()))[f] for f in fields
            if all(f in of for of in by_run.values()) and len({of[f] for of in by_run.values()}) == 1}
  return dict(runs=by_run, common=common, differing=[f for f in fields if f not in common])
