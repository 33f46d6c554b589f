import numpy as np
import pytest
from PIL import Image

from ddil_jax.errors import UsageError
from ddil_jax.evaluation import grids


def test_grid_places_and_maps_pixels():
  images = np.stack([np.full((2, 3, 1), v) for v in (-1.0, 0.0, 1.0, 2.0, -2.0)])
  sheet = grids.image_grid(images, columns=3)
  assert sheet.shape == (5, 11, 1) and sheet.dtype == np.uint8
  assert sheet[0, 0, 0] == 0 and sheet[0, 4, 0] == 128 and sheet[1, 10, 0] == 255  # first row: -1, 0, 1
  assert sheet[3, 0, 0] == 255 and sheet[4, 4, 0] == 0  # second row, clipped
  assert (sheet[2] == 255).all() and (sheet[3:, 8:] == 255).all()  # gap and empty place are white
  big = grids.image_grid(images, columns=3, gap=0, scale=2)
  np.testing.assert_array_equal(big[::2, ::2], grids.image_grid(images, columns=3, gap=0))


def test_bytes_come_back_from_floats():
  byte = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
  np.testing.assert_array_equal(grids.image_grid(byte / 127.5 - 1, columns=1)[..., 0], byte[0, ..., 0])


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_png_round_trip(tmp_path, channels, mode):
  sheet = np.random.default_rng(0).integers(0, 256, (5, 7, channels), dtype=np.uint8)
  path = tmp_path / "made" / "grid.png"
  grids.save_png(path, sheet)
  with Image.open(path) as im:
    assert im.mode == mode
    np.testing.assert_array_equal(np.asarray(im).reshape(sheet.shape), sheet)
  assert [p.name for p in path.parent.iterdir()] == ["grid.png"]


def test_bad_input_is_named(tmp_path):
  ok = np.zeros((2, 4, 4, 1))
  with pytest.raises(UsageError, match="2 channels"):
    grids.image_grid(np.zeros((1, 4, 4, 2)), 1)
  with pytest.raises(UsageError, match="columns 0"):
    grids.image_grid(ok, 0)
  with pytest.raises(UsageError, match="non-finite"):
    grids.image_grid(ok + np.nan, 1)
  with pytest.raises(UsageError, match=r"expected uint8"):
    grids.save_png(tmp_path / "x.png", ok[0])
  (tmp_path / "file").write_text("")
  with pytest.raises(UsageError, match="cannot write .*file/x.png"):
    grids.save_png(tmp_path / "file" / "x.png", grids.image_grid(ok, 2))
