"""Shift against quality: settings are points, groups are apart, known orders give known correlations."""

import math

import pytest

from ddil_jax.evaluation import report_figures, shift_quality

CLEAN = ("student_teacher", True)


def row(distance, last, objective="pd", steps=2, shifted=True):
  times = [{"t": t, "sw2_student_forward": 9.0 if t == 1 else last * t, "sw2_student_teacher": 9.0 if t == 1 else last}
           for t in (0.5, 0.0, 1.0)]  # in any order; the first time is noise and counts for nothing
  return {"objective": objective, "guidance_scale": 1, "steps": steps, "metrics": {"fd@9/train/x": distance},
          "shift": times if shifted else []}


def rows():
  """PD: more shift, more distance, at another scale than LCM, where it is the other way round."""
  for i in range(6):
    for seed in (-0.1, 0.1):
      yield f"pd-{i}", row(1 + i + seed, 0.1 + 0.01 * i + 0.001 * seed)
      yield f"lcm-{i}", row(100 - i + seed, 5 + i, "lcm")
  yield "pd-none", row(50, 50, shifted=False)
  yield "pd-diverged", row(math.nan, 1)
  yield "few", row(1, 1, steps=4)


def test_points_are_means_over_seeds():
  found = {point.name: point for point in shift_quality.points(rows())}
  assert len(found) == 13 and {"pd-none", "pd-diverged"}.isdisjoint(found)
  point = found["pd-3"]
  assert point.seeds == 2 and point.group == ("pd", 1.0, 2)
  assert point.distance == pytest.approx(4) and point.shift[CLEAN] == pytest.approx(0.13)
  assert point.shift["student_forward", False] == pytest.approx(0.13 * 0.25)
  assert point.shift["student_forward", True] == 0
  twice = [*rows(), *(("again-" + name, row) for name, row in rows() if name == "pd-3")]
  assert len(shift_quality.points(twice)) == 13  # the same runs by another name


def test_correlations_are_those_of_the_groups():
  found = {(f.group, f.predictor): f.correlation for f in shift_quality.correlate(shift_quality.points(rows()))}
  assert found[("pd", 1.0, 2), CLEAN].r == 1 and found[("lcm", 1.0, 2), CLEAN].r == -1
  within = found["within", CLEAN]
  assert within.n == 12 and abs(within.r) < 1e-9  # pooled without groups it would be .7
  assert not any(group == ("pd", 1.0, 4) for group, _ in found)  # one setting is no group
  assert (("pd", 1.0, 2), ("student_forward", True)) not in found  # always 0


def test_table_and_figure(tmp_path):
  points = shift_quality.points(rows())
  lines = shift_quality.markdown(shift_quality.correlate(points)).splitlines()
  assert lines[2].startswith("| lcm, 2 steps, guidance 1 | 6 | ") and "-1.00" in lines[2]
  assert lines[-1].startswith("| all, ranks within the groups | 12 | ")
  assert len({line.count("|") for line in lines}) == 1
  drawing = shift_quality.draw(points)
  report_figures.save([drawing], tmp_path)
  assert (tmp_path / "shift_quality.svg").stat().st_size > 1000 and (tmp_path / "shift_quality.png").exists()
