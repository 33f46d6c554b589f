"""Training steps of Stable Diffusion 1.5's size on one accelerator: utilisation, memory, and the same step in PyTorch.

LCM+DDIL and DMD2+DDIL (without the GAN term) in bfloat16 on random weights and made-up latents, whose values do not
change the time. On a GPU each side has a process of its own, so that one's memory is free for the next:
`python -m launch.bench.large rows.json lcm ours`. A TPU belongs to one process, and PyTorch is not measured there.
"""

import argparse
import functools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ddil_jax import build as build_lib
from ddil_jax import config as config_lib
from ddil_jax import keys as keys_lib
from ddil_jax.data import pipeline
from ddil_jax.data.dataset import Dataset
from ddil_jax.diffusion.process import sd_alphas_cumprod
from ddil_jax.interop import diffusers
from ddil_jax.plan import CHIPS
from ddil_jax.objectives.base import draw_noise, draw_times
from ddil_jax.states.base import Context
from ddil_jax.states.replay import Replay
from ddil_jax.states.rollouts import states_per_rollout
from ddil_jax.training import parallel
from ddil_jax.training.step import due_players, init_state, make_train_step
from launch.bench.against_torch import DM_RANGE, torch_version
from launch.bench.measure import SMOKE, Size, in_a_process, leave_out, rate, ratio, row

UTILISATION, TARGET = 0.45, 1.2  # of the chip's peak rate; times as fast as the better of PyTorch's two
METHODS, THEIRS = ("lcm", "dmd2"), ("eager", "compiled")
OURS = "ours"


def large(dataset: Dataset, network, size: Size) -> list[dict]:
  """Both methods, ours and PyTorch's; nothing where there is no accelerator."""
  del dataset, network
  if jax.default_backend() == "cpu" and not size.smoke:
    leave_out("steps of Stable Diffusion's size, which need an accelerator")
    return []
  theirs = THEIRS if torch_version() and jax.default_backend() in ("gpu", "cpu") else ()
  if not theirs:
    leave_out("steps of Stable Diffusion's size in PyTorch, which is not installed, or has no such device")
  rows = []
  for method in METHODS[:1] if size.smoke else METHODS:
    apart = functools.partial(in_a_process, "launch.bench.large", size)
    found = {OURS: measure(method, OURS, size) if jax.default_backend() == "tpu" else apart(arguments=(method, OURS))}
    for who in theirs[:1] if size.smoke else theirs:
      found[who] = apart(arguments=(method, who), JAX_PLATFORMS="cpu")
    rows += rows_of(method, found, size)
  return rows


def rows_of(method: str, found: dict[str, dict], size: Size) -> list[dict]:
  """The rows of a method from what `measure` gave of each side."""
  own, seconds = found[OURS], {who: of["seconds"] for who, of in found.items()}
  name, chip = f"SD 1.5, {method}+ddil, batch {size.batch}", chip_of(own["device"])
  about = {"method": method, "steps": size.window, "batch_size": size.batch, "device": own["device"]}
  rows = []
  if chip is not None:
    shares = [operations / s / chip.flops for operations, s in zip(own["operations"], own["seconds"])]
    rows.append(row(f"{name}: of the chip's peak rate", "share", shares, UTILISATION, "at least", **about))
  theirs = [who for who in THEIRS if who in found]
  best = min(theirs, key=lambda who: sorted(seconds[who])[len(seconds[who]) // 2], default=None)
  for who in theirs:
    rows.append(ratio(f"{name}: our steps, times as fast as PyTorch's ({who})", seconds, who, OURS,
                      TARGET if who == best else None, "at least", **about))
  rows += [rate(f"{name}: steps of {who}", "steps/s", size.window, seconds[who], **about) for who in found]
  return rows + [row(f"{name}: memory, {who}", "MiB", [of["bytes"] / 2**20], **about) for who, of in found.items()
                 if of["bytes"]]


def chip_of(kind: str):
  """The data sheet of a device by its kind, "NVIDIA H200" or "TPU v5 lite"; None for one that is not known."""
  words = kind.lower().replace("lite", "e").replace(" e", "e").replace("tpu ", "")
  return next((chip for name, chip in CHIPS.items() if name in words), None)


def config_of(method: str, size: Size) -> ConfigDict:
  """The config that is measured."""
  config = config_lib.load(f"configs/sd15_{method}_ddil.py:{'smoke' if size.smoke else 'planned'}")
  config.train.update(parallel="single", batch_size=size.batch)
  config.states.update(capacity=16 * size.batch, refresh_every=size.window)
  config.optimizer.warmup_steps = 0
  if method == "dmd2":
    config.objective.gan_weight = 0.0
  return config


def measure(method: str, who: str, size: Size) -> dict:
  """{"seconds": of each window of steps, "operations": of each, "bytes": peak, "device"} of one side, in this process."""
  config = config_of(method, size)
  ours = Ours(config, abstract=who != OURS)
  step = ours if who == OURS else Theirs(ours, who)
  seconds, operations = [], []
  step(1)
  step(int(config.objective.get("period", 1)))  # all programs are compiled
  for _ in range(size.repeats):
    before = ours.refreshes()
    seconds.append(step(size.window))
    operations.append(ours.operations(size.window, before) if who == OURS else 0)
  return {"seconds": seconds, "operations": operations, "bytes": step.peak(), "device": step.device()}


# Ours ---------------------------------------------------------------------------------------


class Ours:
  """A run that goes on: `run(steps)` gives the seconds of so many steps. `abstract` has no parameters and cannot."""

  def __init__(self, config: ConfigDict, abstract: bool = False):
    self.config, self.built, self.step = config, build_lib.build(config), 0
    built, self.root = self.built, jax.random.key(config.seed)
    self.batches = pipeline.batches(built.dataset, config.train.batch_size, config.seed)
    if abstract:
      return
    teacher = built.init_teacher(jax.random.key(1))
    self.runner = parallel.make_runner("single", lambda layout: make_train_step(
        built.objective, built.distribution, built.optimizers, built.ema_decays, config.train.batch_size,
        config.states.rollout_params, layout), config.train.batch_size)
    make_state = functools.partial(init_state, built.objective, built.distribution, built.optimizers, built.ema_decays)
    self.state = self.runner.create(make_state, self.root, teacher, self.batches[0])
    self.frozen = self.runner.place_frozen({"teacher": jax.tree.map(
        lambda leaf: leaf.astype(config.teacher.dtype), teacher)})

  def __call__(self, steps: int) -> float:
    began = time.perf_counter()
    for _ in range(steps):
      self._step()
    jax.block_until_ready(self.state)
    return time.perf_counter() - began

  def _step(self):
    batch = self.runner.place_batch(self.batches[self.step])
    due = due_players(self.built.objective, self.step)
    self.state, metrics = self.runner.step(self.state, self.frozen, batch, self.root, due)
    self.step += 1
    return metrics

  def refreshes(self) -> dict[str, int]:
    """{source: rollouts that went into its replay buffer}."""
    if not hasattr(self, "state"):
      return {}
    dist, sources = self.state.dist, self.built.distribution.sources
    return {name: int(part.pushed) // states_per_rollout(self._grid_of(name), self.built.objective.grid)
            for name, part in zip(sources, dist if len(sources) > 1 else (dist,)) if isinstance(part, Replay)}

  def _grid_of(self, source: str) -> np.ndarray:
    own = self.built.objective.sampler_grid
    return self.built.parts.make_grid(self.config.states.teacher_steps) if source == "teacher" else own

  def operations(self, steps: int, before: dict[str, int]) -> float:
    """Of the last steps, by how often a network was evaluated: a gradient is two evaluations more than its loss."""
    period = self.config.objective.get("period", 1)
    due = sum((self.step - 1 - i) % period == 0 for i in range(steps))
    # LCM: student and its gradient, guided teacher, target. DMD2: an image; the critic and its gradient; when the student
    # is due its gradient, the guided teacher and the critic's estimate.
    evaluations = 6 * steps if self.config.objective.name == "lcm" else 4 * steps + 5 * due
    for source, now in self.refreshes().items():
      calls = (len(self._grid_of(source)) - 1) * (2 if source == "teacher" else 1)
      evaluations += (now - before[source]) * calls
    return evaluations * self.config.train.batch_size * self._operations_of_one()

  @functools.cache
  def _operations_of_one(self) -> float:
    """Operations of the teacher for one example, as the compiler counts them before it optimises."""
    parts = self.built.parts
    params = jax.eval_shape(self.built.init_teacher, jax.random.key(0))
    x, t = jax.ShapeDtypeStruct((1, *parts.image_shape), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
    return jax.jit(parts.teacher).lower(params, x, t, parts.cond).cost_analysis()["flops"]

  def peak(self) -> int | None:
    """Bytes, where the device counts them."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")

  def device(self) -> str:
    return jax.devices()[0].device_kind

  def look(self, steps: int) -> list[tuple]:
    """[(host batch, draws, {player: loss})] of the next steps; the random numbers are known by their names."""
    distribution, times, seen = self.built.distribution, draw_times(self.built.parts), []

    @jax.jit
    def draws(state, frozen, batch):
      key = jax.random.fold_in(self.root, state.step)
      keys = keys_lib.per_example(key, batch["lane"])
      ctx = Context(state.step, key, keys, batch, state.params["student"], frozen["teacher"],
                    self.config.train.batch_size)
      s, _ = distribution.sample(state.dist, ctx)
      found = {"x_t": s.x_t, "t": s.t, "k": s.k, **s.cond}
      if self.config.objective.name == "dmd2":
        found |= {"dm_t": times(keys, "dm_t", DM_RANGE), "dm_noise": draw_noise(keys, "dm_eps", s.x_t),
                  "critic_t": times(keys, "critic_t"), "critic_noise": draw_noise(keys, "critic_eps", s.x_t)}
      return found

    for _ in range(steps):
      batch = self.batches[self.step]
      found = jax.device_get(draws(self.state, self.frozen, self.runner.place_batch(batch)))
      metrics = jax.device_get(self._step())
      seen.append((batch, found, {name.partition("/")[0]: float(mean.total / mean.count)
                                  for name, mean in metrics.items() if name.endswith("/loss")}))
    return seen


# PyTorch's ----------------------------------------------------------------------------------


class Theirs:
  """The same run in PyTorch, of networks with random weights or of `folders` {player: as `diffusers.export` writes}."""

  def __init__(self, ours: Ours, how: str = "eager", folders: dict[str, str] | None = None, dtype: str = "bfloat16"):
    import torch

    from launch.bench import torch_large
    self._torch, self._batches, self._count = torch, ours.batches, 0
    self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    method = ours.config.objective.name
    names = ("student", "teacher", "average", {"lcm": "target", "dmd2": "critic"}[method])
    nets = {name: self._net(ours.config, name, folders).to(self._device) for name in names}
    if dtype == "bfloat16":
      nets["teacher"].to(torch.bfloat16)
    run = functools.partial(torch.compile, dynamic=False) if how == "compiled" else lambda net: net
    self.step = torch_large.Step(method, nets, options_of(ours), run, None if dtype == "float32" else torch.bfloat16)

  def _net(self, config: ConfigDict, name: str, folders):
    from diffusers import UNet2DConditionModel
    if folders:
      return UNet2DConditionModel.from_pretrained(folders.get(name, folders["student"]))
    _, about = diffusers.architecture(config.model.file)
    own = {"time_cond_proj_dim": config.model.guidance_embedding or None} if name not in ("teacher", "critic") else {}
    return UNet2DConditionModel.from_config(about["config"] | own)

  def __call__(self, steps: int) -> float:
    self._synchronise()
    began = time.perf_counter()
    for _ in range(steps):
      self.step(self._batches[self._count])
      self._count += 1
    self._synchronise()
    return time.perf_counter() - began

  def _synchronise(self):
    if self._device.type == "cuda":
      self._torch.cuda.synchronize()

  def peak(self) -> int | None:
    return self._torch.cuda.max_memory_allocated() if self._device.type == "cuda" else None

  def device(self) -> str:
    return self._torch.cuda.get_device_name() if self._device.type == "cuda" else "cpu"


def options_of(ours: Ours) -> dict:
  """`torch_large.Step`'s options from a config of ours."""
  config, built = ours.config, ours.built
  o, parts = config.objective, built.parts
  cond = {name: jnp.zeros(v.shape, v.dtype) for name, v in parts.cond.items()}
  rates = {"student": config.optimizer.learning_rate,
           "critic": config.optimizer.critic_learning_rate or config.optimizer.learning_rate}
  options = {"grid": built.objective.grid, "sampler_grid": built.objective.sampler_grid,
             "teacher_grid": parts.make_grid(config.states.teacher_steps), "alphas_cumprod": sd_alphas_cumprod(),
             "priors": {name: config.states[name] for name in built.distribution.sources},
             "refresh_every": config.states.refresh_every,
             "slots": config.states.capacity // config.train.batch_size, "rates": rates,
             "clip": config.optimizer.clip, "ema": config.train.ema[0], "null": parts.null(cond)["text"][0],
             "guidance_scale": config.teacher.guidance_scale}
  return options | ({"target_decay": o.target_decay, "huber": o.huber_c, "guidance_range": o.guidance_range,
                     "width": config.model.guidance_embedding} if o.name == "lcm" else
                    {"period": o.period, "dm_range": DM_RANGE, "cap": o.weight_cap})


if __name__ == "__main__":
  args = argparse.ArgumentParser()
  args.add_argument("out")
  args.add_argument("method", choices=METHODS)
  args.add_argument("who", choices=(OURS, *THEIRS))
  args.add_argument("--smoke", action="store_true")
  args = args.parse_args()
  pathlib.Path(args.out).write_text(json.dumps(measure(args.method, args.who, SMOKE if args.smoke else Size())))
