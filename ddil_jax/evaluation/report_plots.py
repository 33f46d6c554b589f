"""Figures of a metric: against sampling steps, network evaluations, a field that was swept; differences to baselines.

A point is a mean over training seeds, its bar the 95 % t-interval (from three seeds on), small dots are single
seeds, and a cross at the upper edge is a setting without any value: all its runs diverged or failed.
"""

import math

import matplotlib
from matplotlib import ticker
from matplotlib.figure import Figure

from ddil_jax.evaluation import meanings
from ddil_jax.evaluation.report_figures import INK, STYLE, Drawing, scale, styles

TEACHER = "the teacher's own sampler"
_MOST = 12  # curves in one figure of all methods
_LEAST = 4  # compared settings of a group that are worth a figure


def draw(tables: list[dict]) -> list[Drawing]:
  """Figures of the tables of `comparisons.summarise`."""
  figures = []
  with matplotlib.rc_context(STYLE):
    for i, table in enumerate(tables):
      name = table["metric"].partition("@")[0] + (f"_{i + 1}" if len(tables) > 1 else "")
      figures += [*_against_steps(table, name), *_against_evaluations(table, name), *_against_fields(table, name),
                  *_differences(table, name)]
  return figures


def _axis_title(table) -> str:
  meaning = meanings.of(table["metric"])
  return meaning.heading + (f"\n{meaning.better} is better" if meaning.better else "")


def _against_steps(table, name):
  """A panel per method and guidance scale, a curve per setting."""
  panels = {}
  for g in table["groups"]:
    for label, cell in g["cells"].items():
      panels.setdefault((g["objective"], g["guidance_scale"]), {}).setdefault(label, []).append((g["steps"], cell))
  panels = {key: curves for key, curves in panels.items() if len({x for of in curves.values() for x, _ in of}) > 1}
  teachers = {g["guidance_scale"]: [] for g in table["teacher"]}
  for g in table["teacher"]:
    teachers[g["guidance_scale"]] += [(g["steps"], cell) for cell in g["cells"].values()]
  chosen = {}
  for (objective, guidance), curves in panels.items():
    counts = [x for of in curves.values() for x, _ in of]
    teacher = [(x, cell) for x, cell in teachers.get(guidance, []) if min(counts) <= x <= max(counts)]
    chosen[f"{objective}, guidance scale {guidance:g}"] = curves | ({TEACHER: teacher} if teacher else {})
  drawn = _painted(chosen)
  if not drawn:
    return []
  figure = _panels(drawn, "sampling steps", _axis_title(table), doubling=True)
  title = f"{meanings.of(table['metric']).heading} against sampling steps"
  return [Drawing(f"{name}_steps", title, title, figure)]


def _against_evaluations(table, name):
  """A panel per guidance scale with all methods; of many settings only those that others are compared with."""
  if len({g["objective"] for g in table["groups"]}) < 2 and all(
      g["evaluations"] in ([], [g["steps"]]) for g in (*table["teacher"], *table["groups"])):
    return []  # the figure against steps says the same
  panels = {}
  for g in (*table["teacher"], *table["groups"]):
    for label, cell in g["cells"].items():
      curve = TEACHER if g in table["teacher"] else f"{g['objective']} {label}"
      of = cell.evaluations or g["evaluations"]  # a setting that failed as often as the others
      if len(of) == 1:
        panels.setdefault(g["guidance_scale"], {}).setdefault(curve, []).append((of[0], cell))
  baselines = {f"{g['objective']} {c.baseline}" for g in table["groups"] for c in g["cells"].values() if c.baseline}
  chosen = {}
  for guidance, curves in sorted(panels.items()):
    if len(curves) > _MOST and baselines:
      curves = {label: of for label, of in curves.items() if label in baselines or label == TEACHER}
    least = min((x for label, of in curves.items() if label != TEACHER for x, _ in of), default=math.inf)
    curves = {label: [p for p in of if p[0] >= least] for label, of in curves.items()}
    if len({x for of in curves.values() for x, _ in of}) > 1:
      chosen[f"guidance scale {guidance:g}"] = curves
  drawn = _painted(chosen)
  if not drawn:
    return []
  figure = _panels(drawn, "network evaluations per image", _axis_title(table), doubling=True, width=3.6)
  title = f"{meanings.of(table['metric']).heading} against network evaluations"
  return [Drawing(f"{name}_evaluations", title, title, figure)]


def _against_fields(table, name):
  """A figure per numeric field, a panel per group, a curve per setting of all else."""
  fields = dict.fromkeys(f for g in table["groups"] for cell in g["cells"].values() for f in cell.setting.values)
  figures = []
  for field in fields:
    chosen = {}
    for g in table["groups"]:
      curves = {}
      for cell in g["cells"].values():
        x = cell.setting.values.get(field)
        if isinstance(x, int | float) and not isinstance(x, bool):
          curves.setdefault(cell.setting.without(field) or g["objective"], []).append((x, cell))
      curves = {rest: points for rest, points in curves.items() if len(points) > 1}
      if curves:
        # What the others are compared with, where it has no such field: a level.
        levels = {cell.baseline for cell in g["cells"].values()} - {None} - set(curves)
        curves |= {label: [(None, g["cells"][label])] for label in levels
                   if field not in g["cells"][label].setting.values}
        chosen[f"{g['objective']}, {g['steps']} steps, guidance scale {g['guidance_scale']:g}"] = curves
    drawn = _painted(chosen)
    if drawn:
      title = f"{meanings.of(table['metric']).heading} against {field}"
      figures.append(Drawing(f"{name}_{field}", title, title, _panels(drawn, field, _axis_title(table))))
  return figures


def _differences(table, name):
  """Where a group has many settings, a panel for it and for each with several.

  Paired differences to the baseline; a dot is filled after Holm's correction.
  """
  chosen = {}
  for g in table["groups"]:
    compared = {label: cell for label, cell in g["cells"].items() if cell.difference}
    if len(compared) > 1:
      chosen[f"{g['objective']}, {g['steps']} steps, guidance scale {g['guidance_scale']:g}"] = compared
  if max(map(len, chosen.values()), default=0) < _LEAST:
    return []
  rows = [len(cells) for cells in chosen.values()]
  figure = Figure(figsize=(6.4, 0.17 * sum(rows) + 0.75 * len(rows)), layout="constrained")
  for axis, (title, cells) in zip(figure.subplots(len(rows), 1, squeeze=False, height_ratios=rows).flat, chosen.items()):
    for y, (label, cell) in enumerate(cells.items()):
      d = cell.difference
      colour = styles([cell.setting.variant])[cell.setting.variant][0]
      bar = None if d.half is None else [[d.half], [d.half]]
      axis.errorbar(d.mean, y, xerr=bar, fmt="o", color=colour, mfc=colour if cell.holm else "none", capsize=2)
    axis.axvline(0, color=INK, linewidth=0.8)
    axis.set_yticks(range(len(cells)), list(cells), fontsize=6.5)
    axis.invert_yaxis()
    axis.margins(y=0.6 / len(cells))
    known = {cell.baseline for cell in cells.values()}
    axis.set_title(title, loc="left")
    axis.set_xlabel("difference to " + (known.pop() if len(known) == 1 else "the baseline that is like it"), fontsize=6.5)
  title = f"{meanings.of(table['metric']).heading}: paired differences"
  return [Drawing(f"{name}_differences", title, f"{title}, with 95 % intervals; filled where significant after Holm's"
                  " correction", figure)]


def _painted(panels):
  """[(title, {label: (points by size of x, colour, line style)})]; a label looks the same in all panels."""
  paint = styles(dict.fromkeys(label for curves in panels.values() for label in curves if label != TEACHER))
  paint[TEACHER] = (INK, "dashed")
  return [(title, {label: (sorted(points, key=lambda p: p[0] or 0), *paint[label]) for label, points in curves.items()})
          for title, curves in panels.items()]


def _panels(drawn, x_title, y_title, doubling=False, width=2.7) -> Figure:
  """Panels of `_painted`, with one legend for all."""
  columns = min(4 if width < 3 else 3, len(drawn))
  count = -(-len(drawn) // columns)
  entries = {}
  fig = Figure(layout="constrained")
  axes = fig.subplots(count, columns, squeeze=False).flat
  for (title, curves), axis in zip(drawn, axes):  # in this order: axes keeps what is left over
    ticks = sorted({x for points, *_ in curves.values() for x, _ in points if x is not None})
    values, gap = [], min(1.035, 1.12**(1 / len(curves)))
    for i, (label, (points, colour, dash)) in enumerate(curves.items()):
      # On a logarithmic axis the curves stand a little apart, so that bars do not hide each other.
      apart = gap**(i - (len(curves) - 1) / 2) if doubling else 1.0
      entries[label] = _level(axis, points[0][1], colour, dash) if points[0][0] is None else \
          _curve(axis, [(x * apart, cell) for x, cell in points], colour, dash)
      for cell in (cell for _, cell in points if cell.interval):
        values += [*cell.values.values(), *(end for end in (cell.interval.low, cell.interval.high) if end is not None)]
    if values:
      scale(axis, values)
    _x_axis(axis, ticks, doubling, gap**(len(curves) / 2))
    axis.set_title(title)
    axis.set_xlabel(x_title)
  for axis in list(axes):
    axis.remove()
  for row in range(count):
    fig.axes[row * columns].set_ylabel(y_title)
  width = max(width, 4.4) if len(drawn) == 1 else width
  longest = max(map(len, entries))
  across = max(1, int(width * columns / (0.062 * longest + 0.5)))
  lines = -(-len(entries) // across)
  fig.set_size_inches(width * columns + 0.3, 2.2 * count + 0.18 * lines)
  fig.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=across, frameon=False)
  return fig


def _curve(axis, points, colour, dash):
  """One setting: means and intervals, single seeds, crosses for settings without a value."""
  there = [(x, cell) for x, cell in points if cell.interval]
  line, = axis.plot([x for x, _ in there], [cell.mean for _, cell in there], color=colour, linestyle=dash, marker="o")
  for x, cell in there:
    if cell.interval.half is not None:
      axis.errorbar(x, cell.mean, cell.interval.half, color=colour, capsize=2, linewidth=1)
    if len(cell.values) > 1:
      axis.plot([x] * len(cell.values), list(cell.values.values()), color=colour, linestyle="", marker=".",
                markersize=2.5, alpha=0.5)
  lost = [x for x, cell in points if not cell.interval]
  axis.plot(lost, [0.97] * len(lost), color=colour, linestyle="", marker="x", markersize=5,
            transform=axis.get_xaxis_transform())
  return line


def _level(axis, cell, colour, dash):
  """A setting without a place on the axis: its mean from edge to edge, its interval as a band."""
  if cell.interval and cell.interval.half is not None:
    axis.axhspan(cell.interval.low, cell.interval.high, color=colour, alpha=0.12, linewidth=0)
  return axis.axhline(cell.mean if cell.interval else math.nan, color=colour, linestyle=dash)


def _x_axis(axis, ticks, doubling, apart):
  """Ticks where the points are, unless they would touch; room for the outermost points."""
  low, high = ticks[0], ticks[-1]
  logarithmic = doubling or (low > 0 and high >= 20 * low)
  if logarithmic:
    axis.set_xscale("log", base=2 if doubling else 10)
    pad = math.exp(0.05 * math.log(high / low)) * apart * 1.03
    axis.set_xlim(low / pad, high * pad)
  place = math.log if logarithmic else float
  if all(place(b) - place(a) > (place(high) - place(low)) / 12 for a, b in zip(ticks, ticks[1:])):
    axis.xaxis.set_major_locator(ticker.FixedLocator(ticks))
  axis.xaxis.set_minor_locator(ticker.NullLocator())
  axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:.4g}"))
