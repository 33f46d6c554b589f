"""Mixed samplers: means and paired differences of made-up rows."""

import pytest

from ddil_jax.evaluation import report_figures, teacher_acts


def row(seed, variant, acts, distance, evaluations):
  acted = f"+teacher({','.join(map(str, acts))})" if acts else ""
  return {"objective": "pd", "guidance_scale": 3, "steps": 4, "seed": seed, "variant": variant + acted,
          "network_evaluations": evaluations, "metrics": {"kd@9/train/x": 0.5, "fd@9/train/x": distance}}


def rows():
  for seed in range(3):
    for variant, base in (("base", 5.0), ("+ddil", 4.0)):
      yield row(seed, variant, (), base + seed, 4)
      yield row(seed, variant, (3,), base + seed - 1 + 0.01 * seed, 5)
      yield row(seed, variant, (0, 1, 2, 3), 9.0, 8)


def test_each_is_compared_with_the_same_student_alone():
  found = teacher_acts.compare(rows())
  assert [(m.variant, m.acts) for m in found] == [
      (variant, acts) for variant in ("+ddil", "base") for acts in ((), (3,), (0, 1, 2, 3))]
  alone, last, whole = found[3:]
  assert alone.difference is None and alone.interval.mean == pytest.approx(6)
  assert last.difference.mean == pytest.approx(-0.99) and last.difference.significant and last.evaluations == 5
  assert whole.difference.mean == pytest.approx(3) and whole.difference.n == 3


def test_table_and_figure(tmp_path):
  found = teacher_acts.compare(rows())
  lines = teacher_acts.markdown(found).splitlines()
  assert lines[6] == "| pd, 4 steps, guidance 3 | base | 4 | 5 | 5.01 ± 2.51 (3) | -0.99 ± 0.02 * |"
  assert lines[5].startswith("| pd, 4 steps, guidance 3 | base | none | 4 | 6.00") and lines[7].count("| all |") == 1
  assert "the 4 comparisons" in lines[-1]
  report_figures.save([teacher_acts.draw(found)], tmp_path)
  assert (tmp_path / "teacher_acts.svg").stat().st_size > 1000 and (tmp_path / "teacher_acts.png").exists()
