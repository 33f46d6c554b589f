import csv
import json

import pyarrow.parquet
import pytest

from ddil_jax import config as config_lib
from ddil_jax import sweep
from ddil_jax.errors import UsageError


def test_lists_of_trials():
  assert sweep.product({"a": (1, 2), "seed": range(2)}) == [
      {"a": 1, "seed": 0}, {"a": 1, "seed": 1}, {"a": 2, "seed": 0}, {"a": 2, "seed": 1}]
  assert sweep.zipped({"a": (1, 2), "b": "xy"}) == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]
  assert sweep.cross(sweep.zipped({"a": (1, 2), "b": "xy"}), [{"seed": 0}, {"seed": 1}])[1] == {
      "a": 1, "b": "x", "seed": 1}
  with pytest.raises(UsageError, match="'a': 1, 'b': 2"):
    sweep.zipped({"a": (1,), "b": (1, 2)})


def write_config(folder, body: str, name="mine.py"):
  path = folder / name
  path.write_text("from configs.digits_lcm import get_config\n" + body)
  return str(path)


def test_trials_have_names_specs_and_overrides(tmp_path):
  path = write_config(tmp_path, "def sweep():\n  return [{'arg': a, 'states.forward': f, 'seed': s}"
                                " for a in ('', 'ddil,reflected') for f in (1.0, ('linear', 0.0, 1.0, 1.0))"
                                " for s in (0, 1)]\n")
  found = sweep.trials(f"{path}:guided", {"train.steps": "7"})
  assert [t.name for t in found][::3] == ["base-forward=1.0-seed=0", "base-forward=linear,0.0,1.0,1.0-seed=1",
                                          "ddil+reflected-forward=linear,0.0,1.0,1.0-seed=0"]
  config = found[-1].config()
  assert found[-1].spec == f"{path}:guided,ddil,reflected"
  assert config.states.forward == ("linear", 0.0, 1.0, 1.0) and config.train.steps == 7 and config.seed == 1
  other = write_config(tmp_path, "def sweep():\n  return [{'config': 'configs/digits_pd.py', 'seed': 0}, {'seed': 0}]\n")
  names = [(t.name, t.config().objective.name) for t in sweep.trials(other)]
  assert names == [("digits_pd", "pd"), ("run", "lcm")]


def test_the_run_of_an_earlier_trial_is_the_teacher(tmp_path):
  path = write_config(tmp_path, "def sweep():\n  return [{'arg': 'guided', 'seed': s} for s in (0, 1)] + ["
                                "{'arg': 'ddil', 'seed': s, 'teacher': {'arg': 'guided'}} for s in (0, 1)]\n")
  found = sweep.trials(path, {"teacher.path": "t"}, tmp_path)
  assert [(t.name, t.after, t.config().teacher.path) for t in found] == [
      ("guided-seed=0", "", "t"), ("guided-seed=1", "", "t"),
      ("ddil-seed=0", "guided-seed=0", str(tmp_path / "guided-seed=0")),
      ("ddil-seed=1", "guided-seed=1", str(tmp_path / "guided-seed=1"))]


@pytest.mark.parametrize("body, message", [
    ("", "no function sweep"),
    ("def sweep():\n  return []\n", "at least one"),
    ("def sweep():\n  return [{'seed': 0}, {'seed': 0}]\n", "twice"),
    ("def sweep():\n  return [{'states.forwrad': 1.0}]\n", "forward"),
    ("def sweep():\n  return [{'seed': 0}, {'seed': 1, 'teacher': {'arg': 'ddil'}}]\n", "the teacher of trial seed=1 must be"),
    ("def sweep():\n  return [{'seed': 1, 'teacher': {'seed': 0}}, {'seed': 0}]\n", "an earlier trial"),
])
def test_a_sweep_that_cannot_run(tmp_path, body, message):
  with pytest.raises(UsageError, match=message):
    sweep.trials(write_config(tmp_path, body))


def test_a_folder_keeps_its_sweep(tmp_path):
  first = [sweep.Trial("a", "configs/digits_lcm.py:", {"seed": "0", "eval.ema": "raw"})]
  with pytest.raises(UsageError, match="holds no sweep"):
    sweep.load(tmp_path)
  sweep.save(first, tmp_path)
  sweep.save(first, tmp_path)
  assert sweep.load(tmp_path) == first
  with pytest.raises(UsageError, match="unlike trials: a, b"):
    sweep.save([first[0]._replace(overrides={"seed": "1"}), first[0]._replace(name="b")], tmp_path)


def results_of(folder, trial, rows):
  (folder / trial.name).mkdir()
  (folder / trial.name / "config.json").write_text(json.dumps(config_lib.to_dict(trial.config())))
  (folder / trial.name / "results.json").write_text(json.dumps(rows))


def test_the_table_has_a_row_for_every_trial(tmp_path):
  done, failed, opened = trials = [
      sweep.Trial(name, "configs/digits_lcm.py:", {"seed": "1", "states.forward": forward, "teacher.path": name})
      for name, forward in (("done", "0.5"), ("failed", "('linear', 0.0, 1.0, 1.0)"), ("open", "1.0"))]
  row = {"objective": "lcm", "variant": "base", "steps": 4, "seed": 1, "guidance_scale": 1.0,
         "network_evaluations": 4, "seconds": 2.5}
  results_of(tmp_path, done, [row | {"metrics": {"fd@6/train/x": 2.0}}, row | {"steps": 2, "metrics": {}}])
  (tmp_path / "failed").mkdir()
  (tmp_path / "failed" / sweep.FAILED).write_text('{"error": "not finite, diverged"}')
  # Results of another config do not count.
  results_of(tmp_path, opened, [row])
  (tmp_path / "open" / "config.json").write_text("{}")
  rows = sweep.gather(trials, tmp_path)
  assert [(r["run"], r["status"], r["error"], r["steps"]) for r in rows] == [
      ("done", "done", "", 4), ("done", "done", "", 2), ("failed", "failed", "not finite, diverged", None),
      ("open", "open", "", None)]
  assert [r["config.states.forward"] for r in rows] == [0.5, 0.5, '["linear", 0.0, 1.0, 1.0]', 1.0]
  assert {name for name in rows[0] if name.startswith("config.")} == {"config.states.forward"}
  sweep.write_table(rows, tmp_path)
  with open(tmp_path / "results.csv", newline="") as f:
    written = list(csv.DictReader(f))
  assert [r["fd@6/train/x"] for r in written] == ["2.0", "", "", ""] and written[2]["seed"] == "1"
  table = pyarrow.parquet.read_table(tmp_path / "results.parquet").to_pylist()
  assert [r["run"] for r in table] == ["done", "done", "failed", "open"]
  assert table[0]["fd@6/train/x"] == 2.0 and table[0]["steps"] == 4 and table[2]["steps"] is None
  assert table[2]["config.states.forward"] == '["linear", 0.0, 1.0, 1.0]' and table[0]["config.states.forward"] == "0.5"
