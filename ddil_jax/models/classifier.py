"""A small image classifier; its penultimate layer is the feature space of the metrics."""

import flax.linen as nn

from ddil_jax.models.layers import GroupNorm
from ddil_jax.types import Array


class Classifier(nn.Module):
  """images [B,H,W,C] in [-1, 1] -> (logits [B, num_classes], features [B, feature_dim]).

  3x3 convolution, GroupNorm, SiLU and 2x2 average pooling until the map is at most 4x4, the width
  doubling each time; the map is flattened (where things are matters), not averaged. The features
  are linear, before the activation: closer to the Gaussian that a Frechet distance assumes.

  Attributes:
    channels: width of the first convolution.
  """
  num_classes: int
  channels: int = 16
  feature_dim: int = 32

  @nn.compact
  def __call__(self, images: Array) -> tuple[Array, Array]:
    h, width, i = images, self.channels, 0
    while max(h.shape[1:3]) > 4:
      h = self._stage(h, width, i)
      h = nn.avg_pool(h, (2, 2), (2, 2), "SAME", count_include_pad=False)
      width, i = 2 * width, i + 1
    h = self._stage(h, width, i)
    features = nn.Dense(self.feature_dim, name="features")(h.reshape(h.shape[0], -1))
    return nn.Dense(self.num_classes, name="logits")(nn.silu(features)), features

  def _stage(self, h: Array, width: int, i: int) -> Array:
    h = nn.Conv(width, (3, 3), name=f"conv_{i}")(h)
    return nn.silu(GroupNorm(name=f"norm_{i}")(h))
