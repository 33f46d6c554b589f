"""Figures of a metric: what they show is what the table says."""

import pytest

from ddil_jax.errors import UsageError
from ddil_jax.evaluation import comparisons, report_figures, report_plots
from tests.evaluation.test_comparisons import BASE, DDIL, failed, rows, seeds, setting

SHOT = {"base": seeds(4., 4.2, 4.1), "+ddil": seeds(3.9, 4., 4.2)}


def drawn(given) -> dict:
  return {d.name: d for d in report_plots.draw(comparisons.summarise(given))}


def lines(axis) -> dict:
  """{label or colour: [(x, y)]} of the curves of an axis, without bars and single seeds."""
  return {line.get_color(): [(round(float(x), 3), round(float(y), 3)) for x, y in zip(*line.get_data())]
          for line in axis.lines if line.get_marker() in ("o", "x") and len(line.get_xdata())}


def test_a_curve_over_steps_has_means_intervals_and_the_teacher():
  given = rows(setting(""), seeds(9.), "teacher", 4) + rows(setting(""), seeds(8.), "teacher", 8)
  for n in (4, 2):
    given += rows(BASE, {s: v * 4 / n for s, v in SHOT["base"].items()}, steps=n) + rows(DDIL, SHOT["+ddil"], steps=n)
  figure = drawn(given)["fd_steps"].figure
  axis, = figure.axes
  assert [[y for _, y in points] for points in lines(axis).values()] == [[8.2, 4.1], [4.033, 4.033], [9.0]]
  interval = comparisons.summarise(given)[0]["groups"][0]["cells"]["base"].interval
  bars = [b.get_segments()[0][:, 1] for b in axis.collections]
  assert any(bar == pytest.approx([interval.low, interval.high]) for bar in bars) and len(bars) == 4
  assert {t.get_text() for t in figure.legends[0].texts} == {"base", "+ddil", report_plots.TEACHER}
  assert axis.get_ylabel() == "Fréchet distance\nlower is better"
  # One method whose every step is one evaluation: the same figure twice would say nothing more.
  assert set(drawn(given)) == {"fd_steps"}


def test_a_swept_field_is_an_axis_its_baseline_a_level_and_what_diverged_a_cross():
  every = {n: setting("+ddil", **{"states.every": n}) for n in (1, 10, 50)}
  given = rows(BASE, SHOT["base"]) + rows(every[1], seeds(4., 4.1)) + rows(every[10], seeds(3.)) + failed(every[50], 0)
  d = drawn(given)["fd_states.every"]
  axis, = d.figure.axes
  assert list(lines(axis).values()) == [[(50.0, 0.97)]]  # of the same colour as the curve, which comes first
  curve = next(line for line in axis.lines if line.get_marker() == "o")
  assert [list(map(float, v)) for v in curve.get_data()] == [[1, 10], [4.05, 3]]
  level = next(line for line in axis.lines if line.get_marker() == "None" and set(line.get_ydata()) == {4.1})
  assert level.get_color() == report_figures.styles(["base"])["base"][0]
  assert axis.get_xlabel() == "states.every" and axis.get_xscale() == "log"


def test_methods_meet_in_the_figure_against_evaluations_and_keep_their_colours():
  given = rows(setting(""), seeds(5.), "teacher", 8, scale=3.0)
  for objective in ("pd", "lcm"):
    for scale in (1.0, 3.0):
      given += rows(BASE, seeds(4.), objective, 4, scale=scale) + rows(BASE, seeds(6.), objective, 2, scale=scale)
  axes = drawn(given)["fd_evaluations"].figure.axes
  assert [axis.get_title() for axis in axes] == ["guidance scale 1", "guidance scale 3"]
  assert list(lines(axes[0])) == list(lines(axes[1]))[1:]  # the teacher comes first


def test_differences_of_many_settings_are_filled_where_they_hold():
  given = rows(BASE, seeds(4., 4.2, 4.1))
  for n, values in ((1, seeds(3., 3.21, 3.1)), (10, seeds(4.1, 4.1, 4.1)), (50, seeds(5., 4., 4.5))):
    given += rows(setting("+ddil", **{"states.every": n}), values)
  assert "fd_differences" not in drawn(given)
  given += rows(setting("+ddil", **{"states.every": 300}), seeds(3.5))
  cells = comparisons.summarise(given)[0]["groups"][0]["cells"]
  axis, = drawn(given)["fd_differences"].figure.axes
  labels = [t.get_text() for t in axis.get_yticklabels()]
  assert labels == [label for label in cells if label != "base"] and axis.get_xlabel() == "difference to base"
  dots = [line for line in axis.lines if line.get_marker() == "o"]
  assert [line.get_xdata()[0] for line in dots] == pytest.approx([cells[label].difference.mean for label in labels])
  assert [line.get_markerfacecolor() != "none" for line in dots] == [cells[label].holm for label in labels]
  assert [cells[label].holm for label in labels] == [True, False, False, False]
  bars = [b.get_segments()[0][:, 0] for b in axis.collections]
  assert len(bars) == 3 and bars[0] == pytest.approx([cells[labels[0]].difference.low, cells[labels[0]].difference.high])
  # Another method with two compared settings has a panel beside it, with one it has none.
  other = setting("+ddil", **{"states.every": 1}), setting("+ddil", **{"states.every": 10})
  for n, panels in ((1, 1), (2, 2)):
    more = rows(BASE, seeds(4.), "dmd2") + [row for each in other[:n] for row in rows(each, seeds(3.), "dmd2")]
    assert len(drawn(given + more)["fd_differences"].figure.axes) == panels


def test_files_are_whole_and_the_same_again(tmp_path):
  given = [r for n in (4, 2) for r in rows(BASE, SHOT["base"], steps=n) + rows(DDIL, SHOT["+ddil"], steps=n)]
  written = []
  for name in ("a", "b"):
    drawings = list(drawn(given).values())
    report_figures.svg(drawings[0])  # as the page does before
    written.append([path.read_bytes() for path in report_figures.save(drawings, tmp_path / name)])
  assert written[0] == written[1]
  svg, png = written[0]
  assert b"sampling steps" in svg and b"+ddil" in svg and report_figures.INK.encode() in svg
  assert png.startswith(b"\x89PNG")
  (tmp_path / "file").touch()
  with pytest.raises(UsageError, match="cannot write"):
    report_figures.save(drawings, tmp_path / "file" / "deep")


def test_nothing_to_draw():
  assert drawn(rows(BASE, seeds(4.))) == {}
