"""Folders of diffusers in and out, and what is refused; nothing here needs PyTorch, the parity tests do."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from ddil_jax import build
from ddil_jax import config as config_lib
from ddil_jax.diffusion import grids
from ddil_jax.errors import UsageError
from ddil_jax.interop import configs, diffusers, release, weights
from ddil_jax.main import main
from tests.running import refuse  # noqa: F401 (a fixture)

CONFIG = dict(
    _class_name="UNet2DConditionModel", _diffusers_version="0.42.1", sample_size=8, in_channels=4, out_channels=4,
    block_out_channels=[4, 8], layers_per_block=1, norm_num_groups=2, attention_head_dim=2, cross_attention_dim=6,
    down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"], up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
    use_linear_projection=False, time_cond_proj_dim=None, _name_or_path="/somewhere/else")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
  """A pipeline's folder with a UNet of random weights, and a model card."""
  folder = tmp_path_factory.mktemp("tiny-diffusion")
  module, rest = configs.make(CONFIG)
  assert rest == ()
  template, rng = weights.template(module, *module.example())["params"], np.random.default_rng(0)
  draw = lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32)  # noqa: E731
  diffusers.export(jax_map(draw, template), {"config": CONFIG}, folder / "unet")
  (folder / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DConditionModel"]}')
  (folder / "README.md").write_text("---\nlicense: creativeml-openrail-m\ntags: [x]\n---\nlicense: no\n")
  return folder


def jax_map(function, tree):
  return {k: jax_map(function, v) if isinstance(v, dict) else function(v) for k, v in tree.items()}


def tensors_of(folder):
  return safetensors.numpy.load_file(folder / WEIGHTS)


def test_round_trip_to_the_bit(pipeline, tmp_path, capsys):
  """In, out, in again: by the command line, sharded and half precision too."""
  one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
  assert main(["convert", str(pipeline), f"--out={one}"]) == 0
  assert "UNet2DConditionModel: " in capsys.readouterr().out
  assert main(["export", str(one), f"--out={tmp_path / 'out'}", "--sampler=ddim", "--steps=2", "--prediction=v"]) == 0
  wanted, found = tensors_of(pipeline / "unet"), tensors_of(tmp_path / "out" / "unet")
  assert list(wanted) == list(found) and len(wanted) > 100
  for name, x in wanted.items():
    np.testing.assert_array_equal(found[name], x, strict=True)
  assert wanted["down_blocks.0.attentions.0.proj_in.weight"].shape == (4, 4, 1, 1)
  assert wanted["down_blocks.0.resnets.0.conv1.weight"].shape == (4, 4, 3, 3)
  config = json.loads((tmp_path / "out" / "unet" / "config.json").read_text())
  assert config == {k: v for k, v in CONFIG.items() if k != "_name_or_path"}
  scheduler = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
  assert scheduler["_class_name"] == "DDIMScheduler" and scheduler["prediction_type"] == "v_prediction"
  card = (tmp_path / "out" / "README.md").read_text()
  assert card.startswith("---\nlicense: creativeml-openrail-m\n") and f"from `{pipeline.name}`" in card
  assert "at the times 999, 499 with" in card

  # In two files with an index, and the same in bfloat16, whose values float32 holds exactly.
  shards = tmp_path / "sharded"
  shards.mkdir()
  shutil.copy(pipeline / "unet" / "config.json", shards)
  parts = {f"part-{i}.safetensors": dict(list(wanted.items())[i::2]) for i in range(2)}
  for file, arrays in parts.items():
    safetensors.numpy.save_file(arrays, shards / file)
  index = {"weight_map": {name: file for file, arrays in parts.items() for name in arrays}}
  (shards / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
  assert main(["convert", str(shards), f"--out={two}"]) == 0
  a, b = diffusers.load(one), diffusers.load(two)
  assert a.module == b.module and a.about["license"] == "creativeml-openrail-m" and b.about["license"] == ""
  flat = safetensors.numpy.load_file
  assert all(np.array_equal(x, flat(two)[name]) for name, x in flat(one).items())
  diffusers.export(a.params, a.about, tmp_path / "half", "bfloat16")
  diffusers.convert(tmp_path / "half", two)
  name = "conv_in/kernel"
  assert np.array_equal(flat(two)[name], flat(one)[name].astype("bfloat16").astype(np.float32))
  with pytest.raises(UsageError, match="parameters and config do not fit: conv_in/bias"):
    diffusers.export({k: v for k, v in a.params.items()} | {"conv_in": {"kernel": a.params["conv_in"]["kernel"]}},
                     a.about, tmp_path / "not")


def test_a_student_starts_as_its_teacher(pipeline, tmp_path, capsys):
  """LCM's embedding is new, and zero; all else is the teacher's; what is left over is listed."""
  folder = tmp_path / "model"
  shutil.copytree(pipeline / "unet", folder)
  (folder / "config.json").write_text(json.dumps(CONFIG | {"some_new_option": 3}))
  safetensors.numpy.save_file(tensors_of(folder) | {"left.over": np.zeros((2, 3), np.float32)}, folder / WEIGHTS)
  out, teacher = tmp_path / "student.safetensors", tmp_path / "teacher.safetensors"
  assert main(["convert", str(folder), f"--out={out}", "--guidance_embedding=6"]) == 0
  said = capsys.readouterr().out
  assert "new, without effect: time_embedding.cond_proj.weight [6, 4]" in said
  assert "unused: left.over [2, 3]" in said and "not known: some_new_option" in said
  assert main(["convert", str(pipeline), f"--out={teacher}"]) == 0
  student, before = diffusers.load(out), diffusers.load(teacher).params
  assert student.module.guidance_embedding == 6 and student.about["config"]["time_cond_proj_dim"] == 6
  assert not student.params["time_embedding"].pop("cond_proj")["kernel"].any()
  assert json.dumps(jax_map(np.ndarray.tolist, student.params)) == json.dumps(jax_map(np.ndarray.tolist, before))


def test_old_and_new_names():
  """Autoencoders of before 2023, text encoders of transformers 5."""
  names = {"encoder.mid_block.attentions.0.query.weight": 0, "decoder.mid_block.attentions.0.proj_attn.bias": 1}
  assert configs.full_names(names) == {"encoder.mid_block.attentions.0.to_q.weight": 0,
                                       "decoder.mid_block.attentions.0.to_out.0.bias": 1}
  names = {"embeddings.token_embedding.weight": 0, "text_projection.weight": 1}
  assert list(configs.full_names(names)) == ["text_model.embeddings.token_embedding.weight", "text_projection.weight"]


@pytest.fixture
def spoil(pipeline, tmp_path, refuse):  # noqa: F811
  """Changes a copy of the UNet's folder; returns the line with which `ddil convert` refuses it."""
  def run(change=None, *arguments, **config):
    folder = tmp_path / "m"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(pipeline / "unet", folder)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    if change:
      change(folder)
    line = refuse("convert", folder, f"--out={tmp_path / 'out'}", *arguments)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    return line
  return run


def test_weights_that_are_refused(spoil, refuse, pipeline, tmp_path, monkeypatch):  # noqa: F811
  def tensors(**change):
    def apply(folder):
      found = tensors_of(folder) | change
      safetensors.numpy.save_file({k: v for k, v in found.items() if v is not None}, folder / WEIGHTS)
    return apply

  bias = np.zeros(4, np.float32)
  assert "conv_in.bias [4] is missing" in spoil(tensors(**{"conv_in.bias": None}))
  assert "conv_in.bias has shape [5], which does not fit [4]" in spoil(tensors(**{"conv_in.bias": np.zeros(5)}))
  assert "conv_in.bias has values that are not finite" in spoil(tensors(**{"conv_in.bias": bias * np.nan}))
  cut = lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])  # noqa: E731
  assert "damaged, cut short" in spoil(cut)
  assert "damaged, cut short" in spoil(lambda folder: (folder / WEIGHTS).write_bytes(b"\x80\x02}q\x00."))

  def pickled(folder):
    (folder / WEIGHTS).unlink()
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")

  line = spoil(pickled)
  assert "diffusion_pytorch_model.bin, a pickle" in line and "save_pretrained" in line
  assert f"has no {WEIGHTS}" in spoil(lambda folder: (folder / WEIGHTS).unlink())

  def indexed(**files):
    def apply(folder):
      (folder / WEIGHTS).unlink()
      (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(files))
    return apply

  for name in (f"../unet/{WEIGHTS}", "/etc/passwd", "a.bin", ".safetensors", "a\\b.safetensors"):
    assert "safetensors files in the same folder are expected" in spoil(indexed(weight_map={"conv_in.bias": name}))
  assert "'weight_map'" in spoil(indexed(weight_map={"conv_in.bias": 3}))
  assert "no file" in spoil(indexed(weight_map={"conv_in.bias": "part-1.safetensors"}))
  assert "none yet" in spoil(None, "--guidance_embedding=6", time_cond_proj_dim=6)

  out = f"--out={tmp_path / 'out'}"
  assert "is no folder" in refuse("convert", tmp_path / "absent", out)
  monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
  line = refuse("convert", "someone/some-model", out)
  assert "no folder someone/some-model is here" in line and "hf download someone/some-model --local-dir FOLDER" in line
  assert "has no vae/config.json; there are: unet" in refuse("convert", pipeline, "--component=vae", out)
  assert "the name of a folder" in refuse("convert", pipeline, "--component=../unet", out)
  assert "convert the folder again" in refuse("export", pipeline / "unet" / WEIGHTS, out)


def test_what_the_system_refuses_is_the_users_mistake(spoil, pipeline, refuse, tmp_path, monkeypatch):  # noqa: F811
  """A folder without permission, of a model and of a pipeline: exit code 2."""
  def denied(self, *_):
    raise PermissionError(13, "Permission denied", str(self))

  file = tmp_path / "file.safetensors"
  assert main(["convert", str(pipeline), f"--out={file}"]) == 0
  index = {"_class_name": "StableDiffusionPipeline", "vae": ["diffusers", "AutoencoderKL"]}
  (tmp_path / "p" / "vae").mkdir(parents=True)
  (tmp_path / "p" / "model_index.json").write_text(json.dumps(index))
  with monkeypatch.context() as patch:
    patch.setattr("pathlib.Path.iterdir", denied)
    line = spoil(lambda folder: (folder / WEIGHTS).unlink())
    assert f"cannot read {tmp_path / 'm'}: Permission denied" in line
    line = refuse("export", file, f"--out={tmp_path / 'new'}", f"--pipeline={tmp_path / 'p'}")
    assert f"cannot read {tmp_path / 'p' / 'vae'}: Permission denied" in line
  with monkeypatch.context() as patch:
    patch.setattr("pathlib.Path.is_file", denied)
    assert "cannot read" in refuse("convert", tmp_path / "m", f"--out={tmp_path / 'out'}")


def test_types_that_are_not_read(spoil):
  """By the header, before anything is written; numpy has no float of 8 bits."""
  def eight_bits(folder):
    header = json.dumps({"conv_in.bias": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))

  assert "conv_in.bias is of type F8_E4M3, which is not read" in spoil(eight_bits)


@pytest.mark.parametrize("files, wanted", [
    (["a.safetensors", "a.fp16.safetensors", "a.bin"], ["a.safetensors"]),
    (["a.fp16.safetensors", "a.bin", "a.fp16.bin"], ["a.fp16.safetensors"]),
    (["a.safetensors.index.fp16.json", "a.fp16-00001-of-00001.safetensors", "a-00001-of-00001.bin"],
     ["a.fp16-00001-of-00001.safetensors", "a.safetensors.index.fp16.json"]),
    (["a.safetensors.index.json", "a-00001-of-00001.safetensors", "a-00001-of-00001.fp16.safetensors"],
     ["a-00001-of-00001.safetensors", "a.safetensors.index.json"]),
    (["a.safetensors.index.fp16.json", "a-00001-of-00001.fp16.safetensors", "b.safetensors"],
     ["a-00001-of-00001.fp16.safetensors", "a.safetensors.index.fp16.json"])])
def test_what_is_asked_of_the_hub(files, wanted, pipeline, tmp_path, monkeypatch):
  """Safetensors of one component, full precision where there is some, else half; the Hub is a folder here."""
  from huggingface_hub.utils import filter_repo_objects
  hub, cache = tmp_path / "hub", tmp_path / "cache"
  stem = WEIGHTS.removesuffix(".safetensors")
  index = json.dumps({"weight_map": dict.fromkeys(tensors_of(pipeline / "unet"), next(
      (f.replace("a", stem, 1) for f in files if "-of-" in f and f.endswith(".safetensors")
       and (".fp16" in f) == any("index.fp16" in g for g in files)), ""))})
  there = {"model_index.json": b"{}", "unet/config.json": json.dumps(CONFIG).encode(), "vae/config.json": b"{}",
           "v1-5-pruned.safetensors": b"", f"vae/{WEIGHTS}": b""}
  for name in files:
    content = index.encode() if name.endswith(".json") else (pipeline / "unet" / WEIGHTS).read_bytes()
    there["unet/" + (name.replace("a", stem, 1) if name[0] == "a" else name)] = content

  def snapshot(name, allow_patterns):
    assert name == "someone/some-model"
    for path in filter_repo_objects(there, allow_patterns=allow_patterns):
      (cache / path).parent.mkdir(parents=True, exist_ok=True)
      (cache / path).write_bytes(there[path])
    return str(cache)

  monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
  assert main(["convert", "someone/some-model", f"--out={tmp_path / 'out'}"]) == 0
  found = sorted(str(p.relative_to(cache)) for p in cache.rglob("*") if p.is_file())
  assert found == ["model_index.json", "unet/config.json", *(f"unet/{name.replace('a', stem, 1)}" for name in wanted)]


@pytest.mark.parametrize("change, said", [
    (dict(_class_name="FluxTransformer2DModel"), "unknown model 'FluxTransformer2DModel'; "),
    (dict(_class_name=None), "unknown model 'None'"),
    (dict(_class_name=["UNet2DModel"]), "unknown model"),
    *((dict(_class_name=None, architectures=value), "unknown model")
      for value in (7, "CLIPTextModel", {"CLIPTextModel": 0}, [["CLIPTextModel"]], [])),
    (dict(architectures=["CLIPTextModel"], _class_name=None, hidden_act=["gelu"]), "unknown hidden_act"),
    (dict(down_block_types=["CrossAttnDownBlock2D", "DownBlock3D"]), "'DownBlock3D'; did you mean DownBlock2D"),
    (dict(down_block_types=["DownBlock2D"]), "a list of 2 block types is expected"),
    (dict(mid_block_type="UNetMidBlock2DSimpleCrossAttn"), "unknown mid_block_type"),
    (dict(block_out_channels=[4, 10**12]), "a whole number from 1 to 16384 is expected"),
    (dict(block_out_channels=[2] * 100_000), "a list of 1 to 8 widths is expected"),
    (dict(block_out_channels=[4, 7]), "norm_num_groups=2 does not divide 7"),
    (dict(layers_per_block=10**9), "a whole number from 1 to 64 is expected"),
    (dict(transformer_layers_per_block=[1, [1]]), "which need reverse_transformer_layers_per_block"),
    (dict(transformer_layers_per_block=-1), "a whole number from 0 to 64 is expected"),
    # Each number is allowed, what comes of them together is not.
    (dict(layers_per_block=20, transformer_layers_per_block=50), "a network of 2,132 residual blocks and transformers"),
    (dict(cross_attention_dim="../x"), "cross_attention_dim='../x': a whole number"),
    (dict(attention_head_dim=3), "3 attention heads do not divide 4 channels"),
    (dict(norm_eps="1e-5"), "norm_eps='1e-5': a number is expected"),
    (dict(act_fn="gelu"), "act_fn='gelu' is not supported"),
    (dict(use_linear_projection=2), "true or false is expected"),
    (dict(addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=24),
     "leaves no room for the pooled text")])
def test_configs_that_are_refused(change, said, spoil):
  line = spoil(**change)
  assert said in line and "config.json: " in line


def test_configs_that_are_no_configs(spoil, monkeypatch):
  text = lambda value: lambda folder: (folder / "config.json").write_text(value)  # noqa: E731
  assert "cannot read" in spoil(text("{"))
  assert "cannot read" in spoil(text("[" * 100_000))
  assert "no JSON object" in spoil(text("[]"))
  assert "larger than any such file" in spoil(text(" " * (weights.LARGEST_JSON + 1)))
  monkeypatch.setattr(diffusers, "_MOST_PARAMETERS", 1000)
  assert "1,000 are the most allowed" in spoil()


@pytest.mark.parametrize("name", [f"{name}_ddil" for name in ("sd15_pd", "sd15_lcm", "sd15_dmd2", "ssd1b_dmd2",
                                                              "sdxl_dmd2")])
def test_a_lora_of_these_configs_can_be_exported(name, tmp_path):
  """All that `lora` trains of a student has a place in diffusers' format; LCM's embedding of the scale has none."""
  def export(arg, **overrides):
    config = config_lib.load(f"configs/{name}.py:{arg}", {f"model.{k}": str(v) for k, v in overrides.items()})
    built = build.build(config)
    start = lambda key: built.objective.init(key, built.init_teacher(key))["student"]  # noqa: E731
    delta = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), jax.eval_shape(start, jax.random.key(0)))
    diffusers.export_lora(delta, diffusers.architecture(config.model.file)[1], tmp_path)
    return safetensors.numpy.load_file(tmp_path / "pytorch_lora_weights.safetensors")

  written = export("lora,smoke")
  assert written["unet.conv_in.lora_A.weight"].shape == (4, 4, 3, 3) and len(written) > 30
  if name == "sd15_lcm_ddil":
    with pytest.raises(UsageError, match="cond_proj/kernel whole.*--config.model.guidance_embedding=0"):
      export("smoke", lora=4)


def test_exports_that_are_refused(pipeline, tmp_path, refuse):  # noqa: F811
  file = tmp_path / "m.safetensors"
  diffusers.convert(pipeline, file)
  run = lambda *a, out=tmp_path / "new": refuse("export", file, f"--out={out}", *a)  # noqa: E731
  assert "unknown sampler 'euler'" in run("--sampler=euler")
  assert "unknown prediction 'epsilon'" in run("--prediction=epsilon")
  assert "4 decreasing whole numbers from 0 to 999" in run("--timesteps=999,749,749,249")
  assert "such as 999,749,499,249" in run("--timesteps=999;1")
  assert "diffusers' DDIM takes its own only" in run("--sampler=ddim", "--steps=2", "--timesteps=999,400")
  assert "cannot read" in run(f"--run={tmp_path / 'absent'}")
  assert not (tmp_path / "new").exists()
  assert "is not an empty folder" in run(out=pipeline)
  assert "no file" in refuse("export", tmp_path / "absent", f"--out={tmp_path / 'new'}")


def test_model_card():
  """Licence, times, metrics and config of the run."""
  run = {"config": {"objective": {"name": "dmd2"}}, "results": [
      {"steps": 4, "guidance_scale": 1.0, "metrics": {"fd@5000/x/y": 12.5}}]}
  card = release.model_card({"source": "sd"}, release.Sampling("lcm", 4, "eps", (999, 749, 499, 249), 1.0), run)
  assert "license: unknown" in card and "states no licence" in card and "| fd@5000/x/y | 12.5 |" in card
  assert '"name": "dmd2"' in card and "num_inference_steps=4, guidance_scale=1).images" in card
  card = release.model_card({"source": "sd"}, release.Sampling("lcm", 3, "eps", (999, 500, 100)))
  assert "guidance_scale=1, timesteps=[999, 500, 100]).images" in card


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
def test_a_call_of_so_many_steps_takes_the_times_of_our_grid(steps):
  """DMD2's, by diffusers' scheduler itself, without an argument; fewer steps take some of them, where they can."""
  torch = pytest.importorskip("torch", reason="parity needs PyTorch: pip install -r requirements-test.txt")
  from diffusers import LCMScheduler
  times = grids.dmd2_timesteps(steps).tolist()
  sampling = release.Sampling("lcm", steps, timesteps=tuple(times))
  scheduler = LCMScheduler.from_config(release.scheduler_config(sampling))
  scheduler.set_timesteps(steps)
  assert scheduler.timesteps.tolist() == times and release.timesteps(sampling) == times
  # A step ends where the next one begins.
  x = torch.ones(1, 1, 1, 2)
  for now, following in zip(times, times[1:]):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda shape, **_: torch.ones(shape))
      step = scheduler.step(torch.zeros_like(x), now, x)
    alpha = scheduler.alphas_cumprod[following]
    torch.testing.assert_close(step.prev_sample, alpha**0.5 * step.denoised + (1 - alpha)**0.5)
    x = step.prev_sample
  if 1000 % steps == 0:
    scheduler.set_timesteps(max(1, steps // 2))
    assert set(scheduler.timesteps.tolist()) <= set(times)
    with pytest.raises(ValueError):
      scheduler.set_timesteps(2 * steps)


def test_times_that_no_scheduler_has_by_itself():
  """They are the card's argument, and the config is LCM's own."""
  for steps, times in ((3, (999, 500, 100)), (4, ()), (4, (999, 759, 499, 259))):
    config = release.scheduler_config(release.Sampling("lcm", steps, timesteps=times))
    assert config["original_inference_steps"] == 50
