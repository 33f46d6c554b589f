"""A folder of images: classes, splits, crops, transparency, and files that cannot be used."""

import numpy as np
import pytest
from PIL import Image

from ddil_jax.data import pipeline
from ddil_jax.errors import UsageError


def save(path, array, **kwargs):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.asarray(array, np.uint8)).save(path, **kwargs)


def solid(value, height=6, width=6):
  return np.full((height, width, 3), value, np.uint8)


def test_classes_and_splits(tmp_path):
  for i in range(20):
    save(tmp_path / ("cats" if i < 12 else "birds") / f"{i:02d}.png", solid(10 * i))
  train = pipeline.load("folder", path=tmp_path, image_size=6)
  test = pipeline.load("folder", path=tmp_path, split="test", image_size=6)
  assert train.num_classes == test.num_classes == 2
  # birds (12..19) come first in the sorted list; its 10th and 20th file are test.
  value = lambda data: np.rint((data.images[:, 0, 0, 0] + 1) * 127.5 / 10).astype(int).tolist()  # noqa: E731
  assert value(test) == [1, 11] and test.labels.tolist() == [1, 1]
  assert value(train) == [12, 13, 14, 15, 16, 17, 18, 19, 0, *range(2, 11)]
  assert train.labels.tolist() == [0] * 8 + [1] * 10


def test_split_folders(tmp_path):
  for i in range(3):
    save(tmp_path / "train" / f"{i}.png", solid(i))
  save(tmp_path / "test" / "x.png", solid(200))
  assert len(pipeline.load("folder", path=tmp_path, image_size=4).images) == 3
  test = pipeline.load("folder", tmp_path, "test", image_size=4)  # data_dir does as well
  np.testing.assert_allclose(test.images, np.full((1, 4, 4, 3), 200 / 127.5 - 1), atol=1e-6)


def test_centre_crop_grey_transparency_and_orientation(tmp_path):
  wide = np.concatenate([solid(0, 8, 4), solid(255, 8, 8), solid(0, 8, 4)], axis=1)
  save(tmp_path / "a.png", wide)
  rgba = np.zeros((8, 8, 4))
  save(tmp_path / "b.png", rgba)  # black, wholly transparent: white
  exif = Image.Exif()
  exif[0x0112] = 3  # upside down
  save(tmp_path / "c.png", np.concatenate([solid(255, 4, 8), solid(0, 4, 8)]), exif=exif)
  data = pipeline.load("folder", path=tmp_path, image_size=8, channels=1)
  assert data.images.shape == (3, 8, 8, 1) and data.num_classes == 1
  assert (data.images[0] == 1).all() and (data.images[1] == 1).all()
  assert (data.images[2, :4] == -1).all() and (data.images[2, 4:] == 1).all()


def test_bad_files_are_listed_with_reasons(tmp_path):
  save(tmp_path / "good.png", np.random.default_rng(0).integers(0, 256, (16, 16, 3)))
  (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:300])
  (tmp_path / "text.jpg").write_text("not a picture")
  Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "deep.png")
  (tmp_path / "notes.txt").write_text("not looked at")
  (tmp_path / ".hidden.png").write_text("not looked at")
  data = pipeline.load("folder", path=tmp_path, image_size=8)
  assert len(data.images) == 1
  reasons = dict(data.skipped)
  assert sorted(reasons) == ["cut.png", "deep.png", "text.jpg"]
  assert reasons["text.jpg"] == "not an image" and "not 8 bits" in reasons["deep.png"] and reasons["cut.png"]
  assert "3 files skipped" in pipeline.preflight(data)["summary"]
  (tmp_path / "good.png").unlink()
  with pytest.raises(UsageError, match="no usable image .* the first of 3 that failed: cut.png"):
    pipeline.load("folder", path=tmp_path, image_size=8)


def test_other_formats_are_not_decoded(tmp_path):
  """Whatever a file is called: Pillow's decoder of EPS starts Ghostscript."""
  save(tmp_path / "good.png", solid(7))
  Image.fromarray(solid(7)).save(tmp_path / "a.png", format="EPS")
  assert pipeline.load("folder", path=tmp_path, image_size=4).skipped == (("a.png", "not an image"),)


def test_bomb_is_refused(tmp_path, monkeypatch):
  save(tmp_path / "good.png", solid(7))
  save(tmp_path / "huge.png", solid(7, 40, 40))
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
  assert [file for file, _ in pipeline.load("folder", path=tmp_path, image_size=4).skipped] == ["huge.png"]


@pytest.mark.parametrize("options,match", [
    (dict(path="{tmp}/none", image_size=8), "is not a folder"),
    (dict(path="{tmp}"), "image_size is not given"),
    (dict(path="{tmp}", image_size=8, channels=2), "channels must be 1 or 3"),
    (dict(path="{tmp}", image_size=8), r"no usable image for split 'train' in .*\.png"),
    (dict(image_size=8), "give the path"),
])
def test_bad_arguments(tmp_path, options, match):
  options = {k: v.format(tmp=tmp_path) if isinstance(v, str) else v for k, v in options.items()}
  with pytest.raises(UsageError, match=match):
    pipeline.load("folder", **options)


def test_images_beside_class_folders(tmp_path):
  save(tmp_path / "a" / "1.png", solid(1))
  save(tmp_path / "2.png", solid(1))
  with pytest.raises(UsageError, match=r"2\.png lies beside the sub-folders a"):
    pipeline.load("folder", path=tmp_path, image_size=4)
