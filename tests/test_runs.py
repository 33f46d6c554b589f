"""Runs that are stopped, killed and continued give the numbers of one that was not."""

import gc
import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from ddil_jax.main import main
from ddil_jax.training import checkpoint
from ddil_jax.training import logging as log_lib
from tests.running import ROOT, SHORT, refuse, shared, trained  # noqa: F401 (fixtures)

pytestmark = pytest.mark.xdist_group("runs")
FOUR = ("--config.train.steps=4", "--config.train.checkpoint_every=2", *SHORT)
# All that a training state can hold: two networks and a head, their optimizers, averages, two buffers.
DMD2 = ("train", "--config=configs/digits_dmd2.py:smoke", "--config.objective.gan_weight=0.1",
        "--config.model.channel_mult=(1,)", "--config.states.forward=0.4",
        "--config.states.student=0.3", "--config.states.teacher=0.3", "--config.states.refresh_every=2", *FOUR)
LAST = (3, 3, 8, 1)  # of the kernels of its networks
# A process that is killed as soon as step 3 is logged and the checkpoint of step 2 lies on disk.
KILLED = """
import os, pathlib, signal, sys, time
from ddil_jax.main import main
from ddil_jax.training import logging

write = logging.MetricWriter.write

def write_and_die(self, step, scalars, images=None):
  write(self, step, scalars, images)
  if step == 3:
    while not pathlib.Path(sys.argv[1], "checkpoints", "2", "record.json").exists():
      time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)

logging.MetricWriter.write = write_and_die
main([*sys.argv[2:], "--workdir=" + sys.argv[1]])
"""


def values(workdir):
  """The lines of metrics.jsonl, without what the clock says."""
  return [{k: v for k, v in line.items() if k not in ("time", "steps_per_second")}
          for line in log_lib.read_metrics(workdir / "metrics.jsonl")]


def assert_same_bits(a, b):
  a, b = (jax.tree_util.tree_flatten_with_path(tree)[0] for tree in (a, b))
  assert len(a) == len(b) > 10
  for (name, x), (other, y) in zip(a, b):
    assert name == other and x.dtype == y.dtype
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), jax.tree_util.keystr(name)


def copies() -> int:
  """Arrays of the shape of the network's last kernel that lie on the device."""
  gc.collect()
  return sum(v.shape == LAST and v.dtype == np.float32 for v in jax.live_arrays())


@pytest.mark.parametrize("period", [1, pytest.param(2, marks=pytest.mark.slow)])  # a program more to compile
def test_killed_and_continued(tmp_path, trained, monkeypatch, capsys, period):  # noqa: F811
  """DMD2 with GAN, replay and the mixture: 4 steps are 2, SIGKILL, and 2, bit for bit."""
  command, before, during = (*DMD2, f"--config.objective.period={period}"), copies(), []
  with monkeypatch.context() as patch:
    write = log_lib.MetricWriter.write
    patch.setattr(log_lib.MetricWriter, "write", lambda *arguments: (during.append(copies()), write(*arguments)))
    assert main([*command, f"--workdir={tmp_path / 'whole'}"]) == 0
  killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "killed"), *command], cwd=ROOT,
                          capture_output=True, text=True)
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  assert [line["step"] for line in values(tmp_path / "killed")] == [1, 2, 3]
  assert not (tmp_path / "killed" / "results.json").exists()
  capsys.readouterr()
  assert main([*command, f"--workdir={tmp_path / 'killed'}"]) == 0
  assert "continuing from step 2 of 4" in capsys.readouterr().out

  whole, continued = trained
  assert int(whole.step) == 4
  assert {"student", "critic"} == set(whole.params) == set(whole.opt) and "head" in whole.params["critic"]
  pushed = [int(part.pushed) for part in whole.dist if part]
  assert len(pushed) == 2 and any(pushed)  # the buffers were used
  assert_same_bits(whole, continued)
  assert values(tmp_path / "whole") == values(tmp_path / "killed")
  results = [json.loads((tmp_path / name / "results.json").read_text())[0] for name in ("whole", "killed")]
  assert results[0]["metrics"] == results[1]["metrics"]
  # Parameters, gradients' moments and averages of both players lie there at once; not what a sitting before compiled.
  # Of the teacher there is what the step reads, and no second copy.
  tree = jax.tree.leaves((whole.params, whole.opt, whole.ema))
  assert during[0] - before == sum(v.shape == LAST for v in tree) + 1
  held = sum(v.nbytes for v in jax.tree.leaves((whole.params, whole.opt, whole.ema)))
  assert held < results[0]["step_bytes"] == results[1]["step_bytes"] < 100 * held
  assert 0 < results[0]["step_seconds"] < results[0]["seconds"]


@pytest.mark.parametrize("method, number", [
    ("teacher", signal.SIGTERM), pytest.param("lcm", signal.SIGINT, marks=pytest.mark.slow)])
def test_stopped_and_continued(tmp_path, trained, refuse, monkeypatch, method, number):  # noqa: F811
  """A signal: the step is finished and saved, exit code 130; the same command goes on to the same bits."""
  command = ("train", f"--config=configs/digits_{method}.py:smoke", *FOUR, "--config.train.checkpoint_every=0")
  assert main([*command, f"--workdir={tmp_path / 'whole'}"]) == 0

  write = log_lib.MetricWriter.write

  def write_and_signal(self, step, scalars, images=None):
    write(self, step, scalars, images)
    if step == 1:
      os.kill(os.getpid(), number)

  with monkeypatch.context() as patch:
    patch.setattr(log_lib.MetricWriter, "write", write_and_signal)
    before = signal.getsignal(number)
    line = refuse(*command, f"--workdir={tmp_path / 'stopped'}", code=130)
    assert signal.getsignal(number) is before
  assert "stopped at step 1 of 4" in line and "the same command continues" in line
  assert checkpoint.Checkpoints(tmp_path / "stopped" / "checkpoints", read_only=True).steps() == [1]
  assert main([*command, f"--workdir={tmp_path / 'stopped'}"]) == 0
  assert_same_bits(*trained)
  assert values(tmp_path / "whole") == values(tmp_path / "stopped")


def test_best_is_kept_and_versions_are_compared(tmp_path, capsys):
  """Evaluations during the run choose the checkpoint that is kept besides the newest."""
  command = ["train", "--config=configs/digits_teacher.py:smoke", *FOUR, "--config.eval.metrics=('fd',)",
             "--config.train.eval_every=1", "--config.train.keep=1", "--config.train.keep_best=1",
             "--config.train.checkpoint_every=0", f"--workdir={tmp_path}"]
  assert main(command) == 0
  lines = log_lib.read_metrics(tmp_path / "metrics.jsonl")
  measured = {line["step"]: v for line in lines for k, v in line.items() if k.startswith("eval/fd@6/train/")}
  assert set(measured) == {1, 2, 3}
  best = min(measured, key=measured.get)
  with checkpoint.Checkpoints(tmp_path / "checkpoints", read_only=True, best_metric="fd") as checkpoints:
    assert checkpoints.steps() == sorted({best, 4})
    assert checkpoints.best() == best
  loaded = checkpoint.load_any(tmp_path)  # what the evaluation used is what others get
  assert loaded.origin.endswith("4 ema/0.999") and loaded.meta["weights"] == "ema/0.999"

  path = tmp_path / "versions.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"jax": "0.0.1"}))
  capsys.readouterr()
  assert main(command) == 0
  said = capsys.readouterr().out
  assert f"jax 0.0.1 -> {jax.__version__}" in said and said.count("need not be the same") == 1
