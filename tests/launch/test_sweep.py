"""Sweeps with real runs: killed and continued, failed trials, what schedulers get."""

import json
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import kubernetes_validate
import pytest

from ddil_jax import sweep as sweeps
from ddil_jax.evaluation import report
from launch import k8s, sweep
from tests.launch.test_processes import as_started, check_script, what_is_done
from tests.running import ROOT, shared  # noqa: F401

CONFIG = '''
from configs import common, digits_teacher

def get_config(arg=None):
  config = digits_teacher.get_config("smoke")
  config.model.channel_mult, config.eval.num_samples, config.eval.batch_size = (1,), 6, 6
  config.eval.sampler_steps, config.eval.metrics, config.train.max_bad_steps = (), ("saturation",), 2
  config.train.update(steps={steps}, log_every=5, checkpoint_every=40)
  return config

def sweep():
  return [{{"optimizer.learning_rate": rate, "seed": seed}} for rate in ({rates}) for seed in range(2)]
'''


def write_config(folder, steps, rates) -> str:
  folder.mkdir(exist_ok=True)
  path = folder / "mine.py"
  path.write_text(CONFIG.format(steps=steps, rates=rates))
  return str(path)


def command(*arguments) -> list[str]:
  return [sys.executable, "-m", "launch.sweep", *map(str, arguments)]


def plain_table(workdir) -> list[dict]:
  """The table but for times and the order of columns."""
  rows = sweeps.gather(sweeps.load(workdir), workdir)
  return [{name: value for name, value in row.items() if name not in ("seconds", "step_seconds")} for row in rows]


def test_a_stopped_sweep_ends_although_trials_are_left(tmp_path):
  """More of them than a pipe to the workers holds."""
  path, workdir = write_config(tmp_path, 4, "1e-3,"), tmp_path / "sweep"
  process = subprocess.Popen(command("--config", path, "--workdir", workdir, f"--config.teacher.path={'x' * 100_000}"),
                             cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
  while not (workdir / "sweep.json").exists():
    assert process.poll() is None
    time.sleep(0.05)
  time.sleep(0.5)  # the worker is importing
  process.terminate()
  try:
    _, error = process.communicate(timeout=60)
  finally:
    process.kill()
  assert process.returncode == 130 and "the same command continues" in error


@pytest.mark.slow
def test_a_killed_sweep_continues_to_the_same_table(tmp_path, capsys):
  path = write_config(tmp_path, 120, "1e-3,")
  assert sweep.main(["--config", path, "--workdir", str(tmp_path / "whole"), "--workers=2"]) == 0
  killed = tmp_path / "killed"
  process = subprocess.Popen(command("--config", path, "--workdir", killed), cwd=ROOT, stdout=subprocess.DEVNULL,
                             start_new_session=True)
  try:
    until = time.monotonic() + 120
    first = killed / sweeps.load(tmp_path / "whole")[0].name / "metrics.jsonl"
    while not (first.exists() and first.stat().st_size) and time.monotonic() < until:
      time.sleep(0.05)
  finally:
    process.kill()
    process.wait()
  assert process.returncode == -signal.SIGKILL and not (killed / "results.csv").exists()
  # Its worker saves and ends by itself, so the folder is free.
  until = time.monotonic() + 60
  while sweep.main(["--workdir", str(killed), "--retry"]) and time.monotonic() < until:
    time.sleep(0.5)
  assert plain_table(killed) == plain_table(tmp_path / "whole")
  assert [row["status"] for row in plain_table(killed)] == ["done"] * 2
  capsys.readouterr()
  assert sweep.main(["--workdir", str(killed)]) == 0
  assert "2 of 2 trials are done already" in capsys.readouterr().out


def test_a_diverged_trial_is_a_row_and_is_tried_again_on_request(tmp_path, capsys):
  path = write_config(tmp_path, 6, "1e30, 1e-3")
  workdir = tmp_path / "sweep"
  assert sweep.main(["--config", path, "--workdir", str(workdir)]) == 1
  rows = plain_table(workdir)
  assert [row["status"] for row in rows] == ["failed", "failed", "done", "done"]
  assert "not finite" in rows[0]["error"] and rows[0]["config.optimizer.learning_rate"] == 1e30
  assert "FAILED" in capsys.readouterr().err
  found = report.compare([workdir], metric="saturation")
  assert [(r["setting"], r["seeds"], r["failed"]) for r in found] == [
      ("learning_rate=0.001", 2, {}), ("learning_rate=1e+30", 0, {"diverged": 2})]
  assert found[1]["reasons"] == [rows[0]["error"].partition(";")[0]]
  before = (workdir / rows[0]["run"] / "log.txt").stat().st_mtime_ns
  assert sweep.main(["--workdir", str(workdir)]) == 1
  assert "2 failed before" in capsys.readouterr().out
  assert (workdir / rows[0]["run"] / "log.txt").stat().st_mtime_ns == before


STAGES = """
from configs import common, digits_teacher
from ddil_jax.sweep import product

def get_config(arg=None):
  config = digits_teacher.get_config("smoke")
  config.model.channel_mult, config.eval.num_samples, config.eval.batch_size = (1,), 6, 6
  config.eval.sampler_steps, config.eval.metrics, config.train.max_bad_steps = (), ("saturation",), 2
  config.train.update(steps=4, log_every=2)
  if arg == "second":
    config = common.trajectory(config, name="lcm", num_scales=8, sampler_steps=2)
    config.train.update(steps=4, log_every=2, batch_size=8)
  return config

def sweep():
  names = {names}
  return product({{"arg": ("",), "data.name": names}}) + [
      {{"arg": "second", "data.name": name, "teacher": {{"arg": ""}}}} for name in names]
"""


@pytest.mark.parametrize("names", [("absent", "none"), pytest.param(("absent", "digits"), marks=pytest.mark.slow)])
def test_a_trial_whose_teacher_is_a_trial_waits_for_it(tmp_path, capsys, names):
  path, workdir = tmp_path / "mine.py", tmp_path / "sweep"
  path.write_text(STAGES.format(names=names))
  assert sweep.main(["--config", str(path), "--workdir", str(workdir), "--workers=2"]) == 1
  rows = {row["run"]: row for row in plain_table(workdir)}
  second = "done" if names[1] == "digits" else "failed"
  assert [row["status"] for row in rows.values()] == ["failed", second, "failed", second]
  bad, good, of_bad, of_good = rows
  assert rows[of_bad]["error"] == f"the run of its teacher, {bad}, failed"
  if second == "done":
    config = json.loads((workdir / of_good / "config.json").read_text())
    assert config["teacher"]["path"] == str(workdir / good)
  capsys.readouterr()
  assert sweep.main(["--workdir", str(workdir)]) == 1
  assert f"{2 * (second == 'done')} of 4 trials are done already, {2 + 2 * (second == 'failed')} failed before" in (
      capsys.readouterr().out)
  assert sweep.main(["--workdir", str(workdir), "--slurm"]) == 2
  assert "start at once" in capsys.readouterr().err


DIES = """
import multiprocessing, os, signal
from configs import digits_teacher

def get_config(arg=None):
  if arg == "dies" and multiprocessing.parent_process():
    os.kill(os.getpid(), signal.SIGKILL)
  return digits_teacher.get_config("smoke")

def sweep():
  return [{"arg": "dies"}, {"arg": "waits", "teacher": {"arg": "dies"}}, {"arg": "other", "data.name": "absent"}]
"""


def test_a_worker_that_dies_ends_the_sweep_when_the_others_are_done(tmp_path, capsys, monkeypatch):
  """Also where a trial waits for the one that died with it."""
  monkeypatch.setattr(sweep, "PATIENCE", 1.0)
  path, workdir = tmp_path / "mine.py", tmp_path / "sweep"
  path.write_text(DIES)
  assert sweep.main(["--config", str(path), "--workdir", str(workdir), "--workers=2"]) == 1
  assert "the worker processes ended" in capsys.readouterr().err
  assert [sweeps.status(trial, workdir) for trial in sweeps.load(workdir)] == ["open", "open", "failed"]


def test_schedulers_get_quoted_commands(tmp_path, capsys):
  path, workdir = write_config(tmp_path / "a b", 6, "1e-3, 2e-3"), tmp_path / "my sweep"
  assert sweep.main(["--config", path, "--workdir", str(workdir), "--dry_run", "--config.train.batch_size=4"]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 4 and not workdir.exists()
  words = shlex.split(lines[3])
  assert f"--config={path}:" in words and "--config.seed=1" in words and "--config.train.batch_size=4" in words
  assert sweep.main(["--config", path, "--workdir", str(workdir), "--slurm", "--dry_run"]) == 0
  printed = capsys.readouterr().out
  assert not workdir.exists()
  assert sweep.main(["--config", path, "--workdir", str(workdir), "--slurm"]) == 0
  script = (workdir / "slurm.sh").read_text()
  assert script == printed and "#SBATCH --array=0-3\n" in script
  check_script(workdir / "slurm.sh")


def test_a_kubernetes_job_makes_the_sweep_that_it_runs(tmp_path, capsys, monkeypatch):
  """Rendered where its volume is not; what a pod starts runs the trial of its index there."""
  path, workdir = write_config(tmp_path / "a b", 6, "1e-3, 2e-3"), tmp_path / "my $$sweep"
  given = ["--config", path, "--workdir", str(workdir), "--config.train.batch_size=4", "--k8s"]
  assert sweep.main([*given, "--image=ddil:1", "--claim=data"]) == 2
  assert "pods keep what lies in /data" in capsys.readouterr().err
  monkeypatch.setattr(k8s, "VOLUME", str(tmp_path))
  assert sweep.main([*given, "--image=ddil:1"]) == 2
  assert "--claim=CLAIM" in capsys.readouterr().err
  assert sweep.main([*given, "--image=ddil:1", "--claim=data", "--name=lcm", "--gpus=2", "--dry_run"]) == 0
  job = json.loads(capsys.readouterr().out)
  assert not workdir.exists()
  kubernetes_validate.validate(job, "1.31", strict=True)
  spec, pod = job["spec"], job["spec"]["template"]["spec"]
  assert (job["metadata"]["name"], spec["completions"], spec["completionMode"]) == ("lcm", 4, "Indexed")
  assert (what_is_done(job, 137, disrupted=True), what_is_done(job, 130)) == ("Ignore", "Ignore")
  assert what_is_done(job, 2) == "FailIndex" and spec["backoffLimitPerIndex"] == 3
  (container,), (volume,) = pod["containers"], pod["volumes"]
  assert container["image"] == "ddil:1" and container["resources"] == {"limits": {"nvidia.com/gpu": 2}}
  assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": str(tmp_path)}]
  assert volume["persistentVolumeClaim"] == {"claimName": "data"}
  started = as_started(container["command"], {"JOB_COMPLETION_INDEX": "3"})
  assert started[:3] == ["python", "-m", "launch.sweep"] and sweep.main(started[3:]) == 0
  assert [row["status"] for row in plain_table(workdir)] == ["open", "open", "open", "done"]
  # Also of a sweep that is there.
  assert sweep.main(["--workdir", str(workdir), "--k8s", "--image=ddil:1", "--claim=data"]) == 0
  again = json.loads((workdir / "job.json").read_text())["spec"]
  assert as_started(again["template"]["spec"]["containers"][0]["command"], {})[3] == f"--workdir={workdir}"
  assert again["completions"] == 4


@pytest.mark.parametrize("arguments, message", [
    (["--config=configs/absent.py"], "absent.py"),
    ([], "holds no sweep"),
    (["--config=configs/digits_pd.py", "--config.train.stpes=3"], "steps"),
    (["--config=configs/digits_pd.py", "--workers=0"], "at least 1"),
    (["--config.seed=3"], "needs --config"),
])
def test_mistakes_are_one_line(tmp_path, capsys, arguments, message):
  assert sweep.main([f"--workdir={tmp_path / 'sweep'}", *arguments]) == 2
  line = capsys.readouterr().err
  assert message in line and line.startswith("ddil: ") and line.count("\n") == 1
  assert not pathlib.Path(tmp_path / "sweep").exists()


def test_a_worker_takes_the_seeds_of_one_setting():
  """It has built and compiled them; two workers do not compile the same, unless nothing else is left."""
  a, b = ([sweeps.Trial(f"{lr}-{seed}", "x.py:", {"train.steps": lr, "seed": str(seed), "teacher.path": f"t{seed}"})
           for seed in range(3)] for lr in ("10", "20"))
  ready = [a[1], b[0], b[1], a[2]]
  assert sweep.choose(ready, a[0], []) == a[1] and sweep.choose(ready, b[2], [a[0]]) == b[0]
  assert sweep.choose(ready, None, [a[0]]) == b[0]
  assert sweep.choose([a[2]], b[2], [a[0]]) == a[2] and sweep.choose([], a[0], [b[0]]) is None
