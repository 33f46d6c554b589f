"""One self-contained HTML file from run directories, and the table for the terminal.

A run directory may hold `config.json`, `versions.json`, `metrics.jsonl` and `results.json`; what is
absent is named in the report. Values are compared only under one full metric name
(`fd@2000/test/digits-cnn-1a2b3c4d`) and, between variants, only over the seeds that both have.
"""

import base64
import datetime
import json
import pathlib
import statistics
import struct

import jinja2

from ddil_jax.errors import UsageError
from ddil_jax.evaluation import files, report_figures, report_rows
from ddil_jax.evaluation.report_rows import variant_order
from ddil_jax.evaluation.report_table import fmt, summarise, terminal_table

__all__ = ["terminal_table", "write_report"]

OBJECTIVES = {"pd": "progressive distillation (PD)", "cd": "consistency distillation (CD)",
              "lcm": "latent-consistency-style distillation (LCM)",
              "dmd2": "distribution matching distillation (DMD2)"}
METRICS = {
    "fd": ("Fréchet distance", "lower is better: squared, of Gaussians fitted to the extractor's features"),
    "kd": ("kernel distance", "lower is better: unbiased squared MMD, cubic kernel, so it may be negative"),
    "precision": ("precision", "higher is better: share of samples near the reference"),
    "recall": ("recall", "higher is better: share of the reference near the samples"),
    "density": ("density", "higher is better: how densely the reference lies around the samples"),
    "coverage": ("coverage", "higher is better: share of reference points with a sample near them"),
    "class_accuracy": ("class accuracy", "higher is better: samples classified as the class asked for"),
    "saturation": ("saturation", "share of pixels at the bound, good or bad only against the data's own"),
}


def write_report(run_dirs, out, title: str = "Diffusion distillation with imitation learning") -> dict:
  """Writes one self-contained HTML file about the runs; opening it makes no request.

  Args:
    run_dirs: directories of runs; one that holds runs in sub-directories stands for these.
    out: path of the file; replaced whole or not at all.
    title: heading of the page.

  Returns:
    {"out", "runs", "rows", "missing": [what was absent], "tables": as `summarise`, cells as dicts}.

  Raises:
    UsageError: a directory does not exist, no run holds anything, or `out` cannot be written.
  """
  missing = []
  runs = report_rows.runs_of(run_dirs, missing)
  if not any(run.config or run.log or run.rows for run in runs):
    raise UsageError(f"nothing to report in {', '.join(map(str, run_dirs)) or 'no directory'}; "
                     f"expected one of {', '.join(report_rows.FILES)} in each run")
  rows = report_rows.unique([row for run in runs for row in run.rows], missing)
  students = [r for r in rows if r.objective != "teacher"]
  num_runs = len({r.run for r in rows} | {run.name for run in runs if run.log or run.config})
  tables = summarise(rows)
  environment = jinja2.Environment(
      loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent), autoescape=True,
      undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
  environment.filters["num"] = lambda *args, **kwargs: fmt(*args, **kwargs).replace("-", "−")
  page = environment.get_template("report.html.j2").render(
      title=title, date=datetime.date.today().isoformat(), num_runs=num_runs, rows=rows, tables=tables,
      objectives=[OBJECTIVES.get(o, o) for o in dict.fromkeys(r.objective for r in students)],
      student_steps=sorted({r.steps for r in students}, reverse=True),
      variants=sorted({r.variant for r in students}, key=variant_order),
      data=sorted({c["data.name"] for run in runs if (c := _flatten(run.config)).get("data.name")}),
      columns=_columns(rows), meanings=METRICS, samples=_sample_sections(rows, missing),
      figures=report_figures.draw(runs, rows),
      configs=_split({run.name: _flatten(run.config) for run in runs if run.config}),
      versions=_split({run.name: _flatten(run.versions) for run in runs if run.versions}), missing=missing)
  files.write_bytes(out, page.encode("utf-8", "replace"))
  plain = lambda group: group | {"cells": {  # noqa: E731
      v: c._asdict() | {"mean": c.mean, "difference": c.difference} for v, c in group["cells"].items()}}
  return {"out": str(out), "runs": num_runs, "rows": len(rows), "missing": missing, "tables": [
      t | {part: [plain(g) for g in t[part]] for part in ("teacher", "groups")} for t in tables]}


def _columns(rows):
  """The metrics of the full table: (name, kind, typical size)."""
  columns = []
  for name in {m for r in rows for m in r.metrics}:
    kind = name.partition("@")[0]
    sizes = [abs(v) for r in rows if (v := r.metrics.get(name)) is not None]
    place = list(METRICS).index(kind) if kind in METRICS else len(METRICS)
    columns.append((place, name, kind, statistics.median(sizes or [0])))
  return [column[1:] for column in sorted(columns)]


def _sample_sections(rows, missing):
  """[(guidance scale, {line: [picture]})]: the teacher, most steps first, then each student's first seed."""
  sections, shown, absent = {}, set(), []
  for row in rows:
    if (row.group, row.variant) in shown:
      continue
    picture = _picture(row)
    if picture is None:
      absent.append(f"{row.run}: no sample grid of {row.label}, seed {row.seed}")
      continue
    shown.add((row.group, row.variant))
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


def _flatten(tree, prefix="") -> dict[str, str]:
  flat = {}
  for key, value in tree.items():
    if isinstance(value, dict) and value:
      flat |= _flatten(value, f"{prefix}{key}.")
    else:
      flat[f"{prefix}{key}"] = value if isinstance(value, str) and value else json.dumps(value)
  return flat


def _split(by_run) -> dict:
  """Fields that differ between runs, and the fields with one value in all of them."""
  fields = sorted({f for fields in by_run.values() for f in fields})
  common = {f: next(iter(by_run.values()))[f] for f in fields
            if all(f in of for of in by_run.values()) and len({of[f] for of in by_run.values()}) == 1}
  return dict(runs=by_run, common=common, differing=[f for f in fields if f not in common])
