"""The demo's list of runs: every one is a config that loads, and seeds differ in nothing but their seed."""

from ddil_jax import config as config_lib
from launch import demo


def test_trials():
  trials = demo.trials("runs/demo/teacher", seeds=2, data_dir="data")
  assert len({trial.name for trial in trials}) == len(trials) == 2 * 4 * len(demo.FAMILIES)
  settings = {trial.name: config_lib.flatten(trial.config()) for trial in trials}
  for name, config in settings.items():
    assert config["teacher.path"] == "runs/demo/teacher" and config["data.data_dir"] == "data"
    first = settings[name.replace("-seed1", "-seed0")]
    assert {field for field in config if config[field] != first[field]} <= {"seed"}
  texts = {str(config) for config in settings.values()}
  assert len(texts) == len(trials)
  counts = {name: len(config["train.stages"]) or 1 for name, config in settings.items()}
  assert counts["pd-base-seed0"] == 2 and counts["dmd2-4-ddil-seed1"] == 1


def test_seeds_are_counted(tmp_path, capsys):
  assert len(demo.trials("teacher")) == 20
  assert demo.main(["--seeds=0", f"--workdir={tmp_path / 'demo'}"]) == 2
  assert "--seeds=0: at least 1 is needed" in capsys.readouterr().err
  assert demo.main(["--workers=0", f"--workdir={tmp_path / 'demo'}"]) == 2
  assert "--workers=0: at least 1 is needed" in capsys.readouterr().err
  assert not (tmp_path / "demo").exists()
  (tmp_path / "file").touch()
  assert demo.main([f"--workdir={tmp_path / 'file' / 'demo'}"]) == 2
  assert "cannot write" in capsys.readouterr().err
