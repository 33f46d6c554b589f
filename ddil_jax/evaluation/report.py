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
import textwrap
from typing import NamedTuple

import jinja2

from ddil_jax.errors import UsageError
from ddil_jax.evaluation import files, report_figures, report_rows
from ddil_jax.evaluation.report_rows import Row, order, variant_order

OBJECTIVES = {"pd": "progressive distillation (PD)", "cd": "consistency distillation (CD)",
              "lcm": "latent-consistency-style distillation (LCM)",
              "dmd2": "distribution matching distillation (DMD2)"}
METRICS = {
    "fd": ("Fréchet distance", "lower is better: Gaussians fitted to the extractor's features, squared distance"),
    "kd": ("kernel distance", "lower is better: unbiased squared MMD with a cubic kernel, so it may be negative"),
    "precision": ("precision", "higher is better: share of samples near the reference"),
    "recall": ("recall", "higher is better: share of the reference near the samples"),
    "density": ("density", "higher is better: how densely the reference lies around the samples"),
    "coverage": ("coverage", "higher is better: share of reference points with a sample near them"),
    "class_accuracy": ("class accuracy", "higher is better: share of samples classified as the class asked for"),
    "saturation": ("saturation", "share of pixels at the bound, neither good nor bad: compare it with the data's"),
}


class Cell(NamedTuple):
  """One metric of one variant: finite values by seed, and the paired differences to base by seed."""

  values: dict[int, float]
  differences: dict[int, float]
  failed: int  # seeds whose value is not finite
  best: bool

  @property
  def mean(self):
    return statistics.fmean(self.values.values()) if self.values else None

  @property
  def difference(self):
    return statistics.fmean(self.differences.values()) if self.differences else None

  @property
  def lower(self):
    return sum(d < 0 for d in self.differences.values())

  @property
  def sign(self):
    """-1 or 1 where all of at least two seeds agree on the sign of the difference, else 0."""
    signs = {(d > 0) - (d < 0) for d in self.differences.values()}
    return signs.pop() if len(signs) == 1 < len(self.differences) else 0


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
  tables = summarise(rows)
  environment = jinja2.Environment(loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent), autoescape=True,
                                   undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
  environment.filters["num"] = lambda *args, **kwargs: fmt(*args, **kwargs).replace("-", "−")
  page = environment.get_template("report.html.j2").render(
      title=title, date=datetime.date.today().isoformat(), runs=runs, rows=rows, tables=tables,
      objectives=[OBJECTIVES.get(o, o) for o in dict.fromkeys(r.objective for r in students)],
      student_steps=sorted({r.steps for r in students}, reverse=True),
      variants=sorted({r.variant for r in students}, key=variant_order),
      data=sorted({str(c["name"]) for r in runs if isinstance(c := r.config.get("data"), dict) and "name" in c}),
      columns=_columns(rows), meanings=METRICS, samples=_sample_sections(rows, missing),
      figures=report_figures.draw(runs, rows),
      configs=_split({run.name: _flatten(run.config) for run in runs if run.config}),
      versions=_split({run.name: _flatten(run.versions) for run in runs if run.versions}), missing=missing)
  files.write_bytes(out, page.encode("utf-8", "replace"))
  return {"out": str(out), "runs": len(runs), "rows": len(rows), "missing": missing, "tables": [
      t | {"groups": [g | {"cells": {v: c._asdict() | {"mean": c.mean, "difference": c.difference}
                                     for v, c in g["cells"].items()}} for g in t["groups"]]} for t in tables]}


def summarise(rows: list[Row]) -> list[dict]:
  """A table for each full name of a Frechet distance: unlike ones never share a table.

  Returns:
    [{"metric", "variants", "groups": [{"objective", "steps", "guidance_scale", "teacher", "evaluations", "cells"}]}],
    "teacher" being the teacher's own mean distance at the same steps and guidance scale.
  """
  tables = []
  for metric in sorted({m for r in rows for m in r.metrics if m.startswith("fd@")}):
    found, evaluations = {}, {}
    for r in rows:
      if metric in r.metrics:
        found.setdefault(r.group, {}).setdefault(r.variant, {}).setdefault(r.seed, r.metrics[metric])
        evaluations.setdefault(r.group, set()).add(r.network_evaluations)
    cells = {group: _cells(found[group]) for group in sorted(found, key=order)}
    teachers = {group[1:]: of[""].mean for group, of in cells.items() if group[0] == "teacher"}
    groups = [dict(objective=group[0], steps=group[1], guidance_scale=group[2], teacher=teachers.get(group[1:]),
                   evaluations=sorted(evaluations[group] - {None}), cells={v: c for v, c in of.items() if v})
              for group, of in cells.items()]
    variants = sorted({v for g in groups for v in g["cells"]}, key=variant_order)
    tables.append(dict(metric=metric, variants=variants, groups=groups))
  return tables


def terminal_table(rows) -> str:
  """The summary as text of at most 100 columns.

  Args:
    rows: the list that results.json holds.
  """
  notes, lines = [], []
  checked = [report_rows.check(raw, notes) for raw in rows]
  for table in summarise(report_rows.unique([r for r in checked if r], notes)):
    lines += [*textwrap.wrap(f"Frechet distance, lower is better: {table['metric']}", 100), ""]
    groups = table["groups"]
    left = list(zip(*[("objective", "steps", "scale", "teacher")] + [
        (_short(g["objective"], 12), str(g["steps"]), f"{g['guidance_scale']:g}", fmt(g["teacher"]))
        for g in groups], strict=True))
    right = [[_short(v, 17)] + [_text_cell(g["cells"].get(v)) for g in groups] for v in table["variants"]]
    while True:  # variants that do not fit go into a further block
      block = list(left)
      while right and (len(block) == len(left) or _width([*block, right[0]]) <= 100):
        block.append(right.pop(0))
      pads = [str.rjust if 0 < i < len(left) else str.ljust for i in range(len(block))]
      columns = [[pad(text, max(map(len, c))) for text in c] for pad, c in zip(pads, block)]
      lines += ["  ".join(line).rstrip() for line in zip(*columns, strict=True)] + [""]
      if not right:
        break
  if not lines:
    return "No Frechet distance in the results.\n"
  lines += ["teacher: its own sampler at the same steps and scale. In brackets: mean paired difference to base,",
            "and in how many shared seeds it is lower. *: lower than all other variants in each of >= 2 seeds."]
  return "\n".join(lines + [line for n in dict.fromkeys(notes) for line in textwrap.wrap(f"note: {n}", 100)]) + "\n"


def fmt(value, like=None, sign: bool = False) -> str:
  """A number with the decimals that suit its size, or the size of `like`."""
  if value is None:
    return "-"
  size = abs(value if like is None else like)
  kind = ".1e" if size >= 1e6 or 0 < size < 1e-3 else ".0f" if size >= 1e3 else ".2f" if size >= 1 else ".3f"
  return f"{value:{'+' if sign else ''}{kind}}"


def _cells(by_variant) -> dict[str, Cell]:
  finite = {v: {s: x for s, x in seeds.items() if x is not None} for v, seeds in by_variant.items()}
  paired = lambda a, b: {s: finite[a][s] - finite[b][s] for s in finite[a] if s in finite[b]}  # noqa: E731
  cells = {}
  for v in sorted(by_variant, key=variant_order):
    rivals = [list(paired(v, u).values()) for u in by_variant if u != v]
    best = bool(rivals) and all(len(d) > 1 and max(d) < 0 for d in rivals)
    differences = paired(v, "base") if v != "base" and "base" in finite else {}
    cells[v] = Cell(finite[v], differences, len(by_variant[v]) - len(finite[v]), best)
  return cells


def _text_cell(cell) -> str:
  if cell is None:
    return "-"
  text = fmt(cell.mean) + "*" * cell.best
  if cell.difference is not None:
    text += f" ({fmt(cell.difference, cell.mean, True)} {cell.lower}/{len(cell.differences)})"
  return text


def _width(columns) -> int:
  return sum(max(map(len, c)) for c in columns) + 2 * (len(columns) - 1)


def _short(text, width):
  text = " ".join(text.split())
  return text if len(text) <= width else text[:width - 1] + "~"


def _columns(rows):
  """The metrics of the full table: (name, kind, typical size), those of one extractor together."""
  columns = []
  for name in {m for r in rows for m in r.metrics}:
    kind, _, rest = name.partition("@")
    sizes = [abs(v) for r in rows if (v := r.metrics.get(name)) is not None]
    place = list(METRICS).index(kind) if kind in METRICS else len(METRICS)
    columns.append(((rest.count("-/-"), rest, place, name), (name, kind, statistics.median(sizes or [0]))))
  return [column for _, column in sorted(columns)]


def _sample_sections(rows, missing):
  """[(guidance scale, {line: [picture]})]: the teacher from many to few steps, then each student's first seed."""
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
  return dict(row=row, src="data:image/png;base64," + base64.b64encode(data).decode(), width=width, height=height)


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
