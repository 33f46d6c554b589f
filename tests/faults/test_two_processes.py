"""Two processes with several devices each train one run: like one process, and through the death of one of them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from ddil_jax.main import main
from ddil_jax.training import checkpoint
from ddil_jax.training import logging as log_lib
from launch import local
from tests.conftest import CHEAP
from tests.running import ROOT, SHORT, shared, trained  # noqa: F401 (fixtures)

pytestmark = pytest.mark.xdist_group("processes")
# Two players and a replay buffer; SGD, since Adam would make much of a gradient that is rounding only.
RUN = ("train", "--config=configs/digits_dmd2.py:smoke", "--config.objective.period=1", "--config.objective.num_steps=2",
       "--config.states.refresh_every=2", "--config.teacher.dtype=bfloat16", "--config.model.channel_mult=(1,)",
       "--config.model.channels=4", "--config.optimizer.name=sgd", "--config.optimizer.learning_rate=0.05",
       "--config.optimizer.critic_learning_rate=0.05", "--config.train.checkpoint_every=5", "--config.train.steps=7",
       *SHORT)
SPLIT = ("--config.train.parallel=mesh", "--config.train.fsdp=2", "--config.train.min_shard=0")
# Dies when it has done step 7, the last, and the checkpoint of step 5 is complete.
DIES = """
import os, pathlib, signal, sys, time
from ddil_jax.main import main
from ddil_jax.training import loop

summarise, done = loop.summarise, []

def summarise_and_die(window):
  done.append(1)
  if len(done) == 7:
    while not pathlib.Path(sys.argv[1], "checkpoints", "5", "record.json").exists():
      time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
  return summarise(window)

loop.summarise = summarise_and_die
main(sys.argv[2:])
"""


@pytest.fixture(autouse=True)
def compile_cheaply(monkeypatch):
  """The processes compile the same programs, each for itself, and run them a few times."""
  monkeypatch.setenv("XLA_FLAGS", CHEAP)
  monkeypatch.chdir(ROOT)


def commands(workdir, *arguments):
  return local.commands(2, local.free_port(), [*arguments, f"--workdir={workdir}"])


def assert_close(a, b):
  for (path, x), y in zip(jax.tree_util.tree_flatten_with_path(a)[0], jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(np.asarray(x, float), np.asarray(y, float), rtol=0, atol=1e-6,
                               err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
def test_one_of_two_is_killed(tmp_path, trained, capfd):  # noqa: F811
  """kill -9 of process 1 at step 7: up to there both did what one process does, and one process goes on from step 5.

  With four devices each, everything split that can be, and a teacher in bfloat16.
  """
  both = commands(tmp_path / "two", *RUN, *SPLIT)
  both[1] = [sys.executable, "-c", DIES, str(tmp_path / "two"), *both[1][3:]]
  codes = local._once(both, local.environment(4), grace=5)
  said = capfd.readouterr()
  assert codes[1] == -signal.SIGKILL and codes[0] not in local.SETTLED
  assert "batch 8 = 8 device(s) x 1 pass(es) x 1; mesh of data 4 x fsdp 2" in said.out
  assert "Involuntary full rematerialization" not in said.err  # the compiler found a way for every array
  assert not (tmp_path / "two" / "results.json").exists()
  split = log_lib.read_metrics(tmp_path / "two" / "metrics.jsonl")
  assert [line["step"] for line in split][:6] == [1, 2, 3, 4, 5, 6]

  assert main([*RUN, f"--workdir={tmp_path / 'one'}"]) == 0
  whole = log_lib.read_metrics(tmp_path / "one" / "metrics.jsonl")
  for line, other in zip(split, whole):
    assert line.keys() == other.keys()
    for name in other.keys() - {"time", "steps_per_second"}:
      assert line[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name
  after_five = []
  for name in ("two", "one"):
    with checkpoint.Checkpoints(tmp_path / name / "checkpoints", read_only=True) as checkpoints:
      state, _, step = checkpoints.restore(trained[0], 5)  # saved by two processes, read by one
    after_five.append(state)
    assert step == int(state.step) == 5 and int(state.dist.pushed) == 6  # two states a walk, at the steps 0, 2 and 4
  assert_close(*after_five)

  assert main([*RUN, f"--workdir={tmp_path / 'two'}"]) == 0
  assert "continuing from step 5 of 7" in capfd.readouterr().out
  assert_close(trained[1], trained[0])
  results = [json.loads((tmp_path / name / "results.json").read_text())[0] for name in ("two", "one")]
  assert results[0]["metrics"] == pytest.approx(results[1]["metrics"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method, options", [("pd", ("--config.train.stages=()",)), ("lcm", ())])
def test_two_processes_are_one(method, options, tmp_path, trained, capfd):  # noqa: F811
  """With DDIL's mixture and replay: five steps of two processes with four devices each are those of one device."""
  run = ("train", f"--config=configs/digits_{method}.py:smoke,ddil", "--config.model.channel_mult=(1,)",
         "--config.model.channels=4", "--config.states.refresh_every=2", "--config.optimizer.name=sgd",
         "--config.optimizer.learning_rate=0.05", "--config.train.checkpoint_every=5", "--config.train.steps=5",
         *options, *SHORT)
  codes = local._once(commands(tmp_path / "two", *run, *SPLIT), local.environment(4), grace=60)
  assert codes == [0, 0] and "batch 8 = 8 device(s) x 1 pass(es) x 1; mesh of data 4 x fsdp 2" in capfd.readouterr().out
  assert main([*run, f"--workdir={tmp_path / 'one'}"]) == 0
  with checkpoint.Checkpoints(tmp_path / "two" / "checkpoints", read_only=True) as checkpoints:
    state, _, step = checkpoints.restore(trained[0], 5)
  assert step == 5
  assert_close(state, trained[0])
  # Drawn and measured by both together; again by one, and by two.
  results = lambda name: json.loads((tmp_path / name / "results.json").read_text())[0]["metrics"]  # noqa: E731
  assert results("two") == pytest.approx(results("one"), rel=1e-3, abs=1e-4)
  if method == "lcm":
    first = results("two")
    (tmp_path / "two" / "results.json").unlink()
    again = local.commands(2, local.free_port(), ["evaluate", f"--workdir={tmp_path / 'two'}"])
    assert local._once(again, local.environment(4), grace=60) == [0, 0]
    assert results("two") == pytest.approx(first, rel=1e-5, abs=1e-6)
    said = capfd.readouterr().out
    assert said.count("evaluating ") == 1
    single = ["evaluate", f"--workdir={tmp_path / 'two'}", "--config.train.parallel=single"]
    assert local._once(local.commands(2, local.free_port(), single), local.environment(4), grace=60) == [2, 2]
    assert "train.parallel=single runs in one process, and there are 2" in capfd.readouterr().err


def test_the_launcher_ends_and_starts_again(tmp_path, monkeypatch, capfd):
  """When one process dies the other is ended, and both are started again as often as was said."""
  first = f"import os, sys, time; new = not os.path.exists({str(tmp_path / 'seen')!r}); time.sleep(0.3);"
  dies = first + f"open({str(tmp_path / 'seen')!r}, 'w').close(); sys.exit(1 if new else 0)"
  waits = first + "time.sleep(60 if new else 0)"
  monkeypatch.setattr(local, "commands", lambda *arguments: [[sys.executable, "-c", code] for code in (waits, dies)])
  assert local.run(2, 0, [], restarts=0, grace=0.2) == 1
  (tmp_path / "seen").unlink()
  assert local.run(2, 0, [], restarts=3, grace=0.2) == 0
  assert capfd.readouterr().err.count("starting again") == 1


# One that says so when it could be stopped, and one that then has its launcher asked to stop.
STAND_INS = ("""
import os, signal, sys, time
signal.signal(signal.SIGTERM, {handler})
open({ready!r}, "a").write("x")
time.sleep(60)
""", """
import os, signal, sys, time
signal.signal(signal.SIGTERM, {handler})
while not os.path.exists({ready!r}):
  time.sleep(0.01)
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(60)
""")


@pytest.mark.parametrize("handler, code", [
    ("signal.SIG_DFL", 130),  # importing
    ("lambda *_: sys.exit(130)", 130),
    ("lambda *_: sys.exit(1)", 1),  # no space for the last step
])
def test_a_launcher_that_was_asked_to_stop_starts_nothing(tmp_path, monkeypatch, capfd, handler, code):
  """Whatever comes of the processes' saving, also where it would be started again otherwise."""
  ready = tmp_path / "ready"
  codes = [text.format(handler=handler, ready=str(ready)) for text in STAND_INS]
  monkeypatch.setattr(local, "commands", lambda *arguments: [[sys.executable, "-c", text] for text in codes])
  assert local.run(2, 0, [], restarts=3) == code
  assert ready.read_text() == "x" and "starting again" not in capfd.readouterr().err


def test_sigterm_to_one_of_two(tmp_path):
  """Both finish the same step, save it, and end with 130."""
  command = [sys.executable, "-m", "launch.local", "--processes=2", "--devices=2", "--", "train",
             "--config=configs/digits_teacher.py:smoke", "--config.model.channel_mult=(1,)", "--config.model.channels=4",
             *SPLIT, "--config.train.steps=1000000", *SHORT, f"--workdir={tmp_path}"]
  launcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  try:
    metrics = tmp_path / "metrics.jsonl"
    while launcher.poll() is None and not (metrics.exists() and log_lib.read_metrics(metrics)):
      time.sleep(0.05)
    os.kill(int((tmp_path / ".lock").read_text()), signal.SIGTERM)
    said, _ = launcher.communicate(timeout=120)
  finally:
    launcher.kill()
  assert launcher.returncode == 130, said
  steps = log_lib.read_metrics(metrics)[-1]["step"]
  assert said.count(f"stopped at step {steps} of 1000000; the same command continues") == 2
  assert checkpoint.Checkpoints(tmp_path / "checkpoints", read_only=True).steps()[-1] == steps


# One call of a network in each process: a sample knows how many of its batch were on its device.
DRAWS = """
import sys
import flax.linen as nn, jax, numpy as np
from ddil_jax.evaluation import features, sampling
from ddil_jax.training import parallel, processes

class Net(nn.Module):
  @nn.compact
  def __call__(self, x):
    h = nn.Dense(3)(x.reshape(len(x), -1))
    return h, jax.nn.tanh(h)

out, *flags = sys.argv[1:]
if flags:
  processes.start(processes.find("auto", flags[0], 2, int(flags[1])))
devices, here = parallel.spread("mesh", together=True), parallel.spread("mesh")
draw = jax.jit(lambda keys, cond: jax.vmap(lambda key: jax.random.normal(key, (4, 4, 1)))(keys)
               + cond["label"].reshape(-1, 1, 1, 1))
keys = devices.split(jax.random.split(jax.random.key(0), devices.count * 3))
shares = [len(part.data) for part in draw(keys, {"label": devices.split(np.zeros(len(keys)))}).addressable_shards]
images = sampling.sample_images(draw, 21, (4, 4, 1), 0, {"label": np.arange(21) % 10}, 6, devices)
net = Net()
extractor = features.make_extractor(net, net.init(jax.random.key(0), images[:1]), (4, 4, 1), "net", here, batch_size=8)
spread = extractor.on(devices)
processes.meet("measuring")
assert spread.name == extractor.name
np.testing.assert_allclose(spread.features(images), extractor.features(images), rtol=0, atol=1e-6)
np.savez(out, images=images, features=spread.features(images), shares=shares, count=devices.count, here=here.count)
"""


def test_two_processes_draw_and_measure_together(tmp_path, capfd):
  """Each computes its share of every batch, and both have all of it: as one process has."""
  port = local.free_port()
  both = [[sys.executable, "-c", DRAWS, str(tmp_path / f"{i}.npz"), f"localhost:{port}", str(i)] for i in range(2)]
  assert local._once(both, local.environment(2), grace=60) == [0, 0], capfd.readouterr().err
  assert local._once([[sys.executable, "-c", DRAWS, str(tmp_path / "one.npz")]], local.environment(1), grace=60) == [0]
  one, *two = (np.load(tmp_path / f"{name}.npz") for name in ("one", 0, 1))
  for other in two:
    assert (other["count"], other["here"], other["shares"].tolist()) == (4, 2, [3, 3])
    for name in ("images", "features"):
      np.testing.assert_allclose(other[name], one[name], rtol=0, atol=1e-6)
  assert len(one["images"]) == 21 and one["images"].std() > 1


# Another process's command: its folder, the folder whose code it runs, and the arguments.
ELSEWHERE = """
import os, sys
folder, code, *sys.argv[1:] = sys.argv[1:]
os.chdir(folder)
sys.path.insert(0, code)
from ddil_jax.main import run
run()
"""


def elsewhere(command, folder, code=ROOT):
  return [sys.executable, "-c", ELSEWHERE, str(folder), str(code), *command[3:]]


def test_processes_that_do_not_agree(tmp_path, capfd):
  """Another config and other code in one of them: both say so at the start, and nothing is written."""
  for part in ("ddil_jax", "configs"):
    shutil.copytree(ROOT / part, tmp_path / "other" / part, ignore=shutil.ignore_patterns("__pycache__"))
  with open(tmp_path / "other" / "ddil_jax" / "keys.py", "a") as file:
    file.write("# changed\n")
  both = commands(tmp_path / "run", *RUN, *SPLIT)
  both[1] = elsewhere(both[1], ROOT, tmp_path / "other") + ["--config.optimizer.learning_rate=0.01"]
  assert local._once(both, local.environment(2), grace=60) == [2, 2]
  said = capfd.readouterr().err
  assert said.count("config.optimizer.learning_rate is 0.05 in process 0, 0.01 in process 1") == 2
  assert len(re.findall(r"the processes do not agree: code is '(\w+)' in process 0, '(?!\1)\w+' in process 1", said)) == 2
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_with_other_data(tmp_path, capfd):
  """The same config, and under the same path other images."""
  for name, value in (("a", 10), ("b", 11)):
    folder = tmp_path / name / "pictures" / "train"
    folder.mkdir(parents=True)
    for i in range(8):
      Image.fromarray(np.full((8, 8, 3), value * i, np.uint8)).save(folder / f"{i}.png")
  both = commands(tmp_path / "run", "train", "--config=configs/digits_teacher.py:smoke", "--config.data.name=folder",
                  "--config.data.path=pictures", *SPLIT, *SHORT)
  both = [elsewhere(command, tmp_path / name) for command, name in zip(both, "ab")]
  assert local._once(both, local.environment(2), grace=60) == [2, 2]
  said = capfd.readouterr().err
  assert len(re.findall(r"the processes do not agree: data is '\w+' in process 0, '\w+' in process 1", said)) == 2
  assert not (tmp_path / "run").exists()
