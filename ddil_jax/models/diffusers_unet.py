"""One network for diffusers' `UNet2DModel` and `UNet2DConditionModel`: Stable Diffusion 1 and 2, SDXL, SSD-1B, DDPM."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddil_jax.errors import UsageError
from ddil_jax.models.base import require_features
from ddil_jax.models.blocks import Down, Level, Mid, Middle, Style, Up, group_norm
from ddil_jax.models.layers import guidance_embedding, sinusoidal_embedding, timestep_embedding
from ddil_jax.types import Array, Cond

_ZEROS = nn.initializers.zeros_init()


@dataclasses.dataclass(frozen=True)
class Times:
  """How time is embedded: width of the sinusoid and of the result, and the choices of `timestep_embedding`."""
  sinusoid: int
  width: int
  cosine_first: bool = True
  shift: float = 0.0


class DiffusersUNet(nn.Module):
  """`(x [B,H,W,in_channels], t [B], cond) -> [B,H,W,out_channels]`. Names of sub-modules are those of the weights.

  Attributes:
    in_channels, out_channels: of the map.
    down, up: levels, the first of `down` at full size, the last of `up` at full size.
    middle: the block between them; None is none (SSD-1B has one without attention, others have been removed whole).
    times: the time embedding.
    style: what the blocks share.
    text_width: D of cond["text"]; 0 is a network without text.
    added_time: width of the sinusoid of each of cond["time_ids"] (SDXL: 256); 0 is none.
    pooled_width: D of cond["text_pooled"], next to time_ids.
    guidance_embedding: width of the embedding of cond["guidance_scale"] (`time_cond_proj_dim`; LCM: 256); 0 is none.
      Its projection starts at zero, so a student that starts from a teacher's parameters starts as the teacher.
    end_time_embedding: width of the embedding of cond["end_time"] (missing: t itself); likewise, and unknown to diffusers.
    num_classes: classes of cond["label"]; 0 is none.
    center: the network wants 2 x - 1.
    sample_size: (H, W) of the maps that it was made for, if it says so.

  Source: Ho et al. 2020 (arXiv 2006.11239), Rombach et al. 2022 (arXiv 2112.10752), SDXL (arXiv 2307.01952), LCM
  (arXiv 2310.04378), SSD-1B (arXiv 2401.02677).
  """
  in_channels: int
  out_channels: int
  down: tuple[Level, ...]
  up: tuple[Level, ...]
  middle: Middle | None
  times: Times
  style: Style = Style()
  text_width: int = 0
  added_time: int = 0
  pooled_width: int = 0
  guidance_embedding: int = 0
  end_time_embedding: int = 0
  num_classes: int = 0
  center: bool = False
  sample_size: tuple[int, int] | None = None

  @property
  def labels(self) -> int:
    """How many values cond["label"] may have, the null class included; 0 is none."""
    return self.num_classes

  def feature_names(self) -> tuple[str, ...]:
    """Features that `__call__` gives on request."""
    return ("bottleneck", "encoder", *(f"level{i}" for i in range(len(self.down))))

  def cache_names(self) -> tuple[str, ...]:
    """Features that `__call__` gives on request and takes in `reuse`, in place of computing them.

    "deep<i>" enters the block on the way up that mirrors down_blocks.<i>: taking it leaves the blocks 0 to i and their
    mirrors. "skips" is all that the way down and the middle give.
    """
    return ("skips", *(f"deep{i}" for i in range(len(self.down))))

  def example(self, size: tuple[int, int] | None = None, tokens: int = 77) -> tuple[Any, Any, Cond]:
    """Shapes of (x, t, cond) for one image: arguments of `init`."""
    height, width = size or self.sample_size or (2**len(self.down),) * 2
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)  # noqa: E731
    cond = {}
    if self.text_width:
      cond["text"] = shape(1, tokens, self.text_width)
    if self.added_time:
      cond |= {"text_pooled": shape(1, self.pooled_width), "time_ids": shape(1, 6)}
    if self.guidance_embedding:
      cond["guidance_scale"] = shape(1)
    if self.num_classes:
      cond["label"] = jax.ShapeDtypeStruct((1,), jnp.int32)
    return shape(1, height, width, self.in_channels), shape(1), cond

  @nn.compact
  def __call__(self, x: Array, t: Array, cond: Cond, keys: Array | None = None,
               features: tuple[str, ...] = (), reuse: dict[str, Any] | None = None) -> Any:
    """Runs the network.

    Args:
      x: [B, H, W, in_channels].
      t: time input [B], 0..1000.
      cond: "text" [B,L,D] embeddings of the prompt; SDXL's "text_pooled" [B,D'] and "time_ids" [B,6] (original size,
        crop, target size, height first); "guidance_scale" float [B], missing: no such term; "end_time" float [B];
        "label" int [B].
      keys: [B] typed keys that switch dropout on.
      features: names of features wanted; see `feature_names` and `cache_names`.
      reuse: one of `cache_names` and its value, of an earlier call; features that it passes over are not there.

    Returns:
      [B, H, W, out_channels], float32 or the wider compute dtype; with features, a pair of it and {name: [B, h, w, c]}.

    Raises:
      UsageError: unknown feature, or an entry of cond that the network needs is missing.
    """
    reuse = reuse or {}
    require_features(features, (*self.feature_names(), *self.cache_names()))
    require_features(reuse, self.cache_names())
    needed = ["text"] * bool(self.text_width) + ["text_pooled", "time_ids"] * bool(self.added_time) \
        + ["label"] * bool(self.num_classes)
    if missing := [name for name in needed if name not in cond]:
      raise UsageError(f"this UNet needs cond['{missing[0]}']; cond has {', '.join(cond) or 'nothing'}")
    style, found = self.style, {}
    text = cond["text"].astype(style.dtype) if self.text_width else None
    emb = self._embed(t, cond)

    last = len(self.down) - 1
    depth = next((i for i in range(last + 1) if f"deep{i}" in reuse), last)  # the last block of the way down
    skips, h = reuse.get("skips", ((), None))
    skips = list(skips)
    if h is None:
      h = nn.Conv(self.down[0].channels, (3, 3), dtype=style.dtype, name="conv_in")(2 * x - 1 if self.center else x)
      skips = [h]
      for i, level in enumerate(self.down[:depth + 1]):
        h, outputs, found[f"level{i}"] = Down(level, style, name=f"down_blocks_{i}")(h, emb, text, keys)
        skips += outputs if i < depth else outputs[:len(level.depths)]  # of the last none, or one that nothing reads
      found["encoder"] = h
    if not reuse:
      if self.middle is not None:
        h = Mid(self.middle, style, name="mid_block")(h, emb, text, keys)
      found["bottleneck"], found["skips"] = h, (tuple(skips), h)
    for i, level in enumerate(self.up):
      if last - i <= depth:
        h = found[f"deep{last - i}"] = reuse.get(f"deep{last - i}", h)
        h = Up(level, style, name=f"up_blocks_{i}")(h, skips, emb, text, keys)

    h = nn.silu(group_norm(style, "conv_norm_out")(h))
    out = nn.Conv(self.out_channels, (3, 3), dtype=style.dtype, name="conv_out")(h)
    out = out.astype(jnp.promote_types(out.dtype, jnp.float32))
    return (out, {name: found[name] for name in features}) if features else out

  def _embed(self, t: Array, cond: Cond) -> Array:
    """Embedding [B, width] of time and of all that is added to it."""
    times, dtype = self.times, self.style.dtype
    wide = jnp.promote_types(dtype, jnp.float32)
    sinusoid = lambda v, dim: timestep_embedding(v.astype(wide), dim, times.cosine_first, times.shift)  # noqa: E731
    w = None
    if self.guidance_embedding and "guidance_scale" in cond:
      w = guidance_embedding(cond["guidance_scale"].astype(wide) - 1, self.guidance_embedding)
    emb = TimeEmbedding(times.width, dtype, name="time_embedding")(sinusoid(t, times.sinusoid), w)
    if self.end_time_embedding:
      end = sinusoidal_embedding(cond.get("end_time", t).astype(wide), self.end_time_embedding)
      emb = emb + nn.Dense(times.width, use_bias=False, kernel_init=_ZEROS, dtype=dtype, name="end_time")(end)
    if self.num_classes:
      emb = emb + nn.Embed(self.num_classes, times.width, dtype=dtype, name="class_embedding")(cond["label"])
    if self.added_time:
      ids = sinusoid(cond["time_ids"], self.added_time).reshape(len(t), -1)
      added = jnp.concatenate([cond["text_pooled"].astype(wide), ids], axis=-1)
      emb = emb + TimeEmbedding(times.width, dtype, name="add_embedding")(added)
    return emb


class TimeEmbedding(nn.Module):
  """Two dense layers with SiLU between; a condition [B,D] is projected and added before."""
  width: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, condition: Array | None = None) -> Array:
    if condition is not None:
      x = x + nn.Dense(x.shape[-1], use_bias=False, kernel_init=_ZEROS, dtype=self.dtype, name="cond_proj")(condition)
    h = nn.silu(nn.Dense(self.width, dtype=self.dtype, name="linear_1")(x))
    return nn.Dense(self.width, dtype=self.dtype, name="linear_2")(h)
