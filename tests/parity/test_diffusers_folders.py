"""diffusers in PyTorch reads what we write, gives the same images, and we read what it writes."""

import functools
import json
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
from ddil_jax.main import main
from ddil_jax.models.base import as_net_fn
from ddil_jax.objectives.base import bind
from ddil_jax.objectives.lcm import consistency_function
from tests.parity.test_diffusers_models import QUICK, SD15, diffusers, randomise, torch

STEPS, SHAPE = 4, (2, 8, 8, 4)


pytestmark = pytest.mark.xdist_group("diffusers_folders")  # its fixture is made once


@pytest.fixture(scope="module")
def student(tmp_path_factory):
  """Folder of teacher, student (`trained`; its guidance embedding has learned something), and the exports."""
  base = tmp_path_factory.mktemp("student")
  teacher = randomise(diffusers.UNet2DConditionModel(**SD15))
  teacher.save_pretrained(base / "teacher" / "unet", max_shard_size="10KB")
  assert len(list((base / "teacher" / "unet").glob("*.safetensors"))) > 2
  assert main(["convert", str(base / "teacher"), f"--out={base / 'start'}", "--guidance_embedding=6"]) == 0
  start = folders.load(base / "start")
  kernel = start.params["time_embedding"]["cond_proj"]["kernel"]
  kernel[:] = np.random.default_rng(0).standard_normal(kernel.shape)
  folders.save(base / "trained", start.params, start.about)
  for sampler in ("lcm", "ddim"):
    assert main(["export", str(base / "trained"), f"--out={base / sampler}", f"--sampler={sampler}",
                 f"--steps={STEPS}"]) == 0
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


@pytest.mark.parametrize("sampler", ["lcm", "ddim"])
def test_images_agree(student, sampler):
  """The same noise gives the same images, with the scheduler that we wrote, loaded by them."""
  unet = diffusers.UNet2DConditionModel.from_pretrained(student / sampler, subfolder="unet").eval()
  kind = diffusers.LCMScheduler if sampler == "lcm" else diffusers.DDIMScheduler
  scheduler = kind.from_pretrained(student / sampler, subfolder="scheduler")
  scheduler.set_timesteps(STEPS)
  x_T, text, scale, noise = draws()
  embed = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding
  w = embed(None, torch.from_numpy(scale) - 1, embedding_dim=6)
  to_torch = lambda v: torch.from_numpy(np.asarray(v).transpose(0, 3, 1, 2).copy())  # noqa: E731
  x = to_torch(x_T)
  with pytest.MonkeyPatch.context() as patch, torch.no_grad():
    for i, t in enumerate(scheduler.timesteps):
      out = unet(x, t, torch.from_numpy(text), timestep_cond=w).sample
      # LCM's scheduler draws its noise inside: it gets ours.
      patch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *a, i=i, **k: to_torch(noise[i]))
      x = scheduler.step(out, t, x).prev_sample
  wanted = x.numpy().transpose(0, 2, 3, 1)

  assert wanted.std() > 0.1
  np.testing.assert_allclose(sample(student / "trained", sampler), wanted, rtol=1e-3, atol=1e-3)


@functools.cache
def draws():
  """x_T, text, guidance scale, and the noise that `rollout` draws at each step."""
  keys = jax.random.split(jax.random.key(3), SHAPE[0])
  normal = np.random.default_rng(1).standard_normal
  x_T = normal(SHAPE).astype(np.float32)
  noise = [keys_lib.normal_like(keys_lib.numbered(keys, i), jnp.asarray(x_T)) for i in range(STEPS)]
  return x_T, normal((2, 3, 6)).astype(np.float32), np.array([7.5, 2.0], np.float32), noise


def sample(file, sampler):
  """Our images."""
  loaded = folders.load(file)
  table = process.stable_diffusion()
  denoiser = prediction.make_denoiser(as_net_fn(loaded.module).apply, table, prediction.make("eps"))
  if sampler == "lcm":
    denoiser, solver, grid = consistency_function(denoiser), solvers.renoise(), grids.lcm(STEPS)
  else:
    solver, grid = solvers.ddim(), grids.ddim(STEPS)
  x_T, text, scale, _ = draws()
  keys = jax.random.split(jax.random.key(3), len(x_T))

  @functools.partial(jax.jit, compiler_options=QUICK)
  def run(params, x_T):
    return rollout(solver(table, bind(denoiser, params)), x_T, grid, {"text": text, "guidance_scale": scale}, keys)

  return run(loaded.params, jnp.asarray(x_T))


# The config.json of Stable Diffusion 1.5's UNet, fields with default values left out.
FULL_SD15 = dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


@pytest.mark.slow
def test_full_stable_diffusion(tmp_path):
  """SD 1.5's UNet at full size: what converting it takes, and parity. About 12 GiB of memory and ten minutes."""
  model = randomise(diffusers.UNet2DConditionModel(**FULL_SD15))
  assert sum(p.numel() for p in model.parameters()) == 859_520_964
  model.save_pretrained(tmp_path / "full")
  x = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 4, 16, 16)).astype(np.float32))
  text = torch.from_numpy(np.random.default_rng(1).standard_normal((1, 77, 768)).astype(np.float32))
  with torch.no_grad():
    wanted = model(x, torch.tensor([321.0]), text).sample.numpy().transpose(0, 2, 3, 1)
  del model

  # In a process of its own, whose peak is that of converting.
  code = (f"import resource, sys; from ddil_jax.main import main; main(['convert', '{tmp_path}/full', "
          f"'--out={tmp_path}/full.safetensors']); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
  begin = time.monotonic()
  said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
  seconds, peak, size = time.monotonic() - begin, int(said[-1]) * 1024, 859_520_964 * 4
  print(f"converting {size / 2**30:.2f} GiB: {seconds:.0f} s, peak {peak / 2**30:.2f} GiB")
  assert peak < 2.2 * size

  loaded = folders.load(tmp_path / "full.safetensors")
  apply = jax.jit(loaded.module.apply, compiler_options=QUICK)
  ours = apply({"params": loaded.params}, x.numpy().transpose(0, 2, 3, 1), jnp.array([321.0]), {"text": text.numpy()})
  print(f"error {np.abs(ours - wanted).max():.2e} of {np.abs(wanted).max():.2f}")
  np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
