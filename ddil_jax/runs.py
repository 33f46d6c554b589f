"""Whole training runs in a work directory. Composes build, loop and evaluation.

A work directory holds `config.json`, `versions.json`, `checkpoints/`, `metrics.jsonl`, event
files, `samples/` and `results.json`. Progressive distillation in stages has one such directory
per stage below its own.
"""

import contextlib
import functools
import json
import pathlib
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ddil_jax import build as build_lib
from ddil_jax import config as config_lib
from ddil_jax import files
from ddil_jax import keys as keys_lib
from ddil_jax import measure as measure_lib
from ddil_jax import samplers, trained
from ddil_jax import shift as shift_lib
from ddil_jax.data import pipeline
from ddil_jax.data.dataset import Dataset, some
from ddil_jax.errors import UsageError
from ddil_jax.models import base as models
from ddil_jax.objectives.base import completed
from ddil_jax.training import checkpoint, compiling, loop, parallel, processes
from ddil_jax.training import params as params_lib
from ddil_jax.training import workdir as workdir_lib
from ddil_jax.training import logging as log_lib
from ddil_jax.training.step import due_players, init_state, make_diagnose, make_train_step

# Fields that may differ when a run is resumed.
MAY_CHANGE = ("train.log_every", "train.checkpoint_every", "train.eval_every", "train.keep", "train.keep_best",
              "train.parallel", "train.fsdp", "train.sharding", "train.min_shard", "train.microbatch",
              "train.watchdog_seconds", "train.profile_steps", "model.remat",
              "eval", "data.data_dir", "data.manual_dir")
_DIAGNOSE_BATCHES = 8  # over which the objective's own measurements are averaged
_PROGRAMS_OF = 1000  # steps of which the programs are known; players learn more often


def train(config: ConfigDict, workdir: str | pathlib.Path, teacher=None, say=print) -> list[dict]:
  """Trains a run to its end, or continues one, and evaluates it.

  Args:
    teacher: parameters, instead of those at config.teacher.path.

  Returns:
    The rows of `results.json`.

  Raises:
    UsageError, RunError, loop.Stopped.
  """
  workdir = pathlib.Path(workdir)
  if not processes.is_first():
    say = lambda line: None  # noqa: E731
  plain = config_lib.to_dict(config)
  plain["data"] |= {"data_dir": "", "manual_dir": ""}  # each machine may have its own
  processes.require_agreement({"workdir": str(workdir), "code": processes.code_hash(), "versions": log_lib.versions(),
                               "config": plain})
  if config.train.stages:
    return _train_stages(config, workdir, teacher, say)
  return _train_one(config, workdir, functools.partial(_fit_together, config, teacher, say), MAY_CHANGE, say)


def _train_one(config, workdir, fit_together, may_change, say):
  # A new folder is claimed when all parts are known to fit: a mistake must not leave a config there
  # from which the corrected command then differs. An old one is compared first, since that is quick.
  several = processes.count() > 1
  setup = fit_together() if several or not (workdir / "config.json").exists() else None
  with _claim(config, workdir, may_change, say):
    return _train(config, workdir, setup or fit_together(), say)


def _claim(config, workdir, may_change, say):
  def prepare():
    return workdir_lib.prepare(workdir, config_lib.to_dict(config), log_lib.versions(), may_change=may_change,
                               defaults=config_lib.to_dict(config_lib.defaults()))

  claimed = processes.together(lambda: prepare() if processes.is_first() else None)
  processes.together(lambda: _require_shared(workdir))
  if not claimed:
    return contextlib.nullcontext()
  if claimed.new_versions:
    changes = "; ".join(f"{name} {then} -> {now}" for name, (then, now) in claimed.new_versions.items())
    say(f"other versions than at the start of this run, results need not be the same to the bit: {changes}")
  return claimed


def _require_shared(workdir) -> None:
  if not (workdir / "config.json").exists():
    raise UsageError(f"{workdir} is not the folder that process 0 writes to; all processes need the same file system")


def _train_stages(config, workdir, teacher, say):
  """Runs the stages one after the other: each student is the next teacher, with fresh optimizers."""
  stages = _stage_configs(config, workdir)
  first = _fit_together(stages[0], teacher, say)
  for stage in stages[1:]:
    build_lib.build(stage, first.built.dataset)
  rows = []
  with _claim(config, workdir, MAY_CHANGE, say):
    for i, stage in enumerate(stages):
      # The folder may be named in another way, or moved.
      may_change = MAY_CHANGE + (("teacher.path",) if i else ())
      fit_together = functools.partial(_fit_together, stage, None, say) if i else lambda: first
      name = f"stage_{stage.objective.num_steps}"
      stage_rows = _train_one(stage, workdir / name, fit_together, may_change, say)
      rows += [row | {"samples": f"{name}/{row['samples']}"} for row in stage_rows]
    if processes.is_first():
      files.write_json(workdir / "results.json", rows)
  return rows


def _stage_configs(config, workdir) -> list[ConfigDict]:
  steps = config.train.stages
  if "num_steps" not in config.objective:
    raise UsageError(f"config.train.stages={steps}: objective '{config.objective.name}' has no num_steps; set it to ()")
  if any(n < 1 or n != int(n) for n in steps) or any(a <= b for a, b in zip(steps, steps[1:])):
    raise UsageError(f"config.train.stages={steps}: step counts of at least 1, each below the one before, are needed")
  stages = []
  for i, num_steps in enumerate(steps):
    stage = config.copy_and_resolve_references()
    stage.unlock()
    stage.objective.num_steps, stage.train.stages = num_steps, ()
    if i:
      # The guided function belongs to the first teacher; its student has the guidance in it (where it is not told
      # the scale), and was trained at its own times only.
      stage.teacher.guidance_scale = 1.0
      if not samplers.reads_guidance(config):
        stage.teacher.folded_guidance_scale = config.teacher.guidance_scale
      stage.states.teacher_steps = steps[i - 1]
      stage.teacher.path, stage.teacher.ema = str(workdir / f"stage_{steps[i - 1]}"), stage.eval.ema
    stages.append(stage.lock())
  return stages


class _Setup(NamedTuple):
  """Parts that were seen to fit together; {due players: memory of their step} as far as it was looked at."""
  built: build_lib.Built
  teacher: Any
  batches: pipeline.Batches
  runner: parallel.Runner
  step_bytes: dict[tuple[str, ...], int]


def _fit_together(config, teacher, say) -> _Setup:
  """Everything that can find a mistake of the user, before anything is written."""
  if processes.count() == 1:
    return _fit(config, teacher, say)
  # Process 0 prepares the data set where that is needed; the others find it.
  processes.together(lambda: build_lib.load_data(config, "train") if processes.is_first() else None)
  setup = processes.together(lambda: _fit(config, teacher, say))
  processes.require_agreement({"data": data_hash(setup.built.dataset),
                               "teacher": params_lib.hash_params(setup.teacher) if setup.teacher else ""})
  return setup


def data_hash(data: Dataset) -> str:
  """Of what training reads: of sets on disk the first rows."""
  rows = [data.images, *(data.cond[name] for name in sorted(data.cond))]
  return processes.array_hash(*map(some, rows), data.labels)


def _fit(config, teacher, say) -> _Setup:
  alike = config.copy_and_resolve_references().unlock()
  alike.seed, alike.teacher.path = 0, ""
  alike.data.data_dir = str(pathlib.Path(config.data.data_dir or pipeline.default_data_dir()).resolve())
  built, runner, step_bytes = _built(json.dumps(config_lib.to_dict(alike), sort_keys=True))
  say(pipeline.preflight(built.dataset)["summary"])
  teacher = trained.load_teacher(config, built) if teacher is None else teacher
  batches = pipeline.batches(pipeline.subset(built.dataset, config.data.fraction), config.train.batch_size,
                             config.seed, config.data.flip, jax.process_index(), processes.count())
  jax.eval_shape(built.objective.init, jax.random.key(config.seed), teacher)
  return _Setup(built, teacher, batches, runner, step_bytes)


@functools.lru_cache(maxsize=4)  # the stages of one setting
def _built(text: str) -> tuple[build_lib.Built, parallel.Runner, dict]:
  """Parts and compiled step of a config as JSON. The seeds of a sweep differ in neither, so they compile once."""
  config = config_lib.from_dict(json.loads(text))
  built = build_lib.build(config)

  def make_step(layout):
    return make_train_step(built.objective, built.distribution, built.optimizers, built.ema_decays,
                           config.train.batch_size, config.states.rollout_params, layout)

  options = parallel.Options(config.train.fsdp, config.train.sharding, config.train.min_shard, config.train.microbatch)
  return built, parallel.make_runner(config.train.parallel, make_step, config.train.batch_size, options=options), {}


def _train(config, workdir, setup, say):
  built, teacher, batches, runner, step_bytes = setup
  root = jax.random.key(config.seed)
  make_state = functools.partial(init_state, built.objective, built.distribution, built.optimizers, built.ema_decays)
  start_from = (make_state, root, teacher, batches[0])
  shapes = runner.shapes(*start_from)
  say(f"{config.objective.name}: {models.count_params(shapes.params['student']):,} parameters in the student, "
      f"states from {', '.join(built.distribution.sources)}; {runner.summary}")

  with contextlib.ExitStack() as stack:
    tally = stack.enter_context(compiling.tally())
    checkpoints = stack.enter_context(checkpoint.Checkpoints(
        workdir / workdir_lib.CHECKPOINTS, keep=config.train.keep, keep_best=config.train.keep_best, best_metric="fd"))
    restored = checkpoints.restore(shapes)
    teacher_hash = params_lib.hash_params(teacher) if teacher else ""
    state, meta, start = restored or (None, {"seconds": 0.0, "teacher": teacher_hash}, 0)
    if meta["teacher"] != teacher_hash:
      raise UsageError(f"the teacher at {config.teacher.path} is not the one that {workdir} was trained with (other"
                       " parameters); bring that one back, or train in a new work directory")
    if restored:
      say(f"continuing from step {start} of {config.train.steps}")
    state = runner.create(*start_from) if state is None else runner.place(state)
    frozen = runner.place_frozen({"teacher": _stored(teacher, config.teacher.dtype)})
    write, progress = _telling(config, workdir, start, stack)
    clock = _Clock(trained.cost_of(meta))

    def log(step, metrics):
      progress(step, **({"loss": metrics["student/loss"]} if "student/loss" in metrics else {}))
      write(step, metrics | {"steps_per_second": clock.rate(step)})

    def save(step, state, metrics):
      weights = "params/student" if config.eval.ema == "raw" else f"ema/{config.eval.ema}"
      if step == config.train.steps:
        last = [due_players(built.objective, i) for i in range(max(start, step - _PROGRAMS_OF), step)]
        clock.memory(runner, step_bytes, (state, frozen, runner.place_batch(batches[step - 1]), root), set(last))
      checkpoints.save(step, state, {**clock.cost()._asdict(), "weights": weights, "teacher": teacher_hash}, metrics)

    def evaluate_now(step, state):
      rows = measure_lib.measure(config, built, student_params(config, built, state, teacher), teacher,
                                 workdir / "samples" / f"step_{step}" if processes.is_first() else None, shift=False)
      metrics = rows[0]["metrics"]  # of the first sampler, the student as it was trained
      write(step, {f"eval/{k}": v for k, v in metrics.items()})
      return {name.partition("@")[0]: value for name, value in metrics.items()}

    diagnose = _diagnose(config, built, teacher, frozen, batches, runner, write)

    def dump(step, state):
      path = workdir / f"dump-{step}.safetensors"
      student = parallel.local(state.params["student"])
      if processes.is_first():
        params_lib.save_params(path, student, {"step": step})
      return str(path)

    settings = loop.Settings(config.train.steps, config.train.log_every, config.train.eval_every,
                             config.train.checkpoint_every, config.train.max_bad_steps, config.eval.diagnose_every,
                             config.train.watchdog_seconds, config.train.profile_steps)
    ahead = stack.enter_context(contextlib.closing(pipeline.Ahead(batches, start, config.train.steps)))
    clock.start(start)
    state = loop.run_loop(runner, functools.partial(due_players, built.objective), state, frozen, ahead, root,
                          settings, loop.Hooks(log, save, evaluate_now, dump, diagnose, lambda: say(str(tally)),
                                               workdir / "profile"))
    state = runner.fetch(state)
    cost = clock.cost()
  params = student_params(config, built, state, teacher)
  return trained.write_results(config, built, params, teacher, workdir, cost)


def _telling(config, workdir, start, stack):
  """(write, update progress) of process 0; the other processes are silent."""
  if not processes.is_first():
    return (lambda step, values: None), (lambda step, **values: None)
  writer = stack.enter_context(log_lib.MetricWriter(workdir, start))
  return writer.write, stack.enter_context(log_lib.Progress(config.train.steps, workdir.name)).update


def _diagnose(config, built, teacher, frozen, batches, runner, write):
  """The hook that logs the drift of the covariate shift and what the objective measures of itself."""
  own = jax.jit(make_diagnose(built.objective, built.distribution, config.train.batch_size,
                              config.states.rollout_params))
  key = keys_lib.named(jax.random.key(config.seed), "diagnose")  # other draws than those of the step
  place_batch = runner.place_batch
  if config.train.parallel == "pmap":  # the state comes in the plain layout
    frozen, place_batch = {"teacher": teacher}, lambda batch: batch

  @functools.cache
  def probe():  # made when it is first needed: it walks the teacher
    return shift_lib.probe(config, built, samplers.samplers(config, built)[0], teacher)

  def diagnose(step, state):
    several = range(_DIAGNOSE_BATCHES if built.objective.diagnose else 0)
    values = loop.summarise([own(state, frozen, place_batch(batches[step + i]), jax.random.fold_in(key, i))
                             for i in several])
    if config.eval.shift_samples and built.objective.teacher is not None:
      values |= probe().drift(student_params(config, built, state, teacher))
    if values:
      write(step, values)

  return diagnose


class _Clock:
  """What the training costs, over all sittings; the rate of this one, and the memory of its step."""

  def __init__(self, before: measure_lib.Cost):
    self._before, self._began, self._last = before, time.monotonic(), None
    self._windows, self._bytes = [], before.step_bytes

  def start(self, step: int):
    self._began = time.monotonic()
    self._last = (self._began, step)

  def rate(self, step: int) -> float:
    now = time.monotonic()
    (before, first), self._last = self._last, (now, step)
    self._windows.append(max(now - before, 1e-9) / (step - first))
    return 1 / self._windows[-1]

  def memory(self, runner, known, arguments, dues):
    """Of the programs that ran with such arguments; they are not compiled again, nor lowered for every seed."""
    if runner.lower is not None and dues:
      for due in dues - known.keys():
        known[due] = compiling.peak_bytes(runner.step.lower(*arguments, due).compile())
      self._bytes = max(known[due] for due in dues)

  def cost(self) -> measure_lib.Cost:
    steady = statistics.median(self._windows[1:]) if self._windows[1:] else self._before.step_seconds
    return measure_lib.Cost(round(self._before.seconds + time.monotonic() - self._began, 2), steady, self._bytes)


def _stored(params, dtype: str):
  """Parameters in the dtype in which they are kept."""
  return jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), params)


def student_params(config, built, state, teacher):
  """The student as it is evaluated: its own parameters or an EMA, with the teacher's where it builds on them."""
  name = config.eval.ema
  own = parallel.local(state.params["student"] if name == "raw" else state.ema[name])
  return completed(built.objective, own, teacher)
