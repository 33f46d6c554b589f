"""The InceptionV3 of FID: the network of the TensorFlow release of December 2015, as its PyTorch port has it."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddil_jax.models import preprocess
from ddil_jax.types import Array

SIZE = 299
RESIZES = ("torch", "tf1", "clean")


class InceptionV3(nn.Module):
  """images [B,H,W,C] in [-1, 1] -> (logits [B,1008], pool3 features [B,2048]).

  The network differs from other InceptionV3s in its pooling branches: averages do not count the padding, and the
  last block takes a maximum. Names of sub-modules are those of the published weights.

  `resize` is how an image gets to 299x299 and to the network's range; FIDs under different ones differ:

      torch  bilinear, half-pixel centres, no antialias; level / 127.5 - 1     (pytorch-fid)
      tf1    bilinear, corners aligned, no antialias; (level - 128) / 128      (the TensorFlow graph, torch-fidelity)
      clean  Pillow's bicubic with antialias, clipped; (level - 128) / 128     (clean-fid)

  Attributes:
    resize: one of RESIZES.
    quantise: round images to 8-bit levels first, as if they came from files.
    logit_bias: add the last layer's bias; the inception score as released does not.

  Source: Szegedy et al. 2015 (arXiv 1512.00567); FID: Heusel et al. 2017 (arXiv 1706.08500); inception score:
  Salimans et al. 2016 (arXiv 1606.03498), released code; resizes: Parmar et al. 2021 (arXiv 2104.11222).
  """
  resize: str = "torch"
  quantise: bool = True
  logit_bias: bool = False

  @nn.compact
  def __call__(self, images: Array) -> tuple[Array, Array]:
    x = preprocess.levels(images, self.quantise)
    if self.resize == "torch":
      x = preprocess.bilinear(x, SIZE) / 127.5 - 1
    elif self.resize == "tf1":
      x = (preprocess.bilinear_tf1(x, SIZE) - 128) / 128
    else:
      x = (jnp.clip(preprocess.bicubic(x, SIZE, SIZE), 0, 255) - 128) / 128

    x = Conv(32, (3, 3), 2, name="Conv2d_1a_3x3")(x)
    x = Conv(32, (3, 3), padding="VALID", name="Conv2d_2a_3x3")(x)
    x = Conv(64, (3, 3), name="Conv2d_2b_3x3")(x)
    x = nn.max_pool(x, (3, 3), (2, 2))
    x = Conv(80, name="Conv2d_3b_1x1")(x)
    x = Conv(192, (3, 3), padding="VALID", name="Conv2d_4a_3x3")(x)
    x = nn.max_pool(x, (3, 3), (2, 2))
    for name, width in (("5b", 32), ("5c", 64), ("5d", 64)):
      x = BlockA(width, name=f"Mixed_{name}")(x)
    x = BlockB(name="Mixed_6a")(x)
    for name, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
      x = BlockC(width, name=f"Mixed_{name}")(x)
    x = BlockD(name="Mixed_7a")(x)
    x = BlockE("average", name="Mixed_7b")(x)
    x = BlockE("max", name="Mixed_7c")(x)
    features = jnp.mean(x, axis=(1, 2))
    logits = nn.Dense(1008, self.logit_bias, precision=jax.lax.Precision.HIGHEST, name="fc")(features)
    return logits, features


class Conv(nn.Module):
  """Convolution without bias, batch normalisation by stored statistics, ReLU; stride 2 has no padding."""
  features: int
  kernel: tuple[int, int] = (1, 1)
  stride: int = 1
  padding: str = "SAME"

  @nn.compact
  def __call__(self, x: Array) -> Array:
    padding = "VALID" if self.stride > 1 else self.padding
    # In full precision: the number should not depend on the device.
    x = nn.Conv(self.features, self.kernel, self.stride, padding, use_bias=False, name="conv",
                precision=jax.lax.Precision.HIGHEST)(x)
    return nn.relu(nn.BatchNorm(use_running_average=True, epsilon=1e-3, name="bn")(x))


def _average(x):
  return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _concatenate(*branches):
  return jnp.concatenate(branches, axis=-1)


class BlockA(nn.Module):
  """35x35: 1x1, 5x5, two 3x3, pooling of `width` channels."""
  width: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    five = Conv(48, name="branch5x5_1")(x)
    five = Conv(64, (5, 5), name="branch5x5_2")(five)
    three = Conv(64, name="branch3x3dbl_1")(x)
    three = Conv(96, (3, 3), name="branch3x3dbl_2")(three)
    three = Conv(96, (3, 3), name="branch3x3dbl_3")(three)
    return _concatenate(Conv(64, name="branch1x1")(x), five, three, Conv(self.width, name="branch_pool")(_average(x)))


class BlockB(nn.Module):
  """35x35 to 17x17."""

  @nn.compact
  def __call__(self, x: Array) -> Array:
    three = Conv(64, name="branch3x3dbl_1")(x)
    three = Conv(96, (3, 3), name="branch3x3dbl_2")(three)
    three = Conv(96, (3, 3), 2, name="branch3x3dbl_3")(three)
    return _concatenate(Conv(384, (3, 3), 2, name="branch3x3")(x), three, nn.max_pool(x, (3, 3), (2, 2)))


class BlockC(nn.Module):
  """17x17: 1x1, 7x7 and two 7x7 as rows and columns of `width` channels, pooling."""
  width: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    row, column, w = (1, 7), (7, 1), self.width
    seven = Conv(w, name="branch7x7_1")(x)
    seven = Conv(w, row, name="branch7x7_2")(seven)
    seven = Conv(192, column, name="branch7x7_3")(seven)
    twice = Conv(w, name="branch7x7dbl_1")(x)
    for i, (width, kernel) in enumerate([(w, column), (w, row), (w, column), (192, row)]):
      twice = Conv(width, kernel, name=f"branch7x7dbl_{i + 2}")(twice)
    return _concatenate(Conv(192, name="branch1x1")(x), seven, twice, Conv(192, name="branch_pool")(_average(x)))


class BlockD(nn.Module):
  """17x17 to 8x8."""

  @nn.compact
  def __call__(self, x: Array) -> Array:
    three = Conv(192, name="branch3x3_1")(x)
    three = Conv(320, (3, 3), 2, name="branch3x3_2")(three)
    seven = Conv(192, name="branch7x7x3_1")(x)
    seven = Conv(192, (1, 7), name="branch7x7x3_2")(seven)
    seven = Conv(192, (7, 1), name="branch7x7x3_3")(seven)
    seven = Conv(192, (3, 3), 2, name="branch7x7x3_4")(seven)
    return _concatenate(three, seven, nn.max_pool(x, (3, 3), (2, 2)))


class BlockE(nn.Module):
  """8x8: 1x1, 3x3 and two 3x3, the last of each split in a row and a column; pooling, "average" or "max"."""
  pool: str

  @nn.compact
  def __call__(self, x: Array) -> Array:
    row, column = (1, 3), (3, 1)
    three = Conv(384, name="branch3x3_1")(x)
    twice = Conv(448, name="branch3x3dbl_1")(x)
    twice = Conv(384, (3, 3), name="branch3x3dbl_2")(twice)
    pooled = _average(x) if self.pool == "average" else nn.max_pool(x, (3, 3), (1, 1), "SAME")
    return _concatenate(
        Conv(320, name="branch1x1")(x),
        Conv(384, row, name="branch3x3_2a")(three), Conv(384, column, name="branch3x3_2b")(three),
        Conv(384, row, name="branch3x3dbl_3a")(twice), Conv(384, column, name="branch3x3dbl_3b")(twice),
        Conv(192, name="branch_pool")(pooled))
