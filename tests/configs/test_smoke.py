"""Every config file: its modifiers build, its smoke run trains and is evaluated, its sweep loads."""

import json
import math
import re

import pytest

from ddil_jax import build
from ddil_jax import config as config_lib
from ddil_jax.errors import UsageError
from ddil_jax.evaluation import report_rows
from ddil_jax.main import main
from tests.building import trace_step
from tests.running import SHORT, shared  # noqa: F401 (a fixture)

NAMES = config_lib.available()
# With all modifiers and a whole evaluation; the others plain and briefly.
FULL = ("digits_teacher", "digits_pd", "digits_cd", "digits_lcm", "digits_dmd2")
FIELDS = {"objective", "variant", "steps", "seed", "guidance_scale", "metrics", "shift", "network_evaluations",
          "seconds", "teacher"}


def modifiers(name: str) -> list[str]:
  """The modifiers of a config file, as its error lists them; those that fit its objective."""
  with pytest.raises(UsageError) as error:
    config_lib.load(f"configs/{name}.py:?")
  found = re.search(r"there are: (.*)$", str(error.value))[1].split(", ")
  # A loss that needs the clean image is refused on rollout states.
  needs_x0 = build.build(config_lib.load(f"configs/{name}.py:smoke")).objective.needs_x0
  # `planned` is for networks at full size, which a smoke run has not; what is DDIL already stays it.
  return [m for m in found if m not in ("smoke", "planned")
          and not (m == "ddil" and (needs_x0 or name.endswith("_ddil")))]


# What the other methods' losses do is in tests/contract; that each of their modifiers builds is in `make test-all`.
@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[] if name in FULL or not name.startswith("digits_") else [pytest.mark.slow])
    for name in NAMES])
def test_modifiers_build(name):
  """Each changes something and builds; all of them at once make a step that can be traced."""
  plain = config_lib.load(f"configs/{name}.py:smoke")
  few = {"objective.num_steps": "2"} if plain.train.stages else {}  # as a late stage would have it
  alone = [f"{modifier},smoke" for modifier in modifiers(name)]
  for arg in [*alone, ",".join([*modifiers(name), "smoke"])]:
    config = config_lib.load(f"configs/{name}.py:{arg}", few)
    assert arg == "smoke" or config_lib.flatten(config) != config_lib.flatten(plain), arg
    build.build(config)
  trace_step(config)


@pytest.mark.parametrize("name", NAMES)
def test_sweep(name):
  """Each entry loads, no two are the same run."""
  sweep = config_lib.module(f"configs/{name}.py").sweep()
  assert sweep
  seen = set()
  for entry in sweep:
    arg = entry.get("arg", "")
    config = config_lib.load(f"configs/{name}.py" + (f":{arg}" if arg else ""),
                             {field: str(value) for field, value in entry.items() if field != "arg"})
    seen.add(json.dumps(config_lib.to_dict(config), sort_keys=True))
  assert len(seen) == len(sweep)


# Of the others every step is traced above; their runs are compiled in `make test-all`.
# DMD2 runs whole in tests/test_runs.py too. Every modifier makes the programs longer to compile.
QUICK = [("digits_teacher", ("reflected",)), ("digits_pd", ("ddil", "reflected"))]
RUNS = QUICK + [pytest.param(name, None, marks=pytest.mark.slow) for name in NAMES if name != "digits_teacher"]


@pytest.mark.parametrize("name, chosen", RUNS)
def test_smoke(name, chosen, tmp_path, monkeypatch, capsys):
  """Two steps as a user runs them."""
  full = name in FULL
  stages = config_lib.load(f"configs/{name}.py").train.stages
  arg = ",".join([*(chosen or modifiers(name)), "smoke"]) if full else "smoke"
  # To compile less: one stage, and players that learn together.
  objective = config_lib.load(f"configs/{name}.py").objective
  fewer = ["--config.train.stages=(2,)"] * bool(stages) + ["--config.objective.period=1"] * ("period" in objective)
  brief = () if full else (*SHORT, *fewer)
  assert main(["train", f"--config=configs/{name}.py:{arg}", f"--workdir={tmp_path / 'run'}", *brief]) == 0
  config = json.loads((tmp_path / "run" / "config.json").read_text())
  assert config["data"]["name"] in ("fake", "fake_text") and config["train"]["steps"] == 2
  rows = json.loads((tmp_path / "run" / "results.json").read_text())
  teacher_run = config["objective"]["name"] == "denoising"
  counts = {row["steps"] for row in rows}
  # What the report says of a run that failed is what it would have had.
  assert report_rows.attempted(config) == [
      (row["objective"], row["steps"], row["guidance_scale"]) for row in rows]
  if config["train"]["stages"]:
    assert counts == set(config["train"]["stages"])
  else:
    assert counts >= set(config["eval"]["sampler_steps"])
  for row in rows:
    assert set(row) >= FIELDS
    assert row["objective"] == ("teacher" if teacher_run else config["objective"]["name"])
    assert row["variant"] == ("" if teacher_run else "+ddil+reflected" if full else "base")
    assert row["network_evaluations"] >= row["steps"] and row["seed"] == 0
    measured = {metric.partition("@")[0] for metric in row["metrics"]}
    assert measured == set(config["eval"]["metrics"])
    assert all(math.isfinite(value) for value in row["metrics"].values())
    assert bool(row["shift"]) == (full and not teacher_run)
    assert (tmp_path / "run" / row["samples"]).is_file()
  teachers = {row["teacher"] for row in rows}  # of all stages the first one's
  assert len(teachers) == 1 and teachers.isdisjoint({""}) != teacher_run
  if full and stages:
    run_again_by_another_name(name, arg, rows, tmp_path, monkeypatch, capsys)


def run_again_by_another_name(name, arg, rows, tmp_path, monkeypatch, capsys):
  """Stages refer to each other by path; the folder may be named in another way when the run is continued."""
  monkeypatch.chdir(tmp_path)
  capsys.readouterr()
  assert main(["train", f"--config=configs/{name}.py:{arg}", "--workdir=run"]) == 0
  assert capsys.readouterr().out.count("continuing from step 2 of 2") == len({row["steps"] for row in rows})
  assert [row["metrics"] for row in json.loads((tmp_path / "run" / "results.json").read_text())] == \
      [row["metrics"] for row in rows]
  for command in ("evaluate", "sample"):
    assert main([command, "--workdir=run"]) == 2
    assert "run in stages; give one of run/stage_4, run/stage_2" in capsys.readouterr().err
