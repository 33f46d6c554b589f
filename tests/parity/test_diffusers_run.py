"""A run whose teacher and student are a network of diffusers, from its folder to the student's folder."""

import json

import jax
import numpy as np
import pytest

from ddil_jax import build, samplers, trained
from ddil_jax.interop import diffusers as folders
from ddil_jax.main import main
from tests.parity.test_diffusers_models import diffusers, randomise, torch
from tests.running import SHORT, refuse, shared  # noqa: F401 (fixtures)

pytestmark = pytest.mark.xdist_group("diffusers_run")  # its fixture is made once
TEACHER = dict(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(4,), layers_per_block=1,
               norm_num_groups=2, mid_block_type=None, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
OPTIONS = ("--config.process.name=ddpm", "--config.prediction.name=eps", "--config.grid.name=ddim",
           "--config.train.stages=()", "--config.objective.num_steps=2", "--config.train.steps=1", *SHORT)


@pytest.fixture(scope="module")
def run(tmp_path_factory, shared):  # noqa: F811
  """(folder of the run, folder of diffusers' teacher, converted file)."""
  base = tmp_path_factory.mktemp("run")
  randomise(diffusers.UNet2DModel(**TEACHER)).save_pretrained(base / "teacher")
  file = base / "teacher.safetensors"
  assert main(["convert", str(base / "teacher"), f"--out={file}"]) == 0
  assert main(["train", "--config=configs/digits_pd.py:smoke", f"--workdir={base / 'run'}",
               f"--config.model.file={file}", *OPTIONS]) == 0
  return base / "run", base / "teacher", file


def test_from_folder_to_folder(run, tmp_path, refuse):  # noqa: F811
  """The teacher is theirs, the student was trained from it, and theirs samples as ours does."""
  workdir, teacher, file = run
  config = trained.saved_config(workdir)
  built = build.build(config)
  given = trained.load_teacher(config, built)
  np.testing.assert_array_equal(given["conv_in"]["kernel"], folders.load(file).params["conv_in"]["kernel"])

  out = tmp_path / "student"
  assert main(["export", str(workdir), f"--out={out}"]) == 0
  unet = diffusers.UNet2DModel.from_pretrained(out, subfolder="unet").eval()
  before = diffusers.UNet2DModel.from_pretrained(teacher)
  moved = max(float((a - b).detach().abs().max()) for a, b in zip(unet.parameters(), before.parameters(), strict=True))
  assert 0 < moved < 0.1
  scheduler = diffusers.DDIMScheduler.from_pretrained(out, subfolder="scheduler")
  assert scheduler.config.beta_schedule == "linear" and scheduler.config.timestep_spacing == "trailing"
  card = (out / "README.md").read_text()
  assert "saturation@" in card and json.dumps(str(file)) in card

  sampler = samplers.samplers(config, built)[0]
  keys, cond = jax.random.split(jax.random.key(0), 2), {"label": np.zeros(2, np.int32)}
  params, _ = trained.params_of(config, built, workdir)
  # Their start is ours: the sampler's own draw.
  x = torch.from_numpy(np.array(samplers.prior(built.parts.process, keys, np.zeros((2, 8, 8, 1), np.float32)))
                       .transpose(0, 3, 1, 2).copy())
  scheduler.set_timesteps(2)
  with torch.no_grad():
    for t in scheduler.timesteps:
      x = scheduler.step(unet(x, t).sample, t, x).prev_sample
  wanted = x.numpy().transpose(0, 2, 3, 1)
  scale = np.abs(wanted).max()
  np.testing.assert_allclose(sampler.sample(params, keys, cond) / scale, wanted / scale, atol=1e-3)
  assert "is not an empty folder" in refuse("export", workdir, f"--out={out}")


def test_a_student_that_is_told_the_end_time(run, refuse, tmp_path):  # noqa: F811
  config = json.loads((run[0] / "config.json").read_text())
  config["model"]["end_time_embedding"] = 8
  (tmp_path / "config.json").write_text(json.dumps(config))
  assert "which no network of diffusers reads" in refuse("export", tmp_path, f"--out={tmp_path / 'out'}")


@pytest.mark.parametrize("change, said", [
    (dict(in_channels=3, out_channels=3), "images of 1 and this prediction need 1 to 1"),
    (dict(num_class_embeds=5), "5 classes; the data has")])
def test_networks_that_do_not_fit_the_run(run, change, said, refuse, tmp_path):  # noqa: F811
  folder, file = tmp_path / "other", tmp_path / "other.safetensors"
  diffusers.UNet2DModel(**TEACHER | change).save_pretrained(folder)
  assert main(["convert", str(folder), f"--out={file}"]) == 0
  line = refuse("train", "--config=configs/digits_pd.py:smoke", f"--workdir={tmp_path / 'run'}",
                f"--config.model.file={file}", *OPTIONS)
  assert said in line and not (tmp_path / "run").exists()
