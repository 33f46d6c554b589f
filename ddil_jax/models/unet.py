"""The project's own UNet: class and guidance conditioning, attention, dropout, named features.

One skip per residual block. Downsampling is average pooling, upsampling nearest neighbour and a
convolution, cropped to the skip's size, so that odd maps (28 -> 14 -> 7 -> 4) work. Every residual
branch and the output start at zero: the network begins as the zero function.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddil_jax.errors import UsageError
from ddil_jax.keys import named
from ddil_jax.models.adapters import Adapter
from ddil_jax.models.base import require_features
from ddil_jax.models.layers import GroupNorm, dropout, guidance_embedding, rematerialised, sinusoidal_embedding
from ddil_jax.types import Array, Cond

_ZEROS = nn.initializers.zeros_init()


class ResBlock(nn.Module):
  """GroupNorm, SiLU, convolution, twice; the embedding scales and shifts the second norm."""
  channels: int
  dropout: float = 0.0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, embedding: Array, keys: Array | None = None) -> Array:
    conv = lambda name, **kw: nn.Conv(self.channels, (3, 3), dtype=self.dtype, name=name, **kw)  # noqa: E731
    h = nn.silu(GroupNorm(dtype=self.dtype, name="norm_in")(x))
    h = conv("conv_in")(h)
    scale_shift = nn.Dense(2 * self.channels, dtype=self.dtype, name="film")(embedding)
    h = nn.silu(GroupNorm(dtype=self.dtype, name="norm_out")(h, scale_shift))
    h = dropout(h, self.dropout, None if keys is None else named(keys, self.name))
    h = conv("conv_out", kernel_init=_ZEROS)(h)
    if x.shape[-1] != self.channels:
      x = nn.Dense(self.channels, dtype=self.dtype, name="skip")(x)
    return x + h


class Attention(nn.Module):
  """Self-attention over the pixels of a map, residual."""
  num_heads: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    b, h, w, c = x.shape
    if c % self.num_heads:
      raise UsageError(f"attention: num_heads {self.num_heads} must divide {c} channels ({h}x{w} map)")
    y = GroupNorm(dtype=self.dtype, name="norm")(x).reshape(b, h * w, c)
    qkv = nn.Dense(3 * c, dtype=self.dtype, name="qkv")(y).reshape(b, h * w, 3, self.num_heads, -1)
    y = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]).reshape(b, h, w, c)
    return x + nn.Dense(c, dtype=self.dtype, kernel_init=_ZEROS, name="out")(y)


class UNet(nn.Module):
  """Noise-conditional UNet, `(x [B,H,W,C], t [B], cond) -> [B,H,W,out_channels]`.

  Attributes:
    out_channels: output channels.
    channels: width of the first level.
    channel_mult: width of each level in units of `channels`; its length is the number of levels.
    num_res_blocks: residual blocks per level, on the way down and on the way up.
    attention_resolutions: heights of the maps at which self-attention acts.
    num_heads: attention heads.
    num_classes: 0 is unconditional; else the index `num_classes` is the null class.
    dropout: rate in the residual blocks; acts only where keys are given.
    guidance_embedding: width of the embedding of cond["guidance_scale"]; 0 is none. Its projection
      starts at zero, so a student that starts from a teacher's parameters starts as the teacher.
    end_time_embedding: width of the embedding of cond["end_time"] (missing: t itself); likewise.
    dtype: compute dtype; parameters and output are float32.
    remat: an entry of `layers.REMAT`: what is kept for the gradient, and what computed anew to save memory.
    adapter: hidden width of an adapter after each residual block and its attention, which reads the guidance
      scale, the time and the class (`models/adapters.py`); 0 is none. All of their parameters are below names
      of their own, "<block>_adapter"; they start as no change.
  """
  out_channels: int
  channels: int = 8
  channel_mult: tuple[int, ...] = (1, 2)
  num_res_blocks: int = 1
  attention_resolutions: tuple[int, ...] = ()
  num_heads: int = 1
  num_classes: int = 0
  dropout: float = 0.0
  guidance_embedding: int = 0
  end_time_embedding: int = 0
  dtype: Any = jnp.float32
  remat: str = "none"
  adapter: int = 0

  def feature_names(self) -> tuple[str, ...]:
    """Features that `__call__` gives on request."""
    return ("bottleneck", "encoder", *(f"level{i}" for i in range(len(self.channel_mult))))

  def cache_names(self) -> tuple[str, ...]:
    """Features that `__call__` gives on request and takes in `reuse`, in place of computing them.

    "deep<m>" enters the up path's block that reads the skip of down block m, counted from the first: taking it
    leaves m + 1 blocks down and up. "skips" is all that the encoder and the middle give.
    """
    return ("skips", *(f"deep{m}" for m in range(len(self.channel_mult) * self.num_res_blocks)))

  @nn.compact
  def __call__(self, x: Array, t: Array, cond: Cond, keys: Array | None = None,
               features: tuple[str, ...] = (), reuse: dict[str, Any] | None = None) -> Any:
    """Runs the network.

    Args:
      x: [B, H, W, C].
      t: time input [B], about 0..1000.
      cond: "label" int [B] (missing: null class), "guidance_scale" float [B] (missing: 1).
      keys: [B] typed keys that switch dropout on.
      features: names of features wanted; see `feature_names` and `cache_names`.
      reuse: one of `cache_names` and its value, of an earlier call; features that it passes over are not there.

    Returns:
      float32 [B, H, W, out_channels]; with features, a pair of it and {name: [B, h, w, c]}.

    Raises:
      UsageError: unknown feature, or heads that do not divide the channels.
    """
    reuse = reuse or {}
    require_features(features, (*self.feature_names(), *self.cache_names()))
    require_features(reuse, self.cache_names())
    last, per_level, found = len(self.channel_mult) - 1, self.num_res_blocks, {}
    # Skips are numbered from the first block; without a deep feature to take, the last of them is computed too.
    depth = next((m for m in range((last + 1) * per_level) if f"deep{m}" in reuse), (last + 1) * per_level - 1)
    res_block, attention = (rematerialised(part, self.remat) for part in (ResBlock, Attention))

    def block(h, level, name):
      width = self.channels * self.channel_mult[level]
      h = res_block(width, self.dropout, self.dtype, name=name)(h, emb, keys)
      if h.shape[1] in self.attention_resolutions:
        h = attention(self.num_heads, self.dtype, name=f"{name}_attention")(h)
      return adapted(h, name)

    def adapted(h, name):
      if not self.adapter:
        return h
      offset = Adapter(h.shape[-1], self.adapter, name=f"{name}_adapter")(*self._for_adapters(t, cond))
      return h + offset[:, None, None].astype(h.dtype)

    emb = nn.silu(self._embed(t, cond))
    skips, h = reuse["skips"] if "skips" in reuse else ((), None)
    skips = list(skips)
    if h is None:
      h = nn.Conv(self.channels, (3, 3), dtype=self.dtype, name="conv_in")(x)
      for number in range(depth + 1):
        i, j = divmod(number, per_level)
        if i > 0 and j == 0:
          h = nn.avg_pool(h, (2, 2), (2, 2), "SAME", count_include_pad=False)
        h = found[f"level{i}"] = block(h, i, f"down_{i}_{j}")
        skips.append(h)
      found["encoder"] = h
    if not reuse:
      h = block(h, last, "mid_0")
      h = adapted(res_block(h.shape[-1], self.dropout, self.dtype, name="mid_1")(h, emb, keys), "mid_1")
      found["bottleneck"], found["skips"] = h, (tuple(skips), h)

    for number in reversed(range(depth + 1)):
      i, j = divmod(number, per_level)
      h = found[f"deep{number}"] = reuse.get(f"deep{number}", h)
      h = block(jnp.concatenate([h, skips.pop()], axis=-1), i, f"up_{i}_{per_level - 1 - j}")
      if i > 0 and j == 0:
        h = upsample(h, skips[-1].shape[1:3])
        h = nn.Conv(h.shape[-1], (3, 3), dtype=self.dtype, name=f"upsample_{i}")(h)

    h = nn.silu(GroupNorm(dtype=self.dtype, name="norm_out")(h))
    out = nn.Conv(self.out_channels, (3, 3), dtype=self.dtype, kernel_init=_ZEROS, name="conv_out")(h)
    out = out.astype(jnp.float32)
    return (out, {name: found[name] for name in features}) if features else out

  def _embed(self, t: Array, cond: Cond) -> Array:
    """Embedding [B, 4 channels] of time, guidance scale and class."""
    width = 4 * self.channels
    h = sinusoidal_embedding(t.astype(jnp.float32), width)
    if self.guidance_embedding:
      w = cond["guidance_scale"].astype(jnp.float32) - 1 if "guidance_scale" in cond else jnp.zeros(t.shape)
      h = h + nn.Dense(width, use_bias=False, kernel_init=_ZEROS, dtype=self.dtype, name="guidance")(
          guidance_embedding(w, self.guidance_embedding))
    if self.end_time_embedding:
      end = cond.get("end_time", t).astype(jnp.float32)
      h = h + nn.Dense(width, use_bias=False, kernel_init=_ZEROS, dtype=self.dtype, name="end_time")(
          sinusoidal_embedding(end, self.end_time_embedding))
    h = nn.silu(nn.Dense(width, dtype=self.dtype, name="time_0")(h))
    h = nn.Dense(width, dtype=self.dtype, name="time_1")(h)
    if self.num_classes:
      label = cond.get("label", jnp.full(t.shape, self.num_classes, jnp.int32))
      h = h + nn.Embed(self.num_classes + 1, width, dtype=self.dtype, name="label")(label)
    return h

  def _for_adapters(self, t: Array, cond: Cond) -> tuple[Array, ...]:
    """Guidance scale [B] (missing: 1), time [B] from 0 to 5, as wide as the scales, and class [B, classes + 1]."""
    scale = cond.get("guidance_scale", jnp.ones(t.shape)).astype(jnp.float32)
    read = (scale, t.astype(jnp.float32) / 200)
    if not self.num_classes:
      return read
    label = cond.get("label", jnp.full(t.shape, self.num_classes, jnp.int32))
    return (*read, jax.nn.one_hot(label, self.num_classes + 1))


def upsample(x: Array, size: tuple[int, int]) -> Array:
  """Nearest-neighbour doubling of x [B,h,w,C], cropped to size (H, W)."""
  b, h, w, c = x.shape
  doubled = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)
  return doubled[:, :size[0], :size[1]]
