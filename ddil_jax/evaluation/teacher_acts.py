"""What it gives when the teacher takes some of a student's sampling steps: a table and a figure of quality and cost.

Rows are those of `results.json`, measured with `eval.teacher_acts`; their variant ends with the steps that the
teacher takes, "+ddil+teacher(0,1)". Each is compared with the same student going alone, seed by seed.
"""

import collections
import re
from collections.abc import Iterable
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure

from ddil_jax.evaluation import statistics
from ddil_jax.evaluation.report_figures import STYLE, Drawing, scale, styles
from ddil_jax.evaluation.report_table import fmt


class Mixed(NamedTuple):
  """A student of which the teacher takes the steps `acts`.

  Attributes:
    student: (objective, guidance scale, sampling steps).
    variant: base, +ddil, ...
    acts: counted from 0, the noisiest.
    evaluations: of a network for one sample.
    interval: of the Fréchet distance over training seeds.
    difference: paired, to the student alone; None for that itself, and where no seed is shared.
  """
  student: tuple[str, float, int]
  variant: str
  acts: tuple[int, ...]
  evaluations: float
  interval: statistics.Interval
  difference: statistics.Difference | None


def compare(rows: Iterable[dict]) -> list[Mixed]:
  """Each mixed sampler, those of one student together, fewest evaluations first."""
  found = collections.defaultdict(dict)
  evaluations = {}
  for row in rows:
    variant, _, acts = row["variant"].partition("+teacher")
    student = row["objective"], float(row["guidance_scale"]), row["steps"]
    key = student, variant, tuple(map(int, re.findall(r"\d+", acts)))
    distance = next(value for metric, value in row["metrics"].items() if metric.startswith("fd@"))
    found[key][row["seed"]] = distance
    evaluations[key] = row["network_evaluations"]
  out = []
  for (student, variant, acts), values in found.items():
    alone = found.get((student, variant, ()), {})
    out.append(Mixed(student, variant, acts, evaluations[student, variant, acts],
                     statistics.mean_interval(list(values.values())),
                     statistics.paired_difference(values, alone) if acts else None))
  return sorted(out, key=lambda m: (m.student, m.variant, m.evaluations, len(m.acts), m.acts))


def markdown(found: list[Mixed]) -> str:
  """A table: a line for each mixed sampler."""
  lines = ["| student | setting | steps of the teacher | evaluations | fd | difference to the student alone |",
           "|---|---|---|---|---|---|"]
  for m in found:
    d, half = m.difference, m.interval.half
    value = fmt(m.interval.mean) + (f" ± {fmt(half, m.interval.mean)}" if half is not None else "")
    change = ""
    if d is not None:
      change = fmt(d.mean, m.interval.mean, True) + (
          f" ± {fmt(d.half, m.interval.mean)}{' *' * d.significant}" if d.half is not None else "")
    lines.append(f"| {_title(m.student)} | {m.variant} | {_steps(m)} | {m.evaluations:g} |"
                 f" {value} ({m.interval.n}) | {change} |")
  count = sum(m.difference is not None and m.difference.half is not None for m in found)
  return "\n".join(lines) + (
      "\n\nFréchet distance, lower is better: mean ± half the 95 % t-interval over training seeds (their number in"
      " brackets). Differences are paired over seeds; *: the interval excludes 0, without any correction for the"
      f" {count} comparisons.\n")


def draw(found: list[Mixed]) -> Drawing:
  """A panel for each kind of student; along x which steps the teacher takes, and the evaluations that this costs."""
  students = list(dict.fromkeys(m.student for m in found))
  paint = styles([m.variant for m in found])
  with matplotlib.rc_context(STYLE):
    columns = min(3, len(students))
    count = -(-len(students) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.6 * count), layout="constrained")
    axes = figure.subplots(count, columns, squeeze=False).flat
    for axis, student in zip(axes, students):
      own = [m for m in found if m.student == student]
      ticks = {m.acts: f"{_steps(m)}\n({m.evaluations:g})"
               for m in sorted(own, key=lambda m: (m.evaluations, len(m.acts), m.acts))}
      for m in own:
        # The variants stand a little apart, so that bars do not hide each other.
        x = list(ticks).index(m.acts) + 0.16 * (list(paint).index(m.variant) - (len(paint) - 1) / 2)
        axis.errorbar(x, m.interval.mean, yerr=m.interval.half, fmt="o" if m.acts else "s", color=paint[m.variant][0])
      axis.set_xticks(range(len(ticks)), list(ticks.values()))
      axis.set(title=_title(student), xlabel="steps of the teacher (network evaluations)", ylabel="Fréchet distance")
      scale(axis, [m.interval.mean for m in own])
    for axis in list(axes):
      axis.remove()
  return Drawing("teacher_acts", "Fréchet distance when the teacher takes some of the steps",
                 "Fréchet distance by the steps that the teacher takes, and the network evaluations that it costs",
                 figure, [(variant, *paint[variant]) for variant in paint])


def _steps(m: Mixed) -> str:
  if not m.acts:
    return "none"
  return "all" if len(m.acts) == m.student[2] else ", ".join(str(i + 1) for i in m.acts)


def _title(student) -> str:
  objective, guidance, steps = student
  return f"{objective}, {steps} steps, guidance {guidance:g}"
