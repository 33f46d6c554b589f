"""The summary of results: a Frechet distance per method and variant, paired over seeds; and as text.

Values are compared only under one full metric name (`fd@2000/test/digits-cnn-1a2b3c4d`) and, between
variants, only over the seeds that both have.
"""

import itertools
import math
import statistics
import textwrap
from typing import NamedTuple

from ddil_jax.evaluation import report_rows
from ddil_jax.evaluation.report_rows import Row, order, variant_order


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


def summarise(rows: list[Row]) -> list[dict]:
  """A table for each full name of a Frechet distance: unlike ones never share a table.

  Returns:
    [{"metric", "size": the median, "variants", "teacher": [group], "groups": [group of students]}] with
    group = {"objective", "steps", "guidance_scale", "teacher": the teacher's own mean distance at the same
    steps and guidance scale, "evaluations", "cells": {variant: Cell}}.
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
    groups = [dict(objective=group[0], steps=group[1], guidance_scale=group[2], cells=of,
                   teacher=teachers.get(group[1:]), evaluations=sorted(evaluations[group] - {None}))
              for group, of in cells.items()]
    students = [g for g in groups if g["objective"] != "teacher"]
    means = [c.mean for of in cells.values() for c in of.values() if c.values]
    tables.append(dict(
        metric=metric, size=statistics.median(means or [0]),
        variants=sorted({v for g in students for v in g["cells"]}, key=variant_order),
        teacher=[g for g in groups if g["objective"] == "teacher"], groups=students))
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
    for scale, own in itertools.groupby(table["teacher"], lambda g: g["guidance_scale"]):
      text = ", ".join(f"{g['steps']} step{'s' * (g['steps'] != 1)} {fmt(g['teacher'], table['size'])}"
                       for g in own)
      lines += textwrap.wrap(f"teacher at guidance scale {scale:g}: {text}", 100)
    lines += [""] * bool(table["teacher"])
    groups = table["groups"]
    if not groups:
      continue
    left = [["student"] + [_short(g["objective"], 12) for g in groups],
            ["steps"] + [str(g["steps"]) for g in groups],
            ["scale"] + [f"{g['guidance_scale']:g}" for g in groups],
            ["teacher"] + [fmt(g["teacher"], table["size"]) for g in groups]]
    right = [_text_column(v, [g["cells"].get(v) for g in groups], table["size"]) for v in table["variants"]]
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
  notes = ["teacher: its own sampler at as many steps and that scale. In brackets: mean paired difference to "
           "base, and in how many shared seeds it is lower. *: lower than all other variants in each of "
           "at least two shared seeds.",
           *(f"note: {n}" for n in dict.fromkeys(notes))]
  return "\n".join(lines + [line for note in notes for line in textwrap.wrap(note, 100)]) + "\n"


def fmt(value, like=None, sign: bool = False) -> str:
  """A number with three significant digits or two decimals, as suits its size or the size of `like`."""
  if value is None:
    return "-"
  size = abs(value if like is None else like)
  decimals = 0 if size >= 1e3 else 2 if size >= 1 or size == 0 else 2 - math.floor(math.log10(size))
  kind = ".1e" if size >= 1e6 or decimals > 5 else f".{decimals}f"
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


def _text_column(variant, cells, size) -> list[str]:
  """Head and cells, the means right-aligned among themselves."""
  means = ["-" if c is None else fmt(c.mean, size) + "*" * c.best for c in cells]
  width = max(len(m.rstrip("*")) for m in means)
  texts = [_short(variant, 17)]
  for mean, c in zip(means, cells, strict=True):
    text = " " * (width - len(mean.rstrip("*"))) + mean.ljust(len(mean.rstrip("*")) + 1)
    if c is not None and c.difference is not None:
      text += f" ({fmt(c.difference, size, True)} {c.lower}/{len(c.differences)})"
    texts.append(text.rstrip())
  return texts


def _width(columns) -> int:
  return sum(max(map(len, c)) for c in columns) + 2 * (len(columns) - 1)


def _short(text, width):
  text = " ".join(text.split())
  return text if len(text) <= width else text[:width - 1] + "~"
