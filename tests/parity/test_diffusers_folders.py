"""diffusers in PyTorch reads what we write, gives the same images, and we read what it writes."""

import functools
import json
import pathlib
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddil_jax import keys as keys_lib
from ddil_jax.diffusion import grids, prediction, process, solvers
from ddil_jax.diffusion.rollout import rollout
from ddil_jax.interop import diffusers as folders
from ddil_jax.interop.text import Prompts
from ddil_jax.main import main
from ddil_jax.models.base import as_net_fn
from ddil_jax.objectives.base import bind
from ddil_jax.objectives.lcm import consistency_function
from tests.data import making
from tests.parity.test_diffusers_models import QUICK, REASON, SD15, SDXL, diffusers, randomise, torch
from tests.running import refuse  # noqa: F401 (a fixture)

transformers = pytest.importorskip("transformers", reason=REASON)
STEPS, SHAPE, SCALE = 4, (2, 8, 8, 4), 7.5
PROMPTS, DMD2 = ["a red square", "a big circle"], [999, 749, 499, 249]


pytestmark = pytest.mark.xdist_group("diffusers_folders")  # its fixture is made once


@pytest.fixture(scope="module")
def student(tmp_path_factory):
  """The teacher's pipeline, the student (`trained`; its guidance embedding has learned something), and exports."""
  base = tmp_path_factory.mktemp("student")
  teacher = base / "teacher"
  making.write_tokenizer(base / "tokenizer")
  text = {k: v for k, v in making.TEXT.items() if k != "projection_dim"}
  diffusers.StableDiffusionPipeline(
      vae=randomise(diffusers.AutoencoderKL(**making.VAE)), scheduler=diffusers.PNDMScheduler(steps_offset=1),
      text_encoder=randomise(transformers.CLIPTextModel(transformers.CLIPTextConfig(**text))),
      tokenizer=transformers.CLIPTokenizer.from_pretrained(base / "tokenizer"),
      unet=randomise(diffusers.UNet2DConditionModel(**SD15 | {"cross_attention_dim": text["hidden_size"]})),
      safety_checker=None, feature_extractor=None, requires_safety_checker=False,
  ).save_pretrained(teacher, max_shard_size="20KB")
  assert len(list((teacher / "unet").glob("*.safetensors"))) > 2
  (teacher / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"")  # beside the safetensors: not read, not passed on
  (teacher / "LICENSE.md").write_text("terms")
  for name, *options in (("unet", "--guidance_embedding=6"), ("vae",), ("text_encoder",)):
    assert main(["convert", str(teacher), f"--component={name}", f"--out={base / name}", *options]) == 0
  start = folders.load(base / "unet")
  kernel = start.params["time_embedding"]["cond_proj"]["kernel"]
  kernel[:] = np.random.default_rng(0).standard_normal(kernel.shape)
  folders.save(base / "trained", start.params, start.about)
  for sampler, *how in (("lcm",), ("ddim", "--sampler=ddim"), ("dmd2", f"--timesteps={','.join(map(str, DMD2))}")):
    assert main(["export", str(base / "trained"), f"--out={base / sampler}", *how, f"--steps={STEPS}",
                 f"--guidance_scale={SCALE}", f"--pipeline={teacher}"]) == 0
  return base


def test_what_we_write_is_what_they_had(student):
  """Their tensors, through us, bit for bit; the config too, but for the new embedding."""
  before, report = diffusers.UNet2DConditionModel.from_pretrained(student / "lcm", subfolder="unet",
                                                                  output_loading_info=True)
  assert not any(report.values()), report
  after = diffusers.UNet2DConditionModel.from_pretrained(student / "teacher", subfolder="unet")
  a, b = before.state_dict(), after.state_dict()
  assert set(a) - set(b) == {"time_embedding.cond_proj.weight"}
  assert all(torch.equal(a[name], x) for name, x in b.items())
  ours, theirs = (json.loads(m.to_json_string()) for m in (before, after))
  assert {k for k in ours if ours[k] != theirs[k]} <= {"time_cond_proj_dim", "_name_or_path"}


@pytest.mark.parametrize("sampler", ["lcm", "ddim", pytest.param("dmd2", marks=pytest.mark.slow)])
def test_images_agree(student, sampler):
  """Our folder is their pipeline: the same prompts and noise give the same latents and the same images."""
  pipeline = diffusers.DiffusionPipeline.from_pretrained(student / sampler)
  assert type(pipeline) is diffusers.StableDiffusionPipeline and pipeline.scheduler.config.steps_offset == 1
  assert type(pipeline.scheduler) is (diffusers.DDIMScheduler if sampler == "ddim" else diffusers.LCMScheduler)
  pipeline.set_progress_bar_config(disable=True)
  to_torch = lambda v: torch.from_numpy(np.asarray(v).transpose(0, 3, 1, 2).copy())  # noqa: E731
  x_T, noise = draws()
  draw, found = iter(noise), []
  with pytest.MonkeyPatch.context() as patch:
    # LCM's scheduler draws its noise inside: it gets ours.
    patch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *a, **k: to_torch(next(draw)))
    wanted = pipeline(PROMPTS, num_inference_steps=STEPS, guidance_scale=SCALE, latents=to_torch(x_T), output_type="np",
                      timesteps=DMD2 if sampler == "dmd2" else None,
                      callback_on_step_end=lambda pipe, i, t, state: found.append(state["latents"]) or {}).images
  latents = sample(student, sampler)
  theirs = found[-1].numpy().transpose(0, 2, 3, 1)
  assert theirs.std() > 0.1 and wanted.std() > 0.1 and len(found) == STEPS
  np.testing.assert_allclose(latents, theirs, rtol=1e-3, atol=1e-3)
  vae = folders.load(student / "vae")
  decode = jax.jit(functools.partial(vae.module.apply, method="decode"), compiler_options=QUICK)
  np.testing.assert_allclose(np.clip(decode({"params": vae.params}, latents) / 2 + 0.5, 0, 1), wanted, atol=1e-3)


def test_what_a_pipeline_takes_over(student, refuse, tmp_path):  # noqa: F811
  """Copies of all that is not the student's, no pickles, the licence; the card loads it in one line."""
  teacher, out = student / "teacher", student / "lcm"
  there, given = ({p.relative_to(f): p for f in (folder,) for p in folder.rglob("*") if p.is_file()}
                  for folder in (out, teacher))
  own = {name for name in there if name.parts[0] in ("unet", "scheduler", "README.md", "model_index.json")}
  assert {name for name in given if name.parts[0] not in ("unet", "scheduler", "model_index.json")} - set(there) == {
      pathlib.Path("vae/diffusion_pytorch_model.bin")}
  for name in set(there) - own:
    assert there[name].read_bytes() == given[name].read_bytes()
  card = (out / "README.md").read_text()
  assert "DiffusionPipeline.from_pretrained(FOLDER)" in card and f"guidance_scale={SCALE}" in card

  def line(change, file="model_index.json"):
    folder = tmp_path / "p"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(teacher, folder)
    change(folder)
    said = refuse("export", student / "trained", f"--out={tmp_path / 'out'}", f"--pipeline={folder}")
    assert not (tmp_path / "out").exists()
    return said

  def index(**entries):
    return lambda folder: (folder / "model_index.json").write_text(json.dumps(
        json.loads((teacher / "model_index.json").read_text()) | entries))

  assert "unknown pipeline 'FluxPipeline'" in line(index(_class_name="FluxPipeline"))
  assert "is no component of diffusers or" in line(index(vae=["my_code", "AutoencoderKL"]))
  assert "is no component of" in line(index(**{"../vae": ["diffusers", "AutoencoderKL"]}))
  assert "is no folder" in line(index(image_encoder=["transformers", "CLIPVisionModelWithProjection"]))
  assert "it has no model_index.json" in line(lambda folder: (folder / "model_index.json").unlink())
  config = json.loads((teacher / "unet" / "config.json").read_text())
  other = json.dumps(config | {"cross_attention_dim": 768})
  assert "cross_attention_dim=768, but the student's is 24" in line(
      lambda folder: (folder / "unet" / "config.json").write_text(other))
  weights = "vae/diffusion_pytorch_model.safetensors"
  assert "diffusion_pytorch_model.bin, a pickle" in line(
      lambda folder: [f.unlink() for f in folder.glob("vae/*safetensors*")])

  def link(folder):
    (folder / weights.replace("vae/", "vae/x-")).symlink_to(student / "vae")

  assert "is a link out of" in line(link)


@pytest.mark.slow
def test_a_pipeline_of_sdxl(tmp_path):
  """Two text encoders: the folder is their pipeline with the student in it, its images those of one put together."""
  making.write_tokenizer(tmp_path / "tokenizer")
  text = transformers.CLIPTextConfig(**making.TEXT)
  tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
  width = 6 * SDXL["addition_time_embed_dim"] + text.projection_dim
  config = SDXL | dict(cross_attention_dim=2 * text.hidden_size, projection_class_embeddings_input_dim=width)
  teacher = diffusers.StableDiffusionXLPipeline(
      vae=randomise(diffusers.AutoencoderKL(**making.VAE)), text_encoder=randomise(transformers.CLIPTextModel(text)),
      text_encoder_2=randomise(transformers.CLIPTextModelWithProjection(text), 1), tokenizer=tokenizer,
      tokenizer_2=tokenizer, unet=randomise(diffusers.UNet2DConditionModel(**config)),
      scheduler=diffusers.EulerDiscreteScheduler(), add_watermarker=False)
  teacher.save_pretrained(tmp_path / "teacher")
  for arguments in (["convert", f"{tmp_path}/teacher", f"--out={tmp_path}/unet"],
                    ["export", f"{tmp_path}/unet", f"--out={tmp_path}/out", f"--pipeline={tmp_path}/teacher",
                     "--sampler=ddim", "--steps=2"]):
    assert main(arguments) == 0
  found = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out", add_watermarker=False)
  assert type(found) is diffusers.StableDiffusionXLPipeline
  teacher.scheduler = diffusers.DDIMScheduler.from_pretrained(tmp_path / "out", subfolder="scheduler")

  def images(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32))
    return pipeline(PROMPTS[0], num_inference_steps=2, guidance_scale=1, latents=x, output_type="np").images

  np.testing.assert_array_equal(images(found), images(teacher))


@functools.cache
def draws():
  """x_T, and the noise that `rollout` draws at each step."""
  keys = jax.random.split(jax.random.key(3), SHAPE[0])
  x_T = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)
  return x_T, [keys_lib.normal_like(keys_lib.numbered(keys, i), jnp.asarray(x_T)) for i in range(STEPS)]


def sample(base, sampler):
  """Our latents."""
  loaded = folders.load(base / "trained")
  table = process.stable_diffusion()
  denoiser = prediction.make_denoiser(as_net_fn(loaded.module).apply, table, prediction.make("eps"))
  solver, grid = solvers.renoise(), grids.make("dmd2", STEPS, table)
  if sampler == "lcm":
    denoiser, grid = consistency_function(denoiser), grids.lcm(STEPS)
  elif sampler == "ddim":
    solver, grid = solvers.ddim(), grids.ddim(STEPS)
  x_T, _ = draws()
  keys = jax.random.split(jax.random.key(3), len(x_T))
  cond = Prompts([base / "text_encoder"], base / "teacher" / "tokenizer")(PROMPTS).cond

  @functools.partial(jax.jit, compiler_options=QUICK)
  def run(params, x_T, cond):
    return rollout(solver(table, bind(denoiser, params)), x_T, grid, cond, keys)

  return run(loaded.params, jnp.asarray(x_T), cond | {"guidance_scale": jnp.full(len(x_T), SCALE)})


# The config.json of Stable Diffusion 1.5's UNet, fields with default values left out.
FULL_SD15 = dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


@pytest.mark.slow
def test_full_stable_diffusion(tmp_path):
  """SD 1.5's UNet at full size: what converting it takes, and parity. About 12 GiB of memory and some minutes."""
  model = randomise(diffusers.UNet2DConditionModel(**FULL_SD15))
  assert sum(p.numel() for p in model.parameters()) == 859_520_964
  model.save_pretrained(tmp_path / "full")
  x = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 4, 16, 16)).astype(np.float32))
  text = torch.from_numpy(np.random.default_rng(1).standard_normal((1, 77, 768)).astype(np.float32))
  with torch.no_grad():
    wanted = model(x, torch.tensor([321.0]), text).sample.numpy().transpose(0, 2, 3, 1)
  del model

  # In a process of its own, whose peak is that of converting.
  code = ("from ddil_jax.main import main; from ddil_jax.measure_files import peak_memory_mib; "
          f"main(['convert', '{tmp_path}/full', '--out={tmp_path}/full.safetensors']); print(peak_memory_mib())")
  begin = time.monotonic()
  said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
  seconds, peak, size = time.monotonic() - begin, int(said[-1]) * 2**20, 859_520_964 * 4
  print(f"converting {size / 2**30:.2f} GiB: {seconds:.0f} s, peak {peak / 2**30:.2f} GiB")
  assert peak < 2.2 * size

  loaded = folders.load(tmp_path / "full.safetensors")
  apply = jax.jit(loaded.module.apply, compiler_options=QUICK)
  ours = apply({"params": loaded.params}, x.numpy().transpose(0, 2, 3, 1), jnp.array([321.0]), {"text": text.numpy()})
  print(f"error {np.abs(ours - wanted).max():.2e} of {np.abs(wanted).max():.2f}")
  np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
