"""Every config file: its modifiers build, its smoke run trains and is evaluated, its sweep names fields that exist."""

import json
import math
import re

import jax
import pytest

from ddil_jax import build
from ddil_jax import config as config_lib
from ddil_jax.errors import UsageError
from ddil_jax.main import main
from tests.running import shared  # noqa: F401 (a fixture)

NAMES = config_lib.available()
FIELDS = {"objective", "variant", "steps", "seed", "guidance_scale", "metrics", "shift", "network_evaluations", "seconds"}


def modifiers(name: str) -> list[str]:
  """The modifiers of a config file, as its error lists them; those that fit its objective."""
  with pytest.raises(UsageError) as error:
    config_lib.load(f"configs/{name}.py:?")
  found = re.search(r"there are: (.*)$", str(error.value))[1].split(", ")
  needs_data = config_lib.load(f"configs/{name}.py").objective.name == "denoising"
  return [m for m in found if m != "smoke" and not (needs_data and m == "ddil")]


@pytest.mark.parametrize("name", NAMES)
def test_modifiers_build(name):
  """Alone and with `smoke`, and each changes something."""
  plain = config_lib.load(f"configs/{name}.py:smoke")
  build.build(plain)
  for modifier in modifiers(name):
    config = config_lib.load(f"configs/{name}.py:{modifier},smoke")
    assert config_lib.flatten(config) != config_lib.flatten(plain), modifier
    if config.train.stages:
      continue  # built stage by stage, below
    built = build.build(config)
    teacher = jax.eval_shape(built.init_teacher, jax.random.key(0)) if built.init_teacher else ()
    assert "student" in jax.eval_shape(built.objective.init, jax.random.key(0), teacher)


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


@pytest.mark.parametrize("name", NAMES)
def test_smoke(name, tmp_path):
  """Two steps with all modifiers at once, as a user runs it."""
  arg = ",".join([*modifiers(name), "smoke"])
  assert main(["train", f"--config=configs/{name}.py:{arg}", f"--workdir={tmp_path / 'run'}"]) == 0
  config = json.loads((tmp_path / "run" / "config.json").read_text())
  assert config["data"]["name"] == "fake" and config["train"]["steps"] == 2
  rows = json.loads((tmp_path / "run" / "results.json").read_text())
  teacher_run = config["objective"]["name"] == "denoising"
  counts = {row["steps"] for row in rows}
  if config["train"]["stages"]:
    assert counts == set(config["train"]["stages"])
  else:
    assert counts >= set(config["eval"]["sampler_steps"])
  for row in rows:
    assert set(row) >= FIELDS
    assert row["objective"] == ("teacher" if teacher_run else config["objective"]["name"])
    assert row["variant"] == ("" if teacher_run else "+ddil+reflected")
    assert row["network_evaluations"] >= row["steps"] and row["seed"] == 0
    measured = {metric.partition("@")[0] for metric in row["metrics"]}
    assert measured == set(config["eval"]["metrics"])
    assert all(math.isfinite(value) for value in row["metrics"].values())
    assert bool(row["shift"]) != teacher_run
    assert (tmp_path / "run" / row["samples"]).is_file()
