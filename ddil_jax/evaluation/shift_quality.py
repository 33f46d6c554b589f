"""Does the measured covariate shift predict the quality? Correlations over the settings of many runs.

A point is one setting: its shift and its Fréchet distance are means over training seeds, since seeds of a setting
are no independent pairs. Settings are compared within a *group*, students of one method, guidance scale and number
of steps: between groups distance and shift differ for reasons of their own. `within` puts the ranks that the
settings have inside their groups together.
"""

import collections
from collections.abc import Iterable
from typing import NamedTuple

import matplotlib
import numpy as np
import scipy.stats
from matplotlib.figure import Figure

from ddil_jax.evaluation import statistics
from ddil_jax.evaluation.report_figures import SOURCES, STYLE, Drawing, scale

# What is correlated with the distance: (pair of the shift's rows, at the clean end only) -> words.
PREDICTORS = {("student_forward", False): "student to forward marginal, mean over times",
              ("student_forward", True): "student to forward marginal, last time",
              ("student_teacher", False): "student to teacher's rollout, mean over times",
              ("student_teacher", True): "student to teacher's rollout, last time"}
LEAST = 6  # settings of a group that is correlated
_COLOURS = tuple(SOURCES.values()) + ("#8a7a00", "#7a6bd0", "#d1495b", "#5c7f2b")


class Point(NamedTuple):
  """A setting.

  Attributes:
    group: (objective, guidance scale, sampling steps).
    name: of the setting.
    shift: {predictor: sliced Wasserstein-2 distance}.
    distance: its Fréchet distance.
    seeds: of which both are means.
  """
  group: tuple[str, float, int]
  name: str
  shift: dict[tuple[str, bool], float]
  distance: float
  seeds: int


class Found(NamedTuple):
  """A correlation (Spearman) of a predictor with the distance, in a group or over all of them ("within")."""
  group: tuple | str
  predictor: tuple[str, bool]
  correlation: statistics.Correlation


def points(rows: Iterable[tuple[str, dict]]) -> list[Point]:
  """Settings of rows of `results.json`; rows without shift or distance (diverged, a teacher's) are left out.

  A setting that is there twice, by other names but with the same numbers, counts once: it is one pair, not two.

  Args:
    rows: (name of the setting without its seed, row).
  """
  seen = collections.defaultdict(list)
  for name, row in rows:
    distance = [value for metric, value in row["metrics"].items() if metric.startswith("fd@")]
    if not row["shift"] or not distance or not np.isfinite(distance[0]):
      continue
    group = (row["objective"], float(row["guidance_scale"]), row["steps"])
    seen[group, name].append(({p: _shift(row["shift"], *p) for p in PREDICTORS}, distance[0]))
  found = [Point(group, name, {p: float(np.mean([shift[p] for shift, _ in of])) for p in PREDICTORS},
                 float(np.mean([distance for _, distance in of])), len(of))
           for (group, name), of in sorted(seen.items())]
  return list({(point.group, point.distance, *point.shift.values()): point for point in reversed(found)}.values())[::-1]


def _shift(times, pair, last) -> float:
  """The distance sw2 of a pair, over the times that were rolled to (all but the first, which is pure noise)."""
  values = [time[f"sw2_{pair}"] for time in sorted(times, key=lambda time: -time["t"])[1:]]
  return values[-1] if last else float(np.mean(values))


def correlate(found: list[Point]) -> list[Found]:
  """Spearman's correlation for every predictor, in each group of at least LEAST settings and within all of them."""
  groups = collections.defaultdict(list)
  for point in found:
    groups[point.group].append(point)
  groups = {group: of for group, of in groups.items() if len(of) >= LEAST}
  out = []
  for predictor in PREDICTORS:
    ranks = []
    for group, of in groups.items():
      shift, distance = [p.shift[predictor] for p in of], [p.distance for p in of]
      if np.ptp(shift) == 0 or np.ptp(distance) == 0:
        continue
      out.append(Found(group, predictor, statistics.correlation(shift, distance)))
      ranks += zip(scipy.stats.rankdata(shift) / len(of), scipy.stats.rankdata(distance) / len(of))
    if ranks:
      out.append(Found("within", predictor, statistics.correlation(*np.transpose(ranks))))
  return out


def markdown(found: list[Found]) -> str:
  """A table: a row for each group, a column for each predictor."""
  cells = collections.defaultdict(dict)
  for f in found:
    cells[f.group][f.predictor] = f.correlation
  lines = ["| students | settings | " + " | ".join(PREDICTORS.values()) + " |", "|---|---|" + "---|" * len(PREDICTORS)]
  for group, of in cells.items():
    title = "all, ranks within the groups" if group == "within" else _title(group)
    values = [f"{of[p].r:+.2f} ({of[p].low:+.2f} to {of[p].high:+.2f})" if p in of else "-" for p in PREDICTORS]
    lines.append(f"| {title} | {next(iter(of.values())).n} | " + " | ".join(values) + " |")
  return "\n".join(lines) + "\n"


def draw(found: list[Point]) -> Drawing:
  """A panel for each predictor, a dot for each setting, a colour for each group."""
  groups = list(dict.fromkeys(point.group for point in found))
  paint = {group: _COLOURS[i % len(_COLOURS)] for i, group in enumerate(groups)}
  marks = {group: "os^vD"[i // len(_COLOURS) % 5] for i, group in enumerate(groups)}
  with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(7.8, 5.6), layout="constrained")
    for axis, (predictor, words) in zip(figure.subplots(2, 2).flat, PREDICTORS.items()):
      for group in groups:
        of = [point for point in found if point.group == group]
        axis.plot([p.shift[predictor] for p in of], [p.distance for p in of], marks[group], color=paint[group],
                  alpha=0.7, label=_title(group))
      axis.set(xlabel=f"SW₂, {words}", ylabel="Fréchet distance")
      scale(axis, [point.shift[predictor] for point in found], "x")
      scale(axis, [point.distance for point in found])
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
  return Drawing("shift_quality", "Fréchet distance against covariate shift",
                 "Fréchet distance of each setting against its covariate shift, by four measures of the shift", figure)


def _title(group) -> str:
  objective, guidance, steps = group
  return f"{objective}, {steps} step{'s' * (steps > 1)}, guidance {guidance:g}"
