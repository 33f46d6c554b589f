"""A student's LoRA: diffusers and peft load what we write, and their network then computes what ours does, merged."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from ddil_jax import build, lora, prepare, trained
from ddil_jax.config import folder
from ddil_jax.errors import UsageError
from ddil_jax.interop import diffusers as folders
from ddil_jax.lora import LoRA
from ddil_jax.main import main
from ddil_jax.models.base import as_net_fn
from tests.data import making
from tests.data.conftest import pipeline_folder  # noqa: F401 (a fixture)
from tests.parity.test_diffusers_models import DDPM, QUICK, SD15, both, diffusers, inputs, randomise, theirs, torch
from tests.parity.test_diffusers_run import OPTIONS, TEACHER
from tests.running import SHORT, refuse, shared  # noqa: F401 (fixtures)

pytest.importorskip("peft", reason="`pip install -r requirements-test.txt` for parity with peft")
from diffusers.loaders import PeftAdapterMixin  # noqa: E402 (needs peft)


class Unet(PeftAdapterMixin, diffusers.UNet2DModel):
  """UNet2DModel with what diffusers' other networks load a LoRA with, as the model card has it."""


def learned(delta):
  """Factors as if trained."""
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda v: rng.standard_normal(v.shape).astype(np.float32) * 0.3, delta)


@pytest.mark.parametrize("name, config", [("UNet2DConditionModel", SD15),
                                           pytest.param("UNet2DModel", DDPM, marks=pytest.mark.slow)])
def test_their_network_with_our_lora_is_ours_merged(name, config, tmp_path):
  """Attention, dense layers and convolutions, with a scale that is not 1."""
  model, module, params = both(name, config)
  options = LoRA(1, alpha=2.0)
  delta = learned(lora.init(jax.random.key(0), params, params, options))
  folders.export_lora(delta, {"config": json.loads(model.to_json_string())}, tmp_path, options.scale)
  given = inputs(module)
  before = theirs(model, module, *given)
  if name == "UNet2DModel":
    model.save_pretrained(tmp_path / "unet")
    model = Unet.from_pretrained(tmp_path / "unet").eval()
    model.load_lora_adapter(tmp_path, prefix="unet", use_safetensors=True)
  else:  # what load_lora_weights of a pipeline does with its UNet
    loader = diffusers.StableDiffusionPipeline
    loader.load_lora_into_unet(*loader.lora_state_dict(tmp_path), model)
  found = theirs(model, module, *given)

  net = jax.jit(as_net_fn(module).apply, compiler_options=QUICK)
  expected = np.asarray(net(lora.merge(params, delta, options.scale), *given))
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
  assert np.abs(found - before).max() > 0.1
  written = safetensors.numpy.load_file(tmp_path / "pytorch_lora_weights.safetensors")
  kernels = len(written) // 2
  assert len([layer for layer in model.modules() if hasattr(layer, "lora_A")]) == kernels > 10


def test_what_was_trained_whole_has_no_place():
  about = {"config": json.loads(diffusers.UNet2DModel(**DDPM).to_json_string())}
  with pytest.raises(UsageError, match="cond_proj/kernel whole.*--merged"):
    folders.export_lora({"time_embedding": {"cond_proj": {"kernel": np.zeros((6, 4))}}}, about, "nowhere")


def test_a_run_with_a_lora_is_exported_as_one(tmp_path, shared, refuse):  # noqa: F811
  """The teacher with the exported LoRA is the student that we sample, which --merged writes whole.

  That of a later stage is over a student that no reader has: refused.
  """
  teacher, file, run = (tmp_path / name for name in ("teacher", "teacher.safetensors", "run"))
  randomise(diffusers.UNet2DModel(**TEACHER)).save_pretrained(teacher)
  assert main(["convert", str(teacher), f"--out={file}"]) == 0
  assert main(["train", "--config=configs/digits_pd.py:smoke", f"--workdir={run}", f"--config.model.file={file}",
               "--config.model.lora=1", "--config.model.lora_alpha=0.5", *OPTIONS]) == 0
  for out, arguments in (("lora", ()), ("whole", ("--merged",))):
    assert main(["export", str(run), f"--out={tmp_path / out}", *arguments]) == 0
  assert not (tmp_path / "lora" / "unet").exists() and not list((tmp_path / "whole").glob("*.safetensors"))
  assert "load_lora_adapter" in (tmp_path / "lora" / "README.md").read_text()

  unet = Unet.from_pretrained(teacher).eval()
  unet.load_lora_adapter(tmp_path / "lora", prefix="unet", use_safetensors=True)
  whole = diffusers.UNet2DModel.from_pretrained(tmp_path / "whole", subfolder="unet").eval()
  config = trained.saved_config(run)
  built = build.build(config)
  params, _ = trained.params_of(config, built, run)
  x, t = np.random.default_rng(0).standard_normal((2, 8, 8, 1)).astype(np.float32), np.full(2, 500.0, np.float32)
  net = as_net_fn(folders.architecture(file)[0])
  before, expected = (np.asarray(net.apply(p, x, t, {})) for p in (folders.load(file).params, params))
  assert np.abs(before - expected).max() > 1e-5  # one step of training
  with torch.no_grad():
    for model in (unet, whole):
      found = model(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), torch.from_numpy(t)).sample
      np.testing.assert_allclose(found.numpy().transpose(0, 2, 3, 1), expected, atol=1e-5)

  path = run / "config.json"
  saved = json.loads(path.read_text())
  path.write_text(json.dumps(saved | {"teacher": saved["teacher"] | {"path": "runs/pd/stage_4"}}))
  assert "over the student at runs/pd/stage_4" in refuse("export", run, f"--out={tmp_path / 'later'}")


@pytest.fixture(scope="module")
def prompted(pipeline_folder, tmp_path_factory):  # noqa: F811
  """(prepared latents with text, folder of diffusers' network that reads it, converted file)."""
  base = tmp_path_factory.mktemp("prompted")
  files = {name: f"{pipeline_folder / name}.safetensors" for name in ("vae", "text_encoder")}
  prepare.prepare(str(making.write_folder(base / "src", 24)), str(base / "set"),
                  prepare.Options(**files, tokenizer=str(pipeline_folder / "tokenizer"), keep_images=True))
  config = json.loads((folder() / "unets" / "tiny.json").read_text())
  config |= {"cross_attention_dim": making.TEXT["hidden_size"]}
  randomise(diffusers.UNet2DConditionModel.from_config(config)).save_pretrained(base / "unet")
  assert main(["convert", str(base / "unet"), f"--out={base / 'unet.safetensors'}"]) == 0
  return base / "set", base / "unet", base / "unet.safetensors"


@pytest.mark.slow
@pytest.mark.parametrize("method, fields", [
    ("lcm", ("objective.guidance_range=()", "model.guidance_embedding=0", "train.ema=(0.5,)", "eval.ema=0.5")),
    ("dmd2", ("model.critic_lora=1", "objective.period=1", "objective.gan_weight=0.1"))])
def test_a_lora_over_text_latents(method, fields, prompted, tmp_path, shared):  # noqa: F811
  """Trained on all sources of states with a guided teacher; diffusers' network with what is exported is the student."""
  data, theirs_folder, file = prompted
  run = tmp_path / "run"
  assert main(["train", f"--config=configs/emoji_{method}.py:ddil,smoke", f"--workdir={run}", *SHORT,
               "--config.data.name=prepared", f"--config.data.path={data}", "--config.data.image_size=0",
               f"--config.model.file={file}", "--config.model.lora=1", "--config.train.batch_size=8",
               *(f"--config.{field}" for field in fields)]) == 0
  assert main(["export", str(run), f"--out={tmp_path / 'lora'}"]) == 0
  model = diffusers.UNet2DConditionModel.from_pretrained(theirs_folder).eval()
  loader = diffusers.StableDiffusionPipeline
  loader.load_lora_into_unet(*loader.lora_state_dict(tmp_path / "lora"), model)

  config = trained.saved_config(run)
  params, _ = trained.params_of(config, build.build(config), run)
  module = folders.architecture(file)[0]
  given = inputs(module, 8, 8)
  net = as_net_fn(module)
  before, expected = (np.asarray(net.apply(p, *given)) for p in (folders.load(file).params, params))
  assert np.abs(before - expected).max() > 1e-5
  np.testing.assert_allclose(theirs(model, module, *given), expected, atol=1e-4)
