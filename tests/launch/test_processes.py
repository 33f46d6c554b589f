"""What the launchers of several processes render, and what they refuse."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import time

import kubernetes_validate
import pytest

from ddil_jax import config as config_lib
from ddil_jax import main
from ddil_jax.training import processes
from launch import k8s, local, rendering, slurm, tpu

TRAIN = ["train", "--config=configs/digits_dmd2.py:smoke", "--workdir=my runs/$(rm -rf x)", "--config.train.parallel=mesh"]

# As a job runs it.
JOB = [*TRAIN, "--config.train.watchdog_seconds=10800"]


def check_script(path):
  """Valid bash, and nothing that shellcheck would warn of."""
  subprocess.run(["bash", "-n", str(path)], check=True)
  shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")
  # SC2016: '$(...)' is not expanded, which is what is wanted of a value.
  done = subprocess.run([shellcheck, "--exclude=SC2016", path], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


def as_started(command, environ):
  """A pod's command as it is started: `$(NAME)` is a variable where there is one of that name, `$$` is a dollar."""
  def value(match):
    return "$" if match[0] == "$$" else environ.get(match[1], match[0])
  return [re.sub(r"\$\$|\$\(([^)]*)\)", value, word) for word in command]


def what_is_done(job, code, disrupted=False):
  """What the first rule that fits a pod's end says, if any does."""
  for rule in job["spec"]["podFailurePolicy"]["rules"]:
    if (disrupted and {"type": "DisruptionTarget", "status": "True"} in rule.get("onPodConditions", ())
        or code in rule.get("onExitCodes", {}).get("values", ())):
      return rule["action"]
  return None


def test_slurm(tmp_path, capsys):
  """Valid bash, in which the values that could be code are words; and what it does with each exit code."""
  path = tmp_path / "run.sh"
  assert slurm.main(["--nodes=2", "--gpus=4", "--time=2-00:00:00", "--restarts=3", f"--out={path}", "--", *TRAIN]) == 0
  assert f"sbatch {path}" in capsys.readouterr().out
  check_script(path)
  text = path.read_text()
  for line in ("--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--time=2-00:00:00", "--requeue"):
    assert f"#SBATCH {line}\n" in text
  (line,) = re.findall(r"^srun --kill-on-bad-exit=1 (.*)$", text, re.M)
  assert shlex.split(line) == ["python", "-m", "ddil_jax", *JOB]
  # The script as bash runs it, with srun and scontrol that say what they are given.
  for code, before, requeued in ((0, "", False), (2, "", False), (1, "", True), (130, "", True), (1, "2", True),
                                 (1, "3", False), (137, "4", False), (130, "4", True)):
    stand_ins = f"srun() {{ printf '%s\\n' \"$@\"; return {code}; }}; scontrol() {{ echo requeued \"$@\"; }}\n"
    environ = {"SLURM_JOB_ID": "7", "PATH": "/nowhere"} | ({"SLURM_RESTART_COUNT": before} if before else {})
    done = subprocess.run(["bash", "-c", stand_ins + text], env=environ, executable="/bin/bash", capture_output=True,
                          text=True)
    said = done.stdout.splitlines()
    assert said[:5] == ["--kill-on-bad-exit=1", "python", "-m", "ddil_jax", "train"] and TRAIN[2] in said
    assert ("requeued requeue 7" in said) == requeued and done.returncode == (0 if requeued else code)


def test_tpu(tmp_path, capsys):
  """Valid bash; gcloud gets the training command as one word, again after a failure, when what is left was ended."""
  path = tmp_path / "run.sh"
  options = ["--name=pod", "--zone=us-central2-b", "--folder=my folder", "--restarts=2", f"--out={path}"]
  assert tpu.main([*options, "--", *TRAIN]) == 0
  assert f"bash {path}" in capsys.readouterr().out
  check_script(path)
  # The script as bash runs it, with a gcloud that keeps what it is given and ends with the next of some codes.
  stand_in = """gcloud() {
    printf '%s\\0' "$@" >> calls; [[ "${*: -1}" == *pkill* ]] && return 0
    ((++runs)); set -- $codes; return ${!runs}
  }
  runs=0
  """
  for codes, code, starts in (("0", 0, 1), ("2", 2, 1), ("1 0", 0, 2), ("255 1 1", 1, 3)):
    (tmp_path / "calls").unlink(missing_ok=True)
    done = subprocess.run(["bash", "-c", stand_in + path.read_text()], cwd=tmp_path, capture_output=True, text=True,
                          env={"PATH": os.defpath, "codes": codes})
    calls = (tmp_path / "calls").read_text().split("\0")[:-1]
    calls = [calls[i:i + 8] for i in range(0, len(calls), 8)]
    assert done.returncode == code and sum("pkill" not in call[-1] for call in calls) == starts
    assert len(calls) == starts + done.stderr.count("run ended with")
    assert calls[0][:7] == ["compute", "tpus", "tpu-vm", "ssh", "pod", "--zone=us-central2-b", "--worker=all"]
    flag, _, remote = calls[0][7].partition("=")
    assert flag == "--command" and shlex.split(remote) == [
        "cd", "my folder", "&&", "exec", ".venv/bin/python", "-m", "ddil_jax", *JOB, "--cluster=tpu"]


def test_what_the_tpu_script_ends_on_a_worker(tmp_path):
  """What is left of the run gets SIGTERM, and the shell that sends it is not ended itself."""
  marker, name = tmp_path / "saved", f"stand-in-{os.getpid()}"
  code = (f"import signal, sys, time; signal.signal(15, lambda *_: (open({str(marker)!r}, 'w'), sys.exit()));"
          " time.sleep(60)")
  left = subprocess.Popen([sys.executable, "-c", code, name])
  time.sleep(0.5)
  (line,) = re.findall(r"^stop=(.*)$", tpu.script(TRAIN, "pod", "z", "f", 0), re.M)
  (command,) = shlex.split(line)
  assert command.count("[d]dil_jax train") == 3
  # By another name: real runs of this machine, other tests' too, are not to be ended.
  command = command.replace("[d]dil_jax train", f"[s]{name[1:]}")
  subprocess.run(["bash", "-c", command], check=True, timeout=30)
  assert left.wait(timeout=10) == 0 and marker.exists()


def test_k8s(capsys):
  """The pods find each other by the variables that `ddil train` reads, and get its arguments as they are."""
  own = "--config.teacher.path=$(DDIL_COORDINATOR)$$"
  assert k8s.main(["--name=dmd2", "--image=ddil:1", "--claim=data", "--pods=3", "--gpus=8", "--dry_run", "--", *TRAIN,
                   own]) == 0
  service, job = json.loads(capsys.readouterr().out)["items"]
  for item in (service, job):
    kubernetes_validate.validate(item, "1.31", strict=True)  # no field that it does not know
  spec, pod = job["spec"], job["spec"]["template"]["spec"]
  assert (spec["completions"], spec["parallelism"], spec["completionMode"]) == (3, 3, "Indexed")
  (container,) = pod["containers"]
  assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
  assert service["spec"]["clusterIP"] == "None" and pod["subdomain"] == service["metadata"]["name"] == "dmd2"
  assert service["spec"]["selector"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
  environ = {entry["name"]: entry["value"] for entry in container["env"]} | {"JOB_COMPLETION_INDEX": "2"}
  assert as_started(container["command"], environ) == ["python", "-m", "ddil_jax", *TRAIN, own, JOB[-1]]  # no shell
  assert processes.find(environ=environ) == processes.Cluster("kubernetes", "dmd2-0.dmd2:8476", 3, 2)


def test_a_pod_that_has_to_make_room_is_no_failure(capsys):
  assert k8s.main(["--name=dmd2", "--image=ddil:1", "--claim=data", "--dry_run", "--", *TRAIN]) == 0
  job = json.loads(capsys.readouterr().out)["items"][1]
  assert what_is_done(job, 137, disrupted=True) == what_is_done(job, 2, disrupted=True) == "Ignore"
  assert what_is_done(job, 130) == "Ignore"  # the others, which stopped with it
  assert what_is_done(job, 2) == "FailJob" and what_is_done(job, 1) is None
  assert job["spec"]["backoffLimit"] == 100


def test_k8s_with_tpus(capsys):
  labels = {"cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice", "cloud.google.com/gke-tpu-topology": "4x4"}
  assert k8s.main(["--name=lcm", "--image=ddil:1", "--claim=data", "--pods=4", "--gpus=4", "--resource=google.com/tpu",
                   *(f"--node={label}={value}" for label, value in labels.items()), "--dry_run", "--", *TRAIN]) == 0
  job = json.loads(capsys.readouterr().out)["items"][1]
  kubernetes_validate.validate(job, "1.31", strict=True)
  pod = job["spec"]["template"]["spec"]
  assert pod["containers"][0]["resources"] == {"limits": {"google.com/tpu": 4}} and pod["nodeSelector"] == labels


def test_a_job_has_a_watchdog_unless_it_says_otherwise(tmp_path):
  """Flags and the config's own value stay, also a 0, which is none."""
  known, overrides = main.parser().parse_known_args(rendering.job_arguments(TRAIN))
  assert config_lib.load(known.config, main.overrides_of(overrides, "train")).train.watchdog_seconds == 10800
  for own in (["--config.train.watchdog_seconds=600"], ["--config.train.watchdog_seconds=0"],
              ["--config.train.watchdog_seconds", "600"]):
    assert rendering.job_arguments([*TRAIN, *own]) == [*TRAIN, *own]
  path = tmp_path / "mine.py"
  path.write_text("from configs import digits_teacher\n\ndef get_config(arg=None):\n  config ="
                  " digits_teacher.get_config('smoke')\n  config.train.watchdog_seconds = 60.0\n  return config\n")
  own = ["train", f"--config={path}", *TRAIN[2:]]
  assert rendering.job_arguments(own) == own
  assert local.checked_arguments(TRAIN) == TRAIN  # somebody sits before it


def test_local(capsys):
  assert local.main(["--processes=2", "--dry_run", "--", *TRAIN]) == 0
  lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
  assert [line[:2] for line in lines] == [["env", f"JAX_LOCAL_DEVICE_IDS={i}"] for i in range(2)]
  assert [line[3:-3] for line in lines] == [["-m", "ddil_jax", *TRAIN]] * 2
  assert [line[-1] for line in lines] == ["--process_id=0", "--process_id=1"]
  assert lines[0][-3:-1] == lines[1][-3:-1] and lines[0][-2] == "--num_processes=2"


@pytest.mark.parametrize("options, ids", [
    (["--processes=2", "--gpus=4"], ["0,1,2,3", "4,5,6,7"]),
    (["--processes=2", "--gpus=0"], None),
    (["--processes=2", "--devices=2"], None),
    (["--processes=1"], None),
])
def test_gpus_of_local_processes(options, ids, capsys):
  """Each has its own, by default one of several; virtual CPU devices and a single process are left alone."""
  assert local.main([*options, "--dry_run", "--", *TRAIN]) == 0
  assert re.findall(r"^env JAX_LOCAL_DEVICE_IDS=(\S+) ", capsys.readouterr().out, re.M) == (ids or [])


def test_jax_restricts_a_process_to_its_gpus():
  """The variable reaches the setting that JAX hands to CUDA; there is no GPU here to see more."""
  code = ("import sys, jax\nfrom ddil_jax.training import processes\n"
          "processes.start(processes.find(coordinator=sys.argv[1], num_processes=1, process_id=0))\n"
          "print(jax.config.read('jax_cuda_visible_devices'))")
  own = local.commands(2, 0, [], gpus=2)[1][:2]
  done = subprocess.run([*own, sys.executable, "-c", code, f"localhost:{local.free_port()}"], capture_output=True,
                        text=True)
  assert done.stdout == "2,3\n", done.stderr


@pytest.mark.parametrize("launcher, options, arguments, words", [
    (local, ["--processes=0"], TRAIN, "at least 1"),
    (local, ["--devices=2", "--gpus=1"], TRAIN, "no --gpus"),
    (local, [], TRAIN[:-1], "train.parallel is single"),
    (local, [], ["report", "x"], "is needed after --"),
    (slurm, ["--nodes=0"], TRAIN, "--nodes=0"),
    (slurm, ["--time=1 day"], TRAIN, "24:00:00"),
    (slurm, ["--name=a b"], TRAIN, "letters, digits"),
    (slurm, ["--restarts=-1"], TRAIN, "at least 0"),
    (slurm, [], [*TRAIN, "--config.train.stepz=3"], "did you mean steps"),
    (tpu, ["--name=Pod", "--zone=z"], TRAIN, "small letters"),
    (tpu, ["--name=pod", "--zone=z", "--restarts=-1"], TRAIN, "at least 0"),
    (k8s, ["--name=DMD2", "--image=i", "--claim=c"], TRAIN, "small letters"),
    (k8s, ["--name=a", "--image=i", "--claim=c", "--pods=0"], TRAIN, "at least 1 pod"),
    (k8s, ["--name=a", "--image=i"], TRAIN, "--claim=CLAIM are needed"),
    (k8s, ["--name=a", "--image=i", "--claim=c", "--node=b"], TRAIN, "LABEL=VALUE"),
])
def test_refuses(launcher, options, arguments, words, capsys):
  assert launcher.main([*options, "--dry_run", "--", *arguments]) == 2
  said = capsys.readouterr().err
  assert words in said and said.count("\n") == 1
