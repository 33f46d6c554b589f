"""Overheads and speeds, measured in one run: a rollout beside its forward passes, a DDIL step beside the
base step, how fast the demo's networks train and sample, and what it takes to measure 50,000 images.

    python -m launch.bench --out=bench/results.json

Programs that are compared run in turns (A B A B ...), since the speed of a machine drifts; a ratio is the
median over these pairs. One process, on all cores that it may use; the evaluation has one of its own.
`--only=evaluation` measures one part.
"""

import argparse
import concurrent.futures
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
  # As in the demo's workers: half the compile time. Read when jax is imported.
  os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=1"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from configs import common  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402

from ddil_jax import build as build_lib  # noqa: E402
from ddil_jax import config as config_lib  # noqa: E402
from ddil_jax import samplers  # noqa: E402
from ddil_jax.data import pipeline  # noqa: E402
from ddil_jax.data.dataset import Dataset  # noqa: E402
from ddil_jax.diffusion.rollout import prior, rollout  # noqa: E402
from ddil_jax.evaluation.sampling import balanced_labels  # noqa: E402
from ddil_jax.states.replay import Replay  # noqa: E402
from ddil_jax.states.rollouts import states_per_rollout  # noqa: E402
from ddil_jax.training import parallel  # noqa: E402
from ddil_jax.training.logging import versions  # noqa: E402
from ddil_jax.training.step import due_players, init_state, make_train_step  # noqa: E402
from ddil_jax.files import read_json, write_json  # noqa: E402

ROLLOUT_TARGET, DDIL_TARGET = 1.1, 1.25
EVALUATION_SECONDS, EVALUATION_MIB = 600, 2048  # of 50,000 images 32x32 on two cores
# A program runs once and says how many seconds that took.
Program = Callable[[], float]


class Size(NamedTuple):
  """How much is measured.

  Attributes:
    repeats: measurements of each program.
    window: training steps of one measurement: one replay period.
    inner: rollouts, forward passes and gradients of one measurement.
    rollouts: step counts K.
    methods: configs of the demo.
    images, side: how many images are measured, of how many pixels a side.
    smoke: networks as small as can be, on fake data.
  """
  repeats: int = 5
  window: int = 50
  inner: int = 5
  rollouts: tuple[int, ...] = (4, 8)
  methods: tuple[str, ...] = ("teacher", "pd", "lcm", "dmd2")
  images: int = 50_000
  side: int = 32
  smoke: bool = False


SMOKE = Size(repeats=2, window=6, inner=1, rollouts=(2,), methods=("pd",), images=64, side=4, smoke=True)


def digits(name: str, size: Size, *args: str) -> ConfigDict:
  """The config of a digits run of the demo, whose replay period is the window."""
  config = config_lib.load(f"configs/digits_{name}.py:{','.join((*args, *['smoke'] * size.smoke))}")
  config.states.refresh_every = size.window
  if size.smoke:
    config.model.channel_mult = (1,)
  return config


def alternate(programs: dict[str, Program], repeats: int,
              warm_ups: list[Program] | None = None) -> dict[str, list[float]]:
  """Seconds of each program, run in turns. Before that all are compiled at the same time, by running
  them once, or by `warm_ups`."""
  with concurrent.futures.ThreadPoolExecutor() as pool:
    list(pool.map(lambda run: run(), warm_ups or programs.values()))
  seconds = {name: [] for name in programs}
  for _ in range(repeats):
    for name, run in programs.items():
      seconds[name].append(run())
  return seconds


def timed(work: Callable[[], object]) -> float:
  """Seconds until the arrays that `work` returns are there."""
  began = time.perf_counter()
  jax.block_until_ready(work())
  return time.perf_counter() - began


def ratio(name: str, seconds: dict[str, list[float]], first: str, second: str, target: float | None,
          **about) -> dict:
  """A row: how many times the seconds of `second` those of `first` are."""
  pairs = [a / b for a, b in zip(seconds[first], seconds[second])]
  value = statistics.median(pairs)
  return {"name": name, "unit": "ratio", "value": round(value, 4), "low": round(min(pairs), 4),
          "high": round(max(pairs), 4), "target": target, "met": None if target is None else value <= target,
          "median_seconds": {n: round(statistics.median(seconds[n]), 6) for n in (first, second)}, **about}


def rate(name: str, unit: str, count: int, seconds: list[float], **about) -> dict:
  """A row: how many a second."""
  return {"name": name, "unit": unit, "value": round(count / statistics.median(seconds), 2),
          "low": round(count / max(seconds), 2), "high": round(count / min(seconds), 2), "target": None,
          "met": None, **about}


# Training -----------------------------------------------------------------------------------


class Window:
  """The first `steps` training steps of a run, always the same ones, fed as the training loop does.

  Buffers begin empty and the window is one replay period long, so every source is refreshed exactly
  once in it: when it is first drawn.
  """

  def __init__(self, config: ConfigDict, dataset: Dataset, network, steps: int, like: "Window | None" = None):
    """Players start as those of `like`: compiling their initialisation takes longer than a window."""
    self.built = build_lib.build(config, dataset)
    if like is not None:
      objective = self.built.objective._replace(init=lambda key, teacher: like.start.params)
      self.built = self.built._replace(objective=objective)
    self.batch_size, self.steps, self._config = config.train.batch_size, steps, config
    built, self._root = self.built, jax.random.key(config.seed)
    self._batches = pipeline.batches(dataset, self.batch_size, config.seed, config.data.flip)
    teacher = network if built.init_teacher else ()
    self._runner = parallel.make_runner("single", lambda layout: make_train_step(
        built.objective, built.distribution, built.optimizers, built.ema_decays, self.batch_size,
        config.states.rollout_params, layout), self.batch_size)
    self._frozen = self._runner.place_frozen({"teacher": teacher})
    self.start = init_state(built.objective, built.distribution, built.optimizers, built.ema_decays,
                            self._root, teacher, jax.tree.map(jnp.asarray, self._batches[0]))
    self.refreshes: dict[str, int] = {}

  def __call__(self) -> float:
    seconds, state = self._run(self.steps)
    self.refreshes = self._count_refreshes(state.dist)
    return seconds

  def warm_up(self) -> float:
    """The first two steps: at one of them all players learn, at the other those of period 1."""
    return self._run(2)[0]

  def _run(self, steps: int):
    # A copy, since the step frees the state that it is given.
    state = jax.block_until_ready(self._runner.place(jax.tree.map(jnp.copy, self.start)))
    began = time.perf_counter()
    for step in range(steps):
      batch = self._runner.place_batch(self._batches[step])
      due = due_players(self.built.objective, step)
      state, _ = self._runner.step(state, self._frozen, batch, self._root, due)
    jax.block_until_ready(state)
    return time.perf_counter() - began, self._runner.fetch(state)

  def _count_refreshes(self, dist) -> dict[str, int]:
    sources, objective = self.built.distribution.sources, self.built.objective
    grids = {"student": objective.sampler_grid, "dagger": objective.sampler_grid}
    if "teacher" in sources:
      grids["teacher"] = self.built.parts.make_grid(self._config.states.teacher_steps)
    parts = dist if len(sources) > 1 else (dist,)
    return {name: int(part.pushed) // states_per_rollout(grids[name], objective.grid)
            for name, part in zip(sources, parts) if isinstance(part, Replay)}


def training(dataset: Dataset, network, size: Size) -> list[dict]:
  """DDIL steps against base steps, and the steps a second of all base methods and of the teacher."""
  rows, rates = [], []
  for method in size.methods:
    base = Window(digits(method, size), dataset, network, size.window)
    windows = {"base": base}
    if method != "teacher":
      mixed = digits(method, size, "ddil")
      mixed.states.update(common.DDIL)  # also for DMD2, whose own mixture has no teacher states
      windows["ddil"] = Window(mixed, dataset, network, size.window, base)
    seconds = alternate(windows, size.repeats, [window.warm_up for window in windows.values()])
    if "ddil" in windows:
      rows.append(ratio(f"{method}: DDIL step / base step", seconds, "ddil", "base", DDIL_TARGET,
                        method=method, steps=size.window, priors=common.DDIL,
                        refreshes=windows["ddil"].refreshes, base_refreshes=base.refreshes))
    rates.append(rate(f"{method}: training, batch {base.batch_size}", "steps/s", size.window, seconds["base"],
                      method=method, batch_size=base.batch_size))
  return rows + rates


# Sampling -----------------------------------------------------------------------------------


def rollouts(dataset: Dataset, network, size: Size) -> list[dict]:
  """K-step scans of PD's DDIM and of LCM's re-noising against K forward passes, one after the other."""
  rows = []
  for method, solver in (("pd", "DDIM"), ("lcm", "re-noising")):
    if method not in size.methods:
      continue
    config = digits(method, size)
    if method == "pd":
      config.objective.num_steps = max(size.rollouts)
    built, batch = build_lib.build(config, dataset), config.train.batch_size
    forward = jax.jit(built.objective.student)
    keys = jax.random.split(jax.random.key(2), batch)
    cond = {"label": jnp.asarray(balanced_labels(batch, dataset.num_classes))}
    x_T = prior(built.parts.process, keys, jnp.zeros((batch,) + built.parts.image_shape))
    for steps in size.rollouts:
      sampler = samplers.samplers(config, built, steps)[0]
      times = [jnp.full(batch, t, jnp.float32) for t in sampler.grid[:-1]]

      @jax.jit
      def scan(params, x, keys, sampler=sampler):
        return rollout(sampler.policy(params), x, sampler.grid, cond, keys)

      def scans():
        x = x_T
        for _ in range(size.inner):
          x = scan(network, x, keys)
        return x

      def forwards():
        x = x_T
        for _ in range(size.inner):
          for t in times:
            x = forward(network, x, t, cond)
        return x

      programs = {"scan": lambda: timed(scans), "forward passes": lambda: timed(forwards)}
      seconds = alternate(programs, size.repeats)
      rows.append(ratio(f"{solver} rollout of {steps} steps / {steps} forward passes", seconds, "scan",
                        "forward passes", ROLLOUT_TARGET, steps=steps, batch_size=batch, calls=size.inner))
  return rows


def sampling(dataset: Dataset, network, size: Size) -> list[dict]:
  """Images a second of every method's own sampler, at the demo's evaluation batch."""
  rows = []
  for method in size.methods:
    config = digits(method, size)
    built, batch = build_lib.build(config, dataset), config.eval.batch_size
    sampler = samplers.samplers(config, built)[0]
    keys = jax.random.split(jax.random.key(2), batch)
    cond = {"label": jnp.asarray(balanced_labels(batch, dataset.num_classes))}
    sample = jax.jit(sampler.sample)
    run = lambda: timed(lambda: sample(network, keys, cond))  # noqa: E731
    rows.append(rate(f"{method}: sampling in {sampler.steps} steps, batch {batch}", "samples/s", batch,
                     alternate({"sample": run}, size.repeats)["sample"], method=method, steps=sampler.steps,
                     batch_size=batch))
  return rows


def gradient_in_scan(dataset: Dataset, network, size: Size, count: int = 20) -> list[dict]:
  """A curiosity: steps along the gradient of one 3x3 convolution, in a `lax.scan` and called one by one."""
  config = digits("teacher", size)
  height, width, _ = dataset.images.shape[1:]
  channels, batch = config.model.channels, config.train.batch_size
  x = jax.random.normal(jax.random.key(0), (batch, height, width, channels))
  start = jax.random.normal(jax.random.key(1), (3, 3, channels, channels)) / channels

  def descend(kernel, _=None):
    loss = lambda k: jnp.mean(jax.lax.conv_general_dilated(  # noqa: E731
        x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")) ** 2)
    return kernel - 1e-3 * jax.grad(loss)(kernel), None

  scan, once = jax.jit(lambda k: jax.lax.scan(descend, k, None, length=count)[0]), jax.jit(descend)

  def one_by_one():
    kernel = start
    for _ in range(count):
      kernel, _ = once(kernel)
    return kernel

  programs = {"scan": lambda: timed(lambda: scan(start)), "calls": lambda: timed(one_by_one)}
  return [ratio("gradient of a convolution in a lax.scan / by calls", alternate(programs, size.repeats), "scan",
                "calls", None, steps=count, batch_size=batch)]


# Evaluation ---------------------------------------------------------------------------------


def evaluation(dataset: Dataset, network, size: Size) -> list[dict]:
  """`ddil evaluate` of images against as many others, both in files, with all default metrics: wall time and peak
  memory of a process that has nothing cached, so that it trains the small classifier too."""
  del dataset, network
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    kinds = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3)).repeat(size.side // 4, 1).repeat(size.side // 4, 2)
    labels = np.arange(size.images) % 10
    for seed, name in enumerate(("images", "reference")):
      noise = np.random.default_rng([1, seed]).integers(0, 100, (size.images, size.side, size.side, 3), np.uint8)
      noise += (0.6 * kinds).astype(np.uint8)[labels]
      np.savez(folder / f"{name}.npz", images=noise, labels=labels)
    del noise
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "ddil_jax", "evaluate", f"--images={folder}/images.npz",
                    f"--reference={folder}/reference.npz", f"--data_dir={folder}", f"--out={folder}/out.json"],
                   check=True, stdout=subprocess.DEVNULL)
    seconds, result = time.perf_counter() - began, read_json(folder / "out.json")
  what = f"evaluation of {size.images:,} images {size.side}x{size.side}"
  return [once(what, "s", round(seconds, 1), EVALUATION_SECONDS, metrics=len(result["metrics"])),
          once(f"{what}, peak memory", "MiB", result["peak_memory_mib"], EVALUATION_MIB)]


def once(name: str, unit: str, value: float, target: float, **about) -> dict:
  """A row that was measured once."""
  return {"name": name, "unit": unit, "value": value, "low": value, "high": value, "target": target,
          "met": value <= target, **about}


# Output -------------------------------------------------------------------------------------


def table(rows: list[dict]) -> str:
  """The rows as text: value, range over the repeats, target and whether it was met."""
  lines = [f"{'':58}{'median':>10}  {'lowest .. highest':>21}  target"]
  for row in rows:
    digits_ = 3 if row["unit"] == "ratio" else 1
    spread = f"{row['low']:.{digits_}f} .. {row['high']:.{digits_}f}"
    goal = "" if row["target"] is None else f"at most {row['target']:g}: {'met' if row['met'] else 'MISSED'}"
    unit = "" if row["unit"] == "ratio" else row["unit"]
    lines.append(f"{row['name']:58}{row['value']:10.{digits_}f}  {spread:>21}  {goal or unit}")
  return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
  args = argparse.ArgumentParser(prog="launch.bench", description="Measures overheads and speeds.")
  args.add_argument("--out", default="bench/results.json")
  args.add_argument("--data_dir", default="",
                    help="where data sets are prepared; default $DDIL_DATA, else data/")
  args.add_argument("--smoke", action="store_true", help="a few steps of one method on fake data")
  parts = {part.__name__: part for part in (rollouts, training, sampling, gradient_in_scan, evaluation)}
  args.add_argument("--only", choices=parts, help="measure one part")
  args = args.parse_args(argv)
  size = SMOKE if args.smoke else Size()
  began, load = time.monotonic(), os.getloadavg()[0]
  config = digits("pd", size)
  config.data.data_dir = args.data_dir
  dataset = build_lib.load_data(config, "train")

  # The network of the demo's teacher and students; untrained, since time does not depend on its values.
  network = build_lib.build(config, dataset).init_teacher(jax.random.key(1))
  rows = []
  for measure in [parts[args.only]] if args.only else parts.values():
    rows += measure(dataset, network, size)
    print(f"{measure.__name__}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  result = {
      "machine": f"{cores} CPU cores, {jax.device_count()} device(s) of kind {jax.devices()[0].device_kind}",
      "load_average": {"before": round(load, 2), "after": round(os.getloadavg()[0], 2)},
      "versions": versions(), "seconds": round(time.monotonic() - began, 1), "repeats": size.repeats, "rows": rows}
  out = pathlib.Path(args.out)
  write_json(out, result)
  print(table(rows))
  print(f"{result['machine']}; load average {load:.1f} before; medians of {size.repeats}; written to {out}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
