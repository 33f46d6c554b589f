"""A run's folder: the same run goes on, another one is refused, two at once are refused."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from ddil_jax.errors import UsageError
from ddil_jax.training import workdir
from ddil_jax.training.workdir import prepare

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = {"objective": {"name": "pd", "steps": 4}, "model": {"mults": (1, 2), "attention": {}},
          "total_steps": 100, "lr": 1e-3, "note": None}
VERSIONS = {"jax": "0.10.2"}


def test_first_start_writes_what_it_runs(tmp_path):
  with prepare(tmp_path / "a" / "run", CONFIG, VERSIONS) as run:
    assert (run.path, run.resumed, run.changed, run.new_versions) == (tmp_path / "a" / "run", False, {}, {})
    text = (run.path / "config.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(CONFIG))
    assert text.index('"lr"') < text.index('"model"') < text.index('"total_steps"')  # sorted
    assert json.loads((run.path / "versions.json").read_text()) == VERSIONS
    assert sorted(os.listdir(run.path)) == [".lock", "config.json", "versions.json"]


def test_the_same_config_resumes(tmp_path):
  prepare(tmp_path, CONFIG, VERSIONS).release()
  before = (tmp_path / "config.json").stat().st_mtime_ns
  reordered = dict(reversed(CONFIG.items()))  # and its tuples are lists in the file
  with prepare(tmp_path, reordered, {"jax": "0.11.0"}) as run:
    assert run.resumed and run.changed == {}
    assert run.new_versions == {"jax": ("0.10.2", "0.11.0")}
  assert (tmp_path / "config.json").stat().st_mtime_ns == before
  assert json.loads((tmp_path / "versions.json").read_text()) == VERSIONS


def test_another_config_is_refused_and_nothing_changes(tmp_path):
  prepare(tmp_path, CONFIG, VERSIONS).release()
  before = (tmp_path / "config.json").read_bytes()
  other = {**CONFIG, "objective": {"name": "lcm", "steps": 4, "w": 3.0}, "model": {"mults": (1, 2, 2)}}
  with pytest.raises(UsageError) as e:
    prepare(tmp_path, other, VERSIONS)
  assert str(e.value) == (
      f"{tmp_path} holds a run of another config: model.attention is {{}} there, '(absent)' here; "
      "model.mults is [1, 2] there, [1, 2, 2] here; objective.name is 'pd' there, 'lcm' here; "
      "objective.w is '(absent)' there, 3.0 here; give another workdir, or the config of that run")
  assert (tmp_path / "config.json").read_bytes() == before
  prepare(tmp_path, CONFIG, VERSIONS).release()  # the refused run holds no lock


def test_fields_that_may_change(tmp_path):
  prepare(tmp_path, CONFIG, VERSIONS).release()
  longer = {**CONFIG, "total_steps": 200, "objective": {"name": "pd", "steps": 8}}
  with pytest.raises(UsageError, match="another config: objective.steps is 4 there, 8 here; give"):
    prepare(tmp_path, longer, VERSIONS, may_change=("total_steps", "objective.st", "obj"))
  with prepare(tmp_path, longer, VERSIONS, may_change=("total_steps", "objective")) as run:
    assert run.resumed and run.changed == {"total_steps": (100, 200), "objective.steps": (4, 8)}
  assert json.loads((tmp_path / "config.json").read_text())["total_steps"] == 200


def test_differences():
  nan = float("nan")
  assert workdir.differences({"a": {"b": nan}, "c": 1}, {"a": {"b": nan}, "c": 1.0}) == {}
  assert workdir.differences({"a": {"b": 1}}, {"a": 1}) == {"a": ("(absent)", 1), "a.b": (1, "(absent)")}


def test_overwrite_removes_the_run_and_nothing_else(tmp_path):
  prepare(tmp_path, CONFIG, VERSIONS).release()
  (tmp_path / "checkpoints" / "10").mkdir(parents=True)
  (tmp_path / "metrics.jsonl").write_text("{}\n")
  (tmp_path / "notes.txt").write_text("mine")
  with prepare(tmp_path, {"other": 1}, VERSIONS, overwrite=True) as run:
    assert not run.resumed
  assert sorted(os.listdir(tmp_path)) == [".lock", "config.json", "notes.txt", "versions.json"]
  assert json.loads((tmp_path / "config.json").read_text()) == {"other": 1}


def test_a_run_without_its_config_is_refused(tmp_path):
  (tmp_path / "checkpoints").mkdir()
  with pytest.raises(UsageError, match="holds checkpoints but no config.json"):
    prepare(tmp_path, CONFIG, VERSIONS)
  (tmp_path / "config.json").write_text('{"a": ')
  with pytest.raises(UsageError, match="config.json is damaged"):
    prepare(tmp_path, CONFIG, VERSIONS)


def test_places_that_cannot_be_written(tmp_path):
  (tmp_path / "file").write_text("")
  for place in (tmp_path / "file", tmp_path / "file" / "run"):
    with pytest.raises(UsageError) as e:
      prepare(place, CONFIG, VERSIONS)
    assert str(e.value).startswith(f"cannot write {place}: ") and "\n" not in str(e.value)
  with pytest.raises(UsageError, match=r"config.model.f is <.*>, which JSON cannot hold"):
    prepare(tmp_path / "run", {"model": {"f": len}}, VERSIONS)
  assert not (tmp_path / "run").exists()


def test_a_read_only_folder(tmp_path):
  if os.geteuid() == 0:
    tmp_path = tmp_path / "disk"  # root may write whatever the mode says, but not to a read-only disk
    tmp_path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
      pytest.skip("root, and mounting a read-only disk is not permitted here")
  else:
    tmp_path.chmod(0o555)
  try:
    with pytest.raises(UsageError, match="cannot write .*: (Read-only file system|Permission denied); give"):
      prepare(tmp_path, CONFIG, VERSIONS)
  finally:
    if os.geteuid() == 0:
      subprocess.run(["umount", str(tmp_path)], check=True)
    else:
      tmp_path.chmod(0o755)


def test_two_processes_at_once(tmp_path):
  """The lock is held while the process lives and gone when it is killed."""
  script = ("import sys\nfrom ddil_jax.training.workdir import prepare\n"
            "run = prepare(sys.argv[1], {'a': 1}, {})\nprint('ready', flush=True)\nsys.stdin.read()\n")
  process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True)
  try:
    assert process.stdout.readline() == "ready\n"
    with pytest.raises(UsageError, match=rf"in use by another run \(process {process.pid}\)"):
      prepare(tmp_path, {"a": 1}, {})
    with pytest.raises(UsageError, match="in use"):
      prepare(tmp_path, {"a": 1}, {}, overwrite=True)
    assert (tmp_path / "config.json").exists()
  finally:
    process.send_signal(signal.SIGKILL)
    process.communicate()
  with prepare(tmp_path, {"a": 1}, {}) as run:
    assert run.resumed


def test_fields_that_came_later_have_their_defaults(tmp_path):
  """A run of an older version continues; another value than the default is a difference."""
  with prepare(tmp_path, {"a": {"old": (1, 2)}, "b": {"x": 1}}, {}):
    pass
  defaults = {"a": {"old": (0,), "new": (3,), "group": {"deep": 1}}, "c": {"y": 2}}
  with prepare(tmp_path, {"a": {"old": (1, 2), "new": (3,)}, "b": {"x": 1}}, {}, defaults=defaults) as run:
    assert run.resumed and not run.changed
  with pytest.raises(UsageError, match="a.new is .3. there, .4. here"):
    prepare(tmp_path, {"a": {"old": (1, 2), "new": (4,)}, "b": {"x": 1}}, {}, defaults=defaults)
