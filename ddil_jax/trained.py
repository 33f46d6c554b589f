"""What is done with a trained run: evaluate it, measure its covariate shift, sample it, export it."""

import json
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ddil_jax import build as build_lib
from ddil_jax import config as config_lib
from ddil_jax import config_checks
from ddil_jax import files, lora
from ddil_jax import measure as measure_lib
from ddil_jax import measure_files, prompting, samplers
from ddil_jax import shift as shift_lib
from ddil_jax.errors import UsageError
from ddil_jax.evaluation import grids, sampling
from ddil_jax.interop import diffusers, release
from ddil_jax.objectives.base import completed
from ddil_jax.training import checkpoint, processes
from ddil_jax.training import logging as log_lib
from ddil_jax.training import params as params_lib
from ddil_jax.training import workdir as workdir_lib


def write_results(config, built, params, teacher, workdir: pathlib.Path, cost: measure_lib.Cost) -> list[dict]:
  """Evaluates, and writes `results.json` and `samples/`."""
  first = processes.is_first()
  rows = measure_lib.measure(config, built, params, teacher, workdir / "samples" if first else None, cost=cost)
  identity = _original_teacher(config, teacher)
  rows = [row | {"teacher": identity} for row in rows]
  if first:
    files.write_json(workdir / "results.json", rows)
  return rows


def _original_teacher(config, teacher) -> str:
  """Identity of the teacher, or where that is a student itself (of a stage before), of its own; "" without."""
  if not teacher:
    return ""
  try:
    own = files.read_json(pathlib.Path(config.teacher.path) / "results.json")[0]["teacher"]
  except (UsageError, LookupError, TypeError):  # no run, or one without results
    own = ""
  return own or params_lib.hash_params(teacher)[:12]


def evaluate(config: ConfigDict, workdir: str | pathlib.Path, say=print) -> list[dict]:
  """Evaluates the newest checkpoint of a run and rewrites its results."""
  workdir = pathlib.Path(workdir)
  built = build_lib.build(config)
  params, meta = params_of(config, built, workdir)
  if processes.is_first():
    say(f"evaluating {workdir} with {config.eval.num_samples} samples")
  return write_results(config, built, params, load_teacher(config, built), workdir, cost_of(meta))


def evaluate_shift(config: ConfigDict, workdir: str | pathlib.Path, say=print) -> list[dict]:
  """Measures the covariate shift of a run's newest checkpoint: `shift.json`, and figures in `shift/`.

  Returns:
    The rows of `shift.json`: like those of `results.json`, without what was not measured.

  Raises:
    UsageError: a run without a teacher, or a config that leaves the shift out.
  """
  # Not at the top: matplotlib takes long to import, and no other part of a run draws.
  from ddil_jax.evaluation import report_figures, shift_figures
  workdir = pathlib.Path(workdir)
  built = build_lib.build(config)
  if built.objective.teacher is None:
    raise UsageError(f"{workdir} is a teacher's run: covariate shift is that of a student; give a student's run")
  if not config.eval.shift_samples:
    raise UsageError("config.eval.shift_samples=0 leaves the covariate shift out; set it to 500, for instance")
  if config.eval.teacher_acts:
    raise UsageError("config.eval.teacher_acts mixes two policies: covariate shift is that of the student; set it to"
                     " ()")
  params, _ = params_of(config, built, workdir)
  teacher = load_teacher(config, built)
  say(f"measuring the covariate shift of {workdir} with {config.eval.shift_samples} samples")
  extractor = measure_lib.load_networks(config, built.parts.image_shape, (), built.dataset).extractor
  rows = [measure_lib.what(config, built, sampler)
          | {"shift": shift_lib.probe(config, built, sampler, teacher).rows(params, extractor.features)}
          for sampler in samplers.samplers(config, built)]
  files.write_json(workdir / "shift.json", rows)
  log = workdir / "metrics.jsonl"
  drawings = shift_figures.draw(rows, log_lib.read_metrics(log) if log.exists() else [])
  report_figures.save(drawings, workdir / "shift")
  say(f"wrote {workdir}/shift.json and {len(drawings)} figure(s) in {workdir}/shift")
  return rows


def measured(config: ConfigDict, workdir: str | pathlib.Path) -> list[dict]:
  """The rows of a run's newest checkpoint under a config of one's own; writes nothing."""
  built = build_lib.build(config)
  params, meta = params_of(config, built, workdir)
  return measure_lib.measure(config, built, params, load_teacher(config, built), cost=cost_of(meta))


def cost_of(meta: dict) -> measure_lib.Cost:
  """What a checkpoint says of its training."""
  return measure_lib.Cost(**{name: meta[name] for name in measure_lib.Cost._fields if name in meta})


def evaluate_files(config: ConfigDict, path: str, reference: str, out: str | pathlib.Path | None = None,
                   own_metrics: bool = False, own_data: bool = False) -> dict:
  """Measures images in files, see `measure_files.measure_files`, and writes the result to `out`."""
  result = measure_files.measure_files(config, path, reference, own_metrics, own_data)
  if out:
    files.write_json(out, result)
  return result


def params_of(config, built, workdir):
  """The student of a run, with the teacher's parameters where it builds on them, and the checkpoint's meta.

  Raises:
    UsageError: it does not fit the config, or the teacher is not the one on which it was trained.
  """
  if not pathlib.Path(workdir).is_dir():
    raise UsageError(f"{workdir} is no run directory; train a run there first")
  if config.train.stages:
    folders = ", ".join(f"{workdir}/stage_{n}" for n in config.train.stages)
    raise UsageError(f"{workdir} is a run in stages; give one of {folders}")
  params, meta = own_params_of(config, built, workdir)
  if not built.objective.complete:
    return params, meta
  teacher = load_teacher(config, built)
  _require_its_teacher(workdir, meta, teacher, config.teacher.path)
  return jax.tree.map(jnp.asarray, completed(built.objective, params, teacher)), meta


def own_params_of(config, built, workdir):
  """The parameters that a run's student trained, and the checkpoint's meta. Raises UsageError if they do not fit."""
  params, meta, origin = _load_student(workdir, config.eval.ema)
  params_lib.require_like(params, jax.eval_shape(_init_student(built), jax.random.key(0)), f"checkpoint {origin}")
  return jax.tree.map(jnp.asarray, params), meta


def _require_its_teacher(workdir, meta, teacher, path) -> None:
  if meta.get("teacher") != params_lib.hash_params(teacher):
    raise UsageError(f"the student in {workdir} is the part of a network whose rest is its teacher, and the one at"
                     f" {path} has other parameters than that; bring it back")


def _init_student(built):
  """key -> a student's own parameters."""
  teacher = built.init_teacher or (lambda key: ())
  return lambda key: built.objective.init(key, teacher(key))["student"]


def sample(config: ConfigDict, workdir: str | pathlib.Path, num_samples: int, seed: int, out: str | pathlib.Path,
           steps: int | None = None, prompts: Sequence[str] = (), encoders: Sequence[str] = (), tokenizer: str = "",
           folder: str = "") -> pathlib.Path:
  """Writes a PNG grid of samples of a run's newest checkpoint.

  Args:
    num_samples: of all; with `prompts` of each of them, a row for each.
    prompts, encoders, tokenizer: see `prompting.encoder`; without prompts the samples are of those of the set.
    folder: writes every sample to a file of its own too; "" does not.

  Raises:
    UsageError: fewer than 1 sample or step; prompts of a run that reads none.
  """
  if num_samples < 1:
    raise UsageError(f"--num_samples={num_samples}: at least 1 is needed")
  if pathlib.Path(out).suffix.lower() != ".png":
    raise UsageError(f"--out={out}: a file that ends in .png is needed")
  built = build_lib.build(config)
  params, _ = params_of(config, built, workdir)
  chosen = samplers.samplers(config, built, steps)[0]
  data = built.dataset
  teacher = jax.tree.map(jnp.asarray, load_teacher(config, built)) if chosen.with_teacher else None
  draw = measure_lib.draw_with(chosen, params, teacher, data.decoder)
  cond = measure_lib.conditions(data, num_samples)
  if prompts:
    cond = prompting.conditions(data, prompting.encoder(config, encoders, tokenizer), prompts, num_samples)
  count = len(cond["label"])
  images = sampling.sample_images(draw, count, config_checks.pixel_shape(data), seed, cond,
                                  min(count, config.eval.batch_size))
  columns = num_samples if prompts else min(10, num_samples)
  grids.save_png(out, grids.image_grid(images, columns=columns, scale=max(1, 32 // images.shape[1])))
  if folder:
    files.make_folder(folder)
    names = prompting.file_names(folder, prompts or ("sample",), num_samples)
    for path, image in zip(names, images, strict=True):
      grids.save_png(path, grids.image_grid(image[None], columns=1, gap=0))
  return pathlib.Path(out)


def export(workdir: str | pathlib.Path, out: str | pathlib.Path, dtype: str = "float32",
           merged: bool = False, pipeline: str = "") -> pathlib.Path:
  """Writes a run's student as a folder for diffusers: its network, or its LoRA, and the scheduler that it asks for.

  Args:
    merged: the network also of a student that trained a LoRA.
    pipeline: see `release.write`.

  Raises:
    UsageError: a run of the project's own UNet, one that no scheduler of diffusers samples, or a LoRA over another
      network than that of config.model.file.
  """
  config = saved_config(workdir)
  file = config.model.get("file", "")
  if not file:
    raise UsageError(f"{workdir} trained the project's own UNet, which diffusers does not have; runs with"
                     " config.model.file can be exported")
  if config.model.get("end_time_embedding", 0):
    raise UsageError(f"{workdir}: the student is told the time at which a jump ends, which no network of diffusers reads")
  built = build_lib.build(config)
  sampling = samplers.sampling_of(config, built)
  of_lora = None if merged else build_lib.loras_of(config).get("student")
  if of_lora and config.teacher.path:
    raise UsageError(f"{workdir} trained its LoRA over the student at {config.teacher.path}, which a reader of the LoRA"
                     " has not; write the whole network with --merged")
  if of_lora and pipeline:
    raise UsageError(f"{workdir} trained a LoRA; a whole pipeline has the whole network: give --merged too, or leave"
                     " --pipeline out and load the LoRA into the teacher's")
  params, _ = (own_params_of if of_lora else params_of)(config, built, workdir)
  about = diffusers.architecture(file)[1]
  if width := config.model.guidance_embedding:
    if about["config"].get("_class_name") != "UNet2DConditionModel":
      raise UsageError(f"{workdir}: the student reads the guidance scale, which UNet2DModel of diffusers does not")
    about = about | {"config": about["config"] | {"time_cond_proj_dim": width}}
  release.write(out, params, about, sampling, release.run_of(workdir), dtype, of_lora, pipeline)
  return pathlib.Path(out)


def saved_config(workdir: str | pathlib.Path) -> ConfigDict:
  """The resolved config of a run. Raises UsageError where there is none."""
  path = pathlib.Path(workdir) / "config.json"
  try:
    saved = json.loads(path.read_text())
  except (FileNotFoundError, NotADirectoryError):
    raise UsageError(f"{workdir} is no run directory: it has no config.json; train a run there first") from None
  except OSError as error:
    raise UsageError(f"cannot read {path}: {error.strerror}") from None
  except json.JSONDecodeError as error:
    raise UsageError(f"{path} is damaged ({error}); bring it back from a copy") from None
  return config_lib.from_dict(workdir_lib.with_defaults(saved, config_lib.to_dict(config_lib.defaults())))


# Parameters --------------------------------------------------------------------------------


def load_teacher(config: ConfigDict, built: build_lib.Built):
  """The frozen parameters at config.teacher.path, checked against the architecture; () where none is needed.

  They are on the host: in training there is on the devices what the step reads of them, split over them and in
  config.teacher.dtype. Who calls a network with them again and again puts them on a device first.

  Raises:
    UsageError: no path given, nothing there, or parameters of another architecture (listed).
  """
  if built.init_teacher is None:
    return ()
  params, where = _find_teacher(config, built.init_teacher)
  try:
    params_lib.require_like(params, jax.eval_shape(built.init_teacher, jax.random.key(0)), f"the teacher at {where}")
  except UsageError as error:
    raise UsageError(f"{error}; set config.model, or where the teacher differs from the student config.teacher, to what"
                     " the teacher's run has") from None
  return jax.tree.map(lambda v: np.array(v) if isinstance(v, jax.Array) else v, params)


def _find_teacher(config, init):
  """(parameters, where they are from) of a config's teacher; `init` makes those of a smoke run."""
  if path := config.teacher.path:
    return _merged(path, _load_student(path, config.teacher.ema), init), path
  file, described = config.model.get("file", ""), config.model.get("file", "").endswith(".json")
  if config.data.name in ("fake", "fake_text") and (described or not file):  # a smoke run: any teacher will do
    return init(jax.random.key(config.seed)), "config.seed"
  if file:
    return diffusers.load(file).params, file
  raise UsageError(f"objective '{config.objective.name}' needs a teacher: train one with"
                   " configs/digits_teacher.py and give its run as --config.teacher.path=RUN")


def _merged(path, found: checkpoint.Loaded, init):
  """A student as a teacher; that of a run which trained a LoRA with its own teacher, as the run's config names it."""
  path = pathlib.Path(path)
  folders = (path, *path.parents[:2]) if path.is_dir() else ()  # of a run, or one of its checkpoints
  run = next((folder for folder in folders if (folder / "config.json").is_file()), None)
  config = saved_config(run) if run else None
  if config is None or not config.model.get("lora", 0):
    return found.params
  teacher, where = _find_teacher(config, init)
  _require_its_teacher(run, found.meta, teacher, where)
  return lora.merge(teacher, found.params, build_lib.loras_of(config)["student"].scale)


def _load_student(path, average: str) -> checkpoint.Loaded:
  return checkpoint.load_any(path, "params/student" if average == "raw" else f"ema/{average}")
