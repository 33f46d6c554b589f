"""The study's command: what it lists and refuses; the teacher's steps in students that were trained."""

import pytest

from ddil_jax import files
from ddil_jax.main import main
from launch import study
from tests.running import shared  # noqa: F401

SHORT = ("--config.model.channel_mult=(1,)", "--config.eval.num_samples=16", "--config.eval.batch_size=16",
         "--config.eval.shift_samples=0", "--config.eval.sampler_steps=()", "--config.eval.metrics=('fd',)")


def test_list(capsys):
  assert study.main(["--list"]) == 0
  said = capsys.readouterr().out
  assert [line.partition(" (")[0] for line in said.splitlines()] == [*study.PARTS, study.INTERVENTION, study.CORRELATION]


@pytest.mark.parametrize("part, message", [("mehtods", "unknown part 'mehtods'"),
                                           ("intervention", "no four-step students"),
                                           ("correlation", "results of 0 settings")])
def test_mistakes_are_one_line(part, message, tmp_path, capsys):
  assert study.main([part, f"--workdir={tmp_path}"]) == 2
  line = capsys.readouterr().err
  assert message in line and line.startswith("ddil: ") and line.count("\n") == 1


def test_correlation_reads_the_parts_that_were_run(tmp_path, capsys):
  for i in range(6):
    for seed in range(2):
      times = [{"t": t, "sw2_student_forward": i + t + 1, "sw2_student_teacher": 1 / (i + t + 1)} for t in (1, 0.5, 0)]
      files.write_json(tmp_path / "priors" / f"pd-forward=0.{i}-seed={seed}" / "results.json", [
          {"objective": "pd", "guidance_scale": 1.0, "steps": 4, "metrics": {"fd@9/train/x": 1.0 + i + seed},
           "shift": times}])
  assert study.main(["correlation", f"--workdir={tmp_path}"]) == 0
  table = (tmp_path / "correlation" / "table.md").read_text()
  assert table in capsys.readouterr().out and "| pd, 4 steps, guidance 1 | 6 | +1.00" in table and "-1.00" in table
  assert {path.name for path in (tmp_path / "correlation").iterdir()} == {
      "table.md", "shift_quality.svg", "shift_quality.png"}


@pytest.mark.slow
def test_intervention(shared, tmp_path, capsys):  # noqa: F811
  """Of a student in stages the first teacher acts; what was measured is kept."""
  assert main(["train", "--config=configs/digits_teacher.py:smoke", f"--workdir={tmp_path}/teacher", *SHORT]) == 0
  assert main(["train", "--config=configs/digits_pd.py:smoke", f"--workdir={tmp_path}/methods/pd", *SHORT,
               "--config.train.stages=(8,4)", "--config.states.teacher_steps=16",
               f"--config.teacher.path={tmp_path}/teacher"]) == 0
  assert study.main(["intervention", f"--workdir={tmp_path}"]) == 0
  rows = files.read_json(tmp_path / "intervention" / "results.json")
  variants = [row["variant"] for row in rows]
  assert len(variants) == len(set(variants)) == 7 and "base" in variants and "base+teacher(0,1,2,3)" in variants
  assert {row["network_evaluations"] for row in rows} == {4}
  assert "| all | 4 |" in (tmp_path / "intervention" / "table.md").read_text()
  before = {path: path.stat().st_mtime_ns for path in (tmp_path / "intervention").glob("methods-*.json")}
  assert len(before) == 1
  assert study.main(["intervention", f"--workdir={tmp_path}"]) == 0
  assert before == {path: path.stat().st_mtime_ns for path in before}
