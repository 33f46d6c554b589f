"""Data that the tests prepare once, and files in the published formats that they write themselves."""

import gzip
import io
import pathlib
import struct
import tarfile

import numpy as np
import pytest

from ddil_jax.data import pipeline
from tests.data import making


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory) -> pathlib.Path:
  root = tmp_path_factory.mktemp("digits")
  pipeline.load("digits", root)
  return root


def idx_bytes(array: np.ndarray) -> bytes:
  header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
  return gzip.compress(header + array.astype(np.uint8).tobytes())


@pytest.fixture
def idx_files(tmp_path):
  """A folder with the four files, 30 + 10 random images, and what was written into them."""
  rng = np.random.default_rng(0)
  folder, arrays = tmp_path / "given", {}
  folder.mkdir()
  for split, prefix, n in (("train", "train", 30), ("test", "t10k", 10)):
    images, labels = rng.integers(0, 256, (n, 28, 28)), np.arange(n) % 10
    images[0, 0, :2] = 0, 255
    (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(idx_bytes(images))
    (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(idx_bytes(labels))
    arrays[split] = (images, labels)
  return folder, arrays


def write_cifar(path: pathlib.Path, members: dict[str, bytes], links: dict[str, str] | None = None) -> None:
  with tarfile.open(path, "w:gz") as tar:
    for name, data in members.items():
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))
    for name, target in (links or {}).items():
      info = tarfile.TarInfo(name)
      info.type, info.linkname = tarfile.SYMTYPE, target
      tar.addfile(info)


@pytest.fixture
def cifar_members():
  """The six batch files, 4 records each, and what they hold: (members, {member: (images HWC, labels)})."""
  rng = np.random.default_rng(1)
  members, arrays = {"cifar-10-batches-bin/readme.html": b"<p>"}, {}
  for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
    images, labels = rng.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, 4)
    members[f"cifar-10-batches-bin/{name}.bin"] = b"".join(
        bytes([label]) + b"".join(image[:, :, c].tobytes() for c in range(3))
        for image, label in zip(images, labels, strict=True))
    arrays[name] = (images, labels)
  return members, arrays


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory) -> pathlib.Path:
  """A tiny pipeline of Stable Diffusion's kinds, and its networks' converted files; see `making.write_pipeline`."""
  pytest.importorskip("transformers", reason="CLIP's tokenizer: pip install -r requirements-test.txt")
  folder = tmp_path_factory.mktemp("pipeline")
  making.write_pipeline(folder)
  return folder
