import errno
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from ddil_jax.errors import RunError, UsageError
from ddil_jax import files

ROOT = pathlib.Path(__file__).parents[1]
ARRAYS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b/c": np.array([1, -2]),
          "none": np.zeros((0, 4)), "strided": np.arange(12.0).reshape(3, 4).T}
ABOUT = {"name": "x", "list": [1, 2.5, None]}


def test_arrays_come_back(tmp_path):
  path = tmp_path / "deep" / "x.safetensors"
  files.save_arrays(path, ARRAYS, ABOUT)
  arrays, about = files.load_arrays(path)
  assert about == ABOUT and set(arrays) == set(ARRAYS)
  for name, x in ARRAYS.items():
    np.testing.assert_array_equal(arrays[name], x)
    assert arrays[name].dtype == x.dtype
  first = path.read_bytes()
  files.save_arrays(path, ARRAYS, ABOUT)
  assert path.read_bytes() == first
  assert os.listdir(path.parent) == ["x.safetensors"]


def test_every_flipped_byte_is_noticed(tmp_path):
  path = tmp_path / "x.safetensors"
  files.save_arrays(path, {"a": np.ones(3, np.float32)}, {"n": 1})
  good = path.read_bytes()
  for i in range(len(good)):
    path.write_bytes(good[:i] + bytes([good[i] ^ 0x01]) + good[i + 1:])
    with pytest.raises(UsageError, match="x.safetensors"):
      files.load_arrays(path)
  path.write_bytes(safetensors.numpy.save({"a": np.ones(3, np.float32)}))  # no hash at all
  with pytest.raises(UsageError, match="damaged"):
    files.load_arrays(path)
  with pytest.raises(UsageError, match="no file"):
    files.load_arrays(tmp_path / "absent.safetensors")


def test_the_hash_covers_names_shapes_types_and_description():
  x = np.arange(4, dtype=np.int32)
  arrays = [{"a": x}, {"b": x}, {"a": x + 1}, {"a": x.reshape(2, 2)}, {"a": x.view(np.float32)}]
  variants = [files.digest(a) for a in arrays] + [files.digest({"a": x}, "about")]
  assert len(set(variants)) == len(variants)
  assert files.digest({"a": x, "b": x + 1}) == files.digest({"b": x + 1, "a": x})


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch):
  path = tmp_path / "x"
  files.write_bytes(path, b"old")

  def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(os, "replace", full)
  with pytest.raises(RunError, match="cannot write .*x: No space left on device; free space"):
    files.write_bytes(path, b"new")
  assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["x"]


def test_json_comes_back_and_mistakes_leave_the_old_file(tmp_path):
  path = tmp_path / "f.json"
  files.write_json(path, {"b": 1, "a": [1, 2]})
  assert files.read_json(path) == {"a": [1, 2], "b": 1}
  with pytest.raises(TypeError):
    files.write_json(path, {"a": object()})
  assert files.read_json(path) == {"a": [1, 2], "b": 1}
  with pytest.raises(UsageError, match="cannot write .*f.json/f: File exists"):
    files.write_bytes(path / "f", b"")
  (tmp_path / "folder").mkdir()
  with pytest.raises(UsageError, match="cannot write .*folder: Is a directory"):
    files.write_bytes(tmp_path / "folder", b"")
  assert sorted(os.listdir(tmp_path)) == ["f.json", "folder"]


def test_atomic_write_on_a_full_disk(tmp_path):
  """Half a file is never seen: the old content stays. The limit is the kernel's, in a process of its own."""
  script = ("import resource, sys\nfrom ddil_jax.errors import RunError\n"
            "from ddil_jax.files import write_bytes\n"
            "write_bytes(sys.argv[1], b'old')\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
            "try:\n  write_bytes(sys.argv[1], b'x' * 5000)\nexcept RunError as e:\n  print(e)\n")
  path = tmp_path / "f"
  done = subprocess.run([sys.executable, "-c", script, str(path)], cwd=ROOT, capture_output=True, text=True)
  assert done.stdout == f"cannot write {path}: File too large; free space and run the same command again\n"
  assert path.read_bytes() == b"old"
  assert os.listdir(tmp_path) == ["f"]
