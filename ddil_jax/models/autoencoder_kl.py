"""The autoencoder of Stable Diffusion (diffusers' `AutoencoderKL`): images to latents and back."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddil_jax.models.blocks import Down, Level, Mid, Middle, Style, Up, group_norm
from ddil_jax.types import Array


class AutoencoderKL(nn.Module):
  """images [B,H,W,C] in [-1, 1] <-> latents [B,h,w,latent_channels] of about unit variance.

  Attributes:
    channels: of the image.
    latent_channels: of the latent.
    down, up: levels of encoder and decoder.
    middle: the block of both.
    style: what the blocks share.
    scaling, shift: latent = (z - shift) * scaling, z as the encoder gives it.
    quant, post_quant: whether there are the 1x1 convolutions after the encoder and before the decoder.

  Source: Rombach et al. 2022 (arXiv 2112.10752), appendix G.
  """
  channels: int
  latent_channels: int
  down: tuple[Level, ...]
  up: tuple[Level, ...]
  middle: Middle
  style: Style
  scaling: float = 0.18215
  shift: float = 0.0
  quant: bool = True
  post_quant: bool = True

  def setup(self):
    self.encoder = Encoder(self.down, self.middle, 2 * self.latent_channels, self.style)
    self.decoder = Decoder(self.up, self.middle, self.channels, self.style)
    conv = lambda width: nn.Conv(width, (1, 1), dtype=self.style.dtype)  # noqa: E731
    if self.quant:
      self.quant_conv = conv(2 * self.latent_channels)
    if self.post_quant:
      self.post_quant_conv = conv(self.latent_channels)

  def example(self) -> tuple:
    """Shapes of the arguments of `init`."""
    side = 2**(len(self.down) - 1)
    return (jax.ShapeDtypeStruct((1, side, side, self.channels), jnp.float32),)

  def __call__(self, images: Array) -> Array:
    """The images as the autoencoder gives them back."""
    return self.decode(self.encode(images)[0])

  def encode(self, images: Array) -> tuple[Array, Array]:
    """images [B,H,W,C] in [-1, 1] -> (mean, standard deviation) of their latents [B,h,w,latent_channels]."""
    h = self.encoder(images)
    h = self.quant_conv(h) if self.quant else h
    mean, log_variance = jnp.split(h.astype(jnp.promote_types(h.dtype, jnp.float32)), 2, axis=-1)
    # The bounds are part of the published model.
    return (mean - self.shift) * self.scaling, jnp.exp(0.5 * jnp.clip(log_variance, -30, 20)) * self.scaling

  def decode(self, latents: Array) -> Array:
    """latents [B,h,w,latent_channels] -> images [B,H,W,C], about in [-1, 1]."""
    z = latents / self.scaling + self.shift
    out = self.decoder(self.post_quant_conv(z) if self.post_quant else z)
    return out.astype(jnp.promote_types(out.dtype, jnp.float32))


class Encoder(nn.Module):
  """images [B,H,W,C] -> [B,h,w,out_channels]."""
  down: tuple[Level, ...]
  middle: Middle
  out_channels: int
  style: Style

  @nn.compact
  def __call__(self, x: Array) -> Array:
    h = nn.Conv(self.down[0].channels, (3, 3), dtype=self.style.dtype, name="conv_in")(x)
    for i, level in enumerate(self.down):
      h, _, _ = Down(level, self.style, name=f"down_blocks_{i}")(h, None)
    h = Mid(self.middle, self.style, name="mid_block")(h, None)
    h = nn.silu(group_norm(self.style, "conv_norm_out")(h))
    return nn.Conv(self.out_channels, (3, 3), dtype=self.style.dtype, name="conv_out")(h)


class Decoder(nn.Module):
  """[B,h,w,c] -> images [B,H,W,out_channels]."""
  up: tuple[Level, ...]
  middle: Middle
  out_channels: int
  style: Style

  @nn.compact
  def __call__(self, z: Array) -> Array:
    h = nn.Conv(self.up[0].channels, (3, 3), dtype=self.style.dtype, name="conv_in")(z)
    h = Mid(self.middle, self.style, name="mid_block")(h, None)
    for i, level in enumerate(self.up):
      h = Up(level, self.style, name=f"up_blocks_{i}")(h, None, None)
    h = nn.silu(group_norm(self.style, "conv_norm_out")(h))
    return nn.Conv(self.out_channels, (3, 3), dtype=self.style.dtype, name="conv_out")(h)
