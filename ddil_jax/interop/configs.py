"""config.json of diffusers and transformers, and arguments of EDM's networks in the same form -> our modules.

An option that is known here and not computed is refused; fields that are not known are returned. A config.json is a
stranger's file: every number in it is checked before anything is built from it.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn

from ddil_jax.errors import UsageError
from ddil_jax.models.autoencoder_kl import AutoencoderKL
from ddil_jax.models.blocks import Level, Middle, Style
from ddil_jax.models.clip import ACTIVATIONS, TextEncoder, Tower
from ddil_jax.models.diffusers_unet import DiffusersUNet, Times
from ddil_jax.models.edm import DhariwalUNet, SongUNet
from ddil_jax.registry import unknown

_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# What a block of a published network may at most be; SDXL's are 1280 wide and 10 transformers deep.
_WIDEST, _DEEPEST, _MOST_LEVELS = 16_384, 64, 8
_MOST_BLOCKS = 1000  # residual blocks and transformers of all levels together; SDXL has 75


def make(config: dict) -> tuple[nn.Module, tuple[str, ...]]:
  """The module that a config.json describes, and the fields of it that are not known here.

  Raises:
    UsageError: another model, an option that is not supported, a number that is no sensible size.
  """
  fields = Fields(config)
  named = config.get("architectures")
  name = config.get("_class_name") or (named[0] if isinstance(named, list) and named else None)
  if not isinstance(name, str) or name not in MODELS:
    raise UsageError(unknown("model", name, MODELS))
  module = MODELS[name](fields)
  # Each is within bounds, but the product may not be; all of them are traced before a parameter can be counted.
  depths = [level.depths for way in ("down", "up") for level in getattr(module, way, ())]
  if (count := sum(len(d) + sum(d) for d in depths)) > _MOST_BLOCKS:
    raise UsageError(f"a network of {count:,} residual blocks and transformers; {_MOST_BLOCKS:,} are the most allowed")
  return module, fields.rest()


def full_names(tensors: dict[str, Any]) -> dict[str, Any]:
  """Tensors under the names of the current layout: older autoencoders and newer text encoders have others."""
  bare = "embeddings.token_embedding.weight" in tensors

  def full(name):
    if bare and not name.startswith("text_projection"):
      return f"text_model.{name}"
    before, dot, after = name.partition(".attentions.")
    for old, new in _OLD_ATTENTION.items() if dot else ():
      after = after.replace(f".{old}.", f".{new}.")
    return before + dot + after

  return {full(name): value for name, value in tensors.items()}


class Fields:
  """The fields of a config, read with checks; remembers which were read."""

  def __init__(self, config: dict):
    self._config, self._seen = config, {"architectures", "sample_size"}

  def rest(self) -> tuple[str, ...]:
    """Fields that nobody asked for and that say something."""
    return tuple(sorted(k for k, v in self._config.items()
                        if k not in self._seen and not k.startswith("_") and v not in (None, False)))

  def ignore_rest(self) -> None:
    """Takes all other fields as known."""
    self._seen |= set(self._config)

  def get(self, name: str, default: Any = None) -> Any:
    """A field; the default also where it is null."""
    self._seen.add(name)
    value = self._config.get(name)
    return default if value is None else value

  def explicit(self, name: str, default: Any) -> Any:
    """A field for which null is a value of its own; the default only where it is absent."""
    self._seen.add(name)
    return self._config.get(name, default)

  def only(self, **allowed: tuple) -> None:
    """Refuses fields with other values than these; None stands for absent or null."""
    for name, values in allowed.items():
      if (value := self.get(name)) not in values:
        raise UsageError(f"{name}={value!r} is not supported; {' or '.join(map(repr, values))} is")

  def integer(self, name: str, default: int | None = None, most: int = _WIDEST, least: int = 1) -> int:
    return self.check(name, self.get(name, default), most, least)

  def check(self, name: str, value: Any, most: int = _WIDEST, least: int = 1) -> int:
    """A whole number from least to most."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
      raise UsageError(f"{name}={_short(value)}: a whole number from {least} to {most} is expected")
    return value

  def number(self, name: str, default: float) -> float:
    value = self.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e6:
      raise UsageError(f"{name}={_short(value)}: a number is expected")
    return float(value)

  def flag(self, name: str, default: bool) -> bool:
    if not isinstance(value := self.get(name, default), bool):
      raise UsageError(f"{name}={_short(value)}: true or false is expected")
    return value

  def each(self, name: str, levels: int, default: Any) -> list:
    """A value for each level: a list of so many, or one for all."""
    value = self.get(name, default)
    value = list(value) if isinstance(value, list | tuple) else [value] * levels
    if len(value) != levels:
      raise UsageError(f"{name}={_short(value)} has {len(value)} entries; {levels} are expected, one a block")
    return value

  def widths(self, groups: int) -> list[int]:
    """block_out_channels."""
    name = "block_out_channels"
    value = self.get(name)
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= _MOST_LEVELS:
      raise UsageError(f"{name}={_short(value)}: a list of 1 to {_MOST_LEVELS} widths is expected")
    for width in value:
      if self.check(name, width) % groups:
        raise UsageError(f"{name}={_short(value)}: norm_num_groups={groups} does not divide {width}")
    return list(value)

  def blocks(self, name: str, known: dict[str, Any], levels: int) -> list[Any]:
    """Block types."""
    types = self.get(name)
    if not isinstance(types, list | tuple) or len(types) != levels:
      raise UsageError(f"{name}={_short(types)}: a list of {levels} block types is expected")
    for kind in types:
      if not isinstance(kind, str) or kind not in known:
        raise UsageError(unknown(f"block type in {name}:", str(kind)[:60], known))
    return [known[kind] for kind in types]


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 60 else text[:57] + "..."


def _heads(width: int, heads: int) -> int:
  if width % heads:
    raise UsageError(f"{heads} attention heads do not divide {width} channels")
  return heads


def _size(fields: Fields) -> tuple[int, int] | None:
  size = fields.get("sample_size")
  if size is None:
    return None
  pair = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
  return tuple(fields.check("sample_size", side) for side in pair)


def _condition_unet(fields: Fields) -> nn.Module:
  """UNet2DConditionModel."""
  fields.only(
      act_fn=(None, "silu", "swish"), center_input_sample=(None, False), dual_cross_attention=(None, False),
      only_cross_attention=(None, False), mid_block_only_cross_attention=(None, False), num_attention_heads=(None,),
      class_embed_type=(None,), num_class_embeds=(None,), encoder_hid_dim=(None,), encoder_hid_dim_type=(None,),
      resnet_skip_time_act=(None, False), resnet_out_scale_factor=(None, 1), resnet_time_scale_shift=(None, "default"),
      time_embedding_type=(None, "positional"), time_embedding_act_fn=(None,), timestep_post_act=(None,),
      conv_in_kernel=(None, 3), conv_out_kernel=(None, 3), attention_type=(None, "default"),
      class_embeddings_concat=(None, False), cross_attention_norm=(None,), addition_embed_type=(None, "text_time"))
  fields.get("upcast_attention")  # ours always takes the softmax in float32
  fields.get("addition_embed_type_num_heads")
  groups = fields.integer("norm_num_groups", 32)
  widths = fields.widths(groups)
  n = len(widths)
  layers = [fields.check("layers_per_block", v, _DEEPEST) for v in fields.each("layers_per_block", n, 2)]
  # Called a dimension, but the number of heads in all published models of this class.
  heads = [_heads(w, fields.check("attention_head_dim", h))
           for w, h in zip(widths, fields.each("attention_head_dim", n, 8))]
  text = {fields.check("cross_attention_dim", v) for v in fields.each("cross_attention_dim", n, 1280)}
  if len(text) > 1:
    raise UsageError(f"cross_attention_dim={sorted(text)}: one width for all blocks is expected")

  depth_name, reverse_name = "transformer_layers_per_block", "reverse_transformer_layers_per_block"

  def depths(name, value, count):
    value = list(value) if isinstance(value, list | tuple) else [value] * count
    if len(value) != count:
      raise UsageError(f"{name}: {_short(value)} has {len(value)} entries for {count} residual blocks")
    return tuple(fields.check(name, v, _DEEPEST, 0) for v in value)

  down_depths = fields.each(depth_name, n, 1)
  if fields.get(reverse_name) is None and any(isinstance(v, list | tuple) for v in down_depths):
    raise UsageError(f"{depth_name}={_short(down_depths)} has lists, which need {reverse_name}")
  up_depths = fields.each(reverse_name, n, down_depths[::-1])
  kinds = {"DownBlock2D": "", "CrossAttnDownBlock2D": "cross"}
  down_kinds = fields.blocks("down_block_types", kinds, n)
  up_kinds = fields.blocks("up_block_types", {k.replace("Down", "Up"): v for k, v in kinds.items()}, n)
  down = tuple(Level(widths[i], depths(depth_name, down_depths[i] if down_kinds[i] else 0, layers[i]), down_kinds[i],
                     heads[i], "conv" if i < n - 1 else "") for i in range(n))
  up = tuple(Level(widths[n - 1 - i], depths(reverse_name, up_depths[i] if up_kinds[i] else 0, layers[n - 1 - i] + 1),
                   up_kinds[i], heads[n - 1 - i], "conv" if i < n - 1 else "") for i in range(n))
  divide = fields.number("mid_block_scale_factor", 1.0)
  deepest = down_depths[-1] if isinstance(down_depths[-1], list | tuple) else [down_depths[-1]]
  middles = {"UNetMidBlock2DCrossAttn": Middle(1, depths(depth_name, deepest[:1], 1)[0], "cross", heads[-1], divide),
             "UNetMidBlock2D": Middle(0, 0, "", 1, divide), None: None}
  middle = fields.explicit("mid_block_type", "UNetMidBlock2DCrossAttn")
  if not isinstance(middle, str | None) or middle not in middles:
    raise UsageError(unknown("mid_block_type", str(middle)[:60], filter(None, middles)))
  times = Times(widths[0], fields.integer("time_embedding_dim", 4 * widths[0], 4 * _WIDEST),
                fields.flag("flip_sin_to_cos", True), fields.number("freq_shift", 0))
  added = fields.get("addition_embed_type") is not None
  ids = fields.integer("addition_time_embed_dim", None) if added else 0
  pooled = fields.integer("projection_class_embeddings_input_dim", None, 8 * _WIDEST) - 6 * ids if added else 0
  if added and pooled < 1:
    raise UsageError("projection_class_embeddings_input_dim leaves no room for the pooled text next to 6 time ids of"
                     f" addition_time_embed_dim={ids}")
  for name in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
    fields.get(name)
  return DiffusersUNet(
      fields.integer("in_channels", 4), fields.integer("out_channels", 4), down, up, middles[middle], times,
      Style(groups, fields.number("norm_eps", 1e-5), fields.number("dropout", 0.0), False,
            fields.flag("use_linear_projection", False), fields.integer("downsample_padding", 1, 1, 0)),
      text.pop(), ids, pooled, fields.integer("time_cond_proj_dim", 0, least=0), sample_size=_size(fields))


def _unet(fields: Fields) -> nn.Module:
  """UNet2DModel."""
  fields.only(act_fn=(None, "silu", "swish"), time_embedding_type=(None, "positional"), class_embed_type=(None,),
              resnet_time_scale_shift=(None, "default", "scale_shift"), downsample_type=(None, "conv", "resnet"),
              upsample_type=(None, "conv", "resnet"))
  fields.get("num_train_timesteps")
  groups = fields.integer("norm_num_groups", 32)
  widths = fields.widths(groups)
  n, layers = len(widths), fields.integer("layers_per_block", 2, _DEEPEST)
  head = fields.explicit("attention_head_dim", 8)

  def heads(width):
    return width // _heads(width, width if head is None else fields.check("attention_head_dim", head))

  def levels(direction, resampling, count):
    resample = fields.get(resampling, "conv")
    change = "Downsample" if direction == "Down" else "Upsample"
    kinds = {f"{direction}Block2D": ("", "conv"), f"Attn{direction}Block2D": ("self", resample),
             f"Resnet{change}Block2D": ("", "resnet")}
    found = fields.blocks(f"{direction.lower()}_block_types", kinds, n)
    order = widths if direction == "Down" else widths[::-1]
    return tuple(Level(w, (0,) * count, kind, heads(w) if kind else 1, resample if i < n - 1 else "")
                 for i, (w, (kind, resample)) in enumerate(zip(order, found)))

  scale_shift = fields.get("resnet_time_scale_shift") == "scale_shift"
  attends = fields.flag("add_attention", True)
  own_groups = fields.get("attn_norm_num_groups")
  if own_groups not in (None, groups):
    raise UsageError(f"attn_norm_num_groups={_short(own_groups)}: norm_num_groups={groups} is expected")
  if (kind := fields.explicit("mid_block_type", "UNetMidBlock2D")) not in ("UNetMidBlock2D", None):
    raise UsageError(unknown("mid_block_type", str(kind)[:60], ["UNetMidBlock2D"]))
  middle = Middle(1, 0, "self" if attends else "", heads(widths[-1]) if attends and kind else 1,
                  fields.number("mid_block_scale_factor", 1.0), not scale_shift or own_groups is not None)
  return DiffusersUNet(
      fields.integer("in_channels", 3), fields.integer("out_channels", 3), levels("Down", "downsample_type", layers),
      levels("Up", "upsample_type", layers + 1), middle if kind else None,
      Times(widths[0], fields.integer("time_embedding_dim", 4 * widths[0], 4 * _WIDEST),
            fields.flag("flip_sin_to_cos", True), fields.number("freq_shift", 0)),
      Style(groups, fields.number("norm_eps", 1e-5), fields.number("dropout", 0.0), scale_shift,
            pad=fields.integer("downsample_padding", 1, 1, 0)),
      num_classes=fields.integer("num_class_embeds", 0, 1_000_000, 0), center=fields.flag("center_input_sample", False),
      sample_size=_size(fields))


def _autoencoder(fields: Fields) -> nn.Module:
  """AutoencoderKL."""
  fields.only(act_fn=(None, "silu", "swish"), latents_mean=(None,), latents_std=(None,))
  for name in ("force_upcast", "sample_size"):  # how it was trained or is computed elsewhere
    fields.get(name)
  groups = fields.integer("norm_num_groups", 32)
  widths = fields.widths(groups)
  n, layers = len(widths), fields.integer("layers_per_block", 1, _DEEPEST)
  fields.blocks("down_block_types", {"DownEncoderBlock2D": ""}, n)
  fields.blocks("up_block_types", {"UpDecoderBlock2D": ""}, n)
  levels = lambda widths, count: tuple(  # noqa: E731
      Level(w, (0,) * count, resample="conv" if i < n - 1 else "") for i, w in enumerate(widths))
  attends = fields.flag("mid_block_add_attention", True)
  channels = fields.integer("in_channels", 3)
  if fields.integer("out_channels", 3) != channels:
    raise UsageError(f"out_channels={fields.get('out_channels')}: in_channels, {channels}, is expected")
  scaling = fields.number("scaling_factor", 0.18215)
  if not scaling > 0:
    raise UsageError(f"scaling_factor={scaling}: a positive number is expected")
  return AutoencoderKL(
      channels, fields.integer("latent_channels", 4), levels(widths, layers),
      levels(widths[::-1], layers + 1), Middle(1, 0, "self" if attends else ""), Style(groups, 1e-6, pad=0), scaling,
      fields.number("shift_factor", 0.0), fields.flag("use_quant_conv", True), fields.flag("use_post_quant_conv", True))


def _edm(song: bool) -> Callable[[Fields], nn.Module]:
  """SongUNet and DhariwalUNet, by the names of EDM's own arguments. What augments the images in training is left out."""
  def build(fields: Fields) -> nn.Module:
    fields.only(channel_mult_emb=(None, 4), label_dropout=(None, 0))
    resolution, channels = fields.integer("img_resolution"), fields.integer("in_channels", 3)
    if fields.integer("out_channels", channels) != channels:
      raise UsageError(f"out_channels={fields.get('out_channels')}: in_channels, {channels}, is expected")
    mult = fields.get("channel_mult", [1, 2, 2, 2] if song else [1, 2, 3, 4])
    if not isinstance(mult, list | tuple) or not 1 <= len(mult) <= _MOST_LEVELS:
      raise UsageError(f"channel_mult={_short(mult)}: a list of 1 to {_MOST_LEVELS} widths is expected")
    if resolution % 2**(len(mult) - 1):
      raise UsageError(f"img_resolution={resolution} cannot be halved {len(mult) - 1} times, for as many levels as"
                       f" channel_mult={_short(mult)} has")
    at = fields.get("attn_resolutions", [16] if song else [32, 16, 8])
    if not isinstance(at, list | tuple):
      raise UsageError(f"attn_resolutions={_short(at)}: a list of resolutions is expected")
    shared = dict(
        resolution=resolution, out_channels=channels, num_classes=fields.integer("label_dim", 0, 1_000_000, 0),
        channels=fields.integer("model_channels", 128 if song else 192, 1024),
        channel_mult=tuple(fields.check("channel_mult", m, 16) for m in mult),
        num_blocks=fields.integer("num_blocks", 4 if song else 3, _DEEPEST // 2),
        attention_resolutions=tuple(fields.check("attn_resolutions", r) for r in at),
        dropout=fields.number("dropout", 0.1))
    fields.get("augment_dim")
    if not song:
      widths = {shared["channels"] * m for m in shared["channel_mult"]}
      if any(width % DhariwalUNet.per_head for width in widths):
        raise UsageError(f"model_channels times channel_mult, {sorted(widths)}: multiples of {DhariwalUNet.per_head},"
                         " the channels of an attention head, are expected")
      return DhariwalUNet(**shared)
    fields.only(embedding_type=(None, "positional", "fourier"), encoder_type=(None, "standard", "skip", "residual"),
                decoder_type=(None, "standard", "skip"))
    taps = fields.get("resample_filter", [1, 1])
    if not isinstance(taps, list | tuple) or len(taps) not in (2, 4):
      raise UsageError(f"resample_filter={_short(taps)}: a list of 2 or 4 whole numbers is expected")
    return SongUNet(**shared, fourier=fields.get("embedding_type") == "fourier",
                    encoder=fields.get("encoder_type", "standard"), decoder=fields.get("decoder_type", "standard"),
                    taps=tuple(fields.check("resample_filter", tap) for tap in taps),
                    noise_width=fields.integer("channel_mult_noise", 1, 16))
  return build


def clip_tower(fields: Fields, width: int = 512, hidden: int = 2048, heads: int = 8) -> Tower:
  """A tower of CLIP; the defaults are those of the original text towers."""
  act = fields.get("hidden_act", "quick_gelu")
  if not isinstance(act, str) or act not in ACTIVATIONS:
    raise UsageError(unknown("hidden_act", str(act)[:60], ACTIVATIONS))
  width = fields.integer("hidden_size", width)
  return Tower(width, fields.integer("intermediate_size", hidden, 4 * _WIDEST),
               fields.integer("num_hidden_layers", 12, 2 * _DEEPEST),
               _heads(width, fields.integer("num_attention_heads", heads)), act, fields.number("layer_norm_eps", 1e-5))


def clip_tokens(fields: Fields) -> tuple[int, int, int | None]:
  """What CLIP's text towers read: number of tokens there are, of those in a text, and where a text is read off."""
  end = fields.integer("eos_token_id", 49407, 10_000_000, 0)
  # Old configs name 2, which is no end of text: such models read off the largest token.
  return (fields.integer("vocab_size", 49408, 10_000_000), fields.integer("max_position_embeddings", 77, 65_536),
          None if end == 2 else end)


def _text_encoder(projected: bool) -> Callable[[Fields], nn.Module]:
  """CLIPTextModel and CLIPTextModelWithProjection."""
  def build(fields: Fields) -> nn.Module:
    tower, dim = clip_tower(fields), fields.integer("projection_dim", 512)
    tokens = clip_tokens(fields)
    fields.ignore_rest()  # of how it was trained, and of transformers' own interface
    return TextEncoder(tower, *tokens, dim if projected else None)
  return build


MODELS: dict[str, Callable[[Fields], nn.Module]] = {
    "UNet2DConditionModel": _condition_unet, "UNet2DModel": _unet, "AutoencoderKL": _autoencoder,
    "CLIPTextModel": _text_encoder(False), "CLIPTextModelWithProjection": _text_encoder(True),
    "SongUNet": _edm(True), "DhariwalUNet": _edm(False)}
