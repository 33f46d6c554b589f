"""The networks of EDM: SongUNet (DDPM++, NCSN++) and DhariwalUNet (ADM). They are F of D = c_skip x + c_out F.

Names of sub-modules are those of the released weights up to NAMES: `enc_32x32_conv` for `enc.32x32_conv`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddil_jax.keys import named
from ddil_jax.models.base import require_features
from ddil_jax.models.layers import (attention, dropout, guidance_embedding, num_groups, rematerialised,
                                    sinusoidal_embedding, timestep_embedding)
from ddil_jax.types import Array, Cond

# Names made from Flax paths -> those of the released weights, for `interop/weights.py`.
NAMES = ((r"^(enc|dec)_", r"\1."), (r"^map_noise_freqs", "map_noise.freqs"))
_ZEROS = nn.initializers.zeros_init()


def _norm(channels: int, eps: float, dtype: Any, name: str) -> nn.Module:
  return nn.GroupNorm(num_groups(channels), epsilon=eps, dtype=dtype, use_fast_variance=False, name=name)


def resample(x: Array, taps: tuple[int, ...], up: bool = False, pad: int | None = None) -> Array:
  """Halves or doubles a map x [B,H,W,C] with a separable low-pass filter.

  Down is a convolution with `f f^T / sum` at stride 2; up is its transpose, times 4.

  Args:
    taps: f, such as (1, 1) or (1, 3, 3, 1).
    pad: zeros around the map on the way down; by default so many that the size is halved.
  """
  f = np.outer(taps, taps) / np.sum(taps)**2
  n, c = len(taps), x.shape[-1]
  kernel = jnp.asarray(np.broadcast_to((4 * f if up else f)[:, :, None, None], (n, n, 1, c)), x.dtype)
  own = (n - 1) // 2
  pad = (n - 1 - own,) * 2 if up else ((own if pad is None else pad),) * 2
  stride, dilation = ((1, 1), (2, 2)) if up else ((2, 2), None)
  return jax.lax.conv_general_dilated(x, kernel, stride, (pad, pad), lhs_dilation=dilation, feature_group_count=c,
                                      dimension_numbers=("NHWC", "HWIO", "NHWC"))


class Block(nn.Module):
  """Residual block with optional resampling and self-attention, x [B,H,W,C] -> [B,H',W',channels].

  Attributes:
    channels: of the output.
    song: DDPM++ / NCSN++: the embedding is added before the second norm, branches are summed over sqrt(2), the skip
      of a resampling block has a convolution. Otherwise ADM: the embedding scales and shifts.
    resample: "", "down" or "up".
    heads: of the attention; 0 is none.
    taps: of the low-pass filter.
    dropout: rate.
    dtype: compute dtype.
  """
  channels: int
  song: bool
  resample: str = ""
  heads: int = 0
  taps: tuple[int, ...] = (1, 1)
  dropout: float = 0.0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, embedding: Array, keys: Array | None = None) -> Array:
    c, dtype = self.channels, self.dtype
    eps, divide = (1e-6, np.sqrt(2.0)) if self.song else (1e-5, 1.0)
    sized = lambda v: resample(v, self.taps, self.resample == "up") if self.resample else v  # noqa: E731
    h = sized(nn.silu(_norm(x.shape[-1], eps, dtype, "norm0")(x)))
    h = nn.Conv(c, (3, 3), dtype=dtype, name="conv0")(h)
    e = nn.Dense(c if self.song else 2 * c, dtype=dtype, name="affine")(embedding)[:, None, None]
    norm = _norm(c, eps, dtype, "norm1")
    if self.song:
      h = norm(h + e)
    else:
      scale, shift = jnp.split(e, 2, axis=-1)
      h = norm(h) * (1 + scale) + shift
    h = dropout(nn.silu(h), self.dropout, None if keys is None else named(keys, "/".join(self.path)))
    h = nn.Conv(c, (3, 3), dtype=dtype, kernel_init=_ZEROS, name="conv1")(h)
    skip = sized(x)
    if x.shape[-1] != c or (self.song and self.resample):
      skip = nn.Conv(c, (1, 1), dtype=dtype, name="skip")(skip)
    x = (skip + h) / divide
    if not self.heads:
      return x
    b, height, width, _ = x.shape
    h = nn.Conv(3 * c, (1, 1), dtype=dtype, name="qkv")(_norm(c, eps, dtype, "norm2")(x))
    q, k, v = jnp.moveaxis(h.reshape(b, height * width, self.heads, c // self.heads, 3), -1, 0)
    h = attention(q, k, v).reshape(x.shape)
    return (nn.Conv(c, (1, 1), dtype=dtype, kernel_init=_ZEROS, name="proj")(h) + x) / divide


class EDMUNet(nn.Module):
  """What both networks share: levels by resolution, embeddings, features.

  Attributes:
    resolution: H = W of the images.
    out_channels: output channels.
    num_classes: classes of cond["label"], whose null class is `num_classes`; 0 is unconditional.
    augment: width of cond["augment"], EDM's augmentation labels (missing: none); 0 is none.
    channels: width in units of which `channel_mult` is.
    channel_mult, num_blocks, attention_resolutions, dropout: as in our UNet.
    dtype: compute dtype.
    remat: an entry of `layers.REMAT`, for the blocks.
    guidance_embedding, end_time_embedding: widths of the embeddings of cond["guidance_scale"] and cond["end_time"], as in
      our UNet; 0 is none. They start at zero, without effect.
  """
  text_width = pooled_width = 0  # these networks read no text
  resolution: int
  out_channels: int
  num_classes: int = 0
  augment: int = 0
  channels: int = 128
  channel_mult: tuple[int, ...] = (1, 2, 2, 2)
  num_blocks: int = 4
  attention_resolutions: tuple[int, ...] = (16,)
  dropout: float = 0.1
  dtype: Any = jnp.float32
  remat: str = "none"
  guidance_embedding: int = 0
  end_time_embedding: int = 0

  @property
  def in_channels(self) -> int:
    """Of the image: an F that predicts one image has as many output channels."""
    return self.out_channels

  @property
  def labels(self) -> int:
    """How many values cond["label"] may have, the null class included; 0 is none."""
    return self.num_classes + bool(self.num_classes)

  def feature_names(self) -> tuple[str, ...]:
    """Features that `__call__` gives on request."""
    return ("bottleneck", "encoder", *(f"level{i}" for i in range(len(self.channel_mult))))

  def example(self) -> tuple[Any, Any, Cond]:
    """Shapes of (x, t, cond) for one image: arguments of `init`."""
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)  # noqa: E731
    cond = {"label": jax.ShapeDtypeStruct((1,), jnp.int32)} if self.num_classes else {}
    cond |= {"augment": shape(1, self.augment)} if self.augment else {}
    cond |= {"guidance_scale": shape(1)} if self.guidance_embedding else {}
    return shape(1, self.resolution, self.resolution, self.out_channels), shape(1), cond

  def _names(self) -> list[str]:
    return [f"{self.resolution >> i}x{self.resolution >> i}" for i in range(len(self.channel_mult))]

  def _attends(self, level: int) -> bool:
    return self.resolution >> level in self.attention_resolutions

  def _one_hot(self, t: Array, cond: Cond) -> Array:
    """[B,num_classes]; the null class is a row of zeros."""
    label = cond.get("label", jnp.full(t.shape, self.num_classes, jnp.int32))
    return jax.nn.one_hot(label, self.num_classes, dtype=jnp.promote_types(self.dtype, jnp.float32))

  def _add_conditions(self, emb: Array, t: Array, cond: Cond) -> Array:
    """emb [B,D] with the augmentation, the guidance scale (missing: 1) and the end time (missing: t)."""
    wide = jnp.promote_types(self.dtype, jnp.float32)
    dense = lambda name, **init: nn.Dense(emb.shape[-1], use_bias=False, dtype=self.dtype, name=name, **init)  # noqa: E731
    if self.augment and "augment" in cond:
      emb = emb + dense("map_augment")(cond["augment"])
    if self.guidance_embedding:
      w = cond.get("guidance_scale", jnp.ones(t.shape)).astype(wide) - 1
      emb = emb + dense("guidance", kernel_init=_ZEROS)(guidance_embedding(w, self.guidance_embedding))
    if self.end_time_embedding:
      end = sinusoidal_embedding(cond.get("end_time", t).astype(wide), self.end_time_embedding)
      emb = emb + dense("end_time", kernel_init=_ZEROS)(end)
    return emb


def _finish(out: Array, found: dict[str, Array], features: tuple[str, ...]) -> Any:
  out = out.astype(jnp.promote_types(out.dtype, jnp.float32))
  return (out, {name: found[name] for name in features}) if features else out


class SongUNet(EDMUNet):
  """DDPM++ (defaults) or NCSN++, `(x [B,H,H,C], t [B], cond) -> [B,H,H,out_channels]`; t is EDM's c_noise.

  Attributes (besides the shared ones):
    fourier: random Fourier features of t instead of sinusoids.
    encoder: "standard"; "skip" or "residual" (NCSN++) also add the filtered input at each level.
    decoder: "standard"; "skip" sums an image over the levels.
    taps: of the low-pass filter; NCSN++ has (1, 3, 3, 1).
    noise_width: of the sinusoid, in units of `channels`; NCSN++ has 2.

  Source: Song et al. 2021 (arXiv 2011.13456), as configured in EDM (arXiv 2206.00364), appendix F.
  """
  fourier: bool = False
  encoder: str = "standard"
  decoder: str = "standard"
  taps: tuple[int, ...] = (1, 1)
  noise_width: int = 1

  @nn.compact
  def __call__(self, x: Array, t: Array, cond: Cond, keys: Array | None = None,
               features: tuple[str, ...] = ()) -> Any:
    """Runs the network; arguments as of our UNet, with cond["augment"] float [B,augment].

    Raises:
      UsageError: unknown feature.
    """
    require_features(features, self.feature_names())
    dtype, names, found, skips = self.dtype, self._names(), {}, []
    last, emb, one = len(names) - 1, self._embed(t, cond), rematerialised(Block, self.remat)

    def block(h, level, name, resample="", attention=False, like_before=False):
      width = h.shape[-1] if like_before else self.channels * self.channel_mult[level]
      return one(width, True, resample, int(attention), self.taps, self.dropout, dtype, name=name)(h, emb, keys)

    conv = lambda width, size, name: nn.Conv(width, (size, size), dtype=dtype, name=name)  # noqa: E731
    h = aux = x.astype(dtype)
    for i, at in enumerate(names):
      if i == 0:
        h = conv(self.channels, 3, f"enc_{at}_conv")(h)
      else:
        h = block(h, i, f"enc_{at}_down", "down", like_before=True)
        if self.encoder == "skip":
          aux = resample(aux, self.taps)
          h = h + conv(h.shape[-1], 1, f"enc_{at}_aux_skip")(aux)
        elif self.encoder == "residual":
          h = aux = (h + FilteredConv(h.shape[-1], self.taps, dtype, name=f"enc_{at}_aux_residual")(aux)) / np.sqrt(2.0)
      skips.append(h)
      for j in range(self.num_blocks):
        h = block(h, i, f"enc_{at}_block{j}", attention=self._attends(i))
        skips.append(h)
      found[f"level{i}"] = h
    found["encoder"] = h

    image = None
    for i in reversed(range(last + 1)):
      at = names[i]
      if i == last:
        h = block(h, i, f"dec_{at}_in0", attention=True, like_before=True)
        h = found["bottleneck"] = block(h, i, f"dec_{at}_in1", like_before=True)
      else:
        h = block(h, i, f"dec_{at}_up", "up", like_before=True)
      for j in range(self.num_blocks + 1):
        h = block(jnp.concatenate([h, skips.pop()], axis=-1), i, f"dec_{at}_block{j}",
                  attention=j == self.num_blocks and self._attends(i))
      if self.decoder == "skip" or i == 0:
        out = nn.silu(_norm(h.shape[-1], 1e-6, dtype, f"dec_{at}_aux_norm")(h))
        out = nn.Conv(self.out_channels, (3, 3), dtype=dtype, kernel_init=_ZEROS, name=f"dec_{at}_aux_conv")(out)
        image = out if image is None else out + resample(image, self.taps, up=True)
    return _finish(image, found, features)

  def _embed(self, t: Array, cond: Cond) -> Array:
    width, wide = self.channels * self.noise_width, jnp.promote_types(self.dtype, jnp.float32)
    if self.fourier:
      # Of fixed random frequencies, which the released weights hold as "map_noise.freqs".
      frequencies = self.param("map_noise_freqs", nn.initializers.normal(16), (width // 2,))
      angles = t.astype(wide)[:, None] * (2 * np.pi * frequencies.astype(wide))[None]
      # Swapped with respect to the release, which swaps them later.
      emb = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    else:
      emb = timestep_embedding(t.astype(wide), width)
    if self.num_classes:
      labels = self._one_hot(t, cond) * np.sqrt(self.num_classes)
      emb = emb + nn.Dense(width, dtype=self.dtype, name="map_label")(labels)
    emb = self._add_conditions(emb, t, cond)
    for name in ("map_layer0", "map_layer1"):
      emb = nn.silu(nn.Dense(4 * self.channels, dtype=self.dtype, name=name)(emb))
    return emb


class FilteredConv(nn.Module):
  """A 3x3 convolution and the halving of the map in one: x [B,H,W,C] -> [B,H/2,W/2,channels]."""
  channels: int
  taps: tuple[int, ...]
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 3, x.shape[-1], self.channels))
    bias = self.param("bias", _ZEROS, (self.channels,))
    # All padding before the convolution, which makes the edges of the filtered map what the release has.
    pad = 1 + (len(self.taps) - 1) // 2
    h = jax.lax.conv_general_dilated(x, kernel.astype(self.dtype), (1, 1), ((pad, pad),) * 2,
                                     dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return resample(h, self.taps, pad=0) + bias.astype(self.dtype)[None, None, None]


class DhariwalUNet(EDMUNet):
  """ADM, `(x [B,H,H,C], t [B], cond) -> [B,H,H,out_channels]`; t is EDM's c_noise. EDM's ImageNet-64 network is

      DhariwalUNet(64, 3, 1000, channels=192, channel_mult=(1, 2, 3, 4), num_blocks=3,
                   attention_resolutions=(32, 16, 8), dropout=0.1)

  Attributes (besides the shared ones):
    per_head: channels of an attention head.

  Source: Dhariwal and Nichol 2021 (arXiv 2105.05233), as configured in EDM (arXiv 2206.00364), appendix F.
  """
  channels: int = 192
  channel_mult: tuple[int, ...] = (1, 2, 3, 4)
  num_blocks: int = 3
  attention_resolutions: tuple[int, ...] = (32, 16, 8)
  per_head: int = 64

  @nn.compact
  def __call__(self, x: Array, t: Array, cond: Cond, keys: Array | None = None,
               features: tuple[str, ...] = ()) -> Any:
    """Runs the network; arguments as of `SongUNet`.

    Raises:
      UsageError: unknown feature.
    """
    require_features(features, self.feature_names())
    dtype, names, found, skips = self.dtype, self._names(), {}, []
    last, emb, one = len(names) - 1, self._embed(t, cond), rematerialised(Block, self.remat)

    def block(h, level, name, resample="", attention=False):
      width = self.channels * self.channel_mult[level] if not resample else h.shape[-1]
      heads = width // self.per_head if attention else 0
      return one(width, False, resample, heads, dropout=self.dropout, dtype=dtype, name=name)(h, emb, keys)

    h = nn.Conv(self.channels * self.channel_mult[0], (3, 3), dtype=dtype, name=f"enc_{names[0]}_conv")(x)
    for i, at in enumerate(names):
      h = block(h, i, f"enc_{at}_down", "down") if i else h
      skips.append(h)
      for j in range(self.num_blocks):
        h = block(h, i, f"enc_{at}_block{j}", attention=self._attends(i))
        skips.append(h)
      found[f"level{i}"] = h
    found["encoder"] = h
    for i in reversed(range(last + 1)):
      at = names[i]
      if i == last:
        h = block(h, i, f"dec_{at}_in0", attention=True)
        h = found["bottleneck"] = block(h, i, f"dec_{at}_in1")
      else:
        h = block(h, i, f"dec_{at}_up", "up")
      for j in range(self.num_blocks + 1):
        h = block(jnp.concatenate([h, skips.pop()], axis=-1), i, f"dec_{at}_block{j}", attention=self._attends(i))
    h = nn.silu(_norm(h.shape[-1], 1e-5, dtype, "out_norm")(h))
    out = nn.Conv(self.out_channels, (3, 3), dtype=dtype, kernel_init=_ZEROS, name="out_conv")(h)
    return _finish(out, found, features)

  def _embed(self, t: Array, cond: Cond) -> Array:
    emb = timestep_embedding(t.astype(jnp.promote_types(self.dtype, jnp.float32)), self.channels, True, 0.0)
    emb = self._add_conditions(emb, t, cond)
    emb = nn.silu(nn.Dense(4 * self.channels, dtype=self.dtype, name="map_layer0")(emb))
    emb = nn.Dense(4 * self.channels, dtype=self.dtype, name="map_layer1")(emb)
    if self.num_classes:
      labels = self._one_hot(t, cond)
      emb = emb + nn.Dense(4 * self.channels, use_bias=False, dtype=self.dtype, name="map_label")(labels)
    return nn.silu(emb)
