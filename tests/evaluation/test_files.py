import errno
import os

import numpy as np
import pytest
import safetensors.numpy

from ddil_jax.errors import RunError, UsageError
from ddil_jax.evaluation import files

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
  with pytest.raises(RunError, match="no space left for .*x; free some"):
    files.write_bytes(path, b"new")
  assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["x"]
