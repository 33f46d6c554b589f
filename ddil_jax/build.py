"""ConfigDict -> parts.

`build(config)` reads top to bottom what a run is made of: data, networks, objective, states,
optimizers. Everything below it takes plain arguments.
"""

import dataclasses
import functools
import inspect
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from ddil_jax import keys as keys_lib
from ddil_jax import config_checks, registry
from ddil_jax.data import pipeline
from ddil_jax.data.dataset import Dataset
from ddil_jax.diffusion import grids, prediction, process, solvers, transforms
from ddil_jax.diffusion.solvers import Policy
from ddil_jax.errors import UsageError
from ddil_jax.evaluation import features
from ddil_jax.interop import diffusers, extractors
from ddil_jax.lora import LoRA
from ddil_jax.models import adapters
from ddil_jax.models import base as models
from ddil_jax.models.classifier import Classifier
from ddil_jax.models.diffusers_unet import DiffusersUNet
from ddil_jax.models.edm import EDMUNet
from ddil_jax.models.head import DiscriminatorHead
from ddil_jax.models.unet import UNet
from ddil_jax.objectives import base as objectives
from ddil_jax.objectives.base import Adapted, FeatureNet, Objective, Parts, bind, completed, low_rank
from ddil_jax.states import priors as priors_lib
from ddil_jax.states.base import SOURCES, WITH_X0, Context, StateDistribution
from ddil_jax.states.forward import forward
from ddil_jax.states.mixture import mixture
from ddil_jax.states.pairs import pairs
from ddil_jax.states.replay import on_policy, replay
from ddil_jax.states.rollouts import rollout_source, states_per_rollout
from ddil_jax.training import optim, parallel, processes
from ddil_jax.training.logging import Progress
from ddil_jax.types import Array, Cond, Params

LORA = ("lora", "critic_lora", "lora_alpha", "lora_targets")  # fields of config.model that are not of a network
PROCESSES = {"cosine": process.cosine, "linear": process.linear, "stable_diffusion": process.stable_diffusion,
             "ddpm": process.ddpm, "edm": process.edm, "flow": process.flow}


class Built(NamedTuple):
  """All parts of a run.

  Attributes:
    parts: the networks and maths below the objective.
    objective, distribution: what is learned, on which states.
    optimizers: {player: optax.GradientTransformation}.
    ema_decays: {name: decay or schedule}: the config's averages and the objective's targets.
    init_teacher: key -> parameters of the teacher's architecture; None without a teacher.
    dataset: the training split.
  """
  parts: Parts
  objective: Objective
  distribution: StateDistribution
  optimizers: dict[str, Any]
  ema_decays: dict[str, optax.ScalarOrSchedule]
  init_teacher: Callable[[Array], Params] | None
  dataset: Dataset


def build(config: ConfigDict, dataset: Dataset | None = None) -> Built:
  """Builds a run.

  Raises:
    UsageError: any value that does not fit, in one line.
  """
  config_checks.check_numbers(config)
  dataset = dataset or load_data(config, "train")
  parts, init_teacher = make_parts(config, dataset)
  objective = with_lora(config, make_objective(config, parts))
  distribution = make_states(config, parts, objective)
  if "forward" in distribution.sources and config_checks.prompts_only(dataset):
    raise UsageError(f"the set {config.data.path} has prompts and no images, so there are no forward states of it:"
                     " --config.states.forward=0 with states of student or teacher")
  if config.objective.get("gan_weight", 0) and config_checks.prompts_only(dataset):
    raise UsageError(f"config.objective.gan_weight={config.objective.gan_weight}: a GAN needs images, and the set"
                     f" {config.data.path} has prompts only; set it to 0")
  average = optim.warm_ema if config.train.ema_warmup else float
  decays = {decay_name(d): average(d) for d in config.train.ema} | dict(objective.targets)
  if config.states.rollout_params != "raw" and config.states.rollout_params not in decays:
    raise UsageError(registry.unknown("states.rollout_params", config.states.rollout_params, ["raw", *decays]))
  if config.eval.ema != "raw" and config.eval.ema not in decays:
    raise UsageError(registry.unknown("eval.ema", config.eval.ema, ["raw", *decays]))
  if objective.teacher is None:
    init_teacher = None
  built = Built(parts, objective, distribution, make_optimizers(config, objective), decays, init_teacher, dataset)
  config_checks.check_evaluation(config, built)
  return built


def decay_name(decay: float) -> str:
  """The name of an EMA in configs and checkpoints: its decay."""
  if not 0 <= decay < 1:
    raise UsageError(f"config.train.ema: decay {decay} must be in [0, 1)")
  return f"{decay:g}"


def load_data(config: ConfigDict, split: str) -> Dataset:
  """A split of the config's data set."""
  data = config.data
  if data.name == "folder" and not data.path:
    raise UsageError("config.data.path is not given: the data set folder is a folder of your images")
  given = dict(data_dir=data.data_dir or None, manual_dir=data.manual_dir or None, path=data.path or None,
               image_size=data.image_size or None)
  if data.name == "fake_text" and config.model.get("file", ""):
    # What a network of any size reads, so that a config can be tried, and planned, without its data.
    module = diffusers.architecture(config.model.file)[0]
    given |= dict(width=getattr(module, "text_width", 0) or None, pooled=getattr(module, "pooled_width", 0) or None,
                  channels=getattr(module, "in_channels", None))
  return pipeline.load(data.name, split=split, **{k: v for k, v in given.items() if v is not None})


def make_parts(config: ConfigDict, dataset: Dataset) -> tuple[Parts, Callable | None]:
  """Networks as functions, and the maths around them."""
  process_ = call("config.process", PROCESSES, config.process)
  prediction_ = call("config.prediction", prediction.PREDICTIONS, config.prediction)
  shape, num_classes, example = dataset.images.shape[1:], dataset.num_classes, _cond_of(dataset)
  model = {name: value for name, value in config.model.items() if name not in LORA}
  teacher_model = dict(model, guidance_embedding=config.teacher.get("guidance_embedding", 0), end_time_embedding=0)
  for field in ("channels", "channel_mult", "num_res_blocks"):
    if config.teacher[field]:
      teacher_model[field] = config.teacher[field]

  if model.pop("file", ""):
    student_net, teacher_net = published_networks(config, shape, num_classes, prediction_, example)
    adapt = None
  else:
    teacher_model.pop("file", "")
    if dataset.cond:
      raise UsageError(f"data set {dataset.name} has {', '.join(dataset.cond)}, which the project's own UNet does not"
                       " read: give one of diffusers as config.model.file, a file of `ddil convert` or a config.json")
    student_net = make_network(model, shape, num_classes, prediction_)
    teacher_net = make_network(teacher_model, shape, num_classes, prediction_)
    adapt = functools.partial(adapted, teacher_model, shape, num_classes, process_, prediction_)
  has_teacher = config.objective.name != "denoising"

  def init_from_teacher(net: models.Network):
    def init(key: Array, teacher: Params) -> Params:
      fresh = net.init(key)
      return models.init_from(fresh, teacher)[0] if teacher else fresh
    return init

  def head_init(key, feature):
    return DiscriminatorHead().init(key, jnp.zeros(feature.shape, jnp.float32))["params"]

  nothing = {"label": np.int32(num_classes), **dataset.null}

  def null(cond: Cond) -> Cond:
    return {name: jnp.broadcast_to(jnp.asarray(nothing[name], value.dtype), value.shape) if name in nothing else value
            for name, value in cond.items()}

  reflect = make_reflection(config, dataset)
  return Parts(
      process=process_, make_grid=lambda n: make_grid(config, n, process_),
      student=prediction.make_denoiser(student_net.apply, process_, prediction_),
      init_student=init_from_teacher(student_net),
      teacher=prediction.make_denoiser(teacher_net.apply, process_, prediction_) if has_teacher else None,
      critic=prediction.make_denoiser(teacher_net.apply, process_, prediction_),
      init_critic=init_from_teacher(teacher_net),
      head=lambda params, feature: DiscriminatorHead().apply({"params": params}, feature), init_head=head_init,
      guidance=lambda scale: transforms.guidance(scale, null), null=null, cond=example,
      guidance_scale=config.teacher.guidance_scale,
      num_classes=num_classes, image_shape=shape,
      reflect_teacher=reflect("teacher"), reflect_target=reflect("target"),
      reflect_sampler=reflect("sampler"), adapt=adapt,
      feature_net=functools.partial(feature_net, config, dataset)), teacher_net.init if has_teacher else None


def make_network(model: dict, image_shape, num_classes: int, prediction_) -> models.Network:
  """The project's UNet for images of a shape, with `init(key) -> params`."""
  module = UNet(**{**model, "dtype": jnp.dtype(model["dtype"])}, out_channels=image_shape[-1] * prediction_.channels,
                num_classes=num_classes)
  return _with_shape(module, image_shape)


def adapted(model: dict, image_shape, num_classes: int, process_, prediction_, hidden: int) -> Adapted:
  """The project's UNet of a teacher with adapters of a hidden width.

  Raises:
    UsageError: a teacher that reads the guidance scale itself.
  """
  if model["guidance_embedding"]:
    raise UsageError(f"config.teacher.guidance_embedding={model['guidance_embedding']}: adapters read the guidance scale"
                     " for a teacher that does not, set it to 0")
  net = make_network({**model, "adapter": hidden}, image_shape, num_classes, prediction_)

  def apply(params, *args):
    return net.apply({**params["base"], **params["adapter"]}, *args)

  def init(key: Array, teacher: Params) -> Params:
    return {name: value for name, value in net.init(key).items() if name not in teacher}

  return Adapted(prediction.make_denoiser(apply, process_, prediction_), init, adapters.learns)


def _cond_of(dataset: Dataset) -> Cond:
  """What a batch of one example is conditioned on, as shapes."""
  rows = {"label": np.asarray(dataset.labels), **dataset.cond}
  return {name: jax.ShapeDtypeStruct((1, *v.shape[1:]), jax.dtypes.canonicalize_dtype(v.dtype))
          for name, v in rows.items()}


def _with_shape(module, image_shape, example: Cond | None = None) -> models.Network:
  net = models.as_net_fn(module)
  cond = {"label": jnp.zeros((1,), jnp.int32), "guidance_scale": jnp.ones((1,)), "end_time": jnp.zeros((1,))}
  more = {name: jnp.zeros(v.shape, v.dtype) for name, v in (example or {}).items()}
  return models.Network(lambda key: net.init(key, image_shape, cond | more), net.apply)


def published_networks(config: ConfigDict, image_shape, num_classes: int, prediction_,
                       example: Cond) -> tuple[models.Network, ...]:
  """(student, teacher) of the architecture in config.model.file; the student may read the guidance scale as well.

  Raises:
    UsageError: a network that does not fit the data, the prediction or the guidance.
  """
  path = config.model.file
  module, _ = diffusers.architecture(path)
  if not isinstance(module, DiffusersUNet | EDMUNet):
    raise UsageError(f"config.model.file={path} is no UNet")
  if isinstance(module, EDMUNet) and image_shape[:2] != (module.resolution,) * 2:
    raise UsageError(f"config.model.file={path} is made for images of {module.resolution}x{module.resolution} pixels;"
                     f" those of {config.data.name} have {image_shape[0]}x{image_shape[1]}")
  text = example["text"].shape[-1] if "text" in example else 0
  pooled = example["text_pooled"].shape[-1] if "text_pooled" in example else 0
  for what, reads, has in (("text", module.text_width, text), ("pooled text", module.pooled_width, pooled)):
    if reads != has:
      width = lambda n: f"{what} of width {n}" if n else f"no {what}"  # noqa: E731
      raise UsageError(f"config.model.file={path} reads {width(reads)}, the data set {config.data.name} has"
                       f" {width(has)}")
  channels = image_shape[-1]
  if (module.in_channels, module.out_channels) != (channels, channels * prediction_.channels):
    raise UsageError(f"config.model.file={path} maps {module.in_channels} to {module.out_channels} channels;"
                     f" images of {channels} and this prediction need {channels} to {channels * prediction_.channels}")
  guided = config.teacher.guidance_scale != 1 or config.objective.name == "denoising"
  # A network of EDM always has the null class: with as many labels as the data has classes it would lack one.
  needs_null = guided or isinstance(module, EDMUNet)
  if module.labels not in (0, num_classes + 1) and (needs_null or module.labels != num_classes):
    raise UsageError(f"config.model.file={path} has {module.labels} classes; the data has {num_classes}, and"
                     f" {num_classes + 1} are needed with the null class of guidance")
  how = dict(dtype=jnp.dtype(config.model.dtype), dropout=config.model.dropout, remat=config.model.remat)
  teacher = module.clone(**how) if isinstance(module, EDMUNet) else module.clone(
      style=dataclasses.replace(module.style, **how))
  student = teacher.clone(guidance_embedding=config.model.guidance_embedding or module.guidance_embedding,
                          end_time_embedding=config.model.get("end_time_embedding", 0))
  return _with_shape(student, image_shape, example), _with_shape(teacher, image_shape, example)


def feature_net(config: ConfigDict, dataset: Dataset, name: str) -> FeatureNet:
  """A network whose layers are features of the data's images, for methods that compare images by them.

  Args:
    name: NAME:FILE of published weights, as in config.eval.extractor; "" is a small classifier of the data set, another
      one than that which measures.

  Raises:
    UsageError: weights that are absent or damaged, or data of latents, which they do not know.
  """
  if name:
    if dataset.decoder:
      raise UsageError(f"{name} reads images, and the data set {dataset.name} holds latents")
    _, module, variables = extractors.from_config(name, False)
    load = lambda: variables["params"]  # noqa: E731
  else:
    module = Classifier(num_classes=dataset.num_classes)
    load = lambda: load_classifier(config, dataset, seed=1).variables["params"]  # noqa: E731
  image = jnp.zeros((1, *dataset.image_shape))
  return FeatureNet(lambda key: module.init(key, image)["params"], load,
                    functools.partial(models.layers_of, module))


def cache_dir(config: ConfigDict) -> pathlib.Path:
  """Where classifiers and features of data sets are kept: beside the data."""
  return pathlib.Path(config.data.data_dir or pipeline.default_data_dir()) / "extractors"


def load_classifier(config: ConfigDict, dataset: Dataset, seed: int = 0) -> features.Extractor:
  """The small classifier of a data set, trained once for each seed and kept.

  Raises:
    UsageError: data of latents, which it does not know.
  """
  if dataset.decoder:
    raise UsageError(f"the small classifier knows no latents, which the data set {dataset.name} holds; a network that"
                     " measures decoded images is given as config.eval.extractor, such as clip:FILE")
  steps = 10 if config.data.name == "fake" else features.STEPS
  with Progress(steps, f"training the classifier of {dataset.name}:", after=10.0) as progress:
    told = {"progress": progress.update} if processes.is_first() else {}
    return features.train_classifier(Classifier(num_classes=dataset.num_classes), dataset.images, dataset.labels,
                                     dataset.num_classes, cache_dir(config), f"{dataset.name}-cnn", seed, steps,
                                     devices=parallel.spread(config.train.parallel), **told)


def make_grid(config: ConfigDict, n: int, process_) -> np.ndarray:
  """The config's time grid of n steps."""
  options = {k: v for k, v in dict(config.grid).items() if k != "name"}
  try:
    return grids.check_grid(grids.make(config.grid.name, n, process_, **options))
  except TypeError:
    raise UsageError(f"grid '{config.grid.name}' does not take the fields {', '.join(options)}"
                     " of config.grid") from None


def make_reflection(config: ConfigDict, dataset: Dataset) -> Callable[[str], transforms.Transform]:
  """place -> Transform, the identity where it is switched off."""
  r = config.reflect
  lo, hi = (own if given == () and own else given for given, own in zip((r.lo, r.hi), dataset.bounds or ((), ())))
  if r.kind != "identity" and () in (lo, hi):
    raise UsageError(f"config.reflect.lo and hi are () for the bounds of the data set, and {dataset.name} names none:"
                     " give them, a number or one per channel")
  channels = dataset.images.shape[-1]
  for field, bound in (("lo", lo), ("hi", hi)):
    if r.kind != "identity" and np.size(bound) not in (1, channels):
      raise UsageError(f"config.reflect.{field}={bound} has {np.size(bound)} bounds; one for each of the {channels}"
                       f" channel{'s' * (channels > 1)} of {dataset.name}, or a number for all of them, is needed")
  options = {"identity": {}, "clip": dict(lo=lo, hi=hi), "fold": dict(lo=lo, hi=hi),
             "dynamic": dict(lo=lo, hi=hi, percentile=r.percentile)}
  try:
    project = transforms.projection(r.kind, **options.get(r.kind, {}))
  except UsageError as error:
    raise UsageError(f"config.reflect: {error}") from None
  return lambda place: transforms.reflect(project) if r.kind != "identity" and r[place] else (lambda denoise: denoise)


def make_objective(config: ConfigDict, parts: Parts) -> Objective:
  """The method by name, with the other fields of config.objective as its options."""
  options = {k: v for k, v in dict(config.objective).items() if k != "name"}
  objective = objectives.make_objective(config.objective.name, parts, options)
  trained = len(objective.grid) - 1
  if len(objective.sampler_grid) - 1 > trained and not objective.needs_x0:
    raise UsageError(f"config.objective.sampler_steps={options['sampler_steps']}: this student is trained at {trained}"
                     " times and cannot take more steps")
  for entry, field in (("end_time", "end_time_embedding"), ("guidance_scale", "guidance_embedding")):
    if entry in objective.reads and not config.model[field]:
      raise UsageError(f"objective '{objective.name}' gives its student the {entry}: it needs config.model.{field} > 0"
                       " (a dimension such as 32)")
  reads_scale = config.model.guidance_embedding or objective.complete  # adapters read it
  if getattr(config.objective, "guidance_range", ()) and not reads_scale:
    raise UsageError("config.objective.guidance_range is given, so the student needs"
                     " config.model.guidance_embedding > 0 (a dimension such as 32)")
  return objective


def loras_of(config: ConfigDict) -> dict[str, LoRA]:
  """{player: its LoRA} as the config wants them; the ranks that are 0 are left out.

  Raises:
    UsageError: targets that are no regular expression, or fields of a LoRA where there is none.
  """
  model = config.model
  found = {name: LoRA(rank, model.lora_alpha, model.lora_targets)
           for name, rank in (("student", model.lora), ("critic", model.critic_lora)) if rank}
  if not found and (model.lora_alpha or model.lora_targets):
    raise UsageError("config.model.lora_alpha and lora_targets are of a LoRA: set config.model.lora or critic_lora to"
                     " its rank, such as 8")
  try:
    re.compile(model.lora_targets)
  except re.error as error:
    raise UsageError(f"config.model.lora_targets={model.lora_targets} is no regular expression: {error}") from None
  return found


def with_lora(config: ConfigDict, objective: Objective) -> Objective:
  """The objective with the LoRAs of the config, and itself without. Raises UsageError."""
  loras = loras_of(config)
  return low_rank(objective, loras) if loras else objective


def make_states(config: ConfigDict, parts: Parts, objective: Objective) -> StateDistribution:
  """The mixture of state sources; sources whose prior is always 0 do not exist."""
  s = config.states
  values = {name: s.get(name, 0.0) for name in SOURCES}  # older runs' configs have no pairs
  schedules = {name: priors_lib.schedule(v, config.train.steps, f"config.states.{name}") for name, v in values.items()}
  wanted = [name for name in SOURCES if not priors_lib.is_never_drawn(values[name])]
  if not wanted:
    raise UsageError("config.states: the priors sum to 0; give at least one of "
                     f"{', '.join(SOURCES)} a positive value")
  priors_lib.check_sum((schedules[name] for name in wanted), config.train.steps)
  refused = [name for name in wanted if name not in WITH_X0]
  if objective.needs_x0 and refused:
    taken = "forward" if objective.teacher is None else " and ".join(WITH_X0)
    raise UsageError(f"objective '{objective.name}' needs the clean image, which rollout states do not have:"
                     f" of config.states it takes {taken} only, not {', '.join(refused)}")
  process_, draw, condition = parts.process, objective.draw, objective.condition

  def student_policy(ctx: Context) -> Policy:
    student = bind(objective.student, completed(objective, ctx.student, ctx.teacher))
    return objective.solver(process_, parts.reflect_sampler(student))

  def teacher_policy(ctx: Context) -> Policy:
    return solvers.ddim()(process_, objective.teacher(ctx.teacher))

  def dagger_policy(ctx: Context) -> Policy:
    key = keys_lib.named(ctx.key, "dagger")
    return solvers.mixed(student_policy(ctx), teacher_policy(ctx), s.dagger_probability, key)

  grids_of = {"student": objective.sampler_grid, "dagger": objective.sampler_grid,
              "teacher": None if objective.teacher is None else parts.make_grid(s.teacher_steps)}
  policies = {"student": student_policy, "teacher": teacher_policy, "dagger": dagger_policy}

  def part(name: str) -> StateDistribution:
    if name == "forward":
      return on_policy(forward(process_, draw, condition, objective.prior_first))
    if objective.teacher is None and name != "student":
      raise UsageError(f"objective '{objective.name}' has no teacher, so no '{name}' states")
    if name == "pairs":
      source = pairs(process_, teacher_policy, grids_of["teacher"], draw, condition, objective.prior_first)
    else:
      source = rollout_source(name, process_, policies[name], grids_of[name], objective.grid, draw, condition)
    if not s.replay:
      return on_policy(source)
    slots = s.capacity // config.train.batch_size
    needed = 1 if name == "pairs" else states_per_rollout(grids_of[name], objective.grid)
    if slots < needed:
      raise UsageError(f"config.states.capacity={s.capacity} is less than one rollout of the {name} source: at least"
                       f" {needed} states x batch_size {config.train.batch_size} = {needed * config.train.batch_size}")
    return replay(source, slots, s.refresh_every)

  priors = priors_lib.normalised({name: schedules[name] for name in wanted})
  return mixture(tuple(part(name) for name in wanted), priors, s.selection)


def make_optimizers(config: ConfigDict, objective: Objective) -> dict[str, Any]:
  """One optimizer a player; those who follow the student may have a learning rate of their own."""
  o = config.optimizer
  ours = ("name", "learning_rate", "schedule", "warmup_steps", "start", "end", "clip", "critic_learning_rate")
  options = {k: v for k, v in dict(o).items() if k not in ours}  # of the optimizer itself, such as b1

  def optimizer(player):
    peak = o.critic_learning_rate if player.name != "student" and o.critic_learning_rate else o.learning_rate
    updates = -(-config.train.steps // player.period)
    rate = optim.learning_rate(peak, o.schedule, updates, o.warmup_steps, o.end, o.get("start", 0.0))
    return optim.make(o.name, rate, o.clip, **options)

  return {player.name: optimizer(player) for player in objective.players}


def call(where: str, makers: dict[str, Callable], group: ConfigDict):
  """Calls the maker that `group.name` names with the group's other fields."""
  if group.name not in makers:
    raise UsageError(registry.unknown(f"{where}.name", group.name, makers))
  options = {k: v for k, v in dict(group).items() if k != "name"}
  known = list(inspect.signature(makers[group.name]).parameters)
  for field in options:
    if field not in known:
      raise UsageError(registry.unknown(f"field of {where} for '{group.name}':", field, known))
  return makers[group.name](**options)
