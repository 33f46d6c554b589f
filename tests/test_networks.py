"""Networks that `config.model.file` names: every method trains on them, and what its student is told starts without
effect."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from ddil_jax import build
from ddil_jax import config as config_lib
from ddil_jax.errors import UsageError
from ddil_jax.interop import configs, diffusers
from ddil_jax.models.base import by_path, init_from
from ddil_jax.models.head import DiscriminatorHead
from tests.building import trace_step
from tests.running import refuse  # noqa: F401 (a fixture)

# Each for the digits, 8x8 pixels of one channel in ten classes.
NETWORKS = {
    "UNet2DModel": dict(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=[4, 8], layers_per_block=1, norm_num_groups=2,
        attention_head_dim=4, down_block_types=["DownBlock2D", "AttnDownBlock2D"],
        up_block_types=["AttnUpBlock2D", "UpBlock2D"], num_class_embeds=11),
    "SongUNet": dict(
        img_resolution=8, in_channels=1, out_channels=1, label_dim=10, model_channels=4, channel_mult=[1, 2],
        num_blocks=1, attn_resolutions=[4], embedding_type="fourier", encoder_type="residual", decoder_type="standard",
        resample_filter=[1, 3, 3, 1], channel_mult_noise=2),
    "DhariwalUNet": dict(
        img_resolution=8, in_channels=1, out_channels=1, label_dim=10, model_channels=64, channel_mult=[1, 1],
        num_blocks=1, attn_resolutions=[4])}
WEIGHTS = "diffusion_pytorch_model.safetensors"
METHODS = [name for name in config_lib.available() if name.startswith("digits_") and name != "digits_agd"]
# The guidance scale, the end time, a derivative forwards, a GAN and a critic.
QUICK = {("digits_lcm", "UNet2DModel"), ("digits_ctm", "UNet2DModel"), ("digits_meanflow", "SongUNet"),
         ("digits_dmd2", "DhariwalUNet")}


def described(folder, name, **change):
  path = folder / f"{name}.json"
  path.write_text(json.dumps({"_class_name": name} | NETWORKS[name] | change))
  return path


@pytest.mark.parametrize("network", NETWORKS)
def test_what_a_student_is_told_starts_without_effect(network):
  """Guidance scale and end time change nothing at first, have a gradient, and are read where they have weights."""
  plain, _ = configs.make({"_class_name": network} | NETWORKS[network])
  told = plain.clone(guidance_embedding=8, end_time_embedding=8)
  key, x, t = jax.random.key(0), jax.random.normal(jax.random.key(1), (2, 8, 8, 1)), jnp.array([10.0, 500.0])
  cond = {"label": jnp.array([3, 10])}
  more = cond | {"guidance_scale": jnp.array([2.0, 5.0]), "end_time": jnp.array([0.0, 100.0])}
  # Drawn, since the last layers of EDM's networks start at zero, and nothing would have an effect.
  rng, quick = np.random.default_rng(0), dict(compiler_options={"xla_backend_optimization_level": 0})
  draw = lambda module, cond: jax.tree.map(  # noqa: E731
      lambda v: rng.normal(0, 0.3, v.shape).astype(np.float32), jax.eval_shape(module.init, key, x, t, cond)["params"])
  fresh, params = jax.eval_shape(told.init, key, x, t, more)["params"], draw(plain, cond)
  student, report = init_from(jax.tree.map(lambda v: np.zeros(v.shape, v.dtype), fresh), params)
  assert len(report.kept) == 2 and not report.unused
  apply = lambda params, cond: told.apply({"params": params}, x, t, cond)  # noqa: E731
  run = jax.jit(apply, **quick)
  before = jax.jit(plain.apply, **quick)({"params": params}, x, t, cond)
  np.testing.assert_allclose(run(student, more), before, atol=1e-5)
  gradient = by_path(jax.jit(jax.grad(lambda params: jnp.sum(apply(params, more)**2)), **quick)(student))
  for name in report.kept:
    assert np.abs(gradient[name]).max() > 0, name
    moved = jax.tree_util.tree_map_with_path(
        lambda path, v: v + 0.1 * (jax.tree_util.keystr(path, simple=True, separator="/") == name), student)
    assert np.abs(run(moved, more) - before).max() > 1e-4, name


@pytest.mark.parametrize("network", NETWORKS)
def test_features_and_the_head_on_them(network):
  """Every feature by name is a map from which the head of a GAN makes one number per example."""
  module, _ = configs.make({"_class_name": network} | NETWORKS[network])
  names = module.feature_names()
  assert names == ("bottleneck", "encoder", "level0", "level1")

  def logits(key, x, t, cond):
    params = module.init(key, x, t, cond)
    out, found = module.apply(params, x, t, cond, features=names)
    head = DiscriminatorHead()
    return out, found, {name: head.apply(head.init(key, v), v) for name, v in found.items()}

  x, t = jnp.zeros((3, 8, 8, 1)), jnp.zeros(3)
  out, found, made = jax.eval_shape(logits, jax.random.key(0), x, t, {"label": jnp.zeros(3, int)})
  assert out.shape == x.shape and all(v.shape == (3,) for v in made.values())
  width = (64, 64) if network == "DhariwalUNet" else (4, 8)
  assert [found[f"level{i}"].shape for i in range(2)] == [(3, 8, 8, width[0]), (3, 4, 4, width[1])]
  assert found["encoder"].shape == found["bottleneck"].shape == (3, 4, 4, width[1])


@pytest.mark.parametrize("method, network", [
    pytest.param(method, network, marks=[] if (method, network) in QUICK else [pytest.mark.slow])
    for method in METHODS for network in NETWORKS])
def test_every_method(method, network, tmp_path):
  """A step of every method can be traced on every network, and gives back what it was given."""
  file = {"model.file": str(described(tmp_path, network)), "data.image_size": "8"}
  trace_step(config_lib.load(f"configs/{method}.py:smoke", file))


@pytest.mark.parametrize("method, network, change, said", [
    ("agd", "SongUNet", {}, "agd: a network of config.model.file has no adapters; use the project's UNet"),
    ("pd", "SongUNet", {"img_resolution": 16}, "is made for images of 16x16 pixels; those of fake have 8x8"),
    ("pd", "DhariwalUNet", {"label_dim": 5}, "has 6 classes; the data has 10, and 11 are needed"),
    ("pd", "DhariwalUNet", {"label_dim": 9}, "has 10 classes; the data has 10, and 11 are needed"),
    ("pd", "DhariwalUNet", {"in_channels": 3, "out_channels": 3}, "images of 1 and this prediction need 1 to 1")])
def test_what_does_not_fit(method, network, change, said, tmp_path):
  file = {"model.file": str(described(tmp_path, network, **change)), "data.image_size": "8"}
  with pytest.raises(UsageError, match=said):
    build.build(config_lib.load(f"configs/digits_{method}.py:smoke", file))


def test_weights_of_edm(tmp_path, refuse):  # noqa: F811
  """A folder with the names of EDM's release is read; what augments its training is left out; diffusers has no such."""
  folder, file = tmp_path / "edm", tmp_path / "edm.safetensors"
  config = {"_class_name": "SongUNet", "augment_dim": 9} | NETWORKS["SongUNet"]
  module, unknown = configs.make(config)
  assert module.augment == 0 and not unknown
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda v: rng.normal(size=v.shape).astype(np.float32),
                        jax.eval_shape(module.init, jax.random.key(0), *module.example())["params"])
  diffusers.export(params, {"config": config}, folder)
  stored = safetensors.numpy.load_file(folder / WEIGHTS)
  assert {"map_noise.freqs", "map_layer0.weight", "enc.8x8_conv.weight", "enc.4x4_aux_residual.weight",
          "enc.4x4_block0.qkv.weight", "dec.8x8_aux_conv.bias"} <= set(stored)
  more = {"map_augment.weight": np.zeros((8, 9), np.float32), "enc.4x4_down.conv0.resample_filter": np.ones((1, 1, 4, 4))}
  safetensors.numpy.save_file(stored | more, folder / WEIGHTS)
  report = diffusers.convert(folder, file)
  assert report.unused == ("map_augment.weight [8, 9]",) and not report.new and not report.ignored
  found = by_path(diffusers.load(file).params)
  for name, value in by_path(params).items():
    np.testing.assert_array_equal(found[name], value)
  assert "the network is a SongUNet; a student for diffusers is a UNet2DModel or a UNet2DConditionModel" in refuse(
      "export", file, f"--out={tmp_path / 'out'}", "--sampler=ddim", "--steps=2")
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("network, change, said", [
    ("SongUNet", {"img_resolution": 9}, "img_resolution=9 cannot be halved 1 times"),
    ("SongUNet", {"img_resolution": 10**9}, "a whole number from 1 to"),
    ("SongUNet", {"channel_mult": []}, "a list of 1 to 8 widths"),
    ("SongUNet", {"channel_mult": ["1"]}, "channel_mult='1': a whole number"),
    ("SongUNet", {"attn_resolutions": 4}, "a list of resolutions"),
    ("SongUNet", {"out_channels": 2}, "out_channels=2: in_channels, 1, is expected"),
    ("SongUNet", {"resample_filter": [1]}, "a list of 2 or 4 whole numbers"),
    ("SongUNet", {"encoder_type": "other"}, "encoder_type='other' is not supported"),
    ("DhariwalUNet", {"model_channels": 32}, "multiples of 64"),
    ("DhariwalUNet", {"num_blocks": 10**6}, "num_blocks=1000000: a whole number from 1 to 32")])
def test_configs_of_edm_that_are_refused(network, change, said):
  with pytest.raises(UsageError, match=re.escape(said)):
    configs.make({"_class_name": network} | NETWORKS[network] | change)
