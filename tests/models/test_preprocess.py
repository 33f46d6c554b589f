"""Quantisation and resizes against the libraries that the ports use."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ddil_jax.models import preprocess

SIZES = [(8, 299), (32, 32), (97, 24)]


def random_levels(h, w=None, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (2, h, w or h, 3)).astype(np.uint8)


def test_levels_are_those_of_a_file():
  rng = np.random.default_rng(0)
  # Not near the middle between two levels, where roundings of the formula decide.
  x = ((rng.integers(-30, 286, (2, 9, 9, 3)) + rng.uniform(-0.4, 0.4, (2, 9, 9, 3))) / 127.5 - 1).astype(np.float32)
  levels = np.asarray(preprocess.levels(x, True))
  # The rounding of EDM's and most others' image files.
  np.testing.assert_array_equal(levels, (x * 127.5 + 128).clip(0, 255).astype(np.uint8))
  every = np.arange(256, dtype=np.float32).reshape(1, 16, 16, 1)
  np.testing.assert_array_equal(preprocess.levels(every / 127.5 - 1, True)[..., 1:2], every)
  raw = np.asarray(preprocess.levels(x, False))
  np.testing.assert_allclose(raw, 127.5 * (x + 1), rtol=1e-5)
  assert raw.min() < 0 and raw.max() > 255


@pytest.mark.parametrize("size_in, size", SIZES)
def test_bilinear_is_torchs(size_in, size):
  torch = pytest.importorskip("torch")
  x = random_levels(size_in, size_in + 3).astype(np.float32)
  wanted = torch.nn.functional.interpolate(torch.from_numpy(x.transpose(0, 3, 1, 2)).double(), (size, size),
                                           mode="bilinear", align_corners=False).numpy().transpose(0, 2, 3, 1)
  np.testing.assert_allclose(preprocess.bilinear(jnp.asarray(x), size), wanted, atol=1e-3)


@pytest.mark.parametrize("size_in, size", SIZES)
def test_bilinear_tf1_interpolates_from_the_corner(size_in, size):
  """By gathering the two neighbours, along one axis after the other."""
  x = random_levels(size_in, size_in + 3).astype(np.float64)

  def along(x, axis):
    n = x.shape[axis]
    source = np.arange(size) * n / size
    low = np.floor(source).astype(int)
    part = (source - low).reshape([-1 if a == axis else 1 for a in range(4)])
    return (1 - part) * np.take(x, low, axis) + part * np.take(x, np.minimum(low + 1, n - 1), axis)

  ours = preprocess.bilinear_tf1(jnp.asarray(x, jnp.float32), size)
  np.testing.assert_allclose(ours, along(along(x, 1), 2), atol=1e-3)
  if size_in != size:
    assert np.abs(ours - preprocess.bilinear(jnp.asarray(x, jnp.float32), size)).max() > 1


@pytest.mark.parametrize("size_in, size", SIZES)
def test_bicubic_is_pillows(size_in, size):
  x = random_levels(size_in, size_in + 3)
  floats = [[Image.fromarray(channel).resize((size, size + 5), Image.BICUBIC) for channel in image]
            for image in x.transpose(0, 3, 1, 2).astype(np.float32)]
  bicubic = jax.jit(functools.partial(preprocess.bicubic, height=size + 5, width=size), static_argnames="rounded")
  ours = bicubic(jnp.asarray(x, jnp.float32))
  np.testing.assert_allclose(ours, np.asarray([[np.asarray(c) for c in image] for image in floats])
                             .transpose(0, 2, 3, 1), atol=1e-3)
  wanted = np.stack([np.asarray(Image.fromarray(image).resize((size, size + 5), Image.BICUBIC)) for image in x])
  wrong = np.abs(np.asarray(bicubic(jnp.asarray(x, jnp.float32), rounded=True)) - wanted)
  assert wrong.max() <= 1 and np.mean(wrong > 0) < 5e-4  # a tie may round the other way
