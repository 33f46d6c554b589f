"""Original checkpoints of Stable Diffusion 1, 2, XL and SSD-1B, one safetensors file each, in the terms of diffusers.

Such a file has the tensors of all networks under the names of the code that trained them, and no config.json: what the
networks are is read off the shapes. What shapes do not say are the constants of the originals: 32 groups in norms, 8
attention heads where the projections around attention are convolutions (Stable Diffusion 1), else heads of 64 channels.

    model.diffusion_model.*                                             unet
    first_stage_model.*                                                 vae
    cond_stage_model.transformer.*                                      text_encoder (Stable Diffusion 1)
    cond_stage_model.model.*                                            text_encoder (2): OpenCLIP's names
    conditioner.embedders.0.transformer.*, conditioner.embedders.1.model.*    text_encoder, text_encoder_2 (XL)
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from ddil_jax.errors import UsageError
from ddil_jax.interop import weights
from ddil_jax.interop.weights import Stored
from ddil_jax.registry import unknown

Tensors = dict[str, Stored]

_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
_HEAD = 64  # channels of an attention head, but in the UNet of Stable Diffusion 1
_UNET_NAMES = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
               "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2",
               "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out"}
_BLOCK_NAMES = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
                "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut", "op": "conv"}
# A tensor that only one kind of a UNet's parts has -> the kind.
_KINDS = {"in_layers.2.weight": "resnets", "proj_in.weight": "attentions", "op.weight": "downsamplers",
          "conv.weight": "upsamplers"}
_VAE_NAMES = ((r"\.mid\.block_1\.", ".mid_block.resnets.0."), (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
              (r"\.mid\.attn_1\.", ".mid_block.attentions.0."), (r"\.nin_shortcut\.", ".conv_shortcut."),
              (r"\.norm_out\.", ".conv_norm_out."), (r"(attentions\.0)\.norm\.", r"\1.group_norm."),
              (r"(attentions\.0)\.([qkv])\.", r"\1.to_\2."), (r"(attentions\.0)\.proj_out\.", r"\1.to_out.0."))
_OPEN_CLIP_NAMES = ((r"^transformer\.resblocks\.", "text_model.encoder.layers."), (r"\.ln_(\d)\.", r".layer_norm\1."),
                    (r"\.mlp\.c_fc\.", ".mlp.fc1."), (r"\.mlp\.c_proj\.", ".mlp.fc2."), (r"\.attn\.", ".self_attn."),
                    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
                    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
                    (r"^ln_final\.", "text_model.final_layer_norm."), (r"^text_projection$", "text_projection.weight"))
_REFINER = 2560  # inputs of the added embedding of SDXL's refiner, which reads five sizes where the base reads six


def model(path, component: str) -> tuple[dict[str, Any], Tensors]:
  """A network of a checkpoint: (what diffusers' config.json would be, tensors by diffusers' names, not read).

  Raises:
    UsageError: another kind of file, or one without this component.
  """
  there = weights.stored(path)
  if not any(name.startswith(_UNET) for name in there):
    raise UsageError(f"{path} is no original checkpoint of Stable Diffusion: no tensor begins with {_UNET}; of a model"
                     " of diffusers give the folder")
  if component not in _COMPONENTS:
    raise UsageError(unknown("component", component, _COMPONENTS))
  for prefix, read in _COMPONENTS[component]:
    own = {name.removeprefix(prefix): tensor for name, tensor in there.items() if name.startswith(prefix)}
    if own:
      try:
        return read(own, f"{_UNET}label_emb.0.0.weight" in there)
      except UsageError as e:
        raise UsageError(f"{path}: {e}") from e
      except (KeyError, IndexError) as e:
        raise UsageError(f"{path}: the {component} in it is cut short or of another layout ({e} is missing)") from e
  raise UsageError(f"{path} has no {component}: no tensor begins with {_COMPONENTS[component][0][0]}")


# UNet ---------------------------------------------------------------------------------------


class _Level(NamedTuple):
  """A resolution: width, transformers in each residual block's attention (None where a block has none)."""
  channels: int
  depths: list[int | None]


def _unet(own: Tensors, xl: bool) -> tuple[dict[str, Any], Tensors]:
  names = dict(_UNET_NAMES)  # original name of a part -> diffusers'
  down = _levels(own, "input_blocks", "down_blocks", names)
  up = _levels(own, "output_blocks", "up_blocks", names)
  for n, part in enumerate(("resnets.0", "attentions.0", "resnets.1")):
    names[f"middle_block.{n}"] = f"mid_block.{part}"
  kind, depth = "UNetMidBlock2DCrossAttn", _depth(own, "middle_block.1")
  if depth is None:
    kind = "UNetMidBlock2D" if "middle_block.0.in_layers.2.weight" in own else None
  linear = len(_any(own, ".proj_in.weight").shape) == 2
  widths = [level.channels for level in down]
  config = {
      "_class_name": "UNet2DConditionModel", "in_channels": own["input_blocks.0.0.weight"].shape[1],
      "out_channels": own["out.2.weight"].shape[0], "block_out_channels": widths,
      "layers_per_block": _one_or_all([len(level.depths) for level in down]),
      "down_block_types": [_block("DownBlock2D", level) for level in down],
      "up_block_types": [_block("UpBlock2D", level) for level in up], "mid_block_type": kind,
      "cross_attention_dim": _any(own, ".attn2.to_k.weight").shape[1],
      "attention_head_dim": [_heads(level) for level in down] if linear else 8, "use_linear_projection": linear,
      "norm_num_groups": 32, "norm_eps": 1e-5, "act_fn": "silu", "flip_sin_to_cos": True, "freq_shift": 0,
      "downsample_padding": 1, **_depths(down, up, depth)}
  if (width := own["time_embed.0.weight"].shape[0]) != 4 * widths[0]:
    config["time_embedding_dim"] = width
  if "label_emb.0.0.weight" in own:
    inputs = own["label_emb.0.0.weight"].shape[1]
    if inputs == _REFINER:
      raise UsageError("this is the refiner of SDXL, which no method here distils; give the base model")
    config |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 256,
               "projection_class_embeddings_input_dim": inputs}
  if xl or not linear:  # of Stable Diffusion 2 there are two sizes of the same shapes
    config["sample_size"] = 128 if xl else 64
  else:
    config["upcast_attention"] = True  # without it Stable Diffusion 2.1 overflows in half precision in diffusers
  return config, {_unet_name(name, names): tensor for name, tensor in own.items()}


def _levels(own: Tensors, old: str, new: str, names: dict[str, str]) -> list[_Level]:
  """The resolutions of one side of a UNet; adds the names of its parts to `names`."""
  parts = sorted({tuple(map(int, found.groups())) for name in own
                  if (found := re.match(rf"{old}\.(\d{{1,4}})\.(\d{{1,4}})\.", name))})
  levels: list[_Level] = []
  ended = True
  for n, m in parts:
    part = f"{old}.{n}.{m}"
    kind = next((kind for mark, kind in _KINDS.items() if f"{part}.{mark}" in own), "")
    if kind == "resnets":
      if ended:
        levels.append(_Level(own[f"{part}.in_layers.2.weight"].shape[0], []))
      ended = False
      levels[-1].depths.append(None)
    if kind in ("resnets", "attentions"):
      names[part] = f"{new}.{len(levels) - 1}.{kind}.{len(levels[-1].depths) - 1}"
      if kind == "attentions":
        levels[-1].depths[-1] = _depth(own, part)
    elif kind:
      names[part] = f"{new}.{len(levels) - 1}.{kind}.0"
      ended = True
  return levels


def _depth(own: Tensors, part: str) -> int | None:
  """Transformers in an attention of a UNet; None where there is no such part."""
  if f"{part}.proj_in.weight" not in own:
    return None
  return len({name.split(".")[part.count(".") + 2] for name in own if name.startswith(f"{part}.transformer_blocks.")})


def _any(own: Tensors, end: str) -> Stored:
  """A tensor whose name ends so."""
  for name, tensor in own.items():
    if name.endswith(end):
      return tensor
  raise KeyError(f"*{end}")


def _heads(level: _Level) -> int:
  if level.channels % _HEAD and _block("", level):
    raise UsageError(f"attention over {level.channels} channels is in no network of Stable Diffusion 2 or XL, whose"
                     f" heads have {_HEAD}")
  return max(1, level.channels // _HEAD)


def _block(name: str, level: _Level) -> str:
  return ("CrossAttn" if any(depth is not None for depth in level.depths) else "") + name


def _depths(down: list[_Level], up: list[_Level], middle: int | None) -> dict[str, Any]:
  """transformer_layers_per_block, and reverse_transformer_layers_per_block where the sides differ."""
  def side(levels):
    return [_one_or_all([depth or 0 for depth in level.depths]) if level.depths[0] is not None else 1
            for level in levels]

  there, back = side(down), side(up)
  if down[-1].depths[0] is None and middle is not None:
    there[-1] = middle  # diffusers takes the middle's from there
    back[0] = middle if up[0].depths[0] is None else back[0]
  if back == there[::-1] and all(isinstance(depth, int) for depth in there):
    return {"transformer_layers_per_block": there}
  return {"transformer_layers_per_block": there, "reverse_transformer_layers_per_block": back}


def _one_or_all(values: list[int]) -> int | list[int]:
  return values[0] if len(set(values)) == 1 else values


def _unet_name(name: str, names: dict[str, str]) -> str:
  """diffusers' name of a tensor; an unknown one stays."""
  words = name.split(".")
  for length in (3, 2):  # words of a part's name
    if new := names.get(".".join(words[:length])):
      inner, last = ".".join(words[length:-1]), words[-1]
      return ".".join(filter(None, (new, _BLOCK_NAMES.get(inner, inner), last)))
  return name


# Autoencoder --------------------------------------------------------------------------------


def _vae(own: Tensors, xl: bool) -> tuple[dict[str, Any], Tensors]:
  levels = _count(own, r"encoder\.down\.(\d{1,4})\.")
  config = {
      "_class_name": "AutoencoderKL", "in_channels": own["encoder.conv_in.weight"].shape[1],
      "out_channels": own["decoder.conv_out.weight"].shape[0],
      "latent_channels": own["decoder.conv_in.weight"].shape[1],
      "block_out_channels": [own[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)],
      "layers_per_block": _count(own, r"encoder\.down\.0\.block\.(\d{1,4})\."), "norm_num_groups": 32, "act_fn": "silu",
      "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels,
      "use_quant_conv": "quant_conv.weight" in own, "use_post_quant_conv": "post_quant_conv.weight" in own,
      "scaling_factor": 0.13025 if xl else 0.18215}

  def new(name):
    name = re.sub(r"^encoder\.down\.(\d{1,4})\.block\.", r"encoder.down_blocks.\1.resnets.", name)
    name = re.sub(r"^encoder\.down\.(\d{1,4})\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0.", name)
    if found := re.match(r"decoder\.up\.(\d{1,4})\.(block|upsample)\.", name):  # counted from the full size there
      kind = "resnets" if found[2] == "block" else "upsamplers.0"
      name = f"decoder.up_blocks.{levels - 1 - int(found[1])}.{kind}.{name[found.end():]}"
    return _renamed(name, _VAE_NAMES)

  return config, {new(name): tensor for name, tensor in own.items()}


# Text encoders ------------------------------------------------------------------------------


def _clip(own: Tensors, xl: bool) -> tuple[dict[str, Any], Tensors]:
  """CLIP of OpenAI, under the names of transformers already."""
  del xl
  return _text_config(own, "CLIPTextModel", "quick_gelu"), own


def _open_clip(own: Tensors, xl: bool) -> tuple[dict[str, Any], Tensors]:
  """OpenCLIP: q, k and v are stored as one. Stable Diffusion 2 reads the states before the last layer; it is left out.
  """
  last = _count(own, r"transformer\.resblocks\.(\d{1,4})\.") - 1
  found: Tensors = {}
  for name, tensor in own.items():
    if name == "logit_scale" or not xl and (name == "text_projection"
                                            or name.startswith(f"transformer.resblocks.{last}.")):
      continue
    new = _renamed(name, _OPEN_CLIP_NAMES)
    if joined := re.fullmatch(r"(.*)\.in_proj_(weight|bias)", new):
      rows = tensor.shape[0] // 3
      for i, part in enumerate("qkv"):
        found[f"{joined[1]}.{part}_proj.{joined[2]}"] = tensor._replace(shape=(rows, *tensor.shape[1:]),
                                                                       rows=(i * rows, (i + 1) * rows))
    elif name == "text_projection":
      found[new] = tensor._replace(shape=tensor.shape[::-1], turned=True)
    else:
      found[new] = tensor
  return _text_config(found, "CLIPTextModelWithProjection" if xl else "CLIPTextModel", "gelu"), found


def _text_config(tensors: Tensors, kind: str, activation: str) -> dict[str, Any]:
  vocabulary, width = tensors["text_model.embeddings.token_embedding.weight"].shape
  projection = tensors.get("text_projection.weight")
  return {"architectures": [kind], "model_type": "clip_text_model", "hidden_act": activation, "hidden_size": width,
          "intermediate_size": tensors["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
          "num_hidden_layers": _count(tensors, r"text_model\.encoder\.layers\.(\d{1,4})\."),
          "num_attention_heads": width // _HEAD, "vocab_size": vocabulary,
          "max_position_embeddings": tensors["text_model.embeddings.position_embedding.weight"].shape[0],
          "projection_dim": projection.shape[0] if projection else width, "layer_norm_eps": 1e-5,
          "bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1}


def _count(names: Iterable[str], pattern: str) -> int:
  """One more than the highest number that a pattern finds; 0 where it finds none."""
  return max((int(found[1]) for name in names if (found := re.match(pattern, name))), default=-1) + 1


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
  for old, new in rules:
    name = re.sub(old, new, name)
  return name


# Component -> where its tensors may be, and what reads them.
_COMPONENTS = {
    "unet": ((_UNET, _unet),), "vae": ((_VAE, _vae),),
    "text_encoder": (("cond_stage_model.transformer.", _clip), ("conditioner.embedders.0.transformer.", _clip),
                     ("cond_stage_model.model.", _open_clip)),
    "text_encoder_2": (("conditioner.embedders.1.model.", _open_clip),)}
