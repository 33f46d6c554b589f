"""The GAN head of DMD2: features of the critic to one logit per image."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ddil_jax.models.layers import GroupNorm
from ddil_jax.types import Array


class DiscriminatorHead(nn.Module):
  """features [B,h,w,c] -> logits [B].

  4x4 convolutions of stride 2, each with GroupNorm and SiLU, until the map is at most 4x4; one that
  covers the rest; a 1x1 convolution; mean over what pixels remain. On the 8x8 bottleneck of an
  ImageNet-64 network this is DMD2's head; 4x4, 2x2 and 1x1 maps drop the stages that they have no
  room for. At least 8 channels share a norm: on a 1x1 map a group of one would be constant.

  Attributes:
    channels: width; None takes that of the features.
    dtype: compute dtype; parameters and logits are float32.

  Source: DMD2 (arXiv 2405.14867), section 4.4.
  """
  channels: int | None = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, features: Array) -> Array:
    width = self.channels or features.shape[-1]
    h = features

    def stage(h, name, kernel, stride, padding):
      h = nn.Conv(width, kernel, stride, padding, dtype=self.dtype, name=f"{name}_conv")(h)
      return nn.silu(GroupNorm(8, self.dtype, name=f"{name}_norm")(h))

    i = 0
    while max(h.shape[1:3]) > 4:
      h = stage(h, f"down_{i}", (4, 4), (2, 2), "SAME")
      i += 1
    if max(h.shape[1:3]) > 1:
      h = stage(h, "rest", h.shape[1:3], (1, 1), "VALID")
    logits = nn.Conv(1, (1, 1), dtype=self.dtype, name="out")(h)
    return jnp.mean(logits.astype(jnp.float32), axis=(1, 2, 3))
