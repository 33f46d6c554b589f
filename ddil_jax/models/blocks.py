"""The blocks of diffusers' UNets and autoencoder: residual, attention, transformer, and the levels made of them.

Names of sub-modules are those of the published weights, `resnets_0` for `resnets.0`. Maps are NHWC.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddil_jax.keys import named
from ddil_jax.models.layers import attention, dropout, rematerialised
from ddil_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Style:
  """What all blocks of a network share.

  Attributes:
    groups, eps: of the group norms.
    dropout: rate in the residual blocks; acts only where keys are given.
    scale_shift: the time embedding scales and shifts the second norm instead of being added before it.
    linear_projection: transformers project pixels with dense layers instead of 1x1 convolutions.
    pad: 1, or 0 for a stride-2 convolution that is padded at the lower right only.
    dtype: compute dtype.
    remat: an entry of `layers.REMAT`: what residual and transformer blocks keep for their gradients.
  """
  groups: int = 32
  eps: float = 1e-5
  dropout: float = 0.0
  scale_shift: bool = False
  linear_projection: bool = False
  pad: int = 1
  dtype: Any = jnp.float32
  remat: str = "none"


@dataclasses.dataclass(frozen=True)
class Level:
  """One down or up block.

  Attributes:
    channels: width.
    depths: transformer blocks after each residual block; one entry for each residual block.
    attention: "" none, "self" over the pixels, "cross" transformers that also read the text.
    heads: of the attention.
    resample: how the map changes its size at the end: "" not, "conv" or "resnet".
  """
  channels: int
  depths: tuple[int, ...]
  attention: str = ""
  heads: int = 1
  resample: str = ""


@dataclasses.dataclass(frozen=True)
class Middle:
  """The block between down and up: residual, then attention (as in Level) and residual `layers` times.

  Attributes:
    divide: by which the sums of residual branches are divided.
    norm: whether self-attention is normalised before.
  """
  layers: int = 1
  depth: int = 1
  attention: str = "cross"
  heads: int = 1
  divide: float = 1.0
  norm: bool = True


def group_norm(style: Style, name: str, eps: float | None = None) -> nn.Module:
  """Group normalisation with statistics in float32 or more, and the variance in two passes."""
  # In one pass the difference of two large numbers loses digits where activations have a mean.
  return nn.GroupNorm(style.groups, epsilon=eps or style.eps, dtype=style.dtype, use_fast_variance=False, name=name)


class ResnetBlock(nn.Module):
  """x [B,H,W,C], embedding [B,D] or None -> [B,H',W',channels]: norm, SiLU, convolution, twice; plus a skip.

  Attributes:
    resample: "down" halves the map (mean), "up" doubles it (nearest), between the first SiLU and convolution.
    size: (H', W') to which a doubled map is cropped; None leaves it.
  """
  channels: int
  style: Style
  resample: str = ""
  divide: float = 1.0
  size: tuple[int, int] | None = None

  @nn.compact
  def __call__(self, x: Array, embedding: Array | None, keys: Array | None = None) -> Array:
    style = self.style
    conv = lambda name: nn.Conv(self.channels, (3, 3), dtype=style.dtype, name=name)  # noqa: E731
    h = nn.silu(group_norm(style, "norm1")(x))
    if self.resample == "down":
      x, h = (nn.avg_pool(v, (2, 2), (2, 2)) for v in (x, h))
    elif self.resample == "up":
      x, h = (doubled(v, self.size) for v in (x, h))
    h = conv("conv1")(h)
    norm = group_norm(style, "norm2")
    if embedding is None:
      h = norm(h)
    else:
      width = self.channels * (2 if style.scale_shift else 1)
      e = nn.Dense(width, dtype=style.dtype, name="time_emb_proj")(nn.silu(embedding))[:, None, None]
      if style.scale_shift:
        scale, shift = jnp.split(e, 2, axis=-1)
        h = norm(h) * (1 + scale) + shift
      else:
        h = norm(h + e)
    h = dropout(nn.silu(h), style.dropout, None if keys is None else named(keys, "/".join(self.path)))
    h = conv("conv2")(h)
    if x.shape[-1] != self.channels:
      x = nn.Conv(self.channels, (1, 1), dtype=style.dtype, name="conv_shortcut")(x)
    return (x + h) / self.divide


def doubled(x: Array, size: tuple[int, int] | None = None) -> Array:
  """Nearest-neighbour doubling of x [B,h,w,C], cropped to size (H, W) if given."""
  x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
  return x if size is None else x[:, :size[0], :size[1]]


def attend(x: Array, context: Array, heads: int, dtype: Any, bias: bool) -> Array:
  """Queries of x [B,N,C], keys and values of `context` [B,M,D] -> [B,N,C]; the layers belong to the calling module."""
  width = x.shape[-1]

  def part(name, of):
    h = nn.Dense(width, use_bias=bias, dtype=dtype, name=name)(of)
    return h.reshape(*of.shape[:2], heads, width // heads)

  h = attention(part("to_q", x), part("to_k", context), part("to_v", context))
  return nn.Dense(width, dtype=dtype, name="to_out_0")(h.reshape(x.shape))


class Attention(nn.Module):
  """x [B,N,C] attends to `context` [B,M,D], or to itself without one -> [B,N,C]."""
  heads: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, context: Array | None = None) -> Array:
    return attend(x, x if context is None else context, self.heads, self.dtype, bias=False)


class PixelAttention(nn.Module):
  """Self-attention over the pixels of a map [B,H,W,C], normalised before, residual."""
  heads: int
  style: Style
  norm: bool = True
  divide: float = 1.0

  @nn.compact
  def __call__(self, x: Array) -> Array:
    h = group_norm(self.style, "group_norm")(x) if self.norm else x
    h = h.reshape(len(x), -1, x.shape[-1])
    return (x + attend(h, h, self.heads, self.style.dtype, bias=True).reshape(x.shape)) / self.divide


class TransformerBlock(nn.Module):
  """x [B,N,C]: self-attention, attention to the text [B,L,D], gated GELU; each normalised before, residual."""
  heads: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, text: Array) -> Array:
    norm = lambda name: nn.LayerNorm(1e-5, dtype=self.dtype, use_fast_variance=False, name=name)  # noqa: E731
    x = x + Attention(self.heads, self.dtype, name="attn1")(norm("norm1")(x))
    x = x + Attention(self.heads, self.dtype, name="attn2")(norm("norm2")(x), text)
    return x + FeedForward(self.dtype, name="ff")(norm("norm3")(x))


class FeedForward(nn.Module):
  """x [B,N,C] -> [B,N,C]: `W2 (a * gelu(b))`, (a, b) = W1 x of width 4 C each.

  Source: Shazeer 2020 (arXiv 2002.05202).
  """
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    width = x.shape[-1]
    a, b = jnp.split(GatedInput(8 * width, self.dtype, name="net_0")(x), 2, axis=-1)
    return nn.Dense(width, dtype=self.dtype, name="net_2")(a * jax.nn.gelu(b, approximate=False))


class GatedInput(nn.Module):
  """A dense layer, at the name that it has in the published weights: `net.0.proj`."""
  width: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    return nn.Dense(self.width, dtype=self.dtype, name="proj")(x)


class Transformer(nn.Module):
  """Transformer blocks over the pixels of a map [B,H,W,C] that read the text [B,L,D], residual."""
  depth: int
  heads: int
  style: Style

  @nn.compact
  def __call__(self, x: Array, text: Array) -> Array:
    style, h = self.style, group_norm(self.style, "norm", 1e-6)(x)

    def project(name, h):  # the same map either way; the published weights have two axes or four
      if style.linear_projection:
        return nn.Dense(x.shape[-1], dtype=style.dtype, name=name)(h)
      return nn.Conv(x.shape[-1], (1, 1), dtype=style.dtype, name=name)(h)

    h = project("proj_in", h).reshape(len(x), -1, x.shape[-1])
    block = rematerialised(TransformerBlock, style.remat)
    for i in range(self.depth):
      h = block(self.heads, style.dtype, name=f"transformer_blocks_{i}")(h, text)
    return x + project("proj_out", h.reshape(x.shape))


class Downsample(nn.Module):
  """x [B,H,W,C] -> [B,H/2,W/2,C] by a convolution of stride 2."""
  style: Style

  @nn.compact
  def __call__(self, x: Array) -> Array:
    pad = ((self.style.pad, 1),) * 2
    return nn.Conv(x.shape[-1], (3, 3), (2, 2), pad, dtype=self.style.dtype, name="conv")(x)


class Upsample(nn.Module):
  """x [B,h,w,C] -> [B,*size,C]: doubled by nearest neighbour, cropped, and a convolution."""
  style: Style

  @nn.compact
  def __call__(self, x: Array, size: tuple[int, int] | None = None) -> Array:
    return nn.Conv(x.shape[-1], (3, 3), dtype=self.style.dtype, name="conv")(doubled(x, size))


def _attention(level: Level | Middle, depth: int, style: Style, name: str, x: Array, text: Array | None,
               **options) -> Array:
  """The attention of a level after one of its residual blocks."""
  if level.attention == "cross":
    return Transformer(depth, level.heads, style, name=name)(x, text)
  if level.attention == "self":
    return rematerialised(PixelAttention, style.remat)(level.heads, style, name=name, **options)(x)
  return x


class Down(nn.Module):
  """x -> (x, the outputs of all its layers, the last map before the size changes)."""
  level: Level
  style: Style

  @nn.compact
  def __call__(self, x: Array, embedding: Array | None, text: Array | None = None, keys: Array | None = None):
    level, found, resnet = self.level, [], rematerialised(ResnetBlock, self.style.remat)
    for i, depth in enumerate(level.depths):
      x = resnet(level.channels, self.style, name=f"resnets_{i}")(x, embedding, keys)
      x = _attention(level, depth, self.style, f"attentions_{i}", x, text)
      found.append(x)
    last = x
    if level.resample == "conv":
      x = Downsample(self.style, name="downsamplers_0")(x)
    elif level.resample == "resnet":
      x = resnet(level.channels, self.style, "down", name="downsamplers_0")(x, embedding, keys)
    return x, found + [x] * bool(level.resample), last


class Mid(nn.Module):
  """The block between the way down and the way up, x [B,H,W,C] -> [B,H,W,C]."""
  middle: Middle
  style: Style

  @nn.compact
  def __call__(self, x: Array, embedding: Array | None, text: Array | None = None, keys: Array | None = None) -> Array:
    m, channels, resnet = self.middle, x.shape[-1], rematerialised(ResnetBlock, self.style.remat)
    x = resnet(channels, self.style, divide=m.divide, name="resnets_0")(x, embedding, keys)
    for i in range(m.layers):
      x = _attention(m, m.depth, self.style, f"attentions_{i}", x, text, divide=m.divide, norm=m.norm)
      x = resnet(channels, self.style, divide=m.divide, name=f"resnets_{i + 1}")(x, embedding, keys)
    return x


class Up(nn.Module):
  """x and the maps of the way down, taken from the end of `skips` (None: there are none) -> x."""
  level: Level
  style: Style

  @nn.compact
  def __call__(self, x: Array, skips: list[Array] | None, embedding: Array | None, text: Array | None = None,
               keys: Array | None = None) -> Array:
    level, resnet = self.level, rematerialised(ResnetBlock, self.style.remat)
    for i, depth in enumerate(level.depths):
      if skips is not None:
        x = jnp.concatenate([x, skips.pop()], axis=-1)
      x = resnet(level.channels, self.style, name=f"resnets_{i}")(x, embedding, keys)
      x = _attention(level, depth, self.style, f"attentions_{i}", x, text)
    size = skips[-1].shape[1:3] if skips else None
    if level.resample == "conv":
      x = Upsample(self.style, name="upsamplers_0")(x, size)
    elif level.resample == "resnet":
      x = resnet(level.channels, self.style, "up", size=size, name="upsamplers_0")(x, embedding, keys)
    return x
