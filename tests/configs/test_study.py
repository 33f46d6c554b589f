"""The parts of the study: every trial loads, seeds are enough, budgets are equal."""

import collections

import pytest

from ddil_jax import config as config_lib
from ddil_jax import files
from ddil_jax import sweep
from configs.study import parts, sources
from launch import study


@pytest.mark.parametrize("part", study.PARTS)
def test_every_setting_has_its_seeds(part):
  trials = sweep.trials(f"configs/study/{part}.py", {"teacher.path": "teacher"})
  seeds = collections.defaultdict(set)
  for trial in trials:
    config = trial.config()
    setting = config.copy_and_resolve_references().unlock()
    setting.seed = 0
    seeds[setting.to_json_best_effort()].add(config.seed)
  assert {len(found) for found in seeds.values()} == {3 if part == "reflection" else 5}
  assert sum(map(len, seeds.values())) == len(trials)


def test_mixtures_cost_the_same():
  """Steps x evaluations a step is that of the base, to half a step."""
  for entry in sources.sweep():
    priors = {name: entry[name] for name in parts.mixture()}
    cost = parts.step_cost(entry, priors)
    steps = 1000 if entry["config"] == parts.DMD2 else 300
    assert abs(entry["train.steps"] * cost - steps * parts.step_cost(entry, parts.mixture(forward=1.0))) <= cost / 2
  guided = {"config": parts.PD, "arg": "guided"}
  assert parts.step_cost(guided, parts.mixture(1.0)) == 7 and parts.step_cost(guided, parts.mixture(teacher=1.0)) == 39


def test_the_study_lists_its_parts_and_names_unknown_ones(capsys):
  assert study.main([]) == 0
  assert len(capsys.readouterr().out.splitlines()) == len(study.PARTS) + 2
  assert study.main(["mehtods"]) == 2
  assert "methods" in capsys.readouterr().err


def test_correlation_reads_the_parts_that_were_run(tmp_path, capsys):
  assert study.main(["correlation", f"--workdir={tmp_path}"]) == 2
  assert "has results of 0 settings" in capsys.readouterr().err
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


def test_parts_are_no_configs():
  with pytest.raises(Exception, match="no function get_config"):
    config_lib.load("configs/study/methods.py")
