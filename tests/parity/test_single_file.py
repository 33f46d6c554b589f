"""Original single-file checkpoints of Stable Diffusion: random weights of diffusers' networks under the original names.

The names are made here from the architecture and checked by diffusers' own converters, which is their oracle.
"""

import json
import math
import os
import re

import jax
import numpy as np
import pytest

from ddil_jax.interop import configs, single_file
from ddil_jax.interop import diffusers as folders
from ddil_jax.main import main
from tests.parity.test_diffusers_models import FULL, QUICK, REASON, diffusers, inputs, randomise, theirs, torch
from tests.running import refuse  # noqa: F401 (a fixture)

transformers = pytest.importorskip("transformers", reason=REASON)
import safetensors.torch  # noqa: E402 (needs PyTorch)
from diffusers.loaders import single_file_utils  # noqa: E402 (needs PyTorch)

SD1 = dict(sample_size=64, block_out_channels=(32, 64), cross_attention_dim=64, attention_head_dim=8,
           layers_per_block=1, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
           up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
XL = dict(sample_size=128, block_out_channels=(32, 64), cross_attention_dim=128, attention_head_dim=(1, 1),
          layers_per_block=2, use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
          projection_class_embeddings_input_dim=6 * 256 + 5, transformer_layers_per_block=(1, 2),
          down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
VAE = dict(block_out_channels=(32, 64), layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * 2,
           up_block_types=("UpDecoderBlock2D",) * 2)
TEXT = dict(hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=1, vocab_size=99,
            max_position_embeddings=12, projection_dim=48, bos_token_id=97, eos_token_id=98)
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
          "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
ENDS = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2", "conv_norm_out": "out.0",
        "conv_in": "input_blocks.0.0", "conv_out": "out.2"}


def unet_name(name, config):
  """The original name of a tensor of a UNet."""
  layers = config["layers_per_block"]
  part, _, last = name.rpartition(".")
  if part in ENDS:
    return f"model.diffusion_model.{ENDS[part]}.{last}"
  found = re.fullmatch(r"(down_blocks|mid_block|up_blocks)\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.+)", name)
  side, kind, i, j, rest = found[1], found[3], int(found[2] or 0), int(found[4]), found[5]
  part, _, last = rest.rpartition(".")
  rest = f"{RESNET[part]}.{last}" if kind == "resnets" else rest
  if side == "mid_block":
    place = f"middle_block.{2 * j if kind == 'resnets' else 1}"
  elif side == "down_blocks":
    place = f"input_blocks.{1 + i * (layers + 1) + (layers if kind == 'downsamplers' else j)}"
    place += ".0.op" if kind == "downsamplers" else f".{int(kind == 'attentions')}"
    rest = rest.removeprefix("conv.") if kind == "downsamplers" else rest
  else:
    behind = 2 if config["up_block_types"][i].startswith("Cross") else 1  # the last of its block
    place = f"output_blocks.{i * (layers + 1) + (layers if kind == 'upsamplers' else j)}"
    place += f".{behind if kind == 'upsamplers' else int(kind == 'attentions')}"
  return f"model.diffusion_model.{place}.{rest}"


def vae_name(name, levels):
  """The original name of a tensor of an autoencoder."""
  for old, new in ((r"down_blocks\.(\d+)\.resnets", r"down.\1.block"), (r"mid_block\.resnets\.0", "mid.block_1"),
                   (r"mid_block\.resnets\.1", "mid.block_2"), (r"mid_block\.attentions\.0", "mid.attn_1"),
                   ("group_norm", "norm"), (r"to_([qkv])\.", r"\1."), (r"to_out\.0", "proj_out"),
                   ("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out"),
                   (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample")):
    name = re.sub(old, new, name)
  name = re.sub(r"up_blocks\.(\d+)\.(resnets|upsamplers\.0)", lambda m: f"up.{levels - 1 - int(m[1])}."
                + ("block" if m[2] == "resnets" else "upsample"), name)
  return f"first_stage_model.{name}"


def open_clip(state, prefix):
  """{original name: tensor} of a text encoder of transformers."""
  out = {}
  for name, x in state.items():
    if name.endswith(("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias")):
      continue
    if name == "text_projection.weight":
      out[f"{prefix}text_projection"] = x.T.contiguous()
      continue
    if "q_proj" in name:
      x = torch.cat([state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
    for old, new in (("embeddings.token_embedding", "token_embedding"), ("self_attn", "attn"), ("mlp.fc1", "mlp.c_fc"),
                     ("embeddings.position_embedding.weight", "positional_embedding"), ("mlp.fc2", "mlp.c_proj"),
                     ("encoder.layers", "transformer.resblocks"), ("layer_norm", "ln_"), ("final_ln_", "ln_final"),
                     ("q_proj.", "in_proj_"), ("text_model.", "")):
      name = name.replace(old, new)
    out[prefix + name] = x
  return out


def text_model(kind, **change):
  model = randomise(kind(transformers.CLIPTextConfig(**TEXT | change)))
  return model, {name if name.startswith("text_") else f"text_model.{name}": x
                 for name, x in model.state_dict().items()}


def read_back(file, out, component, kind):
  """A component that we converted and wrote again, as diffusers or transformers loads it."""
  assert main(["convert", str(file), f"--component={component}", f"--out={out}.safetensors"]) == 0
  loaded = folders.load(f"{out}.safetensors")
  folders.export(loaded.params, loaded.about, out)
  if component.startswith("text"):
    (out / "diffusion_pytorch_model.safetensors").rename(out / "model.safetensors")
  model, report = kind.from_pretrained(out, output_loading_info=True)
  assert not report["missing_keys"] and not report["unexpected_keys"], report
  return model.eval(), loaded


def same(model, state):
  """Asserts that a model has exactly these tensors."""
  found = {name.removeprefix("text_model."): x for name, x in model.state_dict().items()}
  assert {name.removeprefix("text_model.") for name in state} == set(found)
  for name, x in state.items():
    own = found[name.removeprefix("text_model.")]
    assert torch.equal(own, x.reshape(own.shape)), name


@pytest.mark.parametrize("kind", ["sd1", "xl"])
def test_a_whole_checkpoint(kind, tmp_path):
  """UNet, autoencoder and text encoders of one file are what diffusers' converters make of it, bit for bit."""
  config = {"sd1": SD1, "xl": XL}[kind]
  unet, vae = randomise(diffusers.UNet2DConditionModel(**config)), randomise(diffusers.AutoencoderKL(**VAE), 1)
  first, first_state = text_model(transformers.CLIPTextModel)
  prefix = "conditioner.embedders.0.transformer." if kind == "xl" else "cond_stage_model.transformer."
  unet_state = {unet_name(name, config): x for name, x in unet.state_dict().items()}
  attention = r"first_stage_model\.\w+\.mid\.attn_1\.(q|k|v|proj_out)\.weight"  # convolutions in the original
  vae_state = {name: x[..., None, None] if re.fullmatch(attention, name) else x
               for name, x in ((vae_name(name, 2), x) for name, x in vae.state_dict().items())}
  originals = unet_state | vae_state | {prefix + name: x for name, x in first_state.items()}
  originals["model_ema.decay"] = torch.tensor(0.5)
  if kind == "xl":
    second, second_state = text_model(transformers.CLIPTextModelWithProjection, hidden_act="gelu")
    originals |= open_clip(second_state, "conditioner.embedders.1.model.")

  # The oracle agrees with the names above.
  ask = single_file_utils
  for found, model in ((ask.convert_ldm_unet_checkpoint(dict(originals), dict(unet.config)), unet),
                       (ask.convert_ldm_vae_checkpoint(dict(originals), dict(vae.config)), vae)):
    same(model, found)
  if kind == "xl":
    same(second, ask.convert_open_clip_checkpoint(second, dict(originals), "conditioner.embedders.1.model."))

  file = tmp_path / "checkpoint.safetensors"
  safetensors.torch.save_file({name: x.contiguous() for name, x in originals.items()}, file)
  back, loaded = read_back(file, tmp_path / "unet", "unet", diffusers.UNet2DConditionModel)
  same(back, unet.state_dict())
  given = inputs(loaded.module, 4, 4)
  wanted = theirs(unet, loaded.module, *given)
  np.testing.assert_array_equal(theirs(back, loaded.module, *given), wanted)  # the config says the same network
  if kind == "sd1":
    apply = jax.jit(loaded.module.apply, compiler_options=QUICK)
    np.testing.assert_allclose(apply({"params": loaded.params}, *given), wanted, rtol=1e-5,
                               atol=1e-5 * np.abs(wanted).max())
  back, _ = read_back(file, tmp_path / "vae", "vae", diffusers.AutoencoderKL)
  same(back, vae.state_dict())
  assert back.config.scaling_factor == {"sd1": 0.18215, "xl": 0.13025}[kind]
  back, _ = read_back(file, tmp_path / "text", "text_encoder", transformers.CLIPTextModel)
  same(back, first_state)
  tokens = torch.tensor([[97, 5, 6, 98]])
  with torch.no_grad():
    assert torch.equal(back(tokens).last_hidden_state, first(tokens).last_hidden_state)
    if kind == "xl":
      back, _ = read_back(file, tmp_path / "text_2", "text_encoder_2", transformers.CLIPTextModelWithProjection)
      same(back, second_state)
      assert torch.equal(back(tokens).text_embeds, second(tokens).text_embeds)


def test_the_text_encoder_of_stable_diffusion_2(tmp_path):
  """OpenCLIP's, without its last layer, whose states are not read."""
  wanted, state = text_model(transformers.CLIPTextModel, hidden_act="gelu")
  _, other = text_model(transformers.CLIPTextModelWithProjection, num_hidden_layers=3)
  file = tmp_path / "sd2.safetensors"
  originals = open_clip(other | state, "cond_stage_model.model.")
  safetensors.torch.save_file(originals | {"model.diffusion_model.out.2.bias": torch.zeros(4)}, file)
  back, _ = read_back(file, tmp_path / "text", "text_encoder", transformers.CLIPTextModel)
  same(back, state)
  assert back.config.hidden_act == "gelu"


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl", "ssd1b"])
def test_configs_at_full_size(name, tmp_path):
  """The network that is read off the shapes is that of the published config.json; the file has a header only."""
  published = dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8) if name == "sd15" else FULL[name][2]
  with torch.device("meta"):
    unet = diffusers.UNet2DConditionModel(**published)
  config = json.loads(unet.to_json_string())
  shapes = {unet_name(n, config): list(x.shape) for n, x in unet.state_dict().items()}
  ends = np.cumsum([math.prod(shape) * 2 for shape in shapes.values()]).tolist()
  header = json.dumps({n: {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
                       for (n, shape), begin, end in zip(shapes.items(), [0, *ends], ends, strict=False)}).encode()
  file = tmp_path / "full.safetensors"
  file.write_bytes(len(header).to_bytes(8, "little") + header)
  os.truncate(file, 8 + len(header) + ends[-1])  # a hole
  found, tensors = single_file.model(file, "unet")
  assert set(tensors) == set(unet.state_dict())
  module, wanted = configs.make(found)[0], configs.make(config)[0]
  assert module == (wanted.clone(sample_size=None) if name == "sd21" else wanted)


def test_files_that_are_refused(tmp_path, refuse):  # noqa: F811
  out = f"--out={tmp_path / 'out'}"
  pickled = tmp_path / "model.ckpt"
  pickled.write_bytes(b"\x80\x02}q\x00.")
  assert "is a pickle, which can run any code" in refuse("convert", pickled, out)

  def line(tensors, *arguments):
    safetensors.torch.save_file(tensors, tmp_path / "file.safetensors")
    return refuse("convert", tmp_path / "file.safetensors", out, *arguments)

  zero = torch.zeros(4)
  assert "no original checkpoint of Stable Diffusion" in line({"conv_in.weight": zero})
  one = {"model.diffusion_model.out.2.bias": zero}
  assert "is cut short or of another layout" in line(one)
  assert "has no vae: no tensor begins with first_stage_model." in line(one, "--component=vae")
  assert "unknown component 'vea'; did you mean vae?" in line(one, "--component=vea")
  unet = {unet_name(n, SD1): x for n, x in diffusers.UNet2DConditionModel(**SD1).state_dict().items()}
  assert "conv_norm_out.bias [32] is missing" in line({n: x for n, x in unet.items() if not n.endswith("out.0.bias")})
  refiner = {"model.diffusion_model.label_emb.0.0.weight": torch.zeros(2, 2560)}
  assert "the refiner of SDXL" in line(unet | refiner)
  bad = unet | {"model.diffusion_model.input_blocks.0.0.weight": zero}
  assert "cut short or of another layout" in line(bad)
  assert not (tmp_path / "out").exists()
