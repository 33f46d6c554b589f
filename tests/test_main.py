"""The command line as a user sees it: what it says, what it leaves behind, how it ends."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest

from ddil_jax import config as config_lib
from ddil_jax.main import main
from ddil_jax.training import workdir as workdir_lib
from tests.running import ROOT, SHORT, refuse, shared  # noqa: F401 (fixtures)

pytestmark = pytest.mark.xdist_group("main")
TEACHER = ("--config=configs/digits_teacher.py:smoke", *SHORT)


def ddil(*arguments) -> subprocess.CompletedProcess:
  """A process of its own."""
  return subprocess.run([sys.executable, "-m", "ddil_jax", *map(str, arguments)], cwd=ROOT, capture_output=True,
                        text=True)


@pytest.fixture(scope="module")
def teacher(shared, tmp_path_factory):  # noqa: F811
  """A finished run, and what the terminal showed."""
  workdir = tmp_path_factory.mktemp("runs") / "teacher"
  return workdir, ddil("train", *TEACHER, f"--workdir={workdir}")


@pytest.fixture
def run(teacher, tmp_path):
  """A copy of the finished run, to spoil."""
  return shutil.copytree(teacher[0], tmp_path / "run")


def content(folder):
  return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_help_and_wrong_command():
  done = ddil("--help")
  assert done.returncode == 0 and not done.stderr
  for word in ("train", "sample", "evaluate", "report", "list", "examples:", "--config.FIELD=VALUE"):
    assert word in done.stdout
  done = ddil("trian")
  assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
  assert "'trian'" in done.stderr and "train" in done.stderr.replace("trian", "")


def test_no_command_waits_for_pytorch():
  """Where it is installed, as here for parity, its import would take seconds and hundreds of megabytes."""
  code = ("import sys; from ddil_jax import runs, trained; print('torch' in sys.modules);"
          "import torch; print(torch.ones(1))")
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
  assert done.stdout == "False\ntensor([1.])\n", done.stderr


def test_console_of_a_run(teacher):
  workdir, done = teacher
  assert done.returncode == 0, done.stderr
  assert not done.stderr
  lines = done.stdout.splitlines()
  assert lines[0] == "fake/train: 256 images 8x8x1, values -1 to 1, 10 classes of 25 to 26"
  assert lines[1].startswith("denoising: ") and "parameters in the student" in lines[1]
  assert lines[2].startswith("first step after ") and "compiling" in lines[2]
  assert lines[3].startswith("teacher 1/2 (50%)  loss ")
  assert lines[4].startswith("teacher 2/2 (100%)  loss ") and "steps/s" in lines[4] and "in all" in lines[4]
  made = {p.name for p in workdir.iterdir()}
  assert {"config.json", "versions.json", "checkpoints", "metrics.jsonl", "tensorboard", "samples",
          "results.json"} <= made
  (row,) = json.loads((workdir / "results.json").read_text())
  assert row["objective"] == "teacher" and (workdir / row["samples"]).is_file()


def test_list(capsys):
  assert main(["list"]) == 0
  said = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
  assert "digits_pd" in said["configs"] and "fake" in said["data sets"] and "dmd2" in said["objectives"]
  assert "vendi" in said["metrics"] and "cosine" in said["processes"] and "snr_trunc" in said["weightings"]
  assert "clip" in said["transforms"] and "ddim" in said["solvers"] and "dagger" in said["state sources"]


@pytest.mark.parametrize("arguments, words", [
    ((), ["COMMAND"]),
    (("trian",), ["unknown command 'trian'", "did you mean train?", "report"]),
    (("train", "--config=configs/nope.py", "--workdir=w"), ["'configs/nope.py'", "ddil list"]),
    (("train", "--config=configs/digits_pd.py:smoke", "--workdir="), ["--workdir", "folder is needed"]),
    (("sample", "--workdir=nowhere", "--guidance_scale=big"), ["--guidance_scale", "big"]),
    (("report", "nowhere", "--out=r.pdf"), ["--out=r.pdf", ".html"]),
    (("train", "--workdir=w"), ["--config", "ddil list"]),
    (("train", "--config=configs/digits_pd.py"), ["--workdir"]),
    (("train", "--config=configs/digits_pdd.py", "--workdir=w"),
     ["digits_pdd", "did you mean configs/digits_pd.py"]),
    (("train", "--config=configs/digits_pd.py:smok", "--workdir=w"), ["smok", "did you mean smoke", "guided"]),
    (("train", "--config=configs/digits_pd.py", "--workdir=w", "--seed=3"), ["--seed=3"]),
    (("train", "--config=configs/digits_pd.py", "--workdir=w", "--config.seed"), ["config.seed", "=VALUE"]),
    (("list", "--config.seed=3"), ["--config.seed=3"]),
    (("report", "nowhere"), ["nowhere"]),
    (("report",), ["RUN"]),
    (("sample", "--workdir=nowhere"), ["nowhere", "no run directory"]),
    (("sample", "--workdir=nowhere", "--steps=few"), ["--steps", "few"]),
    (("evaluate", "--workdir=nowhere"), ["nowhere", "no run directory"]),
    (("evaluate", "--config=configs/digits_pd.py:smoke", "--workdir=nowhere"), ["nowhere", "no run directory"]),
], ids=lambda v: " ".join(v) if isinstance(v, tuple) else "")
def test_wrong_arguments(refuse, tmp_path, monkeypatch, arguments, words):  # noqa: F811
  monkeypatch.chdir(tmp_path)
  line = refuse(*arguments)
  assert all(word in line for word in words), line
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text, words", [
    ("def get_config(arg:\n", ["SyntaxError"]),
    ("import nothing_of_that_name\n", ["nothing_of_that_name"]),
    ("X = 1\n", ["get_config"]),
    ("def get_config(arg): return 1 / 0\n", ["ZeroDivisionError"]),
    ("def get_config(arg): return {}\n", ["dict", "ConfigDict"])])
def test_broken_config_file(refuse, tmp_path, text, words):  # noqa: F811
  path = tmp_path / "mine.py"
  path.write_text(text)
  line = refuse("train", f"--config={path}", f"--workdir={tmp_path / 'w'}")
  assert "mine.py" in line and all(word in line for word in words), line


# (config and argument, fields, what the line has to name)
FIELDS = [
    ("pd", "train.stepz=3", ["'stepz'", "did you mean steps", "config.train"]),
    ("pd", "trian.steps=3", ["'trian'", "did you mean train"]),
    ("pd", "train.steps=many", ["train.steps=many", "int"]),
    ("pd", "train.steps=1.5", ["train.steps=1.5", "int", "float"]),
    ("pd", "data.flip=2", ["data.flip", "bool"]),
    ("pd", "train.steps.x=3", ["train.steps", "single value"]),
    ("pd", "train=3", ["config.train", "group", "batch_size"]),
    ("pd", "model.channel_mult=(1,'a')", ["model.channel_mult", "'a'"]),
    ("pd", "states.student=often", ["states.student", "float"]),
    ("pd", "states.forward=-1", ["states.forward", "-1", "negative"]),
    ("pd", "states.student=1e400", ["states.student", "not finite"]),
    ("pd", "states.forward=0", ["sum to 0", "student"]),
    ("pd", "states.student=('linear', 0.0)", ["linear", "schedule"]),
    ("pd", "states.student=('linear', 0.0, 0.5, 0.0)", ["states.student", "0.0 is no fraction"]),
    ("pd", "states.student=('piecewise', 0.0, 0.5, 1.0, 0.2, 0.0)", ["states.student", "0.2 is no fraction"]),
    ("pd", "states.forward=('linear', 1.0, 0.0, 0.5) --config.train.steps=8",
     ["priors sum to 0 at 4 of 8 steps", "first at step 4"]),
    ("pd", "states.student=()", ["states.student", "a schedule expected"]),
    ("pd", "states.student=('linear', 'a', 1.0, 0.5)", ["states.student", "'a'", "a schedule expected"]),
    ("pd", "states.dagger_probability=1.5", ["dagger_probability=1.5", "at most 1"]),
    ("pd", "states.selection=per_sample", ["per_sample", "per_example"]),
    ("pd", "states.rollout_params=0.5", ["rollout_params", "0.5", "raw"]),
    ("pd", "states.teacher_steps=0", ["states.teacher_steps=0", "at least 1"]),
    ("pd", "states.refresh_every=0", ["states.refresh_every=0", "at least 1"]),
    ("pd", "train.steps=0", ["train.steps=0", "at least 1"]),
    ("pd", "train.stages=(4,0)", ["train.stages", "at least 1"]),
    ("pd", "train.stages=(2,4)", ["train.stages", "below the one before"]),
    ("lcm", "train.stages=(4,2)", ["train.stages", "num_steps"]),
    ("dmd2", "objective.num_steps=0", ["objective.num_steps=0", "at least 1"]),
    ("cd", "objective.sampler_steps=0", ["objective.sampler_steps=0", "at least 1"]),
    ("cd", "objective.sampler_steps=40", ["objective.sampler_steps=40", "trained at 16"]),
    ("cd", "eval.sampler_steps=(0,)", ["0 sampling steps"]),
    ("cd", "eval.shift_kinds=('featurs',)", ["did you mean features"]),
    ("cd", "eval.sampler_times=(1.0, 0.25, 0.5, 0.0)", ["grid not decreasing at index 2", "sampler_times"]),
    ("cd", "eval.sampler_times=(1.0, 0.33, 0.0)", ["not trained at 0.33", "0.9375"]),
    ("cd", "eval.sampler_steps=(99,)", ["trained at 16 times", "99"]),
    ("pd", "train.batch_size=0", ["batch_size=0"]),
    ("pd", "train.log_every=0", ["log_every=0"]),
    ("pd", "train.keep_best=1", ["keep_best", "eval_every"]),
    ("pd", "train.ema=(1.0,)", ["train.ema", "[0, 1)"]),
    ("pd", "train.ema=(0.9,)", ["eval.ema", "0.99", "0.9"]),
    ("pd", "eval.metrics=('fdd',)", ["'fdd'", "did you mean fd"]),
    ("pd", "eval.reference=tset", ["tset", "did you mean test"]),
    ("pd", "eval.num_samples=0", ["num_samples=0"]),
    ("pd", "eval.num_samples=9 --config.eval.metrics=('inception_score',)", ["inception_score", "10 samples", "9"]),
    ("pd", "eval.num_samples=9 --config.eval.bootstrap=20", ["config.eval", "precision", "12 samples", "bootstrap"]),
    ("pd", "eval.shift_samples=1", ["shift_samples=1", "at least 2"]),
    ("pd", "eval.diagnose_every=-1", ["diagnose_every=-1", "at least 0"]),
    ("dmd2", "objective.gan_balance=atuo", ["gan_balance", "did you mean auto"]),
    ("pd", "eval.bootstrap=1", ["bootstrap is 1", "at least 2"]),
    ("pd", "eval.guidance_scales=(1.0,2.0)", ["guidance_scales", "folded in"]),
    ("lcm", "eval.teacher_acts=(1.5,)", ["teacher_acts=(1.5,)", "0 to 3"]),
    ("lcm", "eval.guidance_scales=(3.0,)", ["guidance_scales", "scale 1 folded in"]),
    ("lcm", "objective.target_decay=2.0", ["target_decay=2.0", "at most 1"]),
    ("teacher", "objective.label_dropout=2.0", ["label_dropout=2.0", "at most 1"]),
    ("f_distill", "objective.period=0", ["objective.period=0", "at least 1"]),
    ("sid", "objective.times=(0.5,)", ["sid: times (0.5,)", "(low, high)"]),
    ("dmd2", "objective.gan_weight=-1.0", ["gan_weight=-1.0", "at least 0"]),
    ("pd", "data.name=folder", ["config.data.path"]),
    ("pd", "data.name=folder --config.data.path=. --config.data.image_size=0", ["data.image_size=N"]),
    ("pd", "data.name=digitz", ["digitz", "did you mean", "digits"]),
    ("pd", "data.name=fashion_mnist", ["train-images-idx3-ubyte", "manual_dir"]),
    ("pd", "data.name=cifar10", ["cifar-10-binary.tar.gz", "manual_dir"]),
    ("pd", "objective.name=pdd", ["pdd", "did you mean pd"]),
    ("pd", "objective.name=cd", ["objective cd", "num_steps"]),
    ("pd", "reflect.kind=clipp", ["transform 'clipp'", "clip"]),
    ("pd:reflected", "reflect.lo=2.0", ["config.reflect", "lo 2", "below hi"]),
    ("pd:reflected", "reflect.lo=(-1.0,0.0)", ["config.reflect.lo=(-1.0, 0.0)", "each of the 1 channel of fake"]),
    ("pd", "prediction.name=vv", ["prediction.name", "'vv'", "flow"]),
    ("pd", "process.name=cosin", ["process.name", "did you mean cosine"]),
    ("pd", "grid.name=unifrom", ["unifrom", "uniform"]),
    ("pd", "grid.name=ddim", ["'ddim'", "uniform"]),
    ("pd", "objective.weight=snrr", ["snrr", "snr"]),
    ("cd", "objective.distance=l3", ["l3", "l2"]),
    ("cd", "objective.solver=dimm", ["dimm", "ddim"]),
    ("pd", "optimizer.name=adm", ["optimizer 'adm'", "did you mean adam"]),
    ("pd", "optimizer.schedule=cosin", ["cosin", "did you mean cosine"]),
    ("pd", "optimizer.learning_rate=-1", ["learning_rate=-1"]),
    ("pd", "model.dtype=float7", ["float7", "float32"]),
    ("pd", "model.channels=0", ["model.channels=0"]),
    ("pd", "model.channel_mult=()", ["model.channel_mult"]),
    ("pd", "teacher.channel_mult=(1.5,)", ["teacher.channel_mult=(1.5,)", "whole number"]),
    ("pd", "teacher.guidance_scale=1e400", ["teacher.guidance_scale", "not finite"]),
    ("pd:ddil", "states.capacity=8", ["states.capacity=8", "batch_size"]),
    ("teacher:ddil", "", ["denoising", "takes forward only, not student, teacher"]),
    ("teacher", "states.student=1.0", ["objective 'denoising'", "clean image"]),
    *((name, "states.student=1.0", [f"objective '{name}'", "clean image", "takes forward and pairs only, not student"])
      for name in ("ect", "rf", "tcm", "ufogen")),
    ("ect", "teacher.guidance_scale=3.0", ["ect: from data", "guidance scale 3"]),
    ("lcm", "objective.guidance_range=(1.0,3.0)", ["guidance_range", "guidance_embedding"]),
    ("lcm", "objective.guidance_range=(3.0,1.0)", ["guidance_range", "g_min <= g_max"]),
    ("pd", "teacher.path=nowhere", ["nowhere", "run's workdir"]),
    ("teacher", "train.batch_size=300", ["batch_size 300", "256"]),
    ("teacher", "train.parallel=mehs", ["mehs", "did you mean mesh"]),
    ("teacher", "train.parallel=mesh --config.train.batch_size=12", ["batch_size 12", "8 devices"]),
    ("teacher", "seed=-1", ["seed", "-1"]),
    ("teacher", "model.attention_resolutions=(8,) --config.model.num_heads=3", ["num_heads 3", "8 channels"]),
]


@pytest.mark.parametrize("spec, fields, words", FIELDS, ids=[f"{spec} {fields}" for spec, fields, _ in FIELDS])
def test_wrong_fields(refuse, tmp_path, monkeypatch, spec, fields, words):  # noqa: F811
  """Nothing is made: not even the work directory, whose config the corrected command would differ from."""
  monkeypatch.chdir(tmp_path)
  method, _, arg = spec.partition(":")
  arg = f"{arg},smoke" if arg else "smoke"
  fields = [f"--config.{field}" for field in fields.split(" --config.") if field]
  line = refuse("train", f"--config=configs/digits_{method}.py:{arg}", "--workdir=w", *fields)
  assert all(word in line for word in words), line
  assert not (tmp_path / "w").exists()


def test_no_teacher(refuse, tmp_path):  # noqa: F811
  line = refuse("train", "--config=configs/digits_dmd2.py", f"--workdir={tmp_path / 'w'}")
  assert "--config.teacher.path=RUN" in line and "digits_teacher" in line
  (tmp_path / "empty").mkdir()
  line = refuse("train", "--config=configs/digits_dmd2.py", f"--workdir={tmp_path / 'w'}",
                f"--config.teacher.path={tmp_path / 'empty'}")
  assert "no checkpoint" in line and "empty" in line
  (tmp_path / "pd" / "stage_4" / "checkpoints").mkdir(parents=True)
  line = refuse("train", "--config=configs/digits_dmd2.py", f"--workdir={tmp_path / 'w'}",
                f"--config.teacher.path={tmp_path / 'pd'}")
  assert "is a run in stages" in line and "pd/stage_4" in line


def test_teacher_that_does_not_fit(refuse, teacher, tmp_path):  # noqa: F811
  line = refuse("train", "--config=configs/digits_pd.py:smoke", f"--workdir={tmp_path / 'w'}",
                f"--config.teacher.path={teacher[0]}", "--config.teacher.channels=16")
  assert "another architecture" in line and "set config.model, or" in line
  assert "conv_in/kernel is float32[3, 3, 1, 8] there, float32[3, 3, 1, 16] here" in line
  line = refuse("train", "--config=configs/digits_pd.py:smoke", f"--workdir={tmp_path / 'w'}",
                f"--config.teacher.path={teacher[0]}", "--config.teacher.ema=0.5")
  assert "ema/0.5" in line and "ema/0.999" in line
  assert not (tmp_path / "w").exists()


def test_work_directory_of_another_config(refuse, run):  # noqa: F811
  before = content(run)
  line = refuse("train", *TEACHER, f"--workdir={run}", "--config.seed=1", "--config.optimizer.learning_rate=0.5")
  assert "another config" in line and "seed is 0 there, 1 here" in line
  assert "optimizer.learning_rate is 0.003 there, 0.5 here" in line
  assert {p: b for p, b in content(run).items() if p.name != ".lock"} == \
      {p: b for p, b in before.items() if p.name != ".lock"}


def test_work_directory_in_use(refuse, run):  # noqa: F811
  config = json.loads((run / "config.json").read_text())
  with workdir_lib.prepare(run, config, {}):
    line = refuse("train", *TEACHER, f"--workdir={run}")
  assert "in use" in line and str(os.getpid()) in line


def test_work_directory_that_cannot_be(refuse, tmp_path):  # noqa: F811
  (tmp_path / "file").write_text("mine")
  for workdir in (tmp_path / "file", tmp_path / "file" / "run", "/proc/run"):
    line = refuse("train", *TEACHER, f"--workdir={workdir}")
    assert f"cannot write {workdir}" in line and "give a path" in line
    refuse("evaluate", f"--workdir={workdir}")
    refuse("sample", f"--workdir={workdir}")
  assert (tmp_path / "file").read_text() == "mine"


def test_sample(refuse, teacher, tmp_path, capsys):  # noqa: F811
  sample = ("sample", f"--workdir={teacher[0]}")
  assert main([*sample, f"--out={tmp_path / 'a.png'}", "--num_samples=6", "--steps=2"]) == 0
  assert "a.png" in capsys.readouterr().out
  assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
  assert "0 sampling steps" in refuse(*sample, "--steps=0")
  assert "--num_samples=0" in refuse(*sample, "--num_samples=0")
  assert ".png is needed" in refuse(*sample, f"--out={tmp_path / 'a.jpg'}")
  assert "another architecture" in refuse(*sample, "--config.model.channels=16")
  (tmp_path / "file").touch()
  assert "cannot write" in refuse(*sample, f"--out={tmp_path / 'file' / 'b.png'}", "--num_samples=6", "--steps=2")


def test_evaluate_shift(refuse, teacher, run, capsys):  # noqa: F811
  """Rows, a table and figures of the covariate shift; the results stay as they are.

  The run is a student with its teacher's parameters, as every student is at its start.
  """
  student = config_lib.load("configs/digits_pd.py:smoke", {"train.stages": "()", "eval.ema": "raw",
                                                           "eval.shift_samples": "0", "teacher.path": str(teacher[0])})
  (run / "config.json").write_text(json.dumps(config_lib.to_dict(student)))
  before = content(run)
  line = refuse("evaluate", "--shift", f"--workdir={run}")
  assert "eval.shift_samples=0" in line and "set it to 500" in line
  assert "is a teacher's run" in refuse("evaluate", "--shift", f"--workdir={teacher[0]}")
  capsys.readouterr()
  assert main(["evaluate", "--shift", f"--workdir={run}", "--config.eval.shift_samples=20"]) == 0
  said = capsys.readouterr().out
  (row,) = json.loads((run / "shift.json").read_text())
  assert (row["objective"], row["variant"], row["steps"], row["seed"]) == ("pd", "base", 4, 0)
  assert [p["k"] for p in row["shift"]] == [0, 1, 2, 3, 4]
  for name in ("sw2_student_forward", "mmd2_student_teacher", "feature_sw2_floor", "feature_mmd2_teacher_forward"):
    assert all(p[f"{name}_low"] <= p[name] <= p[f"{name}_high"] for p in row["shift"])
    kind, _, pair = name.rpartition("2_")
    assert pair in said and f"\n{kind}2 " in said and f"{row['shift'][4][name]:.4f}" in said
  after = content(run)
  assert {p: after[p] for p in before} == before
  assert {str(p) for p in set(after) - set(before)} == {"shift.json", "shift/4_steps_g1.svg", "shift/4_steps_g1.png"}


def test_report(refuse, teacher, tmp_path, capsys):  # noqa: F811
  assert main(["report", str(teacher[0]), f"--out={tmp_path / 'r.html'}"]) == 0
  assert "r.html" in capsys.readouterr().out and "<html" in (tmp_path / "r.html").read_text()
  run = shutil.copytree(teacher[0], tmp_path / "run")
  config = json.loads((run / "config.json").read_text())
  config["optimizer"]["learning_rate"] /= 2
  (run / "config.json").write_text(json.dumps(config))
  both, out = ("report", str(teacher[0]), str(run), "--metric=saturation"), f"--out={tmp_path / 's.html'}"
  assert main([*both, out, f"--table={tmp_path / 't.md'}", f"--figures={tmp_path / 'figures'}"]) == 0
  said = capsys.readouterr().out
  assert said.startswith((tmp_path / "t.md").read_text()) and "| learning_rate=0.0015 |" in said
  assert "difference to 'learning_rate=0.0015'" in said and {p.suffix for p in (tmp_path / "figures").iterdir()} == {
      ".svg", ".png"}
  assert main([*both, out, "--baseline=learning_rate=0.003", f"--table={tmp_path / 't.csv'}"]) == 0
  assert "learning_rate=0.003" in (tmp_path / "t.csv").read_text()
  for wrong, words in (("--baseline=base", ["'base'", "learning_rate=0.0015; learning_rate=0.003"]),
                       ("--metric=fd", ["'fd'", "there are: saturation"]), ("--table=t.txt", ["t.txt", ".md or .csv"])):
    line = refuse(*both, f"--out={tmp_path / 'no.html'}", wrong)
    assert all(word in line for word in words), line
  (tmp_path / "empty").mkdir()
  line = refuse("report", tmp_path / "empty", f"--out={tmp_path / 'no.html'}")
  assert "empty" in line and "results.json" in line
  assert not (tmp_path / "no.html").exists()


def values(folder):
  """The lines of metrics.jsonl, without what the clock says."""
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  return [{k: v for k, v in line.items() if k not in ("time", "steps_per_second")} for line in lines]


def spoil(checkpoint):
  """Flips a bit of the largest file."""
  path = max((p for p in (checkpoint / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def test_corrupt_checkpoints(refuse, teacher, run, capsys):  # noqa: F811
  spoil(run / "checkpoints" / "2")
  assert main(["train", *TEACHER, f"--workdir={run}"]) == 0
  said = capsys.readouterr()
  assert "checkpoints/2 is damaged" in said.err and "falling back to 1" in said.err
  assert "continuing from step 1 of 2" in said.out
  assert values(run) == values(teacher[0])

  shutil.rmtree(run / "checkpoints" / "1")
  spoil(run / "checkpoints" / "2")
  before = content(run / "checkpoints")
  line = refuse("train", *TEACHER, f"--workdir={run}", code=1)
  assert "checkpoints/2 is damaged" in line and "remove it to start anew" in line
  assert content(run / "checkpoints") == before


def test_full_disk(refuse, teacher, tmp_path, capsys):  # noqa: F811
  """The run fails in one line; when there is space again the same command ends it with the same numbers."""
  disk = tmp_path / "disk"
  disk.mkdir()
  # Room for half a checkpoint on disk (they are compressed) besides what a save reserves before it begins.
  first = teacher[0] / "checkpoints" / "1"
  arrays = json.loads((first / "record.json").read_text())["arrays"]
  reserved = 1.02 * sum(4 * math.prod(entry["shape"]) for entry in arrays.values()) + 2048 * len(arrays) + 2**17
  size = reserved + sum(p.stat().st_size for p in first.rglob("*") if p.is_file()) / 2
  if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(size)}", "tmpfs", str(disk)],
                    capture_output=True).returncode:
    pytest.skip("mounting a small disk is not permitted here")
  try:
    line = refuse("train", *TEACHER, f"--workdir={disk / 'run'}", code=1)
    assert "run failed: cannot write checkpoint 2" in line and "No space left" in line
    assert "run the same command again: it resumes from step 1" in line
    subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
    assert main(["train", *TEACHER, f"--workdir={disk / 'run'}"]) == 0
    assert "continuing from step 1 of 2" in capsys.readouterr().out
    first, second = (json.loads((folder / "results.json").read_text())[0]["metrics"]
                     for folder in (teacher[0], disk / "run"))
    assert first == second
  finally:
    subprocess.run(["umount", str(disk)], check=True)
