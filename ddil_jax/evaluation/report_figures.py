"""The report's curves, as inline SVG and as files: text stays text, colours follow the page, ids are deterministic."""

import collections
import html
import io
import pathlib
import re
import textwrap
from typing import NamedTuple

import markupsafe
import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ddil_jax import files
from ddil_jax.evaluation.report_rows import order

SHIFTS = {"sw2": "sliced Wasserstein-2 distance", "mmd2": "unbiased squared maximum mean discrepancy",
          "feature_sw2": "sliced Wasserstein-2 distance of features",
          "feature_mmd2": "unbiased squared maximum mean discrepancy of features"}
SOURCES = {"forward": "#3f7fc4", "student": "#e0740b", "teacher": "#2b9a66", "dagger": "#b0429a",
           "pairs": "#7a6a2b"}
_COLOURS = {"base": "#3f7fc4", "+ddil": "#e0740b", "+reflected": "#2b9a66", "+ddil+reflected": "#b0429a"}
_SPARE = ("#8a7a00", "#7a6bd0", "#00879a", "#a0522d", "#d1495b", "#5c7f2b", "#3f7fc4", "#e0740b", "#2b9a66", "#b0429a")
_DASHES = ("solid", "dashed", "dotted")  # names that CSS has too
INK = "#1b1d21"  # what is drawn in this colour gets the page's text colour
STYLE = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 8, "axes.titlesize": 8.5,
         "text.parse_math": False, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "axes.formatter.use_mathtext": False, "axes.formatter.useoffset": False,
         "grid.alpha": 0.15, "lines.linewidth": 1.3, "lines.markersize": 3.5} | {f"{x}color": INK for x in (
             "text.", "axes.edge", "axes.label", "xtick.", "ytick.", "grid.", "legend.label")}


class Drawing(NamedTuple):
  """A figure.

  Attributes:
    name: of its files.
    title: shown above it.
    alt: what it is, in words.
    figure: what is drawn.
    legend: [(name, colour, line style)] of what the figure itself does not say.
  """
  name: str
  title: str
  alt: str
  figure: Figure
  legend: list[tuple[str, str, str]] = []


def styles(labels) -> dict[str, tuple[str, str]]:
  """{label: (colour, line style)}; the four variants have colours of their own."""
  spare = [label for label in dict.fromkeys(labels) if label not in _COLOURS]
  return {label: (_COLOURS[label], "solid") if label in _COLOURS else
          (_SPARE[spare.index(label) % len(_SPARE)], _DASHES[spare.index(label) // len(_SPARE) % len(_DASHES)])
          for label in labels}


def draw(runs, rows) -> dict:
  """All curves of the runs, as lists of `Drawing`, and their legends, as lists of (name, colour, line style).

  Returns:
    {"shift": {kind: figures}, "shift_legend", "sources": figures, "sources_legend", "training": figures,
     "training_legend"}
  """
  measured = {r.label for r in rows if r.shift}
  # A run that failed has no evaluated rows, but may have a log.
  paint = styles([r.label for r in sorted(rows, key=lambda r: r.setting.order)] + ["base"]
                 + [_label(run) for run in runs if run.log])
  if measured <= set(_COLOURS):
    shown = [v for v in ("base", "+ddil") if v in measured] or sorted(measured)
  else:
    shown = [label for label in paint if label in measured]
  trained = {_label(run) for run in runs if run.log}
  named = lambda names: [(name, *paint[name]) for name in names]  # noqa: E731
  shift_legend = [*named(shown), ("teacher's rollout to the forward marginal", INK, "dashed"),
                  ("floor: two draws of the forward marginal", "#888888", "dotted")]
  sources_legend = [(f"{s} states", c, "solid") for s, c in SOURCES.items()
                    if any(f"student/loss@{s}" in line for run in runs for line in run.log)]
  training_legend = named(label for label in paint if label in trained)
  with matplotlib.rc_context(STYLE):
    return dict(
        shift={kind: _shift(rows, kind, {label: paint[label] for label in shown}, shift_legend) for kind in SHIFTS},
        shift_legend=shift_legend,
        sources=_of_training(runs, _by_source, "loss per state source", paint, sources_legend),
        sources_legend=sources_legend,
        training=_of_training(runs, _curves, "training curves", paint, training_legend),
        training_legend=training_legend)


def _shift(rows, kind, paint, legend):
  """A figure per objective, steps and guidance scale: distance to the forward marginal and the teacher."""
  groups = collections.defaultdict(lambda: collections.defaultdict(list))
  for row in rows:
    if row.label in paint and any(_finite(p.get(f"{kind}_student_{of}")) for p in row.shift
                                  for of in ("forward", "teacher")):
      groups[row.group][row.label].append(row.shift)
  figures = []
  for (objective, steps, guidance), by_label in groups.items():
    everyone = [curve for curves in by_label.values() for curve in curves]
    fig = Figure(figsize=(5.6, 2.3), layout="constrained")
    axes = fig.subplots(1, 2, sharey=True)
    for axis, reference in zip(axes, ("forward", "teacher")):
      if reference == "forward":
        band(axis, everyone, f"{kind}_teacher_forward", INK, linestyle="--", marker="s")
      band(axis, everyone, f"{kind}_floor", "#888888", linestyle=":")
      for label, curves in by_label.items():
        color, dash = paint[label]
        band(axis, curves, f"{kind}_student_{reference}", color, band=len(by_label) <= 4, linestyle=dash, marker="o")
      axis.set_title("to the forward marginal" if reference == "forward" else "to the teacher's rollout")
      axis.set_xlabel("time t (noise → data)")
    axes[0].invert_xaxis()
    axes[1].invert_xaxis()
    axes[0].set_ylabel("SW₂" if kind.endswith("sw2") else "MMD²")
    if kind.endswith("sw2"):
      axes[0].set_ylim(bottom=0)
    title = f"{objective} · {steps} steps · guidance scale {guidance:g}"
    figures.append(Drawing(f"shift_{kind}_{objective}_{steps}_steps_g{guidance:g}", title,
                           f"{SHIFTS[kind]} per time step, {title}", fig, legend))
  return figures


def band(axis, curves, key, color, band=True, **style):
  """Mean over curves per time, and a band from the lowest to the highest end of their intervals."""
  points = collections.defaultdict(list)
  for p in (p for curve in curves for p in curve):
    t, value, low, high = (p.get(k) for k in ("t", key, f"{key}_low", f"{key}_high"))
    if _finite(t) and _finite(value):
      points[t].append((value, low if _finite(low) else value, high if _finite(high) else value))
  if points:
    times = sorted(points)
    mean, low, high = (list(map(of, ([p[i] for p in points[t]] for t in times)))
                       for i, of in enumerate((np.mean, min, max)))
    axis.plot(times, mean, color=color, **style)
    if band:
      axis.fill_between(times, low, high, color=color, alpha=0.15, linewidth=0)


def _of_training(runs, panels, what, paint, legend):
  groups = collections.defaultdict(list)
  for run in sorted(runs, key=lambda run: (not run.rows, [order(r.group) for r in run.rows[:1]])):
    if run.log:
      groups[_title(run)].append(run)
  figures = []
  for title, members in groups.items():
    drawn = [(name, lines) for name, lines in panels(members, paint) if lines]
    if not drawn:
      continue
    columns = min(4, len(drawn))
    count = -(-len(drawn) // columns)
    fig = Figure(figsize=(2.6 * columns, 1.9 * count), layout="constrained")
    axes = fig.subplots(count, columns, squeeze=False, sharey=panels is _by_source).flat
    for (name, lines), axis in zip(drawn, axes):  # in this order: axes keeps what is left over
      for x, y, (color, dash) in lines:
        axis.plot(x, y, color=color, linestyle=dash, alpha=0.8, marker="o" if len(x) < 3 else None)
      axis.xaxis.set_major_locator(ticker.MaxNLocator(4, steps=[1, 2, 5, 10], integer=True))
      scale(axis, [v for _, y, _ in lines for v in y])
      axis.set_title("\n".join(textwrap.wrap(name, 30)))
      axis.set_xlabel("training step")
    for axis in list(axes):
      axis.remove()
    figures.append(Drawing(f"{what} {title}", title, f"{what}, {title}", fig, legend))
  return figures


def scale(axis, values, of="y"):
  """A logarithmic axis where the values span much, with ticks at 1, 2, 5 as plain numbers; `of` is x or y."""
  ticks = axis.xaxis if of == "x" else axis.yaxis
  if min(values) > 0 and max(values) > 5 * min(values):
    axis.set(**{f"{of}scale": "log"})
    subs = (1, 2, 5) if max(values) < 500 * min(values) else (1,)
    ticks.set_major_locator(ticker.LogLocator(subs=subs, numticks=8))
    ticks.set_minor_locator(ticker.NullLocator())
  ticks.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:.4g}"))


def _title(run) -> str:
  if not run.rows:
    return run.name
  first = run.rows[0]
  if first.objective == "teacher":
    return "teacher"
  steps = " and ".join(str(s) for s in sorted({r.steps for r in run.rows}, reverse=True))
  return f"{first.objective} · {steps} steps · guidance scale {first.guidance_scale:g}"


def _label(run) -> str:
  return run.rows[0].label or "base" if run.rows else "base"


def _by_source(runs, paint):
  """A panel per setting, a line per source and run; nothing for runs that know one source only."""
  labels = [label for label in paint if label in {_label(run) for run in runs}]
  panels = [(v, [(*xy, (color, "solid")) for source, color in SOURCES.items() for run in runs
                 if _label(run) == v and (xy := _series(run, f"student/loss@{source}"))]) for v in labels]
  several = len({line[2] for _, lines in panels for line in lines}) > 1
  return panels if several else []


def _curves(runs, paint):
  """A panel per quantity that was logged, a line per run; what belongs to one source or time is left out."""
  keys = {k for run in runs for line in run.log for k in line} - {"step", "time"}
  keys = sorted((k for k in keys if not re.search(r"^shift/|/\w+@[a-z]+$", k)),
                key=lambda k: (k != "student/loss", "/" not in k, k))
  return [(key, [(*xy, paint[_label(run)]) for run in runs if (xy := _series(run, key))]) for key in keys]


def _series(run, key):
  points = [(line["step"], line[key]) for line in run.log if key in line]
  return tuple(zip(*points)) or None


def _finite(value):
  return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


def svg(drawing: Drawing) -> markupsafe.Markup:
  """The figure as <svg> element; ids follow from name and content, so that figures of a page do not clash."""
  text = _rendered(drawing, transparent=True)
  text = re.sub(r"<metadata>.*?</metadata>|<g id=\"[^\"]*\"", lambda m: "<g" if m[0][:2] == "<g" else "",
                text[text.index("<svg"):], flags=re.S)
  return markupsafe.Markup(text.replace(INK, "currentColor").replace(
      "<svg ", f'<svg role="img" aria-label="{html.escape(drawing.alt)}" ', 1))


def _rendered(drawing, **options) -> str:
  out = io.StringIO()
  with matplotlib.rc_context(STYLE | {"svg.hashsalt": drawing.name}):
    drawing.figure.savefig(out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")), **options)
  return out.getvalue()


def save(drawings: list[Drawing], folder) -> list[pathlib.Path]:
  """Writes each figure as SVG and PNG, with its legend; returns the files.

  Raises:
    UsageError: a folder that cannot be written to.
  """
  written = []
  for drawing in drawings:
    stem = re.sub(r"[^A-Za-z0-9_.+=-]+", "_", drawing.name).strip("_")
    with matplotlib.rc_context(STYLE):
      if drawing.legend:
        drawing.figure.set_figheight(drawing.figure.get_figheight() + 0.17 * -(-len(drawing.legend) // 2))
        drawing.figure.legend(handles=[Line2D([], [], color=colour, linestyle=dash, label=name)
                                       for name, colour, dash in drawing.legend],
                              loc="outside lower center", ncols=2, frameon=False)
      png = io.BytesIO()
      drawing.figure.savefig(png, format="png", dpi=160, metadata={"Software": None})
    for ending, data in (("svg", _rendered(drawing).encode()), ("png", png.getvalue())):
      written.append(pathlib.Path(folder) / f"{stem}.{ending}")
      files.write_bytes(written[-1], data)
  return written
