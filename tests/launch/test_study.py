"""The study's command: what it lists and refuses; the teacher's steps in students that were trained."""

import csv
import shutil

import pytest

from ddil_jax import config as config_lib
from ddil_jax import files, sweep
from ddil_jax.errors import UsageError
from ddil_jax.evaluation import report_table
from ddil_jax.main import main
from launch import study
from tests.running import shared  # noqa: F401

SHORT = ("--config.model.channel_mult=(1,)", "--config.eval.num_samples=16", "--config.eval.batch_size=16",
         "--config.eval.shift_samples=0", "--config.eval.sampler_steps=()", "--config.eval.metrics=('fd',)")


def test_list(capsys):
  assert study.main(["--list"]) == 0
  said = capsys.readouterr().out
  assert [line.partition(" (")[0] for line in said.splitlines()] == [
      *study.PARTS, study.INTERVENTION, study.CORRELATION, study.INFERENCE]


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


def family_results(workdir):
  """Results as some trials of the family leave them; distances follow from seed and setting."""
  for trial in sweep.trials("configs/study/family.py", {"teacher.path": str(workdir / "teacher")}, workdir / "family"):
    name = trial.name.removeprefix("digits_").partition("-")[0]
    if name not in ("pd", "lcm", "dmd") or "teacher.guidance_scale" in trial.overrides:
      continue
    config = trial.config()
    seed, ddil = config.seed, ":ddil" in trial.spec
    folder = workdir / "family" / trial.name
    files.write_json(folder / "config.json", config_lib.to_dict(config))
    variant = "+ddil" if ddil else "base"
    if name == "dmd" and seed == 1:
      files.write_json(folder / "failed.json", {"error": "loss not finite for 10 steps", "variant": variant,
                                                "config": config_lib.to_dict(config)})
      continue
    own = config.objective.get("sampler_steps", config.objective.get("num_steps"))
    rows = []
    for steps in config.train.stages or (own, *config.eval.sampler_steps):
      distance = 8 / steps + 0.01 * seed - (1 + 0.1 * seed) * ddil
      rows.append({"objective": name, "variant": variant, "steps": steps, "seed": seed, "guidance_scale": 1.0,
                   "network_evaluations": steps, "step_seconds": 0.01 * (1 + seed), "step_bytes": 2**21 + steps,
                   "metrics": {"fd@2000/train/x": distance, "coverage@2000/train/x": 0.5}, "shift": []})
    files.write_json(folder / "results.json", rows)
  teacher = {"objective": "teacher", "variant": "", "seed": 0, "shift": []}
  files.write_json(workdir / "teacher" / "results.json", [
      teacher | {"steps": 4, "guidance_scale": 1.0, "metrics": {"fd@2000/train/x": 9.0}},
      teacher | {"steps": 2, "guidance_scale": 1.0, "metrics": {"fd@2000/train/other": 7.0}}])


def test_the_table_of_all_methods(tmp_path, capsys, monkeypatch):
  family_results(tmp_path)
  assert study.main(["family", "--table", f"--workdir={tmp_path}"]) == 0
  table = (tmp_path / "family" / "table.md").read_text()
  assert table in capsys.readouterr().out
  cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")]
  lines = {(row[0], row[2], row[3]): row[4:] for row in cells[2:]}
  assert list(lines) == [("teacher's own sampler", "", ""), ("**Base methods**", "", ""),
                         *((name, trained, variant) for name, trained in (
                             ("pd", "each"), ("pd (guidance_range=1.0,5.0)", "each"), ("lcm", "4"))
                           for variant in ("base", "+ddil")), ("**Score and distribution matching**", "", ""),
                         ("dmd", "4", "base"), ("dmd", "4", "+ddil"), ("dmd", "1", "base")]
  assert lines["teacher's own sampler", "", ""][:3] == ["9.00", "-", "-"]  # measured in another way is not shown
  # Three seeds: 2.00, 2.01, 2.02 and 1.00, 0.91, 0.82; t(0.975, 2) = 4.303; of the differences 1.0, 1.1, 1.2 too.
  assert lines["lcm", "4", "base"] == ["2.01 ± 0.02 (3)", "4.01 ± 0.02 (3)", "8.01 ± 0.02 (3)", "0.50, 0.50, 0.50",
                                       "20.00", "6.00", "2.00"]
  assert lines["lcm", "4", "+ddil"][0] == "0.91 ± 0.22 (3) **"
  # The student of one step has three stages of 150 steps behind it.
  steps = config_lib.load("configs/digits_pd.py").train.steps
  assert lines["pd", "each", "base"][4:6] == ["20.00", report_table.fmt(3 * steps * 0.02)]
  assert lines["dmd", "4", "base"][:3] == [f"{value:.2f} (2) 1 diverged" for value in (2.01, 4.01, 8.01)]
  assert lines["dmd", "1", "base"][:4] == ["-", "-", "8.01 (2) 1 diverged", "-, -, 0.50"]
  assert {path.name for path in (tmp_path / "family").glob("family.*")} == {"family.svg", "family.png"}
  # Seeds that were run elsewhere: the table is the same.
  own = tmp_path / "family" / "results.csv"
  with open(own, newline="") as file:
    heads, *rows = csv.reader(file)
  for path, seeds in ((tmp_path / "first.csv", "0"), (own, "12")):
    with open(path, "w", newline="") as file:
      csv.writer(file).writerows([heads, *(row for row in rows if row[heads.index("seed")] in seeds)])
  assert "2.01 ± 0.02 (3)" not in study.compare_family(tmp_path)
  assert study.compare_family(tmp_path, [tmp_path / "first.csv"]) == table
  # Nor are they run again.
  begun = []
  monkeypatch.setattr(study, "run_all", lambda trials, *rest, **options: begun.append({t.name for t in trials}) or {})
  study.run("family", tmp_path, 1, others=[tmp_path / "first.csv"])
  elsewhere = {row[heads.index("run")] for row in rows
               if row[heads.index("seed")] == "0" and row[heads.index("status")] != "open"}
  names = {trial.name for trial in sweep.trials("configs/study/family.py")}
  assert begun[1:] == [names - elsewhere] and elsewhere < names
  for path, message in (("absent.csv", "cannot read the table"), ("family/table.md", "is no table of a sweep"),
                        ("family/results.csv", "the run .* is in .* and in")):
    with pytest.raises(UsageError, match=message):
      study.compare_family(tmp_path, [tmp_path / path])
  own.write_text(",".join(heads) + "\na,open," + "," * (len(heads) - 3) + "\n")
  with pytest.raises(UsageError, match="has no results yet"):
    study.compare_family(tmp_path)


def test_what_was_run_so_far_can_be_gathered(tmp_path, capsys):
  assert study.main(["guided", "--table", f"--workdir={tmp_path}"]) == 0
  assert str(tmp_path / "guided" / "results.csv") in capsys.readouterr().out
  lines = (tmp_path / "guided" / "results.csv").read_text().splitlines()
  assert len(lines) == 1 + len(sweep.trials("configs/study/guided.py")) and all(",open," in line for line in lines[1:])


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


@pytest.mark.slow
def test_inference(shared, tmp_path, monkeypatch, capsys):  # noqa: F811
  """The teacher is trained where it is not there; what was measured is kept, and a table made of it alone."""
  fields = {"model.channel_mult": (1,), "eval.num_samples": 16, "eval.batch_size": 16, "eval.metrics": ("fd",)}
  monkeypatch.setattr(study, "TEACHER", {"config": "configs/digits_teacher.py:smoke", **fields})
  monkeypatch.setattr(study, "TRANSFORMS", ({}, {"cache": "skips"}))
  assert study.main(["inference", "--table", f"--workdir={tmp_path}"]) == 2
  assert "no results yet" in capsys.readouterr().err
  assert study.main(["inference", f"--workdir={tmp_path}"]) == 0
  kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "inference").glob("*.json")}
  assert len(kept) == 6
  rows = [row for path in kept for row in files.read_json(path)]
  assert {(row["steps"], row["guidance_scale"]) for row in rows} == {(n, g) for n in (16, 8, 4) for g in (1.0, 3.0)}
  assert {row["variant"] for row in rows} == {"", "+cached(skips,every:2)"}
  plain = [row["metrics"] for row in rows if not row["variant"]]
  assert len({str(values) for values in plain}) == len(plain) == 18  # each seed is another draw
  table = (tmp_path / "inference" / "table.md").read_text()
  assert table.count("| cached(skips,every:2) |") == 2
  assert study.main(["inference", "--table", f"--workdir={tmp_path}"]) == 0
  assert table in capsys.readouterr().out
  assert kept == {path: path.stat().st_mtime_ns for path in kept}
