"""A distilled student as a folder that diffusers samples from: network, scheduler, model card."""

import json
import os
import pathlib
from typing import Any, NamedTuple

from ddil_jax import files
from ddil_jax.diffusion import grids
from ddil_jax.errors import UsageError
from ddil_jax.interop import diffusers as folders
from ddil_jax.interop import pipelines
from ddil_jax.lora import LoRA
from ddil_jax.registry import unknown
from ddil_jax.types import Params

UNETS = ("UNet2DModel", "UNet2DConditionModel")
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
SAMPLERS = ("ddim", "lcm")
_LCM_STEPS = 50  # times at which LCM's students are trained
# Processes with a table of 1000 steps -> diffusers' names for them.
TABLES = {"stable_diffusion": dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
          "ddpm": dict(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")}


class Sampling(NamedTuple):
  """How the student was trained to be sampled, on a table of 1000 steps.

  Attributes:
    sampler: "ddim" (PD): deterministic, times evenly spaced from the end; "lcm" (LCM, CD, DMD2): predict and renoise.
    steps: sampling steps.
    prediction: what the network predicts, one of PREDICTIONS.
    timesteps: of a grid of one's own, as DMD2's 999, 749, 499, 249; () are the sampler's.
    guidance_scale: folded in, or read by the network where it has an embedding of it; u + g (c - u).
    zero_terminal_snr: the schedule ends in pure noise.
    process: whose table it is, one of TABLES.
    timestep_scaling: of LCM's boundary condition.
    projected: x0 estimates were projected into the data's range on the way, which the card says.
    guided: the scale is not folded in: whoever samples guides, at two calls of the network a step (a teacher).
  """
  sampler: str = "lcm"
  steps: int = 4
  prediction: str = "eps"
  timesteps: tuple[int, ...] = ()
  guidance_scale: float = 1.0
  zero_terminal_snr: bool = False
  process: str = "stable_diffusion"
  timestep_scaling: float = 10.0
  projected: bool = False
  guided: bool = False


def scheduler_config(sampling: Sampling) -> dict[str, Any]:
  """scheduler_config.json of a sampler.

  Raises:
    UsageError: an unknown name, times that do not decrease, or that this scheduler cannot take.
  """
  _check(sampling)
  common = dict(num_train_timesteps=1000, trained_betas=None, clip_sample=False, thresholding=False,
                prediction_type=PREDICTIONS[sampling.prediction], set_alpha_to_one=True, steps_offset=1,
                rescale_betas_zero_snr=sampling.zero_terminal_snr) | TABLES[sampling.process]
  if sampling.sampler == "ddim":
    return common | dict(_class_name="DDIMScheduler", timestep_spacing="trailing")
  return common | dict(_class_name="LCMScheduler", original_inference_steps=_original_steps(sampling) or _LCM_STEPS,
                       timestep_scaling=sampling.timestep_scaling)


def _original_steps(sampling: Sampling) -> int:
  """The `original_inference_steps` with which a call of so many steps takes the student's times; 0 if none does."""
  if not sampling.timesteps:
    return _LCM_STEPS
  # The least: where it is the number of steps, one of fewer takes some of these times, and one of more is refused.
  return next((n for n in range(sampling.steps, 1001)
               if grids.lcm_timesteps(sampling.steps, n).tolist() == list(sampling.timesteps)), 0)


def _check(sampling: Sampling) -> None:
  if sampling.sampler not in SAMPLERS:
    raise UsageError(unknown("sampler", sampling.sampler, SAMPLERS))
  if sampling.prediction not in PREDICTIONS:
    raise UsageError(unknown("prediction", sampling.prediction, PREDICTIONS))
  if not 1 <= sampling.steps <= 1000:
    raise UsageError(f"steps={sampling.steps}: 1 to 1000 are possible")
  times = sampling.timesteps
  if times and (len(times) != sampling.steps or list(times) != sorted(set(times), reverse=True)
                or not 0 <= times[-1] <= times[0] <= 999):
    raise UsageError(f"timesteps={times}: {sampling.steps} decreasing whole numbers from 0 to 999 are expected")
  if times and sampling.sampler == "ddim" and list(times) != grids.ddim_timesteps(sampling.steps).tolist():
    raise UsageError(f"timesteps={times}: diffusers' DDIM takes its own only, for {sampling.steps} steps"
                     f" {tuple(grids.ddim_timesteps(sampling.steps).tolist())}")


def timesteps(sampling: Sampling) -> list[int]:
  """The times at which the student is evaluated."""
  own = grids.ddim_timesteps if sampling.sampler == "ddim" else grids.lcm_timesteps
  return list(sampling.timesteps) or own(sampling.steps).tolist()


def _usage(about: dict, scheduler: str, arguments: str, of_lora: bool, whole: bool) -> list[str]:
  """The lines of Python that load the folder, into a pipeline of the teacher where it is none, and sample it."""
  load = f"scheduler = {scheduler}.from_pretrained(FOLDER, subfolder=\"scheduler\")"
  image = f"image = pipeline(prompt, {arguments}).images[0]"
  if whole:
    return ["pipeline = DiffusionPipeline.from_pretrained(FOLDER)", image]
  if not of_lora:
    return ["unet = UNet2DConditionModel.from_pretrained(FOLDER, subfolder=\"unet\")", load,
            "pipeline = DiffusionPipeline.from_pretrained(TEACHER, unet=unet, scheduler=scheduler)", image]
  if about.get("config", {}).get("_class_name") != "UNet2DModel":
    return [load, "pipeline = DiffusionPipeline.from_pretrained(TEACHER, scheduler=scheduler)",
            "pipeline.load_lora_weights(FOLDER)", image]
  # Which cannot load a LoRA by itself.
  return ["class Unet(PeftAdapterMixin, UNet2DModel):", "  pass", "", "unet = Unet.from_pretrained(TEACHER)",
          "unet.load_lora_adapter(FOLDER, prefix=\"unet\", use_safetensors=True)", load]


def model_card(about: dict, sampling: Sampling, run: dict[str, Any] | None = None, of_lora: bool = False,
               whole: bool = False) -> str:
  """README.md of the folder.

  Args:
    about: of the student's file, see `interop/diffusers.py::Loaded`.
    run: "config" and "results" (rows) of the training run, where there is one.
    of_lora: the folder has a LoRA instead of the network.
    whole: the folder is a whole pipeline.
  """
  run, licence = run or {}, about.get("license") or "unknown"
  scale = sampling.guidance_scale
  folded = scale != 1 and not sampling.guided and not about.get("config", {}).get("time_cond_proj_dim")
  # A pipeline that is given a scale above 1 guides, on top of what the student has learned.
  arguments = f"num_inference_steps={sampling.steps}, guidance_scale={1 if folded else scale:g}"
  if sampling.sampler == "lcm" and not _original_steps(sampling):
    arguments += f", timesteps={list(sampling.timesteps)}"
  terms = (f"under the licence {licence} of that model." if licence != "unknown" else
           "which states no licence: ask its authors before sharing this network.")
  lines = [
      "---", f"license: {licence}", "library_name: diffusers", "tags: [distillation, ddil]", "---", "",
      f"# {sampling.steps}-step student", "",
      f"Distilled with ddil from `{about.get('source', 'unknown')}`, {terms}", "",
      f"It is sampled at the times {', '.join(map(str, timesteps(sampling)))} with the scheduler in `scheduler/`:", "",
      "```python", *_usage(about, scheduler_config(sampling)["_class_name"], arguments, of_lora, whole), "```", ""]
  if folded:
    lines += [f"Guidance with scale {scale:g} is folded into the network: pipelines are given 1, which is none.", ""]
  if sampling.sampler == "ddim" and 1000 % sampling.steps:
    lines += [f"{sampling.steps} does not divide 1000: a step of that scheduler does not end quite where the next one"
              " begins, so its images differ a little from those of the training code.", ""]
  if sampling.projected:
    lines += ["The training code also projects estimates of the image into the data's range while it samples; this"
              " scheduler does not.", ""]
  for row in run.get("results", []):
    lines += [f"Metrics at {row.get('steps')} steps, guidance scale {row.get('guidance_scale')}:", "",
              "| metric | value |", "|---|---|", *(f"| {k} | {v:.6g} |" for k, v in row.get("metrics", {}).items()), ""]
  if "config" in run:
    config = json.dumps(run["config"], indent=1, sort_keys=True)
    lines += ["Config of the training run:", "", "```json", config, "```", ""]
  return "\n".join(lines)


def write(folder, params: Params, about: dict, sampling: Sampling, run: dict[str, Any] | None = None,
          dtype: str = "float32", lora: LoRA | None = None, pipeline: str | os.PathLike = "") -> None:
  """Writes `unet/` or `pytorch_lora_weights.safetensors`, `scheduler/` and README.md; or a whole pipeline.

  Args:
    params, about: of the student; `about` as `interop/diffusers.py::load` gave it for the teacher or the student.
    run: see `model_card`.
    dtype: of the weights.
    lora: of which `params` is the delta; None for a whole network.
    pipeline: folder of the teacher's, from which all but UNet and scheduler is copied; "" writes no pipeline.

  Raises:
    UsageError: what does not fit; a folder that has other files already; see `pipelines.read`.
  """
  folder = pathlib.Path(folder)
  config = scheduler_config(sampling)
  if (name := about["config"].get("_class_name")) not in UNETS:
    raise UsageError(f"the network is a {name}; a student for diffusers is a {' or a '.join(UNETS)}")
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise UsageError(f"{folder} exists already and is not an empty folder; give another one")
  taken = pipelines.read(pipeline, about["config"]) if pipeline else None
  if lora:
    folders.export_lora(params, about, folder, lora.scale, dtype)
  else:
    folders.export(params, about, folder / "unet", dtype)
  files.write_json(folder / "scheduler" / "scheduler_config.json", config)
  card = model_card(about, sampling, run, lora is not None, taken is not None)
  files.write_bytes(folder / "README.md", card.encode())
  if taken:
    pipelines.write(folder, taken, about["config"]["_class_name"], config["_class_name"])


def run_of(workdir) -> dict[str, Any]:
  """"config" and "results" of a run's folder for the model card. Raises UsageError where they are not."""
  workdir = pathlib.Path(workdir)
  return {"config": files.read_json(workdir / "config.json"), "results": files.read_json(workdir / "results.json")}
