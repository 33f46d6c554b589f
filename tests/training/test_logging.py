"""Metrics that a reader can rely on, a line that does not flood, versions without paths."""

import io
import json
import pathlib
import re
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.crc32c import crc32c
from tensorboardX.proto import event_pb2

from ddil_jax.errors import UsageError
from ddil_jax.training import logging
from ddil_jax.training.logging import MetricWriter, Progress, read_metrics

ROOT = pathlib.Path(__file__).parents[2]


def events_of(path):
  """The events of one file by the format's definition: length, its CRC, data, its CRC."""
  data, out = path.read_bytes(), []
  masked = lambda b: (((crc32c(b) >> 15) | (crc32c(b) << 17)) + 0xA282EAD8) & 0xFFFFFFFF  # noqa: E731
  while data:
    (size,) = struct.unpack("<Q", data[:8])
    assert struct.unpack("<I", data[8:12]) == (masked(data[:8]),)
    body = data[12:12 + size]
    assert struct.unpack("<I", data[12 + size:16 + size]) == (masked(body),)
    out.append(event_pb2.Event.FromString(body))
    data = data[16 + size:]
  return out


def no_constants(name):
  raise AssertionError(f"{name} is not JSON")


def test_lines_and_events(tmp_path):
  image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
  with MetricWriter(tmp_path) as writer:
    writer.write(10, {"student/loss": jnp.float32(0.5), "loss@forward": np.float64(2), "count": 3})
    writer.write(jnp.int32(20), {"student/loss": float("nan"), "worse": jnp.array([jnp.inf])},
                 {"samples": image, "grey": image[..., :1]})
    # On disk while the run goes on, not only after it.
    lines = [json.loads(line, parse_constant=no_constants)
             for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [{k: v for k, v in line.items() if k != "time"} for line in lines] == [
      {"step": 10, "student/loss": 0.5, "loss@forward": 2.0, "count": 3},
      {"step": 20, "student/loss": None, "worse": None}]
  assert lines[0]["time"] <= lines[1]["time"]
  assert read_metrics(tmp_path / "metrics.jsonl") == lines

  (path,) = (tmp_path / "tensorboard").iterdir()
  assert re.fullmatch(r"events\.out\.tfevents\.\d+\.\d+", path.name)
  events = events_of(path)
  assert events[0].file_version == "brain.Event:2"
  values = [(e.step, v.tag, v) for e in events[1:] for v in e.summary.value]
  assert [(step, tag, v.simple_value) for step, tag, v in values if not v.HasField("image")] == [
      (10, "student/loss", 0.5), (10, "loss_forward", 2.0), (10, "count", 3.0)]
  images = {tag: v.image for step, tag, v in values if v.HasField("image")}
  assert (images["samples"].height, images["samples"].width, images["samples"].colorspace) == (4, 6, 3)
  from PIL import Image
  decode = lambda tag: np.asarray(Image.open(io.BytesIO(images[tag].encoded_image_string)))  # noqa: E731
  np.testing.assert_array_equal(decode("samples"), image)
  np.testing.assert_array_equal(decode("grey")[..., 0], image[..., 0])


def test_resume_drops_what_the_dead_run_did_after_its_checkpoint(tmp_path):
  with MetricWriter(tmp_path) as writer:
    for step in (10, 20, 30):
      writer.write(step, {"loss": step})
  with open(tmp_path / "metrics.jsonl", "a") as f:
    f.write('{"step": 40, "lo')  # killed in the middle of a line
  with MetricWriter(tmp_path, step=20) as writer:
    writer.write(30, {"loss": 31})
  lines = read_metrics(tmp_path / "metrics.jsonl")
  assert [(line["step"], line["loss"]) for line in lines] == [(10, 10), (20, 20), (30, 31)]
  assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 3
  second = max((tmp_path / "tensorboard").iterdir(), key=lambda p: p.name)
  starts = [e.step for e in events_of(second) if e.HasField("session_log")]
  assert starts == [21]  # TensorBoard hides what the first file has from there on
  with MetricWriter(tmp_path):
    pass
  assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_bad_metrics_are_named(tmp_path):
  with MetricWriter(tmp_path) as writer:
    with pytest.raises(ValueError, match=r"metric loss has shape \(2,\)"):
      writer.write(1, {"loss": np.zeros(2)})
    with pytest.raises(ValueError, match="cannot be named 'step'"):
      writer.write(1, {"step": 1})
    with pytest.raises(ValueError, match=r"image a is float32\[2, 2, 1\]"):
      writer.write(1, {}, {"a": np.zeros((2, 2, 1), np.float32)})
  with pytest.raises(UsageError, match="cannot read .*absent"):
    read_metrics(tmp_path / "absent")
  with pytest.raises(UsageError, match="cannot write .*/absent: No such file"):
    MetricWriter(tmp_path / "absent")


def test_full_disk(tmp_path):
  """The error comes at once and from the caller's own call; the lines before stay readable."""
  script = ("import resource, sys\nfrom ddil_jax.errors import RunError\n"
            "from ddil_jax.training.logging import MetricWriter\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
            "try:\n  with MetricWriter(sys.argv[1]) as writer:\n"
            "    for step in range(10**6): writer.write(step, {'loss': step})\n"
            "except RunError as e:\n  print(step, e)\n")
  done = subprocess.run([sys.executable, "-c", script, str(tmp_path)],
                        cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  step, line = done.stdout.split(" ", 1)
  assert line == f"cannot write {tmp_path}: File too large; free space and run the same command again\n"
  assert len(read_metrics(tmp_path / "metrics.jsonl")) in (int(step), int(step) + 1)
  assert int(step) > 10 and not done.stderr


class Terminal(io.StringIO):
  def isatty(self):
    return True


class Clock:
  """A clock that the test turns."""

  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


def run_progress(stream, seconds_a_step, total, compile_seconds=5.0, start=0):
  clock = Clock()
  with Progress(total, "train teacher", stream=stream, clock=clock) as progress:
    clock.now += compile_seconds
    for step in range(start + 1, total + 1):
      progress.update(step, loss=jnp.float32(1) / step)
      clock.now += seconds_a_step
  return stream.getvalue()


def test_progress_in_a_log():
  lines = run_progress(io.StringIO(), 0.5, 100).splitlines()
  assert lines[0] == "train teacher 1/100 (1%)  loss 1"
  assert lines[1] == "train teacher 21/100 (21%)  loss 0.04762  2.0 steps/s  0:40 left"
  assert lines[-1] == "train teacher 100/100 (100%)  loss 0.01  2.0 steps/s  0:54 in all"
  assert len(lines) == 6  # every ten seconds, and the last


def test_progress_on_a_terminal():
  shown = run_progress(Terminal(), 0.25, 20)
  assert shown.count("\r") == 6 and shown.endswith("in all\n") and shown.count("\n") == 1
  lines = shown.strip("\n").split("\r")[1:]
  assert all(len(after) >= len(before.rstrip()) for before, after in zip(lines, lines[1:], strict=False))


def test_progress_of_a_continued_and_of_a_slow_run():
  lines = run_progress(io.StringIO(), 15.0, 5000, start=4990).splitlines()
  assert lines[0].startswith("train teacher 4991/5000 (99%)")
  assert lines[1].endswith("15.0 s/step  2:00 left")
  assert logging.duration(4000) == "1:06:40"


def test_progress_of_short_work_shows_nothing():
  def shown(seconds_a_batch):
    clock, stream = Clock(), io.StringIO()
    with Progress(40, "evaluating", stream=stream, clock=clock, unit="samples", after=10.0) as progress:
      for done in (10, 20, 30, 40):
        clock.now += seconds_a_batch
        progress.update(done)
    return stream.getvalue().splitlines()

  assert shown(2.0) == []
  assert shown(6.0) == ["evaluating 20/40 (50%)  1.7 samples/s  0:12 left",
                        "evaluating 40/40 (100%)  1.7 samples/s  0:24 in all"]


def test_versions():
  found = logging.versions()
  assert found["jax"] == jax.__version__ and found["numpy"] == np.__version__
  assert found["python"] == ".".join(map(str, sys.version_info[:3]))
  assert found["platform"] == "cpu" and found["device"]
  assert all(isinstance(v, str) and "/" not in v for v in found.values())
  assert {"flax", "optax", "orbax-checkpoint", "ddil-jax"} <= found.keys()
  head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
  if head.returncode == 0:
    assert re.fullmatch(r"[0-9a-f]{40,64}(\+changes)?", found["git"])


def test_no_commit_where_the_package_is_not_tracked(tmp_path):
  """An environment inside somebody's checkout is not that checkout."""
  def git(*arguments):
    subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True)

  package = tmp_path / ".venv" / "ddil_jax"
  package.mkdir(parents=True)
  (package / "__init__.py").write_text("")
  assert logging._commit(package) is None
  git("init", "-q")
  (tmp_path / "readme").write_text("a")
  git("add", "readme")
  git("-c", "user.name=n", "-c", "user.email=e@example.org", "commit", "-qm", "m")
  assert logging._commit(package) is None
  git("add", str(package / "__init__.py"))
  git("-c", "user.name=n", "-c", "user.email=e@example.org", "commit", "-qm", "m")
  assert re.fullmatch("[0-9a-f]{40}", logging._commit(package))
  (package / "__init__.py").write_text("changed = 1\n")
  assert logging._commit(package).endswith("+changes")
