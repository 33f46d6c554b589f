"""Figures and table of the covariate shift, from rows and log lines of known content."""

import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from ddil_jax.evaluation import covariate_shift, report_figures, shift_figures

GRID = np.array([1.0, 0.5, 0.0])


@pytest.fixture(scope="module")
def curves():
  """Measured on Gaussian states; the student drifts away by 1 a step, features are two of the pixels."""
  rng = np.random.default_rng(0)
  student, teacher, forward, second = rng.standard_normal((4, 3, 60, 3, 3, 1))
  student = student + np.arange(3).reshape(3, 1, 1, 1, 1)
  states = covariate_shift.shift_curves(student, teacher, forward, GRID, second)
  flat = [path.reshape(3, 60, 9)[..., :2] for path in (student, teacher, forward)]
  features = covariate_shift.shift_curves(*flat, GRID, second.reshape(3, 60, 9)[..., :2], space="feature_")
  zero = np.zeros((2, 60, 3, 3, 1))
  labels = covariate_shift.label_error_curves({s: zero + 0.25 for s in ("forward", "student", "teacher")},
                                              dict.fromkeys(("forward", "student", "teacher"), zero), GRID[:2])
  return [a | b | (labels[k] if k < 2 else {}) for k, (a, b) in enumerate(zip(states, features))]


def row(curves):
  return {"objective": "pd", "variant": "+ddil", "steps": 2, "guidance_scale": 3.0, "seed": 0, "shift": curves}


def lines_of(figure):
  return {axis.get_title(): {line.get_color(): np.stack(line.get_data()) for line in axis.lines} for axis in figure.axes}


def test_a_panel_for_each_distance_and_for_label_errors(curves):
  (drawing,) = shift_figures.draw([row(curves)])
  drawn = lines_of(drawing.figure)
  assert list(drawn) == ["SW₂ of states", "MMD² of states", "label error, rms per pixel", "SW₂ of features",
                         "MMD² of features"]
  orange = report_figures.SOURCES["student"]
  for title, name in (("SW₂ of states", "sw2"), ("MMD² of features", "feature_mmd2")):
    np.testing.assert_array_equal(drawn[title][orange], [GRID[::-1], [p[f"{name}_student_forward"] for p in curves[::-1]]])
    assert len(drawn[title]) == 4
  np.testing.assert_allclose(drawn["label error, rms per pixel"][orange], [[0.5, 1.0], [0.25, 0.25]])
  assert {name for name, _, _ in drawing.legend} == {what for what, _, _ in shift_figures.PAIRS.values()}


def test_without_features(curves):
  plain = [{name: v for name, v in p.items() if not name.startswith("feature_")} for p in curves]
  (drawing,) = shift_figures.draw([row(plain)])
  assert list(lines_of(drawing.figure)) == ["SW₂ of states", "MMD² of states", "label error, rms per pixel"]
  assert "feature_sw2" not in shift_figures.table([row(plain)])


def test_drift_over_training(curves):
  """A line for each time but pure noise; a value that was not finite is left out."""
  log = [{"step": s, f"shift/student_{of}/sw2@1": 0.1 * s, f"shift/student_{of}/sw2@2": None if s == 20 else 0.2 * s}
         for s in (10, 20, 30) for of in ("forward", "teacher")]
  log = [log[i] | log[i + 1] for i in (0, 2, 4)] + [{"step": 40, "student/loss": 1.0}]
  _, drift = shift_figures.draw([row(curves)], log)
  assert drift.name == "drift" and [name for name, _, _ in drift.legend] == ["k = 1, t = 0.5", "k = 2, t = 0"]
  for lines in lines_of(drift.figure).values():
    one, two = (lines[color] for _, color, _ in drift.legend)
    np.testing.assert_allclose(one, [[10, 20, 30], [1, 2, 3]])
    np.testing.assert_allclose(two, [[10, 30], [2, 6]])
  assert len(shift_figures.draw([row(curves)], [{"step": 1, "student/loss": 1.0}])) == 1


def test_files(curves, tmp_path):
  written = report_figures.save(shift_figures.draw([row(curves)]), tmp_path)
  assert sorted(p.name for p in written) == ["2_steps_g3.png", "2_steps_g3.svg"]
  text = (tmp_path / "2_steps_g3.svg").read_text()
  assert ET.fromstring(text).tag.endswith("svg") and "student to the teacher" in text
  assert np.asarray(Image.open(tmp_path / "2_steps_g3.png").convert("L")).std() > 5


def test_table_marks_what_lies_above_the_floor(curves):
  text = shift_figures.table([json.loads(json.dumps(row(curves)))])
  assert text.startswith("pd +ddil, 2 steps, guidance scale 3\n")
  assert list(shift_figures.PAIRS) == text.splitlines()[1].split()[2:]
  found = {tuple(line.split()[:2]): line.split()[3:] for line in text.splitlines() if line.startswith("sw2")}
  for k, p in enumerate(curves):
    cells = found["sw2", str(k)]
    assert [float(c.rstrip("*")) for c in cells] == [round(p[f"sw2_{pair}"], 4) for pair in shift_figures.PAIRS]
    assert [c.endswith("*") for c in cells] == [k > 0, k > 0, False, False]
  assert text.count("0.2500") == 6
