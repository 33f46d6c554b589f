"""The text-to-image demo: what it would run, what it says where it cannot, and a few steps of it, killed and
continued. The run itself takes 36 minutes."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from ddil_jax import config as config_lib
from launch import demo_t2i
from tests.launch.test_emoji_models import write
from tests.running import ROOT


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


def _files(folder):
  """{name: when it was written} of all that cost the demo time; text of the lists that are made of the shards."""
  made = [path for part in ("models", "data") for path in (folder / part).rglob("*") if path.is_file()]
  made += folder.glob("*/results.json")
  made += [path for path in folder.glob("*/checkpoints/**/*") if path.is_file()]
  lists = ("index.json", "skipped.jsonl")
  return {str(path.relative_to(folder)): path.read_text() if path.name in lists else path.stat().st_mtime_ns
          for path in made}


@pytest.mark.slow
def test_killed_continued_and_done(tmp_path, capsys):
  """Killed when the teacher is trained, the demo goes on with its students, and the third time does nothing anew."""
  data, run = write(tmp_path / "data"), tmp_path / "run"
  arguments = [f"--emoji={data}", f"--workdir={run}", "--smoke"]
  with open(tmp_path / "said", "w") as said:
    process = subprocess.Popen([sys.executable, "-m", "launch.demo_t2i", *arguments], cwd=ROOT, stdout=said,
                               stderr=subprocess.STDOUT, start_new_session=True)
    try:
      while not (run / "teacher" / "results.json").exists():
        assert process.poll() is None, (tmp_path / "said").read_text()
        time.sleep(0.2)
    finally:
      os.killpg(process.pid, signal.SIGKILL)
      process.wait()
  kept = _files(run)
  assert {"models/vae.safetensors", "models/clip.safetensors", "data/index.json", "teacher/results.json"} <= set(kept)
  assert any(name.startswith("teacher/checkpoints/") for name in kept)

  assert demo_t2i.main(arguments) == 0
  assert f"report: {run / 'report.html'}" in capsys.readouterr().out
  done = _files(run)
  assert {name: done[name] for name in kept} == kept, "what was there was made again"
  students = {f"{name}-{variant or 'base'}-seed0" for name, _ in demo_t2i.STUDENTS for variant in demo_t2i.VARIANTS}
  assert {f"{name}/results.json" for name in students} <= set(done)
  assert all(word in (run / "report.html").read_text() for word in students)
  picture = np.asarray(Image.open(run / "overview.png").convert("L"))
  assert picture.std(axis=(0, 1)) > 10  # not one colour

  assert demo_t2i.main(arguments) == 0
  assert "4 of 4 trials are done already" in capsys.readouterr().out
  assert _files(run) == done
