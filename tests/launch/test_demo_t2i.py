"""The text-to-image demo: what it would run, and what it says where it cannot. The run itself takes half an hour."""

import pytest

from ddil_jax import config as config_lib
from launch import demo_t2i


@pytest.mark.parametrize("smoke", [False, True])
def test_trials(tmp_path, smoke):
  """One teacher, and each student with and without DDIL; all read and measure what was made in the same folder."""
  trials = demo_t2i.trials(tmp_path, seeds=2, smoke=smoke)
  configs = {trial.name: config_lib.load(trial.spec, trial.overrides) for trial in trials}
  assert len(configs) == 1 + 2 * 4 and configs["teacher"].objective.name == "denoising"
  for name, config in configs.items():
    assert config.data.path == str(tmp_path / "data") and str(tmp_path / "models") in config.eval.extractor
    if name == "teacher":
      continue
    method, variant, seed = name.split("-")
    assert config.objective.name == method and config.seed == int(seed.removeprefix("seed"))
    assert config.teacher.path == str(tmp_path / "teacher")
    base = configs[f"{method}-base-{seed}"]
    assert (config.states.to_dict() != base.states.to_dict()) == (variant == "ddil")
  assert smoke == (configs["teacher"].train.steps == 2)


def test_no_emoji(tmp_path, capsys):
  assert demo_t2i.main([f"--emoji={tmp_path}", f"--workdir={tmp_path / 'run'}"]) == 2
  assert "captions.jsonl" in capsys.readouterr().err
