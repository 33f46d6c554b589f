"""The parts of the study: every trial loads, seeds are enough, budgets are equal."""

import collections

import pytest

from ddil_jax import config as config_lib
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
    if trial.after:  # its teacher is the run of its own seed
      setting.teacher.path = trial.after.partition("-seed=")[0]
    seeds[setting.to_json_best_effort()].add(config.seed)
  assert {len(found) for found in seeds.values()} == {3 if part.startswith(("fashion", "family")) else 5}
  assert sum(map(len, seeds.values())) == len(trials)


def test_mixtures_cost_the_same():
  """Steps x evaluations a step is that of the base, to half a step."""
  for entry in sources.at_budget(parts.METHODS + parts.METHODS_DMD2):
    priors = {name: entry[name] for name in parts.mixture()}
    cost = parts.step_cost(entry, priors)
    steps = 1000 if entry["config"] == parts.DMD2 else 300
    assert abs(entry["train.steps"] * cost - steps * parts.step_cost(entry, parts.mixture(forward=1.0))) <= cost / 2
  guided = {"config": parts.PD, "arg": "guided"}
  assert parts.step_cost(guided, parts.mixture(1.0)) == 7 and parts.step_cost(guided, parts.mixture(teacher=1.0)) == 39


def test_parts_are_no_configs():
  with pytest.raises(Exception, match="no function get_config"):
    config_lib.load("configs/study/methods.py")
