"""What a trained network is worth: samples, metrics and covariate shift of a run, as rows of `results.json`."""

import functools
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ddil_jax import build as build_lib
from ddil_jax import config_checks, samplers
from ddil_jax import shift as shift_lib
from ddil_jax.data.dataset import Dataset
from ddil_jax.errors import RunError, UsageError
from ddil_jax.evaluation import features, grids, perceptual, results, sampling
from ddil_jax.evaluation.image_sets import ImageSet, image_set
from ddil_jax.interop import diffusers, extractors
from ddil_jax.models.autoencoder_kl import AutoencoderKL
from ddil_jax.training import parallel, processes
from ddil_jax.training.logging import Progress
from ddil_jax.types import ONE_DEVICE, Devices


class Cost(NamedTuple):
  """What a training cost.

  Attributes:
    seconds: over all sittings, compiling included.
    step_seconds: of a step: the median over what was logged in the last sitting, but for its first window, in which
      the step was compiled; None where there was no second one.
    step_bytes: memory of a device for a step, by the compiler's account: state, teacher and batch, and what it needs in
      between; of the largest of its programs. None under pmap.
  """
  seconds: float = 0.0
  step_seconds: float | None = None
  step_bytes: int | None = None


def variant(config: ConfigDict, built: build_lib.Built) -> str:
  """base, +ddil, +reflected or +ddil+reflected; what sampling adds: shifted times, cached features, teacher's steps.

  "" of a teacher's run, or what sampling adds.
  """
  window = config.eval.get("time_shift", 0.0)
  added = f"+shifted({window:g})" * bool(window)
  if cache := config.eval.get("cache", ""):
    added += f"+cached({cache},{config.eval.cache_steps}{',batched' * config.eval.cache_batched})"
  if built.objective.name == "denoising":
    return added
  own = built.objective.own_source
  # Teacher pairs beside the own states are labels (DMD), no mixture of DDIL.
  ddil = tuple(name for name in built.distribution.sources if name != "pairs" or own == name) != (own,)
  name = ("+ddil" * ddil + "+reflected" * (config.reflect.kind != "identity")) or "base"
  acts = config.eval.teacher_acts
  return name + added + f"+teacher({','.join(map(str, acts))})" * bool(acts)


def what(config: ConfigDict, built: build_lib.Built, sampler: samplers.Sampler) -> dict:
  """What a row is about."""
  name = built.objective.name
  return {"objective": "teacher" if name == "denoising" else name, "variant": variant(config, built),
          "steps": sampler.steps, "seed": config.seed, "guidance_scale": sampler.guidance_scale}


def measure(config, built, params, teacher, samples_dir: pathlib.Path | None = None, shift: bool = True,
            cost: Cost = Cost()) -> list[dict]:
  """One row per step count and guidance scale: metrics, covariate shift, a sample grid.

  Samples are drawn in batches over the devices of `train.parallel`, those of all processes, measured and
  forgotten; only those of the grid are kept.
  """
  devices = parallel.spread(config.train.parallel, together=True)
  data = built.dataset if config.eval.reference == "train" else build_lib.load_data(config, config.eval.reference)
  classes = built.dataset.num_classes
  metrics = [m for m in config.eval.metrics if m != "class_accuracy" or classes > 1]
  networks = load_networks(config, config_checks.pixel_shape(built.dataset), metrics, built.dataset,
                           config_checks.needs_extractor(config))
  reference, name = None, config.eval.reference
  if set(metrics) & set(results.AGAINST_REFERENCE):
    reference = image_set(data.images if data.pixels is None else data.pixels)
    name = reference_name(data.name, config.eval.reference, reference, networks)
    # By each process for itself: one that finds them in a file must not wait for those that do not.
    results.reference_features(networks.extractor, reference, build_lib.cache_dir(config))
  of_samples = networks.on(devices)
  each = config.eval.get("samples_per_prompt", 1)
  cond = conditions(data, config.eval.num_samples, each)
  # Whose samples are compared with each other by the measures of diversity.
  alike = cond["label"] if classes > 1 else _chosen(data, config.eval.num_samples, each) if each > 1 else None
  placed, rows = devices.whole((params, teacher if config.eval.teacher_acts else ())), []
  for sampler in samplers.samplers(config, built):
    # What each did alone took not equally long: the set's features, the shift, drawing the grid of samples.
    processes.meet(f"evaluation in {sampler.steps} steps")
    draw = draw_with(sampler, *placed, built.dataset.decoder, devices)
    batches = sampling.sample_batches(draw, config.eval.num_samples, config_checks.pixel_shape(built.dataset),
                                      config.eval.seed, cond, config.eval.batch_size, devices)
    batches = told(batches, config.eval.num_samples, f"evaluating, {sampler.steps} sampling steps:")
    shown = _First(batches, 4 * min(classes, 10) if classes > 1 else 40,
                   f"the samples at {sampler.steps} steps hold values that are not finite: the run diverged")
    agreement = caption_agreement(config, data)
    measured = measure_images(config, agreement.tap(shown) if agreement else shown, config.eval.num_samples,
                              alike, reference, name, of_samples, metrics)
    if agreement:
      own = agreement.measured()
      measured = results.Measured(measured.values | own.values, measured.intervals | own.intervals)
    row = what(config, built, sampler) | {
        "metrics": measured.values, "intervals": {name: i._asdict() for name, i in measured.intervals.items()},
        "shift": [], "network_evaluations": sampler.network_evaluations, **cost._asdict(), "samples": ""}
    if shift and config.eval.shift_samples and built.objective.teacher is not None and not sampler.with_teacher:
      kinds = config.eval.shift_kinds
      row["shift"] = shift_lib.probe(config, built, sampler, teacher).rows(
          params, networks.extractor.features if "features" in kinds else None, "labels" in kinds)
    if samples_dir is not None:
      file, images = f"{sampler.steps}_steps_g{sampler.guidance_scale:g}.png", shown.first
      grids.save_png(samples_dir / file, grids.image_grid(images, columns=10, scale=max(1, 32 // images.shape[1])))
      row["samples"] = f"{samples_dir.name}/{file}"
    rows.append(row)
  return rows


def told(batches, num: int, name: str):
  """Passes batches on; where that takes long, process 0 says how far it is."""
  done = 0
  with Progress(num, name, unit="samples", after=10.0) as progress:
    for batch in batches:
      yield batch
      done += len(batch)
      if processes.is_first():
        progress.update(done)


class _First:
  """Passes batches on and keeps the first images; RunError with `diverged` for values that are not finite."""

  def __init__(self, batches, num: int, diverged: str):
    self._batches, self._num, self._diverged, self._kept = batches, num, diverged, []

  def __iter__(self):
    for batch in self._batches:
      if not np.isfinite(batch).all():
        raise RunError(self._diverged)
      missing = self._num - sum(map(len, self._kept))
      self._kept += [batch[:missing].copy()] if missing > 0 else []
      yield batch

  @property
  def first(self) -> np.ndarray:
    return np.concatenate(self._kept)


def measure_images(config, batches, num: int, labels, reference: ImageSet | None, name: str, networks: "Networks",
                   metrics) -> results.Measured:
  """Metrics of `num` images in batches against a reference of that name; None where no metric needs one."""
  options = config_checks.evaluation_options(config)
  diversity = perceptual.LpipsDiversity(networks.lpips, labels, options)
  measured = results.evaluate(batches if networks.lpips is None else diversity.tap(batches), labels, reference, name,
                              networks.extractor, metrics, build_lib.cache_dir(config), options, networks.judge)
  if networks.lpips is None:
    return measured
  of_lpips = str(results.MetricName("lpips_diversity", num, extractor=networks.lpips.name))
  interval = diversity.interval()
  return results.Measured(measured.values | {of_lpips: diversity.value()},
                          measured.intervals | ({of_lpips: interval} if interval else {}))


def conditions(dataset: Dataset, num: int, each: int = 1) -> dict[str, np.ndarray]:
  """What `num` samples are conditioned on: classes in turn, and the set's prompts in a fixed random order.

  Args:
    each: samples of a prompt, one after the other.
  """
  index = _chosen(dataset, num, each)
  return {"label": sampling.balanced_labels(num, dataset.num_classes),
          **{name: rows[index] for name, rows in dataset.cond.items()}}


def prompts(dataset: Dataset, num: int, each: int = 1) -> list[str]:
  """The captions of `conditions`."""
  return [dataset.captions[i] for i in _chosen(dataset, num, each)]


def _chosen(dataset: Dataset, num: int, each: int) -> np.ndarray:
  order = np.random.default_rng(0).permutation(len(dataset.labels))
  return order[np.arange(num) // each % len(order)]


def draw_with(sampler: samplers.Sampler, params, teacher=None, decoder: str = "", devices: Devices = ONE_DEVICE):
  """(keys, cond) -> images; parameters are an argument of the compiled program, so that it is one for all runs.

  Args:
    decoder: file of the autoencoder that makes images of what is sampled; "" where that are images.
    devices: where the decoder is put.
  """
  params = (params, teacher) if sampler.with_teacher else params
  if not decoder:
    return functools.partial(jax.jit(sampler.sample), params)
  module, weights = _autoencoder(decoder)

  @jax.jit
  def draw(params, weights, keys, cond):
    latents = sampler.sample(params, keys, cond)
    return jnp.clip(module.apply({"params": weights}, latents, method="decode"), -1, 1)

  return functools.partial(draw, params, devices.whole(weights))


@functools.lru_cache(maxsize=1)
def _autoencoder(path: str):
  """(module, parameters) of the file of a data set's autoencoder."""
  module, params, _ = diffusers.load(path)
  if not isinstance(module, AutoencoderKL):
    raise UsageError(f"{path} is no autoencoder")
  return module, params


def caption_agreement(config, data: Dataset) -> perceptual.CaptionAgreement | None:
  """With what `eval.captions` measures samples of the set's prompts; None where it is "".

  Raises:
    UsageError: CLIP reads prompts of another length than the set's tokens have.
  """
  if not config.eval.get("captions", ""):
    return None
  extractor = load_published(config, "captions", config_checks.pixel_shape(data))
  _, module, variables = extractors.from_config(config.eval.captions, config.eval.get("quantise", True))
  each = config.eval.get("samples_per_prompt", 1)
  captions = prompts(data, config.eval.num_samples, each)
  first = {caption: i for i, caption in reversed(list(enumerate(captions)))}
  tokens = np.asarray(data.tokens[_chosen(data, config.eval.num_samples, each)[sorted(first.values())]])
  if tokens.shape[1] != module.length:
    raise UsageError(f"config.eval.captions={config.eval.captions} reads {module.length} tokens, those of {data.name} are"
                     f" {tokens.shape[1]}: it has to be a CLIP with the tokenizer of the set")
  number = {captions[i]: k for k, i in enumerate(sorted(first.values()))}
  return perceptual.CaptionAgreement(extractor, perceptual.text_features(module, variables, tokens),
                                     np.array([number[caption] for caption in captions]),
                                     options=config_checks.evaluation_options(config))


class Networks(NamedTuple):
  """What images are measured with.

  Attributes:
    extractor: of features and logits; None where nothing asks for them.
    judge: of class accuracy, where that is not the extractor.
    lpips: of LPIPS-diversity, or None.
    own: the extractor is the small classifier of the data set, whose name says which set that is.
  """
  extractor: features.Extractor | None
  judge: features.Extractor | None
  lpips: features.Extractor | None
  own: bool

  def on(self, devices: Devices) -> "Networks":
    """The same on other devices."""
    of = (self.extractor, self.judge, self.lpips)
    return Networks(*(network and network.on(devices) for network in of), self.own)


def load_networks(config, image_shape, metrics, dataset, needed: bool = True) -> Networks:
  """The networks that the config names; the small classifier is that of the data set.

  Args:
    needed: whether anything asks the extractor.
  """
  lpips = load_published(config, "lpips", image_shape)
  if not needed:
    return Networks(None, None, lpips, True)
  published = load_published(config, "extractor", image_shape)
  classifier = build_lib.load_classifier(config, dataset) if published is None or "class_accuracy" in metrics else None
  return Networks(published or classifier, classifier if published else None, lpips, published is None)


def reference_name(dataset: str, split: str, images: ImageSet, networks: Networks) -> str:
  """The split; with a network that knows no data set also which set, in which size: "cifar10-test-1a2b3c4d"."""
  return split if networks.own else f"{dataset}-{split}-{images.content[:8]}"


def load_published(config, field: str, image_shape) -> features.Extractor | None:
  """The network of published weights that `config.eval` has in a field, None for "": made once in a process."""
  # Configs of older runs have no such fields.
  text, quantise = config.eval.get(field, ""), config.eval.get("quantise", True)
  return _published(text, quantise, tuple(image_shape), config.train.parallel) if text else None


@functools.lru_cache(maxsize=3)
def _published(text, quantise, image_shape, mode):
  name, module, variables = extractors.from_config(text, quantise)
  # Inception's maps of 299x299 images take 30 MiB an image.
  return features.make_extractor(module, variables, image_shape, name, parallel.spread(mode), batch_size=16)
