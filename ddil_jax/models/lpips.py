"""LPIPS, the learned perceptual distance, as a squared distance of embeddings."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddil_jax.errors import UsageError
from ddil_jax.models import preprocess
from ddil_jax.types import Array

# Stages of (max-pool window before it, convolutions); a convolution is (index in the published `features`, width,
# kernel, stride, padding). A stage ends in a tap, after its ReLU.
STAGES = {
    "alex": ((0, ((0, 64, 11, 4, 2),)),
             (3, ((3, 192, 5, 1, 2),)),
             (3, ((6, 384, 3, 1, 1),)),
             (0, ((8, 256, 3, 1, 1),)),
             (0, ((10, 256, 3, 1, 1),))),
    "vgg": tuple((2 * (stage > 0), tuple((i, width, 3, 1, 1) for i in convolutions))
                 for stage, (width, convolutions) in enumerate(
                     [(64, (0, 2)), (128, (5, 7)), (256, (10, 12, 14)), (512, (17, 19, 21)), (512, (24, 26, 28))])),
}
MIN_SIZE = {"alex": 31, "vgg": 16}  # pixels of a side, so that the last tap has at least one
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class LPIPS(nn.Module):
  """images [B,H,W,C] in [-1, 1] -> (no logits [B,0], embedding e [B,D]); version 0.1, with the linear heads.

      d(a, b) = sum_l 1/(H_l W_l) sum_hw sum_c w_lc (f_lc(a) - f_lc(b))^2,   f = features / |features| over channels

  Since w >= 0, d(a, b) = |e(a) - e(b)|^2 with e = sqrt(w / (H W)) f, concatenated over taps, pixels and channels:
  an image's features are computed once, however many pairs it is in. D grows with the size of the images.

  Attributes:
    net: "alex" (AlexNet) or "vgg" (VGG16).
    quantise: round images to 8-bit levels first, as if they came from files.

  Source: Zhang et al. 2018 (arXiv 1801.03924), eq. 1 and released code.
  """
  net: str = "alex"
  quantise: bool = False

  def distance(self, a: Array, b: Array) -> Array:
    """d(a, b) [B] of images [B,H,W,C]."""
    return jnp.sum(jnp.square(self(a)[1] - self(b)[1]), axis=-1)

  @nn.compact
  def __call__(self, images: Array) -> tuple[Array, Array]:
    if min(images.shape[1:3]) < MIN_SIZE[self.net]:
      raise UsageError(f"images of {images.shape[1]}x{images.shape[2]} pixels are too small for LPIPS with"
                       f" '{self.net}': at least {MIN_SIZE[self.net]} are needed")
    x = preprocess.levels(images, self.quantise) / 127.5 - 1
    x = (x - jnp.asarray(_SHIFT).reshape(1, 1, 1, 3)) / jnp.asarray(_SCALE).reshape(1, 1, 1, 3)
    parts = []
    for tap, f in enumerate(Backbone(self.net, name="features")(x)):
      w = self.param(f"lin{tap}", nn.initializers.ones_init(), (f.shape[-1],))
      e = unit(f) * jnp.sqrt(w / (f.shape[1] * f.shape[2])).reshape(1, 1, 1, -1)
      parts.append(e.reshape(len(e), -1))
    e = jnp.concatenate(parts, axis=-1)
    return e[:, :0], e


def unit(f: Array) -> Array:
  """f [B,h,w,c] / (|f| over channels + 1e-10); its gradient is finite where all channels are 0."""
  return f / (jnp.sqrt(jnp.maximum(jnp.sum(f * f, axis=-1, keepdims=True), 1e-20)) + 1e-10)


class Backbone(nn.Module):
  """The convolutions of torchvision's AlexNet or VGG16; x [B,H,W,3] -> one map [B,h,w,c] per stage."""
  net: str

  @nn.compact
  def __call__(self, x: Array) -> list[Array]:
    taps = []
    for window, convolutions in STAGES[self.net]:
      if window:
        x = nn.max_pool(x, (window, window), (2, 2))
      for index, width, kernel, stride, padding in convolutions:
        x = nn.relu(nn.Conv(width, (kernel, kernel), stride, padding, name=str(index),
                            precision=jax.lax.Precision.HIGHEST)(x))
      taps.append(x)
    return taps
