"""What the launchers of several processes render, and what they refuse."""

import json
import re
import shlex
import subprocess

import pytest

from ddil_jax.training import processes
from launch import k8s, local, slurm

TRAIN = ["train", "--config=configs/digits_dmd2.py:smoke", "--workdir=my runs/$(rm -rf x)", "--config.train.parallel=mesh"]


def test_slurm(tmp_path, capsys):
  """Valid bash, in which the values that could be code are words; and what it does with each exit code."""
  path = tmp_path / "run.sh"
  assert slurm.main(["--nodes=2", "--gpus=4", "--time=2-00:00:00", f"--out={path}", "--", *TRAIN]) == 0
  assert f"sbatch {path}" in capsys.readouterr().out
  subprocess.run(["bash", "-n", str(path)], check=True)
  text = path.read_text()
  for line in ("--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--time=2-00:00:00", "--requeue"):
    assert f"#SBATCH {line}\n" in text
  (line,) = re.findall(r"^srun --kill-on-bad-exit=1 (.*)$", text, re.M)
  assert shlex.split(line) == ["python", "-m", "ddil_jax", *TRAIN]
  # The script as bash runs it, with srun and scontrol that say what they are given.
  for code, requeued in ((0, False), (2, False), (1, True), (130, True)):
    stand_ins = f"srun() {{ printf '%s\\n' \"$@\"; return {code}; }}; scontrol() {{ echo requeued \"$@\"; }}\n"
    done = subprocess.run(["bash", "-c", stand_ins + text], env={"SLURM_JOB_ID": "7", "PATH": "/nowhere"},
                          executable="/bin/bash", capture_output=True, text=True)
    said = done.stdout.splitlines()
    assert said[:5] == ["--kill-on-bad-exit=1", "python", "-m", "ddil_jax", "train"] and TRAIN[2] in said
    assert ("requeued requeue 7" in said) == requeued and done.returncode == (0 if requeued else code)


def test_k8s(capsys):
  """The pods find each other by the variables that `ddil train` reads."""
  assert k8s.main(["--name=dmd2", "--image=ddil:1", "--claim=data", "--pods=3", "--gpus=8", "--dry_run", "--", *TRAIN]) == 0
  service, job = json.loads(capsys.readouterr().out)["items"]
  spec, pod = job["spec"], job["spec"]["template"]["spec"]
  assert (spec["completions"], spec["parallelism"], spec["completionMode"]) == (3, 3, "Indexed")
  (container,) = pod["containers"]
  assert container["command"] == ["python", "-m", "ddil_jax", *TRAIN]  # no shell
  assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
  assert service["spec"]["clusterIP"] == "None" and pod["subdomain"] == service["metadata"]["name"] == "dmd2"
  assert service["spec"]["selector"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
  environ = {entry["name"]: entry["value"] for entry in container["env"]} | {"JOB_COMPLETION_INDEX": "2"}
  assert processes.find(environ=environ) == processes.Cluster("kubernetes", "dmd2-0.dmd2:8476", 3, 2)


def test_local(capsys):
  assert local.main(["--processes=2", "--dry_run", "--", *TRAIN]) == 0
  lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
  assert [line[1:-3] for line in lines] == [["-m", "ddil_jax", *TRAIN]] * 2
  assert [line[-1] for line in lines] == ["--process_id=0", "--process_id=1"]
  assert lines[0][-3:-1] == lines[1][-3:-1] and lines[0][-2] == "--num_processes=2"


@pytest.mark.parametrize("launcher, options, arguments, words", [
    (local, ["--processes=0"], TRAIN, "at least 1"),
    (local, [], TRAIN[:-1], "train.parallel is single"),
    (local, [], ["report", "x"], "is needed after --"),
    (slurm, ["--nodes=0"], TRAIN, "--nodes=0"),
    (slurm, ["--time=1 day"], TRAIN, "24:00:00"),
    (slurm, ["--name=a b"], TRAIN, "letters, digits"),
    (slurm, [], [*TRAIN, "--config.train.stepz=3"], "did you mean steps"),
    (k8s, ["--name=DMD2", "--image=i", "--claim=c"], TRAIN, "small letters"),
    (k8s, ["--name=a", "--image=i", "--claim=c", "--pods=0"], TRAIN, "at least 1 pod"),
])
def test_refuses(launcher, options, arguments, words, capsys):
  assert launcher.main([*options, "--dry_run", "--", *arguments]) == 2
  said = capsys.readouterr().err
  assert words in said and said.count("\n") == 1
