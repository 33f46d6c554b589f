"""Our networks against diffusers' in PyTorch: random weights, tiny sizes, float32."""

import functools
import json

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddil_jax.errors import UsageError
from ddil_jax.interop import weights
from ddil_jax.interop.configs import make
from ddil_jax.models.base import as_net_fn

REASON = "parity with diffusers' models needs PyTorch: pip install -r requirements-test.txt"
torch = pytest.importorskip("torch", reason=REASON)
diffusers = pytest.importorskip("diffusers", reason=REASON)

torch.set_num_threads(1)

# As the published ones, but for the sizes; maps of 9 x 6 are odd after the first level.
SMALL = dict(sample_size=8, norm_num_groups=2, block_out_channels=(4, 8), cross_attention_dim=6)
SD15 = SMALL | dict(layers_per_block=1, attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
SD21 = SD15 | dict(attention_head_dim=(1, 2), use_linear_projection=True, upcast_attention=True)
SDXL = SMALL | dict(
    layers_per_block=1, attention_head_dim=(1, 2), use_linear_projection=True, addition_embed_type="text_time",
    addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 5, time_cond_proj_dim=6,
    transformer_layers_per_block=(1, 2), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
# Blocks removed one by one, and the attention of the middle.
SSD1B = SDXL | dict(time_cond_proj_dim=None, layers_per_block=2, mid_block_type="UNetMidBlock2D",
                    transformer_layers_per_block=[1, [2, 1]], reverse_transformer_layers_per_block=[[1, 1, 2], 1])
DDPM = dict(sample_size=8, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, attention_head_dim=4,
            downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, num_class_embeds=3,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))
ADM = DDPM | dict(resnet_time_scale_shift="scale_shift", downsample_type="resnet", upsample_type="resnet",
                  down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"), downsample_padding=1,
                  up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"), num_class_embeds=None)
UNETS = {"sd15": ("UNet2DConditionModel", SD15), "sd21": ("UNet2DConditionModel", SD21),
         "sdxl-lcm": ("UNet2DConditionModel", SDXL), "ssd1b": ("UNet2DConditionModel", SSD1B),
         "ddpm": ("UNet2DModel", DDPM), "adm": ("UNet2DModel", ADM)}
QUICK = {"xla_backend_optimization_level": 0}


def randomise(model, seed=0):
  """Weights of about the size that trained ones have, biases and gains too; in place."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, p in model.named_parameters():
      fan_in = p.shape[1:].numel() if p.ndim > 1 else 4
      p.copy_(torch.randn(p.shape, generator=generator) / fan_in**0.5)
      p += 1.0 if p.ndim == 1 and name.endswith("weight") else 0.0
  return model.eval()


def both(name, config):
  """(diffusers' model, our module, its parameters) of random weights."""
  model = randomise(getattr(diffusers, name)(**config))
  module = make(json.loads(model.to_json_string()))[0]
  tensors = {k: v.numpy() for k, v in model.state_dict().items()}
  template = weights.template(module, *module.example())
  return model, module, weights.to_flax(template, tensors, name, weights.NUMBERED)["params"]


def inputs(module, height=6, width=4, batch=2, tokens=3):
  """x, t and cond for our module, float32."""
  rng = np.random.default_rng(0)
  x, _, cond = module.example((height, width), tokens)
  draw = lambda like: rng.standard_normal((batch, *like.shape[1:])).astype(np.float32)  # noqa: E731
  cond = {k: draw(v) for k, v in cond.items()}
  cond |= {"label": np.array([2, 0], np.int32)} if "label" in cond else {}
  cond |= {"guidance_scale": np.array([7.5, 2.25], np.float32)} if "guidance_scale" in cond else {}
  cond |= {"time_ids": np.array([[8, 6, 0, 1, 8, 6], [64, 48, 3, 0, 64, 48]], np.float32)} if "time_ids" in cond else {}
  return draw(x), np.array([999, 17], np.float32), cond


def theirs(model, module, x, t, cond):
  """diffusers' output on the same inputs, NHWC."""
  tensors = {k: torch.from_numpy(v) for k, v in cond.items()}
  arguments = [torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), torch.from_numpy(t)]
  options = {}
  if "text" in cond:
    arguments.append(tensors["text"])
  if "label" in cond:
    options["class_labels"] = tensors["label"].long()
  if "time_ids" in cond:
    options["added_cond_kwargs"] = {"text_embeds": tensors["text_pooled"], "time_ids": tensors["time_ids"]}
  if "guidance_scale" in cond:
    pipeline = diffusers.LatentConsistencyModelPipeline
    options["timestep_cond"] = pipeline.get_guidance_scale_embedding(
        None, tensors["guidance_scale"] - 1, embedding_dim=module.guidance_embedding)
  with torch.no_grad():
    return model(*arguments, **options).sample.numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize("name", UNETS)
def test_unet(name):
  model, module, params = both(*UNETS[name])
  x, t, cond = inputs(module, *((10, 6) if name == "sd15" else (8, 4)))
  if name == "sd15":
    x = x[:, :9]  # odd maps are cropped on the way up
  wanted = theirs(model, module, x, t, cond)
  features = module.feature_names() if name in ("sd15", "adm") else ()
  apply = jax.jit(functools.partial(module.apply, features=features), compiler_options=QUICK)
  out = apply({"params": params}, x, t, cond)
  out, found = out if features else (out, {})
  assert np.abs(wanted).std() > 0.1
  np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
  shapes = {k: v.shape[1:] for k, v in found.items()}
  if name == "sd15":
    assert shapes == {"bottleneck": (5, 3, 8), "encoder": (5, 3, 8), "level0": (9, 6, 4), "level1": (5, 3, 8)}
    assert np.abs(found["bottleneck"] - found["encoder"]).max() > 0.1
  elif name == "adm":
    assert set(shapes) == {"bottleneck", "encoder", "level0", "level1"} and shapes["level0"] == (8, 4, 4)


XL = dict(sample_size=128, block_out_channels=(320, 640, 1280), attention_head_dim=(5, 10, 20),
          cross_attention_dim=2048, use_linear_projection=True,
          addition_embed_type="text_time", addition_time_embed_dim=256,
          projection_class_embeddings_input_dim=2816, transformer_layers_per_block=(1, 2, 10),
          down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
          up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"))
FULL = {
    "sd21": ("UNet2DConditionModel", 865, dict(sample_size=96, cross_attention_dim=1024, use_linear_projection=True,
                                               attention_head_dim=(5, 10, 20, 20), upcast_attention=True)),
    "sdxl": ("UNet2DConditionModel", 2567, XL),
    "ssd1b": ("UNet2DConditionModel", 1331, XL | dict(
        mid_block_type="UNetMidBlock2D", transformer_layers_per_block=[1, [2, 2], [4, 4]],
        reverse_transformer_layers_per_block=[[4, 4, 10], [2, 1, 1], 1])),
    "autoencoder": ("AutoencoderKL", 83, dict(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, sample_size=512))}


@pytest.mark.parametrize("name", FULL)
def test_layouts_at_full_size(name):
  """Names and shapes of all tensors; nothing is computed."""
  kind, millions, config = FULL[name]
  with torch.device("meta"):
    model = getattr(diffusers, kind)(**config)
  wanted = {k: tuple(v.shape) for k, v in model.state_dict().items()}
  module, rest = make(json.loads(model.to_json_string()))
  template = weights.template(module, *module.example())
  names, shapes = weights.names(template, weights.NUMBERED), flax.traverse_util.flatten_dict(template)
  assert {names[path]: weights.torch_shape(leaf.shape, path) for path, leaf in shapes.items()} == wanted
  assert sum(p.numel() for p in model.parameters()) // 1_000_000 == millions and not rest


def test_net_fn():
  """The signature of the project's networks; what is missing is said."""
  module = make({"_class_name": "UNet2DConditionModel"} | SDXL)[0]
  net = as_net_fn(module)
  x, t, cond = inputs(module, 4, 4)
  # Nothing is compiled: shapes are what is asked for.
  params = jax.eval_shape(lambda key: net.init(key, x.shape[1:], cond), jax.random.key(0))
  out, found = jax.eval_shape(lambda p: net.apply(p, x, t, cond, None, ("bottleneck",)), params)
  assert out.shape == x.shape and out.dtype == jnp.float32 and found["bottleneck"].shape == (2, 2, 2, 8)
  with pytest.raises(UsageError, match="needs cond\\['time_ids'\\]"):
    net.apply(params, x, t, {k: v for k, v in cond.items() if k != "time_ids"})
  with pytest.raises(UsageError, match="unknown feature 'middle'"):
    net.apply(params, x, t, cond, None, ("middle",))


def test_autoencoder():
  model, module, params = both("AutoencoderKL", dict(
      block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, latent_channels=4, scaling_factor=0.2,
      down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2))
  x = np.random.default_rng(0).uniform(-1, 1, (2, 8, 6, 3)).astype(np.float32)

  @functools.partial(jax.jit, compiler_options=QUICK)
  def run(x):
    mean, std = module.apply({"params": params}, x, method="encode")
    return mean, std, module.apply({"params": params}, mean, method="decode")

  mean, std, back = (np.asarray(v).transpose(0, 3, 1, 2) for v in run(x))
  with torch.no_grad():
    latent = model.encode(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).latent_dist
    wanted = latent.mean * 0.2, latent.std * 0.2, model.decode(latent.mean).sample
  for ours, other in zip((mean, std, back), wanted, strict=True):
    np.testing.assert_allclose(ours, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))
