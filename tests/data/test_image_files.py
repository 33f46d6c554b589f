"""Images in files: what is read, in which order, and what is refused by name."""

import zipfile

import numpy as np
import pytest
from PIL import Image

from ddil_jax.data import image_files
from ddil_jax.data.image_files import open_images
from ddil_jax.errors import UsageError

PIXELS = np.random.default_rng(0).integers(0, 256, (23, 6, 5, 3), np.uint8)
UNIT = (PIXELS / 127.5 - 1).astype(np.float32)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
  monkeypatch.setattr(image_files, "_BATCH", 10)


def read(images):
  batches = list(images.batches())
  assert [len(b) for b in batches] == [10] * (images.shape[0] // 10) + [images.shape[0] % 10][:images.shape[0] % 10]
  together = np.concatenate(batches)
  assert together.dtype == np.float32 and together.shape == images.shape
  return together


def save_folder(root, pixels=PIXELS, name="{i:03d}.png", **options):
  for i, image in enumerate(pixels):
    path = root / name.format(i=i)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.squeeze()).save(path, **options)
  return root


# What is read


def test_folder(tmp_path):
  images = open_images(save_folder(tmp_path / "my samples"))
  assert images.shape == (23, 6, 5, 3) and images.labels is None and images.classes == ()
  np.testing.assert_allclose(read(images), UNIT, atol=1e-6)
  np.testing.assert_array_equal(read(images), read(images))  # again and again
  assert images.name == f"my_samples-{images.content[:8]}"


def test_sub_folders_are_classes(tmp_path):
  for label, i in (("dog", 0), ("cat", 1), ("cat", 2)):
    save_folder(tmp_path, PIXELS[i:i + 1], f"{label}/{i}.png")
  images = open_images(tmp_path)
  assert images.classes == ("cat", "dog") and images.labels.tolist() == [0, 0, 1]
  np.testing.assert_allclose(np.concatenate(list(images.batches())), UNIT[[1, 2, 0]], atol=1e-6)


def test_grey_and_colour(tmp_path):
  grey = open_images(save_folder(tmp_path / "grey", PIXELS[..., :1]))
  assert grey.shape == (23, 6, 5, 1)
  np.testing.assert_allclose(read(grey), UNIT[..., :1], atol=1e-6)
  as_colour = open_images(tmp_path / "grey", channels=3)
  np.testing.assert_allclose(read(as_colour), UNIT[..., :1].repeat(3, axis=3), atol=1e-6)
  # RGB files whose channels are equal are grey images.
  save_folder(tmp_path / "equal", PIXELS[..., :1].repeat(3, axis=3))
  np.testing.assert_allclose(read(open_images(tmp_path / "equal", channels=1)), UNIT[..., :1], atol=1e-6)


@pytest.mark.parametrize("save", [np.save, lambda path, x: np.savez(path, x), lambda path, x: np.savez(path, images=x),
                                  lambda path, x: np.savez_compressed(path, other=x[:1], images=x)],
                         ids=["npy", "npz", "npz by name", "compressed"])
def test_arrays(tmp_path, save):
  path = tmp_path / f"x.{'npy' if save is np.save else 'npz'}"
  save(path, PIXELS)
  np.testing.assert_allclose(read(open_images(path)), UNIT, atol=1e-6)
  save(path, UNIT)
  np.testing.assert_array_equal(read(open_images(path)), UNIT)
  save(path, UNIT.astype(np.float64)[..., 0])  # [N, H, W]
  np.testing.assert_array_equal(read(open_images(path)), UNIT[..., :1])


def test_labels_of_an_archive(tmp_path):
  labels = np.arange(23, dtype=np.int64) % 4
  np.savez(tmp_path / "a.npz", images=PIXELS, labels=labels)
  np.savez(tmp_path / "b.npz", PIXELS, labels)
  for name in ("a.npz", "b.npz"):
    assert open_images(tmp_path / name).labels.tolist() == labels.tolist()


def test_content_is_that_of_the_pixels_files(tmp_path):
  save_folder(tmp_path / "a")
  save_folder(tmp_path / "b")
  first = open_images(tmp_path / "a")
  assert open_images(tmp_path / "b").content == first.content
  changed = PIXELS.copy()
  changed[22, 0, 0, 0] ^= 1
  save_folder(tmp_path / "b", changed)
  assert open_images(tmp_path / "b").content != first.content
  np.save(tmp_path / "x.npy", PIXELS)
  array = open_images(tmp_path / "x.npy")
  assert len({array.content, first.content}) == 2 and array.preprocessing == "2 p / 255 - 1"


def test_an_array_is_read_a_batch_at_a_time(tmp_path):
  """A file far larger than memory (sparse on disk) opens, but for its hash, which is not asked for here."""
  path = tmp_path / "x.npy"
  np.save(path, PIXELS)
  array = image_files._arrays(path)[""]
  with open(path, "r+b") as file:
    file.truncate(path.stat().st_size + 2**40)
  rows = array._replace(shape=(2**33, 6, 5, 3)).rows(10)
  np.testing.assert_array_equal(next(rows), PIXELS[:10])


# What is refused


@pytest.mark.parametrize("make, words", [
    (lambda p: p, "no folder or file"),
    (lambda p: (p.mkdir(), p)[1], "holds no images"),
    (lambda p: (p.write_text("x"), p)[1], "neither a folder nor an .npy or .npz file"),
])
def test_nothing_there(tmp_path, make, words):
  with pytest.raises(UsageError, match=words):
    open_images(make(tmp_path / "x"))


def test_odd_files_are_named(tmp_path):
  save_folder(tmp_path)
  (tmp_path / "011.png").write_bytes((tmp_path / "011.png").read_bytes()[:60])
  with pytest.raises(UsageError, match=r"011\.png cannot be read"):
    list(open_images(tmp_path).batches())
  (tmp_path / "011.png").write_text("no image")
  with pytest.raises(UsageError, match=r"011\.png cannot be read: not an image"):
    list(open_images(tmp_path).batches())
  Image.fromarray(PIXELS[0, :4]).save(tmp_path / "011.png")
  with pytest.raises(UsageError, match=r"011\.png is 5x4, but .*000\.png is 5x6; images of one size"):
    list(open_images(tmp_path).batches())
  Image.fromarray(np.full((6, 5), 40_000, np.uint16)).save(tmp_path / "011.png")
  with pytest.raises(UsageError, match=r"011\.png cannot be read: pixel mode I;16 is not 8 bits a channel"):
    list(open_images(tmp_path).batches())
  Image.fromarray(PIXELS[0]).save(tmp_path / "011.png")
  with pytest.raises(UsageError, match=r"000\.png is in colour; grey images are needed"):
    open_images(tmp_path, channels=1)
  save_folder(tmp_path, PIXELS[:1], "cat/{i}.png")
  with pytest.raises(UsageError, match="lies beside the sub-folders"):
    open_images(tmp_path)


@pytest.mark.parametrize("array, words", [
    (UNIT * 1.01, "image 0 of .* has values from .* floats have to lie in"),
    (UNIT * np.where(np.arange(23) == 17, np.nan, 1).reshape(23, 1, 1, 1), "image 17 of .* has values from nan"),
    (PIXELS.astype(np.float32), r"values from .*; floats have to lie in \[-1, 1\]"),
    (PIXELS / 255, r"these look like images in \[0, 1\]; store 2 x - 1, or uint8"),
    (PIXELS.astype(np.int64), "is int64; uint8, or floats"),
    (PIXELS.transpose(0, 3, 1, 2).copy(), r"the shape \(23, 3, 6, 5\).*; the channels come last"),
    (PIXELS[:, 0, 0], r"the shape \(23, 3\); images \[N, H, W, C\]"),
    (PIXELS[:0], r"the shape \(0, 6, 5, 3\)"),
    (np.asfortranarray(PIXELS), "Fortran order"),
])
def test_odd_arrays(tmp_path, array, words):
  np.save(tmp_path / "x.npy", array)
  with pytest.raises(UsageError, match=words):
    list(open_images(tmp_path / "x.npy").batches())


def test_damaged_arrays(tmp_path):
  path = tmp_path / "x.npy"
  np.save(path, PIXELS)
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(UsageError, match="ends after 21 of 23 images"):
    list(open_images(path).batches())
  path.write_bytes(b"\x93NUMPY\x01\x00")
  with pytest.raises(UsageError, match="cannot be read as .npy"):
    open_images(path)
  (tmp_path / "x.npz").write_bytes(b"PK no archive")
  with pytest.raises(UsageError, match="cannot be read as .npz"):
    open_images(tmp_path / "x.npz")
  np.savez(tmp_path / "x.npz", images=PIXELS)
  data = bytearray((tmp_path / "x.npz").read_bytes())
  data[1000] ^= 1
  (tmp_path / "x.npz").write_bytes(data)
  with pytest.raises(UsageError, match="cannot be read as .npz: Bad CRC-32"):
    list(open_images(tmp_path / "x.npz").batches())
  np.savez(tmp_path / "y.npz", pictures=PIXELS)
  with pytest.raises(UsageError, match="no array images or arr_0; it has pictures"):
    open_images(tmp_path / "y.npz")
  np.savez(tmp_path / "z.npz", images=PIXELS, labels=np.arange(22))
  with pytest.raises(UsageError, match=r"labels of .* are int64 \(22,\); integers \[23\]"):
    open_images(tmp_path / "z.npz")


def test_nothing_is_unpickled(tmp_path):
  class Evil:
    def __reduce__(self):
      return pytest.fail, ("unpickled",)

  np.save(tmp_path / "x.npy", np.array([Evil()], dtype=object), allow_pickle=True)
  with pytest.raises(UsageError):
    list(open_images(tmp_path / "x.npy").batches())
  with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
    archive.write(tmp_path / "x.npy", "images.npy")
  with pytest.raises(UsageError):
    list(open_images(tmp_path / "x.npz").batches())
