"""mnist, fashion_mnist and cifar10 from files that the user brings, good ones and odd ones."""

import gzip
import io
import os
import pathlib
import struct

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from ddil_jax.data import idx, pipeline
from ddil_jax.data.idx import FashionMnist
from ddil_jax.errors import UsageError
from tests.data.conftest import idx_bytes, write_cifar

REAL = pathlib.Path(os.environ.get("DDIL_DATA_DIR") or pathlib.Path(__file__).parents[3] / "shared" / "data")


@pytest.mark.slow
@pytest.mark.skipif(not (REAL / "fashion_mnist").is_dir(),
                    reason=f"no {REAL}/fashion_mnist (set DDIL_DATA_DIR)")
def test_real_fashion_mnist(tmp_path):
  for split, prefix, n in (("test", "t10k", 10_000), ("train", "train", 60_000)):
    data = pipeline.load("fashion_mnist", tmp_path, split, manual_dir=REAL)
    info = pipeline.preflight(data)
    assert (info["count"], info["shape"], info["num_classes"]) == (n, (28, 28, 1), 10)
    assert info["per_class"] == (n // 10, n // 10) and info["value_range"] == (-1, 1)
    # Against the file itself, past its header of 16 bytes.
    raw = gzip.decompress((REAL / "fashion_mnist" / f"{prefix}-images-idx3-ubyte.gz").read_bytes())[16:]
    stored = np.rint((data.images + 1) * 127.5).astype(np.uint8)
    assert stored.tobytes() == raw


def test_small_idx_files(tmp_path, idx_files):
  given, arrays = idx_files
  for split in ("train", "test"):
    data = pipeline.load("mnist", tmp_path / "data", split, manual_dir=given, checksums={})
    images, labels = arrays[split]
    np.testing.assert_allclose(data.images[..., 0], images / 127.5 - 1, atol=1e-6)
    assert data.images[0, 0, 0, 0] == -1 and data.images[0, 0, 1, 0] == 1
    np.testing.assert_array_equal(data.labels, labels)
  # Once prepared, the files are not needed any more.
  assert len(pipeline.load("mnist", tmp_path / "data").images) == 30


@pytest.mark.parametrize("place", ["downloads/manual/mnist", "downloads/manual", "mnist", "."])
def test_places_below_data_dir(tmp_path, idx_files, place):
  given, _ = idx_files
  (tmp_path / "data" / place).mkdir(parents=True, exist_ok=True)
  for file in given.iterdir():
    file.rename(tmp_path / "data" / place / file.name)
  assert len(pipeline.load("mnist", tmp_path / "data", checksums={}).images) == 30


def test_missing_files_are_named_with_place_and_source(tmp_path, idx_files):
  given, _ = idx_files
  (given / "train-labels-idx1-ubyte.gz").unlink()
  with pytest.raises(UsageError) as e:
    pipeline.load("fashion_mnist", tmp_path / "data", manual_dir=given)
  message = str(e.value)
  assert "missing train-labels-idx1-ubyte.gz;" in message and str(given) in message
  assert "github.com/zalandoresearch/fashion-mnist" in message and "\n" not in message
  with pytest.raises(UsageError, match=r"missing cifar-10-binary\.tar\.gz; looked in .*cs\.toronto\.edu"):
    pipeline.load("cifar10", tmp_path / "data")
  assert not (tmp_path / "data").exists() or os.listdir(tmp_path / "data") == []


def test_other_files_are_not_taken_for_the_published(tmp_path, idx_files):
  given, _ = idx_files
  with pytest.raises(UsageError, match="the published file 26421880: it is another file or incomplete"):
    pipeline.load("fashion_mnist", tmp_path / "data", manual_dir=given)
  name = "t10k-labels-idx1-ubyte.gz"
  sums = {name: FashionMnist.FILES[name]._replace(size=(given / name).stat().st_size)}
  with pytest.raises(UsageError, match=f"{name} has SHA-256 .* another file or damaged"):
    pipeline.load("fashion_mnist", tmp_path / "data", manual_dir=given, checksums=sums)


def header(*dims, magic=None):
  return (magic or bytes((0, 0, 8, len(dims)))) + struct.pack(f">{len(dims)}I", *dims)


@pytest.mark.parametrize("data,match", [
    (b"plain text", "cannot be read as gzip"),
    (gzip.compress(b""), "magic number 0x "),
    (gzip.compress(header(2, 28, 28, magic=bytes((0, 0, 13, 3))) + bytes(2 * 784)),
     "magic number 0x00000d03 where"),
    (gzip.compress(header(2) + bytes(2)), "magic number 0x00000801 where .* has 0x00000803"),
    (gzip.compress(header(2, 28, 28)[:9]), "ends inside its header"),
    (gzip.compress(header(2, 28, 28) + bytes(2 * 784 - 1)), "announces .* but 1567 follow"),
    (gzip.compress(header(2, 28, 28) + bytes(2 * 784 + 1)), "more than 1568 follow"),
    (gzip.compress(header(0, 28, 28)), "dimensions"),
    (gzip.compress(header(2**32 - 1, 2**32 - 1, 2**32 - 1)), "dimensions"),
    (gzip.compress(header(2, 28, 28) + bytes(2 * 784))[:-12], "cannot be read as gzip"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_odd_idx_files(tmp_path, data, match):
  path = tmp_path / "images.gz"
  path.write_bytes(data)
  with pytest.raises(UsageError, match=match) as e:
    idx.read_idx(path, 3)
  assert str(path) in str(e.value)


@pytest.mark.parametrize("images,labels,match", [
    (np.zeros((10, 8, 8)), np.zeros(10), "images of 8x8, mnist has 28x28"),
    (np.zeros((10, 28, 28)), np.zeros(9), "has 10 images, .* 9 labels"),
    (np.zeros((10, 28, 28)), np.full(10, 10), r"label 10 where mnist has 0\.\.9"),
])
def test_idx_files_that_do_not_belong_together(tmp_path, idx_files, images, labels, match):
  given, _ = idx_files
  (given / "t10k-images-idx3-ubyte.gz").write_bytes(idx_bytes(images))
  (given / "t10k-labels-idx1-ubyte.gz").write_bytes(idx_bytes(labels))
  with pytest.raises(UsageError, match=match):
    pipeline.load("mnist", tmp_path / "data", manual_dir=given, checksums={})


def test_cifar10(tmp_path, cifar_members):
  members, arrays = cifar_members
  write_cifar(tmp_path / "cifar-10-binary.tar.gz", members)
  train = pipeline.load("cifar10", tmp_path / "data", manual_dir=tmp_path, checksums={})
  test = pipeline.load("cifar10", tmp_path / "data", "test")
  assert train.images.shape == (20, 32, 32, 3) and test.images.shape == (4, 32, 32, 3)
  for i in range(5):
    images, labels = arrays[f"data_batch_{i + 1}"]
    np.testing.assert_allclose(train.images[4 * i:4 * i + 4], images / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(train.labels[4 * i:4 * i + 4], labels)
  np.testing.assert_array_equal(test.labels, arrays["test_batch"][1])
  with pytest.raises(UsageError, match="published file 170052171"):
    pipeline.load("cifar10", tmp_path / "other", manual_dir=tmp_path)


BATCH = "cifar-10-batches-bin/data_batch_3.bin"


@pytest.mark.parametrize("change,match", [
    (lambda m: m.pop(BATCH), f"has no member {BATCH}"),
    (lambda m: m.update({"../evil.bin": b"x"}), "'../evil.bin' points out of the archive"),
    (lambda m: m.update({"/etc/evil": b"x"}), "'/etc/evil' points out of the archive"),
    (lambda m: m.update({BATCH: m[BATCH][:-1]}), f"{BATCH} has 12291 bytes"),
    (lambda m: m.update({BATCH: b""}), f"{BATCH} has 0 bytes"),
    (lambda m: m.update({BATCH: b"\x0a" + m[BATCH][1:]}), r"label 10 where cifar10 has 0\.\.9"),
])
def test_odd_cifar_archives(tmp_path, cifar_members, change, match):
  members, _ = cifar_members
  change(members)
  write_cifar(tmp_path / "cifar-10-binary.tar.gz", members)
  with pytest.raises(UsageError, match=match):
    pipeline.load("cifar10", tmp_path / "data", manual_dir=tmp_path, checksums={})
  assert os.listdir(tmp_path / "data") == []


def test_cifar_links_and_broken_archives(tmp_path, cifar_members):
  members, _ = cifar_members
  path = tmp_path / "cifar-10-binary.tar.gz"
  del members[BATCH]
  write_cifar(path, members, links={BATCH: "/etc/hostname"})
  with pytest.raises(UsageError, match="not a plain file"):
    pipeline.load("cifar10", tmp_path / "data", manual_dir=tmp_path, checksums={})
  path.write_bytes(path.read_bytes()[:5000])
  with pytest.raises(UsageError, match="cannot be read as a tar.gz archive"):
    pipeline.load("cifar10", tmp_path / "data", manual_dir=tmp_path, checksums={})


def test_set_prepared_by_plain_tfds(tmp_path, idx_files):
  """tfds' own mnist has an Image feature (PNG) and version 3.0.1; its files are read as they are."""
  _, arrays = idx_files

  class Plain(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    name = "mnist"
    VERSION = tfds.core.Version("3.0.1")

    def _info(self):
      features = {"image": tfds.features.Image(shape=(28, 28, 1)),
                  "label": tfds.features.ClassLabel(num_classes=10)}
      return tfds.core.DatasetInfo(builder=self, disable_shuffling=True,
                                   features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
      return {split: self._generate_examples(*a) for split, a in arrays.items()}

    def _generate_examples(self, images, labels):
      for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        png = io.BytesIO()
        Image.fromarray(image.astype(np.uint8)).save(png, "PNG")
        png.seek(0)
        yield i, {"image": png, "label": int(label)}

  Plain(data_dir=tmp_path, file_format="array_record").download_and_prepare()
  data = pipeline.load("mnist", tmp_path, "test")
  np.testing.assert_allclose(data.images[..., 0], arrays["test"][0] / 127.5 - 1, atol=1e-6)
  np.testing.assert_array_equal(data.labels, arrays["test"][1])
