"""The report's curves as inline SVG: text stays text, colours follow the page, ids are deterministic."""

import collections
import html
import io
import re
import statistics
import textwrap

import markupsafe
import matplotlib
from matplotlib import ticker
from matplotlib.figure import Figure

from ddil_jax.evaluation.report_rows import order, variant_order

SHIFTS = {"sw2": "sliced Wasserstein-2 distance", "mmd2": "unbiased squared maximum mean discrepancy"}
SOURCES = {"forward": "#3f7fc4", "student": "#e0740b", "teacher": "#2b9a66", "dagger": "#b0429a"}
_COLOURS = {"base": "#3f7fc4", "+ddil": "#e0740b", "+reflected": "#2b9a66", "+ddil+reflected": "#b0429a"}
_SPARE = ("#8a7a00", "#7a6bd0", "#00879a", "#a0522d")
_INK = "#123456"  # what is drawn in this colour gets the page's text colour
_STYLE = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 8, "axes.titlesize": 8.5,
          "text.parse_math": False, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
          "axes.formatter.use_mathtext": False, "axes.formatter.useoffset": False,
          "grid.alpha": 0.15, "lines.linewidth": 1.3, "lines.markersize": 3.5} | {
              f"{x}color": _INK for x in ("text.", "axes.edge", "axes.label", "xtick.", "ytick.", "grid.")}


def colour(variant: str) -> str:
  """The colour of a variant; unknown ones get a spare one by name."""
  return _COLOURS.get(variant) or _SPARE[sum(variant.encode()) % len(_SPARE)]


def draw(runs, rows) -> dict:
  """All figures, as lists of (title, svg), and their legends, as lists of (name, colour, line style).

  Returns:
    {"shift": {kind: figures}, "shift_legend", "sources": figures, "sources_legend", "training": figures,
     "training_legend"}
  """
  measured = {r.variant for r in rows if r.shift}
  shown = [v for v in ("base", "+ddil") if v in measured] or sorted(measured)
  solid = lambda names: [(name, colour(name), "solid") for name in names]  # noqa: E731
  trained = {_variant(run) for run in runs if run.log}
  with matplotlib.rc_context(_STYLE):
    return dict(
        shift={kind: _shift(rows, kind, shown) for kind in SHIFTS},
        shift_legend=[*solid(shown), ("teacher's rollout to the forward marginal", "currentColor", "dashed"),
                      ("floor: two draws of the forward marginal", "#888", "dotted")],
        sources=_of_training(runs, _by_source, "loss per state source"),
        sources_legend=[(f"{s} states", c, "solid") for s, c in SOURCES.items()
                        if any(f"student/loss@{s}" in line for run in runs for line in run.log)],
        training=_of_training(runs, _curves, "training curves"),
        training_legend=solid(sorted(trained, key=variant_order)))


def _shift(rows, kind, shown):
  """A figure per objective, steps and guidance scale: distance to the forward marginal and the teacher."""
  groups = collections.defaultdict(lambda: collections.defaultdict(list))
  for row in rows:
    if row.variant in shown and any(_finite(p.get(f"{kind}_student_{of}")) for p in row.shift
                                    for of in ("forward", "teacher")):
      groups[row.group][row.variant].append(row.shift)
  figures = []
  for (objective, steps, guidance), by_variant in groups.items():
    everyone = [curve for curves in by_variant.values() for curve in curves]
    fig = Figure(figsize=(5.6, 2.3), layout="constrained")
    axes = fig.subplots(1, 2, sharey=True)
    for axis, reference in zip(axes, ("forward", "teacher")):
      if reference == "forward":
        _band(axis, everyone, f"{kind}_teacher_forward", _INK, linestyle="--", marker="s")
      _band(axis, everyone, f"{kind}_floor", "#888888", linestyle=":")
      for variant, curves in by_variant.items():
        _band(axis, curves, f"{kind}_student_{reference}", colour(variant), marker="o")
      axis.set_title("to the forward marginal" if reference == "forward" else "to the teacher's rollout")
      axis.set_xlabel("time t (noise → data)")
    axes[0].invert_xaxis()
    axes[1].invert_xaxis()
    axes[0].set_ylabel("SW₂" if kind == "sw2" else "MMD²")
    if kind == "sw2":
      axes[0].set_ylim(bottom=0)
    title = f"{objective} · {steps} steps · guidance scale {guidance:g}"
    figures.append((title, _svg(fig, f"{kind} {title}", f"{SHIFTS[kind]} per time step, {title}")))
  return figures


def _band(axis, curves, key, color, **style):
  """Mean over curves per time, and a band from the lowest to the highest end of their intervals."""
  points = collections.defaultdict(list)
  for p in (p for curve in curves for p in curve):
    t, value, low, high = (p.get(k) for k in ("t", key, f"{key}_low", f"{key}_high"))
    if _finite(t) and _finite(value):
      points[t].append((value, low if _finite(low) else value, high if _finite(high) else value))
  if points:
    times = sorted(points)
    mean, low, high = (list(map(of, ([p[i] for p in points[t]] for t in times)))
                       for i, of in enumerate((statistics.fmean, min, max)))
    axis.plot(times, mean, color=color, **style)
    axis.fill_between(times, low, high, color=color, alpha=0.15, linewidth=0)


def _of_training(runs, panels, what):
  groups = collections.defaultdict(list)
  for run in sorted(runs, key=lambda run: (not run.rows, [order(r.group) for r in run.rows[:1]])):
    if run.log:
      groups[_title(run)].append(run)
  figures = []
  for title, members in groups.items():
    drawn = [(name, lines) for name, lines in panels(members) if lines]
    if not drawn:
      continue
    columns = min(4, len(drawn))
    count = -(-len(drawn) // columns)
    fig = Figure(figsize=(2.6 * columns, 1.9 * count), layout="constrained")
    axes = fig.subplots(count, columns, squeeze=False, sharey=panels is _by_source).flat
    for (name, lines), axis in zip(drawn, axes):  # in this order: axes keeps what is left over
      for x, y, color in lines:
        axis.plot(x, y, color=color, alpha=0.8, marker="o" if len(x) < 3 else None)
      _scale(axis, [v for _, y, _ in lines for v in y])
      axis.set_title("\n".join(textwrap.wrap(name, 30)))
      axis.set_xlabel("training step")
    for axis in list(axes):
      axis.remove()
    figures.append((title, _svg(fig, f"{what} {title}", f"{what}, {title}")))
  return figures


def _scale(axis, values):
  """A logarithmic axis where the values span much, with ticks at 1, 2, 5 as plain numbers."""
  if min(values) > 0 and max(values) > 5 * min(values):
    axis.set_yscale("log")
    subs = (1, 2, 5) if max(values) < 500 * min(values) else (1,)
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=subs, numticks=8))
    axis.yaxis.set_minor_locator(ticker.NullLocator())
  axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:.4g}"))
  axis.xaxis.set_major_locator(ticker.MaxNLocator(4, steps=[1, 2, 5, 10], integer=True))


def _title(run) -> str:
  if not run.rows:
    return run.name
  first = run.rows[0]
  if first.objective == "teacher":
    return "teacher"
  steps = " and ".join(str(s) for s in sorted({r.steps for r in run.rows}, reverse=True))
  return f"{first.objective} · {steps} steps · guidance scale {first.guidance_scale:g}"


def _variant(run) -> str:
  return run.rows[0].variant or "base" if run.rows else "base"


def _by_source(runs):
  """A panel per variant, a line per source and run; nothing for runs that know one source only."""
  variants = sorted({_variant(run) for run in runs}, key=variant_order)
  panels = [(v, [(*xy, color) for source, color in SOURCES.items() for run in runs
                 if _variant(run) == v and (xy := _series(run, f"student/loss@{source}"))]) for v in variants]
  several = len({line[2] for _, lines in panels for line in lines}) > 1
  return panels if several else []


def _curves(runs):
  """A panel per quantity that was logged, a line per run."""
  keys = {k for run in runs for line in run.log for k in line} - {"step", "time"}
  keys = sorted((k for k in keys if not re.search(r"/loss@\w+$", k)),
                key=lambda k: (k != "student/loss", "/" not in k, k))
  return [(key, [(*xy, colour(_variant(run))) for run in runs if (xy := _series(run, key))]) for key in keys]


def _series(run, key):
  points = [(line["step"], line[key]) for line in run.log if key in line]
  return tuple(zip(*points)) or None


def _finite(value):
  return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


def _svg(fig, name, alt) -> markupsafe.Markup:
  """The figure as <svg> element; ids follow from name and content, so that figures of a page do not clash."""
  out = io.StringIO()
  with matplotlib.rc_context({"svg.hashsalt": name}):
    fig.savefig(out, format="svg", transparent=True,
                metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
  text = out.getvalue()
  text = re.sub(r"<metadata>.*?</metadata>|<g id=\"[^\"]*\"", lambda m: "<g" if m[0][:2] == "<g" else "",
                text[text.index("<svg"):], flags=re.S)
  return markupsafe.Markup(text.replace(_INK, "currentColor").replace(
      "<svg ", f'<svg role="img" aria-label="{html.escape(alt)}" ', 1))
