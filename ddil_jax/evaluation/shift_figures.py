"""Covariate shift of one run, as figures and as a table for the terminal."""

import matplotlib
from matplotlib import ticker
from matplotlib.figure import Figure

from ddil_jax.evaluation.report_figures import INK, SOURCES, STYLE, Drawing, band

# pair -> (what it is, colour, line style)
PAIRS = {"student_forward": ("student to the forward marginal", SOURCES["student"], "solid"),
         "student_teacher": ("student to the teacher's rollout", SOURCES["dagger"], "solid"),
         "teacher_forward": ("teacher's rollout to the forward marginal", INK, "dashed"),
         "floor": ("floor: two draws of the forward marginal", "#888888", "dotted")}
_PANELS = {"sw2": "SW₂ of states", "mmd2": "MMD² of states", "label_error": "label error, rms per pixel",
           "feature_sw2": "SW₂ of features", "feature_mmd2": "MMD² of features"}
_DISTANCES = [kind for kind in _PANELS if kind != "label_error"]


def draw(rows: list[dict], log: list[dict] = ()) -> list[Drawing]:
  """A figure for each row of `shift.json`, and the drift over training if it was logged.

  Args:
    rows: {"objective", "steps", "guidance_scale", "shift": as of `shift.Probe.rows`}.
    log: lines of `metrics.jsonl`.
  """
  with matplotlib.rc_context(STYLE):
    drawings = [_of_time(row) for row in rows]
    steps = [line for line in log if any(name.startswith("shift/") for name in line)]
    return drawings + ([_drift(steps, rows[0]["shift"])] if steps else [])


def _of_time(row) -> Drawing:
  """Panels for distances in state and feature space, and for label errors, over the sampling times."""
  curves = row["shift"]
  with_features = any("feature_sw2_student_forward" in p for p in curves)
  fig = Figure(figsize=(7.8, 1.9 * (1 + with_features)), layout="constrained")
  axes = fig.subplots(1 + with_features, 3, squeeze=False).flat
  for axis, kind in zip(axes, _PANELS):
    if kind == "label_error":
      for source in ("forward", "student", "teacher"):
        band(axis, [curves], f"label_error_{source}", SOURCES[source], marker="o", label=f"{source} states")
      axis.legend(frameon=False)
    else:
      for pair, (_, color, dash) in PAIRS.items():
        band(axis, [curves], f"{kind}_{pair}", color, linestyle=dash, marker="." if dash == "dotted" else "o")
    if "mmd2" not in kind:
      axis.set_ylim(bottom=0)
    axis.set_title(_PANELS[kind])
    axis.set_xlabel("time t (noise → data)")
    axis.invert_xaxis()
  if with_features:
    fig.axes[-1].remove()
  title = f"{row['objective']} · {row['steps']} steps · guidance scale {row['guidance_scale']:g}"
  return Drawing(f"{row['steps']}_steps_g{row['guidance_scale']:g}", title, f"covariate shift per time step, {title}",
                 fig, list(PAIRS.values()))


def _drift(lines, curves) -> Drawing:
  """A panel per reference, a line per sampling time, over the training steps."""
  times = [p for p in curves if p["k"]]
  colors = matplotlib.colormaps["viridis"]([0.85 * i / max(len(times) - 1, 1) for i in range(len(times))])
  paint = [matplotlib.colors.to_hex(color) for color in colors]
  fig = Figure(figsize=(5.6, 2.3), layout="constrained")
  for axis, pair in zip(fig.subplots(1, 2, sharey=True), ("student_forward", "student_teacher")):
    for p, color in zip(times, paint):
      points = [(line["step"], v) for line in lines if (v := line.get(f"shift/{pair}/sw2@{p['k']}")) is not None]
      axis.plot(*zip(*points), color=color, marker="o" if len(points) < 30 else None) if points else None
    axis.set_title(f"SW₂, {PAIRS[pair][0]}")
    axis.set_xlabel("training step")
    axis.xaxis.set_major_locator(ticker.MaxNLocator(4, steps=[1, 2, 5, 10], integer=True))
    axis.set_ylim(bottom=0)
  legend = [(f"k = {p['k']}, t = {p['t']:.3g}", color, "solid") for p, color in zip(times, paint)]
  return Drawing("drift", "drift of the covariate shift", "covariate shift over the training steps", fig, legend)


def table(rows: list[dict]) -> str:
  """The distances per sampling time as text; * where an interval lies above the floor's."""
  lines = []
  for row in rows:
    lines += [f"{row['objective']} {row['variant']}, {row['steps']} steps, guidance scale {row['guidance_scale']:g}",
              f"{'':12}{'k':>3}{'t':>8}" + "".join(f"{pair:>18}" for pair in PAIRS)]
    for kind in _DISTANCES:
      for p in row["shift"]:
        if f"{kind}_floor" in p:
          lines.append(f"{kind:12}{p['k']:3d}{p['t']:8.3g}" + "".join(_cell(p, kind, pair) for pair in PAIRS))
    lines.append(f"{'label error':12}{'k':>3}{'t':>8}" + "".join(f"{s:>18}" for s in ("forward", "student", "teacher")))
    lines += [f"{'':12}{p['k']:3d}{p['t']:8.3g}"
              + "".join(f"{p[f'label_error_{s}']:17.4f} " for s in ("forward", "student", "teacher"))
              for p in row["shift"] if "label_error_student" in p] + [""]
  return "\n".join([*lines, "*: the interval lies above that of the floor."])


def _cell(p, kind, pair) -> str:
  above = pair != "floor" and p[f"{kind}_{pair}_low"] > p[f"{kind}_floor_high"]
  return f"{p[f'{kind}_{pair}']:17.4f}{'*' if above else ' '}"
