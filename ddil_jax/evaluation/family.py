"""Many methods on equal terms: a table and a figure of quality, coverage and what training cost.

A *line* is one way to train: method, guidance scale, number of steps that the student was trained for, base or +DDIL.
It has a value for each number of sampling steps.

Time is that of a training step with nothing to compile, of one run at a time on its core; the cost of a student is that
times its training steps, those of the stages before it included. Memory is the compiler's account of a step: state,
teacher, batch, and what it needs in between.
"""

import collections
import textwrap
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ddil_jax.errors import UsageError
from ddil_jax.evaluation import statistics
from ddil_jax.evaluation.report_figures import INK, STYLE, Drawing, scale, styles
from ddil_jax.evaluation.report_rows import Row
from ddil_jax.evaluation.report_table import fmt

COUNTS = (4, 2, 1)  # sampling steps of the columns
# Fields in which runs of one method are not the same method.
FORMS = ("objective.from_data", "objective.guidance_range", "model.lora")
BASE = "base"
MARKERS = {"solid": "o", "dashed": "s", "dotted": "v"}  # for the line styles that other figures tell methods by


class Line(NamedTuple):
  """One way to train.

  Attributes:
    family: the heading it stands under.
    method: as shown, with what else sets it apart: "msd (dmd2)" of one around another, "guided (lora=4)".
    scale: of the guidance.
    trained: steps that the student was trained for; 0 of stages, one for each number of steps.
    variant: base, +ddil, ...
    distance, coverage: {sampling steps: {seed: value}}, finite ones.
    evaluations: {sampling steps: of a network for one sample}.
    fates: {sampling steps: [what became of seeds without a value]}.
    step_seconds, step_bytes: of a training step, the median over seeds; the largest. None where it is not known.
    cost: {sampling steps: seconds of training steps, the median over seeds}.
  """
  family: str
  method: str
  scale: float
  trained: int
  variant: str
  distance: dict[int, dict[int, float]]
  coverage: dict[int, dict[int, float]]
  evaluations: dict[int, float]
  fates: dict[int, list[str]]
  step_seconds: float | None
  step_bytes: float | None
  cost: dict[int, float]

  @property
  def of(self) -> tuple:
    """What lines that differ in the variant alone have in common."""
    return self.method, self.scale, self.trained


def lines(rows: Iterable[Row], families: Mapping[str, Iterable[str]]) -> list[Line]:
  """The lines of rows of runs and of trials that failed, in the order of the families; the teacher's are left out.

  Args:
    families: {heading: methods by their files' names}; other methods come last.

  Raises:
    UsageError: distances that were measured in unlike ways.
  """
  rows = [row for row in rows if row.objective != "teacher"]
  names = {metric for row in rows for metric in row.metrics if metric.startswith("fd@")}
  if len(names) > 1:
    raise UsageError(f"distances measured in unlike ways cannot stand in one table: {', '.join(sorted(names))}")
  family = {method: heading for heading, methods in families.items() for method in methods}
  places, shown = list(family), _shown(rows)
  grouped = collections.defaultdict(list)
  for row in rows:
    grouped[row.objective, shown(row), row.guidance_scale, _trained(row), row.variant].append(row)
  known = lambda name: places.index(name) if name in places else len(places)  # noqa: E731
  order = sorted(grouped, key=lambda key: (known(key[0]), *key[:3], -key[3], key[4] != BASE, key[4]))
  return [_line(family.get(key[0], "Others"), key[1:], grouped[key]) for key in order]


def _shown(rows: list[Row]):
  """row -> its method with what sets it apart from others of the same objective."""
  values = collections.defaultdict(set)
  for row in rows:
    for field in FORMS:
      values[row.objective, field].add(repr(row.config.get(field)))

  def shown(row):
    base = row.config.get("objective.base")
    apart = [base] if base else []
    for field in FORMS:
      value = row.config.get(field)
      if value and len(values[row.objective, field]) > 1:
        text = ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
        apart.append(field.partition(".")[2] + (f"={text}" if value is not True else ""))
    return f"{row.objective} ({', '.join(apart)})" if apart else row.objective

  return shown


def _trained(row: Row) -> int:
  if row.config.get("train.stages"):
    return 0
  return int(row.config.get("objective.sampler_steps") or row.config["objective.num_steps"])


def _line(family, key, rows) -> Line:
  method, scale_, trained, variant = key
  values = {kind: collections.defaultdict(dict) for kind in ("fd@", "coverage@")}
  fates, cost = collections.defaultdict(list), collections.defaultdict(list)
  for row in rows:
    for kind, of in values.items():
      of[row.steps] |= {row.seed: v for name, v in row.metrics.items() if name.startswith(kind) and v is not None}
    if row.seed not in values["fd@"][row.steps]:
      fates[row.steps].append(row.fate if row.error else "not finite")
    before = [r for r in rows if r.seed == row.seed and r.steps >= row.steps] if trained == 0 else [row]
    if all(r.step_seconds is not None for r in before):
      cost[row.steps].append(sum(r.step_seconds * r.config["train.steps"] for r in before))
  median = lambda found: float(np.median(found)) if found else None  # noqa: E731
  return Line(
      family, method, scale_, trained, variant,
      {n: of for n, of in values["fd@"].items() if of}, {n: of for n, of in values["coverage@"].items() if of},
      {row.steps: row.network_evaluations for row in rows if row.network_evaluations}, dict(fates),
      median([row.step_seconds for row in rows if row.step_seconds is not None]),
      max((row.step_bytes for row in rows if row.step_bytes is not None), default=None),
      {n: median(of) for n, of in cost.items()})


def compared(found: list[Line]) -> dict[tuple[int, int], tuple[statistics.Difference, bool]]:
  """{(index of a line, sampling steps): its difference to base over shared seeds, whether it holds after Holm}."""
  bases = {line.of: line for line in found if line.variant == BASE}
  differences = {}
  for i, line in enumerate(found):
    other = bases.get(line.of)
    for steps, values in line.distance.items() if other and line.variant != BASE else ():
      difference = statistics.paired_difference(values, other.distance.get(steps, {}))
      if difference is not None:
        differences[i, steps] = difference
  tested = [key for key, difference in differences.items() if difference.p is not None]
  holds = dict(zip(tested, statistics.holm([differences[key].p for key in tested])))
  return {key: (difference, holds.get(key, False)) for key, difference in differences.items()}


def markdown(found: list[Line], teacher: Mapping[tuple[int, float], float]) -> str:
  """The table, a line for each way to train, and what it means.

  Args:
    teacher: {(sampling steps, guidance scale): distance of its own sampler}.
  """
  sizes = [v for line in found for of in line.distance.values() for v in of.values()]
  size, marks = float(np.median(sizes or [0])), compared(found)
  heads = ["method", "guidance", "trained for", "setting", *(f"fd, {n} step{'s' * (n > 1)}" for n in COUNTS),
           f"coverage, {', '.join(map(str, COUNTS))}", "ms a step", "training, s", "MiB"]
  out = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
  for scale_ in sorted({g for _, g in teacher}):
    cells = [fmt(teacher.get((n, scale_)), size) for n in COUNTS]
    out.append(f"| teacher's own sampler | {scale_:g} | | | {' | '.join(cells)} | | | | |")
  family = None
  for i, line in enumerate(found):
    if line.family != family:
      family = line.family
      out.append(f"| **{family}** |{' |' * (len(heads) - 1)}")
    cells = [line.method, f"{line.scale:g}", str(line.trained or "each"), line.variant,
             *(_distance(line, n, size, marks.get((i, n))) for n in COUNTS),
             ", ".join(f"{_mean(line.coverage[n]):.2f}" if n in line.coverage else "-" for n in COUNTS),
             fmt(None if line.step_seconds is None else 1e3 * line.step_seconds),
             fmt(max(line.cost.values(), default=None)),
             fmt(None if line.step_bytes is None else line.step_bytes / 2**20)]
    out.append(f"| {' | '.join(cells)} |")
  count = sum(difference.half is not None for difference, _ in marks.values())
  note = (
      "Fréchet distance, lower is better: mean ± half the 95 % t-interval over training seeds, their number in brackets."
      " *: the interval of the paired difference to base excludes 0; **: also after Holm's correction for the"
      f" {count} comparisons. A student trained for 4 steps is sampled at 2 and 1 too. Time: the median of a training"
      " step with nothing to compile, on one core; training: that times the steps, all stages together, but without the"
      " run of another method that is the teacher. Memory: what the compiler says that a step needs, state and teacher"
      " included.")
  return "\n".join(out) + "\n\n" + "\n".join(textwrap.wrap(note, 120)) + "\n"


def _mean(values: Mapping[int, float]) -> float:
  return float(np.mean(list(values.values())))


def _distance(line, steps, size, difference) -> str:
  values = line.distance.get(steps)
  lost = collections.Counter(line.fates.get(steps, ()))
  fates = ", ".join(f"{n} {fate}" for fate, n in lost.items())
  if not values:
    return fates or "-"
  interval = statistics.mean_interval(list(values.values()))
  text = fmt(interval.mean, size) + (f" ± {fmt(interval.half, size)}" if interval.half is not None else "")
  mark = "" if difference is None else " **" if difference[1] else " *" if difference[0].significant else ""
  return f"{text} ({interval.n}){mark}{f' {fates}' * bool(fates)}"


def draw(found: list[Line], teacher: Mapping[tuple[int, float], float]) -> Drawing:
  """A column for each family; for each guidance scale a row against network evaluations and one against training cost.

  Against the cost stands the lowest mean distance of a line's step counts, at the cost of that student. What was
  trained for one step is a diamond of its own.
  """
  families = list(dict.fromkeys(line.family for line in found))
  scales = sorted({line.scale for line in found})
  with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(2.7 * len(families), 5 * len(scales) + 1.4), layout="constrained")
    axes = figure.subplots(2 * len(scales) + 1, len(families), squeeze=False, sharey="row",
                           height_ratios=[1] * 2 * len(scales) + [0.7])
    for column, family in enumerate(families):
      own = [line for line in found if line.family == family]
      # Lines tell the variant; where colours are used up the marker tells the method.
      looks = {name: dict(color=colour, marker=MARKERS[dash])
               for name, (colour, dash) in styles([line.method for line in own]).items()}
      for row, scale_ in enumerate(scales):
        above, below = axes[2 * row, column], axes[2 * row + 1, column]
        _panels(above, below, [line for line in own if line.scale == scale_], looks)
        walked = {n * (1 if scale_ == 1 else 2): v for (n, g), v in teacher.items() if g == scale_ and n in COUNTS}
        above.plot(*zip(*sorted(walked.items())) if walked else ([], []), color=INK, linestyle="dotted")
        above.set(title=f"{family}\nguidance {scale_:g}" if row == 0 else f"guidance {scale_:g}",
                  xlabel="network evaluations", xscale="log")
        above.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
        above.minorticks_off()
        below.set_xlabel("training, seconds")
      axes[-1, column].axis("off")
      axes[-1, column].legend(handles=[Line2D([], [], label=name, **look) for name, look in looks.items()],
                              loc="upper center", ncols=2, frameon=False, fontsize="small", handlelength=1,
                              columnspacing=0.8)
    costs = [x for axis in axes[1:-1:2].flat for drawn in axis.lines for x in drawn.get_xdata()]
    for axis in axes[1:-1:2].flat if costs else ():
      scale(axis, costs, "x")
      axis.set_xlim(0.8 * min(costs), 1.25 * max(costs))
    for row in axes[:-1]:
      row[0].set_ylabel("Fréchet distance")
      values = [y for axis in row for drawn in axis.lines for y in drawn.get_ydata()]
      if values:
        scale(row[0], values)
  return Drawing("family", "Every method: quality against network evaluations and against training cost",
                 "Fréchet distance of every method against network evaluations, and against seconds of training",
                 figure, [("base", INK, "solid"), ("+ddil", INK, "dashed"), ("teacher's own sampler", INK, "dotted")])


def _panels(above, below, own, looks):
  """Quality of lines against network evaluations and against training cost."""
  for line in own:
    means = {n: _mean(of) for n, of in line.distance.items()}
    shown = sorted((line.evaluations[n], mean) for n, mean in means.items() if n in line.evaluations)
    if not shown:
      continue
    base = line.variant == BASE
    look = looks[line.method] | {"fillstyle": "full" if base else "none"}
    if line.trained == 1:
      look["marker"] = "D"
    above.plot(*zip(*shown), linestyle="solid" if base else "dashed", **look)
    best = min(means, key=means.get)
    if best in line.cost:
      below.plot([line.cost[best]], [means[best]], linestyle="none", **look)
