"""What can be found wrong with a config before anything is trained: numbers, and what is to be measured at the end."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ddil_jax import registry, samplers
from ddil_jax.data import pipeline
from ddil_jax.data.dataset import Dataset
from ddil_jax.errors import UsageError
from ddil_jax.evaluation import results
from ddil_jax.interop import diffusers, extractors
from ddil_jax.models.layers import REMAT
from ddil_jax.training import compiling

if TYPE_CHECKING:
  from ddil_jax.build import Built  # which checks what it builds

DTYPES = ("float32", "bfloat16", "float16")
SHIFT_KINDS = ("state", "features", "labels")
# (field, smallest value); those of `objective` where the method has them.
_AT_LEAST = (("train.steps", 1), ("train.batch_size", 1), ("train.log_every", 1), ("train.max_bad_steps", 1),
             ("train.fsdp", 1), ("train.min_shard", 0), ("train.microbatch", 0), ("train.watchdog_seconds", 0),
             ("train.eval_every", 0), ("train.checkpoint_every", 0), ("train.keep", 1), ("train.keep_best", 0),
             ("model.channels", 1), ("model.num_res_blocks", 1), ("model.num_heads", 1),
             ("model.guidance_embedding", 0), ("model.end_time_embedding", 0), ("model.dropout", 0),
             ("model.lora", 0), ("model.critic_lora", 0), ("model.lora_alpha", 0),
             ("teacher.guidance_embedding", 0), ("teacher.channels", 0),
             ("teacher.num_res_blocks", 0), ("optimizer.learning_rate", 0), ("optimizer.critic_learning_rate", 0),
             ("optimizer.warmup_steps", 0), ("optimizer.clip", 0), ("states.dagger_probability", 0),
             ("states.teacher_steps", 1), ("states.refresh_every", 1),
             ("eval.num_samples", 6), ("eval.samples_per_prompt", 1),
             ("eval.batch_size", 1), ("eval.shift_samples", 0), ("eval.diagnose_every", 0),
             ("objective.num_steps", 1), ("objective.sampler_steps", 1), ("objective.num_scales", 1),
             ("objective.label_dropout", 0), ("objective.target_decay", 0), ("objective.gan_weight", 0),
             ("objective.gan_critic_weight", 0), ("objective.period", 1), ("objective.weight_cap", 0),
             ("objective.snr_cap", 0), ("objective.huber_c", 0), ("objective.dsm_weight", 0), ("objective.r1_gamma", 0),
             ("objective.r1_weight", 0), ("objective.reconstruction", 0), ("objective.boundary_weight", 0),
             ("objective.constant", 0), ("objective.ratio_bins", 0), ("optimizer.start", 0), ("optimizer.end", 0))
_AT_MOST = (("states.dagger_probability", 1), ("model.dropout", 0.999), ("objective.label_dropout", 1),
            ("objective.target_decay", 1))


def check_numbers(config: ConfigDict) -> None:
  """Raises UsageError for a number that is out of range."""
  for field, least in _AT_LEAST:
    group, name = field.split(".")
    if name in config[group] and not config[group][name] >= least:
      raise UsageError(f"config.{field}={config[group][name]}: at least {least} is needed")
  compiling.check_profile_steps(config.train.profile_steps)
  for field, bound in _AT_MOST:
    group, name = field.split(".")
    if name in config[group] and config[group][name] > bound:
      raise UsageError(f"config.{field}={config[group][name]}: at most {bound} is possible")
  for group in ("model", "teacher"):
    mult = config[group].channel_mult
    if any(m < 1 or m != int(m) for m in mult) or group == "model" and not mult:
      raise UsageError(f"config.{group}.channel_mult={mult}: a width of at least 1 for each level, a whole number, is"
                       " needed")
  for group in ("model", "teacher"):
    if config[group].dtype not in DTYPES:
      raise UsageError(registry.unknown(f"{group}.dtype", config[group].dtype, DTYPES))
  if config.model.remat not in REMAT:
    raise UsageError(registry.unknown("model.remat", config.model.remat, REMAT))
  if config.train.keep_best and not config.train.eval_every:
    raise UsageError("config.train.keep_best needs evaluations to judge by: set config.train.eval_every")


def check_evaluation(config: ConfigDict, built: "Built") -> None:
  """Raises UsageError for what would stop the evaluation, which comes after all the training."""
  samplers.samplers(config, built)
  if config.eval.shift_samples == 1:
    raise UsageError("config.eval.shift_samples=1: at least 2 samples are needed, or 0 for no covariate shift")
  for kind in config.eval.shift_kinds:
    if kind not in SHIFT_KINDS:
      raise UsageError(registry.unknown("kind in config.eval.shift_kinds", kind, SHIFT_KINDS))
  if config.eval.reference not in pipeline.SPLITS:
    raise UsageError(registry.unknown("split config.eval.reference", config.eval.reference, pipeline.SPLITS))
  _check_what_is_measured(config, built.dataset)
  if config.eval.get("captions", "") and built.dataset.tokens is None:
    raise UsageError(f"config.eval.captions={config.eval.captions}: the data set {built.dataset.name} has no prompts")
  images = len(built.dataset.images) if config.eval.reference == "train" else None
  try:
    results.check(config.eval.metrics, config.eval.num_samples, images, evaluation_options(config))
    check_networks(config, pixel_shape(built.dataset))
    halved = evaluation_options(config).bootstrap > 0
    least = 4 if halved else 2
    if config.eval.get("lpips", "") and config.eval.num_samples < least * built.parts.num_classes:
      raise UsageError(f"LPIPS-diversity needs {least} samples of each of the {built.parts.num_classes} classes"
                       f"{', as the bootstrap halves them' * halved}; num_samples is {config.eval.num_samples}")
  except UsageError as error:
    raise UsageError(f"config.eval: {error}") from None


def prompts_only(dataset: Dataset) -> bool:
  """Whether a set has prompts and no images."""
  return bool(np.isnan(dataset.images[np.arange(1)]).all())


def needs_extractor(config: ConfigDict) -> bool:
  """Whether an evaluation asks a network for features or logits of images."""
  of_shift = config.eval.shift_samples > 0 and "features" in config.eval.shift_kinds
  return of_shift or bool(set(config.eval.metrics) & {*results.OF_FEATURES, *results.OF_LOGITS})


def _check_what_is_measured(config: ConfigDict, dataset: Dataset) -> None:
  """Raises UsageError for measures that need images, or a network that knows them, where there are none."""
  prompts, without = prompts_only(dataset), f"the data set {dataset.name} has no images to compare"
  if (dataset.decoder or prompts) and needs_extractor(config) and not config.eval.get("extractor", ""):
    raise UsageError(f"the data set {dataset.name} holds {'prompts' if prompts else 'latents'}, which the small"
                     " classifier does not know: give config.eval.extractor, such as clip:FILE, to measure decoded images")
  if (dataset.decoder or prompts) and dataset.pixels is None:
    if against := sorted(set(config.eval.metrics) & set(results.AGAINST_REFERENCE)):
      raise UsageError(f"{without} decoded samples with: `ddil prepare --keep_images` stores them next to the latents;"
                       f" or leave {' and '.join(against)} out of config.eval.metrics")
  if prompts and config.eval.shift_samples:
    raise UsageError(f"{without} rollouts with: set config.eval.shift_samples to 0")


def pixel_shape(dataset: Dataset) -> tuple[int, int, int]:
  """(H, W, C) of the images as they are looked at: those of which `images` are latents."""
  if not dataset.decoder:
    return dataset.image_shape
  module, _ = diffusers.architecture(dataset.decoder)
  height, width, _ = dataset.image_shape
  scale = 2 ** (len(module.down) - 1)
  return height * scale, width * scale, module.channels


def check_networks(config: ConfigDict, image_shape) -> None:
  """Raises UsageError for published weights of config.eval that are not there, or do not do for such images."""
  for field in ("extractor", "lpips", "captions"):
    if text := config.eval.get(field, ""):
      check_extractor(field, text, config.eval.metrics, image_shape)


def check_extractor(field: str, text: str, metrics: tuple[str, ...], image_shape) -> None:
  """Raises UsageError if the file of published weights is absent or damaged, or does not do for images or metrics."""
  name, module, variables = extractors.from_config(text, True)
  logits, _ = jax.eval_shape(module.apply, variables, jnp.zeros((1, *image_shape)))
  if field == "extractor":
    results.check_logits(set(metrics) - {"class_accuracy"}, logits.shape[-1], name)
  elif field == "lpips" and not name.startswith("lpips"):
    raise UsageError(f"lpips={text}: lpips-alex:FILE or lpips-vgg:FILE is expected")
  elif field == "captions" and not name.startswith("clip"):
    raise UsageError(f"captions={text}: clip:FILE is expected")


def evaluation_options(config: ConfigDict) -> results.Options:
  """How the config wants metrics measured."""
  # Configs of runs from before there was a bootstrap have no such field.
  return results.Options(bootstrap=config.eval.get("bootstrap", 0), seed=config.eval.seed)
