"""The embedded set: split rule, range, no TensorFlow, atomic and concurrent preparation, damage."""

import hashlib
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from ddil_jax.data import builder, pipeline
from ddil_jax.data.digits import Digits, held_out
from ddil_jax.errors import UsageError

ROOT = pathlib.Path(__file__).parents[2]


def start(code: str, *args) -> subprocess.Popen:
  return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_both_splits_are_the_whole_set(digits_dir):
  digits = load_digits()
  mask = held_out(digits.target)
  for split, which in (("train", ~mask), ("test", mask)):
    data = pipeline.load("digits", digits_dir, split)
    # Pixel 0 is -1 and 16 is 1, exactly; the order is that of the file.
    np.testing.assert_array_equal(data.images[..., 0] * 8 + 8, digits.images[which])
    np.testing.assert_array_equal(data.labels, digits.target[which])
    assert data.images.dtype == np.float32 and data.labels.dtype == np.int32
    assert data.images.min() == -1 and data.images.max() == 1
    assert (data.num_classes, data.value_range, data.image_shape) == (10, (0, 16), (8, 8, 1))
  assert mask.sum() == 500 and len(mask) == 1797


def test_split_is_stratified_and_fixed():
  labels = load_digits().target
  mask = held_out(labels)
  share = np.bincount(labels[mask]) / np.bincount(labels)
  assert np.abs(share - 500 / 1797).max() < 0.01
  # Every stretch of the file (its order is that of the writers) gives to both splits.
  assert all(25 < m.sum() / len(m) * 100 < 31 for m in np.array_split(mask, 6))
  # The rule is part of every reported number: a change of it must not go unnoticed.
  assert hashlib.sha256(np.packbits(mask).tobytes()).hexdigest()[:16] == "045c4b47e95d72ed"


def test_prepares_and_reads_without_tensorflow(tmp_path):
  code = ("import sys; from ddil_jax.data import pipeline; d = sys.argv[1];"
          "a = pipeline.load('digits', d); b = pipeline.load('digits', d, 'test');"
          "assert len(a.images) == 1297 and len(b.images) == 500;"
          "print('tensorflow' in sys.modules)")
  out, err = (p := start(code, tmp_path)).communicate()
  assert p.returncode == 0, err
  assert out == "False\n"  # and tfds' announcements are not on stdout
  assert sorted(os.listdir(tmp_path)) == ["digits"]  # no temporary folder is left


def test_several_processes_prepare_at_once(tmp_path):
  # All wait for the same moment, so that none finds the set prepared.
  code = ("import sys, time, hashlib; from ddil_jax.data import pipeline; import sklearn.datasets;"
          "print('ready', flush=True); sys.stdin.readline();"
          "a = pipeline.load('digits', sys.argv[1]); print(hashlib.sha256(a.images.tobytes()).hexdigest())")
  workers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
             for _ in range(3)]
  for worker in workers:
    assert worker.stdout.readline() == "ready\n"
  for worker in workers:
    worker.stdin.write("go\n")
    worker.stdin.flush()
  results = [worker.communicate() for worker in workers]
  assert [w.returncode for w in workers] == [0] * 3, results
  assert len({out for out, _ in results}) == 1
  assert sorted(os.listdir(tmp_path)) == ["digits"] and os.listdir(tmp_path / "digits") == ["1.0.0"]


def test_loser_of_the_race_uses_the_winners_result(tmp_path, monkeypatch, digits_dir):
  rename = os.rename

  def another_is_first(source, target):
    builder.prepare(Digits, tmp_path)  # a whole second preparation, just before ours would be put in place
    rename(source, target)

  def once(source, target):
    monkeypatch.setattr(os, "rename", rename)
    another_is_first(source, target)

  monkeypatch.setattr(os, "rename", once)
  data = pipeline.load("digits", tmp_path)
  np.testing.assert_array_equal(data.images, pipeline.load("digits", digits_dir).images)
  assert sorted(os.listdir(tmp_path)) == ["digits"]


def test_failed_preparation_leaves_nothing(tmp_path, monkeypatch):
  def broken(self):
    raise UsageError("odd source")

  monkeypatch.setattr(Digits, "read", broken)
  with pytest.raises(UsageError, match="^odd source$"):
    pipeline.load("digits", tmp_path)
  assert os.listdir(tmp_path) == []


def test_damaged_files_are_named(tmp_path):
  pipeline.load("digits", tmp_path)
  [path] = (tmp_path / "digits" / "1.0.0").glob("digits-train.array_record*")
  path.write_bytes(path.read_bytes()[:-70_000])
  with pytest.raises(UsageError, match=r"cannot read the prepared data in .*1\.0\.0.*remove that folder"):
    pipeline.load("digits", tmp_path)


def test_data_dir_that_is_a_file_or_in_the_way(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UsageError, match="--data_dir"):
    pipeline.load("digits", tmp_path / "file")
  (tmp_path / "digits" / "1.0.0").mkdir(parents=True)
  (tmp_path / "digits" / "1.0.0" / "notes.txt").write_text("mine")
  with pytest.raises(UsageError, match="in the way"):
    pipeline.load("digits", tmp_path)
  assert (tmp_path / "digits" / "1.0.0" / "notes.txt").read_text() == "mine"


def test_default_data_dir(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.delenv("DDIL_DATA", raising=False)
  assert pipeline.default_data_dir() == pathlib.Path("data")
  monkeypatch.setenv("DDIL_DATA", str(tmp_path / "there"))
  pipeline.load("digits")
  assert (tmp_path / "there" / "digits" / "1.0.0" / "dataset_info.json").is_file()


def test_resized(digits_dir):
  data = pipeline.load("digits", digits_dir, image_size=16)
  native = pipeline.load("digits", digits_dir, image_size=8)
  assert data.images.shape == (1297, 16, 16, 1) and native.images.shape == (1297, 8, 8, 1)
  assert data.images.min() >= -1 and data.images.max() <= 1
  # Averaging 2x2 pixels gives about the original back.
  back = data.images.reshape(1297, 8, 2, 8, 2, 1).mean((2, 4))
  assert np.abs(back - native.images).mean() < 0.1
